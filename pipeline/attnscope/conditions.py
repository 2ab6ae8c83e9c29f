"""Conditions: named changes of a model's inputs, under which extraction runs it again and stores what it gives.

A condition is data. It says which image and text tokens are taken from the model, what stands in their place, and
what is asked of the model meanwhile. Equal conditions have equal names, so that a run holds each of them once.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from attnscope.samples import Region

ImagePart = Literal["intact", "all", "object", "ranked"]
TextPart = Literal["intact", "all", "phrase", "ranked", "negative", "given"]
Operator = Literal["mean", "zero", "noise", "other", "drop"]
TextOperator = Literal["mask", "drop"]
Asked = Literal["target", "phrase", "object", "embedding"]
RANDOM = "random"


@dataclass(frozen=True)
class Ranking:
    """An order of tokens: a variable (sample, token) that an analyser gives, or 'random'.

    `options` are those of the analyser, as JSON; `at` picks one entry of each further dimension of the variable; of
    several streams, the one named `stream`, or the first that holds tokens of the wanted kind.
    """

    analyser: str
    variable: str = ""
    options: str = "{}"
    at: tuple[tuple[str, str | int], ...] = ()
    stream: str | None = None

    @classmethod
    def by(
        cls, analyser: str, variable: str, options: Mapping[str, object] | None = None, stream: str | None = None,
        **at: str | int,
    ) -> "Ranking":  # fmt: skip
        """The ranking by a variable of an analyser with these options."""
        return cls(
            analyser, variable, json.dumps(dict(options or {}), sort_keys=True), tuple(sorted(at.items())), stream
        )

    @classmethod
    def random(cls, seed: int = 0) -> "Ranking":
        """A random order, another one for each sample."""
        return cls(RANDOM, options=json.dumps({"seed": seed}))

    @property
    def name(self) -> str:
        """The analyser and variable, with a digest of the options where there are any."""
        rest = [self.options, *map(str, self.at), self.stream or ""]
        plain = self.options == "{}" and not self.at and self.stream is None
        mark = "" if plain else "#" + hashlib.sha256("|".join(rest).encode()).hexdigest()[:8]
        return ".".join(part for part in (self.analyser, self.variable) if part) + mark


@dataclass(frozen=True)
class Condition:
    """One change of the inputs, and what is asked of the model under it.

    Parameters
    ----------
    image, text
        What is taken away: nothing, 'all' content tokens, the image tokens of the 'object' that a phrase names, the
        'phrase' itself, or the 'ranked' tokens; 'negative' puts the sample's `targets['negative']` in the text's place,
        'given' the text `given`, the same for every sample.
    operator
        What stands in the place of image tokens: the data's 'mean', 'zero' (of the model's input), 'noise' of the
        data's mean and spread, the same place of an 'other' sample; 'drop' hides them from all attention.
    text_operator
        'mask' puts the tokenizer's mask token in the place of words, 'drop' takes them out of the text.
    threshold
        An image token belongs to an object when their overlap is above this; see `attnscope.ablation.overlaps`.
    ranking, fraction, first
        For 'ranked': the `fraction` of the content tokens that the ranking puts first, from its 'most' or its 'least'.
    ask
        'target': the run's target score. 'phrase': the phrase is masked under the condition as well, and the loss is
        the cross entropy of its words (of a model that writes from left to right: of the words as they stand).
        'object': the object's image tokens are masked as well, and the loss is the divergence of what the model says
        of one of them from what it says when nothing is masked. 'embedding': the vectors of image and text of a dual
        encoder are stored as well.
    seed
        Of noise, of the choice of another sample, and of ties in a ranking.
    """

    image: ImagePart = "intact"
    text: TextPart = "intact"
    operator: Operator = "mean"
    text_operator: TextOperator = "mask"
    threshold: float = 0.5
    ranking: Ranking | None = None
    fraction: float = 0.0
    first: Literal["most", "least"] = "most"
    ask: Asked = "target"
    seed: int = 0
    given: str = ""

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"a condition's {name} is one of {', '.join(allowed)}, got {str(getattr(self, name))!r}"
                )
        if not 0 <= self.fraction <= 1 or not 0 <= self.threshold < 1:
            raise ValueError(
                f"fraction lies in [0, 1] and threshold in [0, 1), got {self.fraction} and {self.threshold}"
            )
        if ("ranked" in (self.image, self.text)) != (self.ranking is not None):
            raise ValueError("a condition on 'ranked' tokens needs a ranking, and no other takes one")
        if (self.text == "given") != bool(self.given):
            raise ValueError("a condition with a 'given' text needs that text, and no other takes one")
        # What says nothing is set to its default, so that equal meanings are equal conditions.
        for name, default in self._silent():
            object.__setattr__(self, name, default)

    def _silent(self) -> Iterable[tuple[str, object]]:
        defaults = {f.name: f.default for f in fields(self)}
        takes_image = self.image != "intact" or self.ask == "object"
        speaking = {
            "operator": takes_image,
            "text_operator": self.text not in ("intact", "negative", "given"),
            "threshold": self.image == "object" or self.ask == "object",
            "fraction": self.ranking is not None,
            "first": self.ranking is not None,
            "seed": self.ranking is not None or (takes_image and self.operator in ("noise", "other")),
        }
        return [(name, defaults[name]) for name, speaks in speaking.items() if not speaks]

    @property
    def by_phrase(self) -> bool:
        """Whether the condition is one for each phrase of a sample rather than one for the sample."""
        return self.image == "object" or self.text == "phrase" or self.ask in ("phrase", "object")

    @property
    def name(self) -> str:
        """What the condition is, in one line; equal for equal conditions only."""
        parts = []
        if self.ask != "target":
            parts.append(f"ask {self.ask}")
        above = f" above {self.threshold:g}"
        if self.image != "intact" or self.ask == "object":
            what = self._removed() if self.image == "ranked" else self.image
            wide = above if self.image == "object" or self.ask == "object" else ""
            parts.append(f"image -{what} by {self.operator}{wide}")
        if self.text != "intact":
            what = self._removed() if self.text == "ranked" else self.text
            how = "" if self.text in ("negative", "given") else f" by {self.text_operator}"
            parts.append(f"text {self.given!r}" if self.given else f"text -{what}{how}")
        if self.seed:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts) or "intact"

    def _removed(self) -> str:
        assert self.ranking is not None
        return f"{self.first} {self.fraction:g} of {self.ranking.name}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = json.loads(json.dumps(asdict(self)))
        # Runs of before there were given texts go by digests of conditions without.
        return plain if self.given else {name: value for name, value in plain.items() if name != "given"}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Condition":
        """The condition that `to_json` gave."""
        ranking = plain.get("ranking")
        if ranking is not None:
            ranking = Ranking(**{**ranking, "at": tuple((k, v) for k, v in ranking["at"])})
        return cls(**{**plain, "ranking": ranking})


_ALLOWED = {
    "image": get_args(ImagePart),
    "text": get_args(TextPart),
    "operator": get_args(Operator),
    "text_operator": get_args(TextOperator),
    "first": ("most", "least"),
    "ask": get_args(Asked),
}

INTACT = Condition()


@dataclass(frozen=True)
class Phrase:
    """A phrase of a sample with all the boxes that it names."""

    text: str
    span: tuple[int, int] | None
    boxes: tuple[tuple[float, float, float, float], ...]


def phrases_of(regions: Sequence[Region] | str) -> list[Phrase]:
    """The phrases of a sample in order: regions of one phrase and span are one. Regions may be the run's own JSON."""
    if isinstance(regions, str):
        listed = json.loads(regions or "[]")
        regions = [
            Region(r.get("phrase"), r["box"] and tuple(r["box"]), r["span"] and tuple(r["span"])) for r in listed
        ]
    found: dict[tuple[str, tuple[int, int] | None], Phrase] = {}
    for region in regions:
        if region.phrase is None and region.span is None:
            continue
        key = (region.phrase or "", region.span)
        known = found.get(key, Phrase(region.phrase or "", region.span, ()))
        found[key] = replace(known, boxes=known.boxes + (() if region.box is None else (region.box,)))
    return list(found.values())


def distinct(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    """The conditions in order, each once."""
    return tuple(dict.fromkeys(conditions))


def distinct_rankings(conditions: Iterable[Condition]) -> list[Ranking]:
    """The rankings that conditions go by, each once."""
    return list(dict.fromkeys(c.ranking for c in conditions if c.ranking is not None))


def set_name(conditions: Sequence[Condition]) -> str:
    """The name under which outputs of these conditions are stored together."""
    plain = json.dumps([c.to_json() for c in conditions], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]
