"""Faithfulness of token rankings: what becomes of the model's answer when the tokens that are ranked first are gone.

1. Extraction runs the model with growing fractions of its tokens taken away, from the one that a ranking puts first on
   (positive perturbation), and from the one that it puts last on (negative perturbation); a random order is the floor.
2. A faithful ranking lets the answer fall fast when its first tokens go, and keeps it long when its last ones do: a
   small area under the positive curve, a large one under the negative.
3. Areas are taken sample by sample, so that methods are compared in pairs on the same samples.

Positive and negative perturbation: Chefer, H., Gur, S. and Wolf, L., "Generic Attention-model Explainability for
Interpreting Bi-Modal and Encoder-Decoder Transformers", ICCV 2021, section 4. As there, the area is that under the
trapezoids over the fractions, the intact input included; here it is divided by the range of the fractions, so that it
is a mean height of the curve.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, hookimpl
from attnscope.conditions import INTACT, Condition, Ranking
from attnscope.report import Citation, Element, Heading, LineChart, Note, Paragraph, Series, Table
from attnscope.statistics import bootstrap_sums, interval_of_sums, mean_height

Modality: TypeAlias = Literal["image", "text"]
ImageOperator: TypeAlias = Literal["drop", "mean", "zero", "noise", "other"]

_EXTRACTED = 1
_FLOOR = "random"
_ENDS = ("most", "least")
_DRAWS = 1000
_MEASURES = {
    "score": ("the target score of what the model says of the intact input", "1"),
    "correct": ("whether the model still says what it says of the intact input", "1"),
}


@dataclass(frozen=True)
class Faithfulness:
    """Perturbation curves of token rankings, their areas, and the methods' differences on the same samples.

    `rankings` are variables of `analyser` (with `ranking_options`), beside which a random order is run; `modalities`
    whose tokens go; `image_operators` and `text_operators` how they go: dropped, or something in their place (see
    `attnscope.conditions.Condition`); `fractions` of the content tokens, from 0 on; `stream` where a ranking has
    several for a modality.
    """

    name: ClassVar[str] = "faithfulness"
    title: ClassVar[str] = "Faithfulness of rankings"
    rankings: tuple[str, ...] = ("relevance", "rollout", "attention")
    analyser: str = "relevance"
    ranking_options: Mapping[str, object] = field(default_factory=dict)
    modalities: tuple[Modality, ...] = ("image",)
    image_operators: tuple[ImageOperator, ...] = ("drop",)
    text_operators: tuple[Literal["drop", "mask"], ...] = ("drop",)
    fractions: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    stream: str | None = None
    target: int | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ordered = list(self.fractions) == sorted(set(self.fractions))
        if not (ordered and len(self.fractions) > 1 and self.fractions[0] == 0 and self.fractions[-1] <= 1):
            raise ValueError(f"fractions go up from 0 to at most 1, got {', '.join(map(str, self.fractions))}")
        if not self.rankings or not self.modalities:
            raise ValueError("faithfulness needs a ranking and a modality at least")

    def requires(self) -> ExtractSpec:
        conditions = [c for curve in self._curves().values() for c in curve]
        return ExtractSpec(frozenset({"score"}), target=self.target, conditions=tuple(dict.fromkeys(conditions)))

    def _curves(self) -> dict[tuple[str, str, str], list[Condition]]:
        """The conditions of each curve by what is taken ('image by drop'), ranking, and end, one for each fraction."""
        found = {}
        for (taken, fields), ranking, end in itertools.product(self._taken(), (*self.rankings, _FLOOR), _ENDS):
            order = self._ranking(ranking)
            found[taken, ranking, end] = [_condition(fields, order, fraction, end) for fraction in self.fractions]
        return found

    def _taken(self) -> list[tuple[str, dict[str, str]]]:
        listed: list[tuple[str, str, dict[str, str]]]
        listed = [("image", f"image by {o}", {"operator": str(o)}) for o in self.image_operators]
        listed += [("text", f"text by {o}", {"text_operator": str(o)}) for o in self.text_operators]
        return [(name, {"part": part, **fields}) for part, name, fields in listed if part in self.modalities]

    def _ranking(self, name: str) -> Ranking:
        if name == _FLOOR:
            return Ranking.random(self.seed)
        options = dict(self.ranking_options)
        if self.target is not None:
            options.setdefault("target", self.target)
        return Ranking.by(self.analyser, name, options, self.stream)

    def analyse(self, run: Run) -> xr.Dataset:
        """Curves (taken, ranking, end, fraction) with intervals, areas by sample, and differences of the areas."""
        curves = self._curves()
        conditions = list(dict.fromkeys(c for curve in curves.values() for c in curve))
        outputs = run.outputs_under(conditions)
        place = {c: at for at, c in enumerate(conditions)}
        coordinates = {
            "taken": np.array([name for name, _ in self._taken()], object),
            "ranking": np.array([*self.rankings, _FLOOR], object),
            "end": np.array(_ENDS, object),
            "fraction": np.array(self.fractions),
        }
        shape = [len(v) for v in coordinates.values()]
        at = np.array([[place[c] for c in curve] for curve in curves.values()]).reshape(shape)
        extracted = run.status == _EXTRACTED
        removed = np.where(extracted, outputs["changed"].values[at], -1)  # (..., fraction, sample)
        content = outputs["content"].values[at].max(axis=(1, 2, 3))
        applies = (removed >= 0).all(axis=(1, 2, 3)) & (content > 0)  # (taken, sample)
        found: dict[str, tuple[object, ...]] = {
            "removed": (
                ("taken", "fraction"),
                _mean(removed[:, 0, 0], applies[:, None]),
                "mean number of tokens taken",
            ),
            "content": ("taken", _mean(content, applies), "mean number of content tokens"),
            "skipped": ("taken", (extracted & ~applies).sum(-1), "number of samples that could not be perturbed"),
        }
        for measure, (meaning, unit) in _MEASURES.items():
            values = np.where(applies[:, None, None, None], outputs[measure].values[at].astype(float), np.nan)
            if np.isfinite(values).any():
                found |= self._described(measure, meaning, unit, values)
        variables = {
            name: xr.Variable(dims, values, {"long_name": str(words), "units": str(rest[0]) if rest else "1"})
            for name, (dims, values, words, *rest) in found.items()
        }
        pairs = [f"{a} - {b}" for a, b in self._pairs()]
        sample = np.array(run.sample_ids, object)
        result = xr.Dataset(variables, {**coordinates, "sample": sample, "pair": np.array(pairs, object)})
        target = run.spec.target if run.spec.target is not None else run.attrs.get("target", "")
        return result.assign_attrs(target=str(target), interval="95 % bootstrap over samples")

    def _pairs(self) -> list[tuple[str, str]]:
        return list(itertools.combinations([*self.rankings, _FLOOR], 2))

    def _described(self, measure: str, meaning: str, unit: str, values: np.ndarray) -> dict[str, tuple[object, ...]]:
        """Curve, area and paired differences of one measure (taken, ranking, end, fraction, sample)."""
        areas = mean_height(np.moveaxis(values, -1, -2), self.fractions)
        names = [*self.rankings, _FLOOR]
        differences = np.stack([areas[:, names.index(a)] - areas[:, names.index(b)] for a, b in self._pairs()], 1)
        found: dict[str, tuple[object, ...]] = {}
        for name, dims, part, words in (
            (measure, ("taken", "ranking", "end", "fraction"), values, meaning),
            (f"{measure}_area", ("taken", "ranking", "end"), areas, f"area under the curve of: {meaning}"),
            (
                f"{measure}_difference",
                ("taken", "pair", "end"),
                differences,
                f"paired difference of areas of: {meaning}",
            ),
        ):
            mean, low, high = self._interval(part)
            found[name] = (dims, mean, words, unit)
            found[f"{name}_low"] = (dims, low, f"lower end of the 95 % interval of: {words}", unit)
            found[f"{name}_high"] = (dims, high, f"upper end of the 95 % interval of: {words}", unit)
        each = f"area under each sample's curve of: {meaning}"
        return found | {f"{measure}_areas": (("taken", "ranking", "end", "sample"), areas, each, unit)}

    def _interval(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        by_sample = np.moveaxis(values, -1, 0)
        sums = bootstrap_sums(by_sample, np.arange(len(by_sample)), draws=_DRAWS, seed=self.seed)
        return interval_of_sums(sums)

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        yield Paragraph(
            "Does the model's answer rest on the tokens that a method ranks first? They are taken away, a growing share"
            " of them: from the first on, where the answer should fall fast, and from the last on, where it should"
            " stay. A random order is what any ranking has to beat."
        )
        yield Citation(
            "Chefer, Gur and Wolf, Generic Attention-model Explainability, ICCV 2021, section 4: positive and negative"
            " perturbation.",
            "https://arxiv.org/abs/2103.15679",
        )
        for taken in result["taken"].values:
            part = result.sel(taken=taken)
            yield Heading(f"{taken}: {float(part['content']):.3g} content tokens on average")
            for measure, (meaning, _) in _MEASURES.items():
                if measure in part:
                    yield from _charts(part, measure, meaning)
            skipped = int(part["skipped"])
            if skipped:
                yield Note(f"{skipped} samples have no such tokens, or no ranking of them; they are left out.")
        yield Note(
            f"Target: {result.attrs.get('target', '')}. The score of a class or word is that of the one the model says"
            " of the intact input. Intervals: 95 % bootstrap over samples, differences paired by sample."
        )


def _condition(fields: Mapping[str, str], ranking: Ranking, fraction: float, end: str) -> Condition:
    """Nothing and all gone are the same for every ranking, and are run once."""
    part = fields["part"]
    how = {name: value for name, value in fields.items() if name != "part"}
    if fraction == 0:
        return INTACT
    if fraction == 1:
        return Condition(**{part: "all"}, **how)  # type: ignore[arg-type]
    return Condition(**{part: "ranked"}, **how, ranking=ranking, fraction=fraction, first=end, seed=0)  # type: ignore[arg-type]


def _mean(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Mean over the chosen samples, along the last axis; NaN for none."""
    count = np.broadcast_to(chosen, values.shape).sum(-1)
    total = np.where(chosen, values, 0).sum(-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _charts(part: xr.Dataset, measure: str, meaning: str) -> Iterator[Element]:
    fractions = part["fraction"].values
    for end, words in (
        ("most", "first-ranked tokens gone: lower is better"),
        ("least", "last-ranked tokens gone: higher is better"),
    ):
        lines = [
            Series(
                str(r), *(part[f"{measure}{suffix}"].sel(ranking=r, end=end).values for suffix in ("", "_low", "_high"))
            )
            for r in part["ranking"].values
        ]
        counts = ", ".join(f"{f:g}: {n:.3g}" for f, n in zip(fractions, part["removed"].values, strict=True))
        caption = f"{words}. Bands: 95 % interval over samples. Tokens taken on average at each fraction, {counts}."
        yield LineChart(fractions, lines, "fraction of the tokens taken away", measure, caption)
    rows = [
        [f"{r}, {end} relevant first", *(_told(part.sel(fraction=f), measure, ranking=r, end=end) for f in fractions)]
        for end, r in itertools.product(_ENDS, part["ranking"].values)
    ]
    yield Table(["step", *(f"{f:g}" for f in fractions)], rows, f"At each fraction of the tokens taken: {meaning}.")
    rows = [
        [str(r), *(_told(part, f"{measure}_area", ranking=r, end=e) for e in _ENDS)] for r in part["ranking"].values
    ]
    yield Table(["ranking", "area, first gone", "area, last gone"], rows, f"Area under the curves of {meaning}.")
    rows = [
        [str(p), *(_told(part, f"{measure}_difference", pair=p, end=e) for e in _ENDS)] for p in part["pair"].values
    ]
    yield Table(["difference", "first gone", "last gone"], rows, "Differences of the areas, paired by sample.")


def _told(part: xr.Dataset, name: str, **where: object) -> str:
    mean, low, high = (float(part[f"{name}{suffix}"].sel(where)) for suffix in ("", "_low", "_high"))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(Faithfulness)
