"""The stored schema: every quantity that a run may hold, and what to extract.

A run is a Zarr hierarchy. `QUANTITIES` is the one table of its arrays; everything that writes, reads or documents
them goes by it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from attnscope.conditions import Condition, distinct

SCHEMA_VERSION = 1

T = TypeVar("T")
Group = Literal["samples", "stream", "site", "outputs", "weights"]


@dataclass(frozen=True)
class Quantity:
    """One array of the schema: where it lies, its dimensions, its stored type, its unit and its meaning."""

    name: str
    group: Group
    dims: tuple[str, ...]
    dtype: str
    units: str
    meaning: str
    fill: float | int | str = 0


_SITE = ("sample", "layer", "head", "query_token", "key_token")
_ANSWER = ("sample", "layer", "answer", "query_token", "key_token")
_NAN = float("nan")

QUANTITIES = (
    Quantity("id", "samples", ("sample",), "string", "", "name of the sample, unique in the run", ""),
    Quantity("text", "samples", ("sample",), "string", "", "text of the sample", ""),
    Quantity("regions", "samples", ("sample",), "string", "",
             "JSON list of phrase, box (pixels), span (characters), mask (run lengths down the columns), label", ""),
    Quantity("image_digest", "samples", ("sample",), "string", "", "SHA-256 of the encoded image", ""),
    Quantity("thumbnail", "samples", ("sample", "image_row", "image_column", "colour"), "uint8", "",
             "the image as the model saw it, red green blue"),
    Quantity("reason", "samples", ("sample",), "string", "", "why the sample was left out", ""),
    Quantity("status", "samples", ("sample",), "uint8", "", "0 missing, 1 extracted, 2 left out; written last"),
    Quantity("token_text", "stream", ("sample", "token"), "string", "", "the token's string", ""),
    Quantity("kind", "stream", ("sample", "token"), "int8", "", "what the token is, see flag_meanings"),
    Quantity("row", "stream", ("sample", "token"), "int16", "", "row on the patch grid, -1 for none", -1),
    Quantity("column", "stream", ("sample", "token"), "int16", "", "column on the patch grid, -1 for none", -1),
    Quantity("region_share", "stream", ("sample", "region", "token"), "float32", "1",
             "the share of a token that lies in a region of its sample; NaN where that isn't known", _NAN),
    Quantity("box", "stream", ("sample", "token", "side"), "float32", "pixel",
             "left, top, right and bottom of a detector's region in the image; NaN where none is known", _NAN),
    Quantity("attention", "site", _SITE, "float16", "1", "attention weights after softmax", _NAN),
    Quantity("attention_values", "site", ("layer", "head", "element"), "float16", "1",
             "attention weights of ragged samples, without their padding, end to end", _NAN),
    Quantity("attention_offset", "site", ("sample",), "int64", "",
             "the element of attention_values that a sample's weights begin at; -1 for none", -1),
    Quantity("attention_mean", "site", ("sample", "layer", "query_token", "key_token"), "float32", "1",
             "mean of the attention weights over heads", _NAN),
    Quantity("attention_grad", "site", _SITE, "float32", "1",
             "derivative of the score by the attention weights", _NAN),
    Quantity("attention_relevance", "site", ("sample", "layer", "query_token", "key_token"), "float32", "1",
             "head mean of the positive part of gradient times attention (Chefer et al., ICCV 2021, eq. 5)", _NAN),
    Quantity("attention_gradcam", "site", ("sample", "layer", "query_token", "key_token"), "float32", "1",
             "head mean of the attention times the sum of each head's gradient (Grad-CAM on the attention)", _NAN),
    Quantity("attention_gradient", "site", ("sample", "layer", "query_token", "key_token"), "float32", "1",
             "head mean of gradient times attention, of either sign", _NAN),
    Quantity("residual_norm", "site", ("sample", "layer", "query_token"), "float32", "1",
             "weight of the residual beside the attention's output, by their norms, from 0 to 2", _NAN),
    Quantity("residual_gradient", "site", ("sample", "layer", "query_token"), "float32", "1",
             "weight of the residual beside the attention's output, by gradient times value, from 0 to 2", _NAN),
    Quantity("answer_relevance", "site", _ANSWER, "float32", "1",
             "attention_relevance for the logit of each token that the model wrote", _NAN),
    Quantity("answer_gradcam", "site", _ANSWER, "float32", "1",
             "attention_gradcam for the logit of each token that the model wrote", _NAN),
    Quantity("answer_gradient", "site", _ANSWER, "float32", "1",
             "attention_gradient for the logit of each token that the model wrote", _NAN),
    Quantity("answer_residual", "site", ("sample", "layer", "answer", "query_token"), "float32", "1",
             "residual_gradient for the logit of each token that the model wrote", _NAN),
    Quantity("query", "site", ("sample", "layer", "head", "query_token", "channel"), "float32", "1",
             "query as the kernel received it: after rotary position and norm", _NAN),
    Quantity("key", "site", ("sample", "layer", "kv_head", "key_token", "channel"), "float32", "1",
             "key as the kernel received it, one per key head", _NAN),
    Quantity("value", "site", ("sample", "layer", "kv_head", "key_token", "value_channel"), "float32", "1",
             "value as the kernel received it, one per key head", _NAN),
    Quantity("log_sum_exp", "site", ("sample", "layer", "head", "query_token"), "float32", "nat",
             "logarithm of the sum of the exponentiated scores of a row", _NAN),
    Quantity("query_valid", "site", ("sample", "layer", "query_token"), "bool", "1",
             "whether the query row has a key that it may attend to", False),
    Quantity("key_valid", "site", ("sample", "layer", "key_token"), "bool", "1",
             "whether the key may be attended to at all", False),
    Quantity("causal", "site", ("sample", "layer"), "bool", "1",
             "whether a query may attend to no later key", False),
    Quantity("mask", "site", ("sample", "layer", "query_token", "key_token"), "bool", "1",
             "which keys a query may attend to, where the other rules don't say it all", True),
    Quantity("entropy", "site", ("sample", "layer", "head", "query_token"), "float32", "nat",
             "entropy of a query's attention weights", _NAN),
    Quantity("top_key", "site", ("sample", "layer", "head", "query_token", "rank"), "int32", "",
             "the keys with the largest attention weights of a query, largest first; -1 for none", -1),
    Quantity("top_value", "site", ("sample", "layer", "head", "query_token", "rank"), "float16", "1",
             "the attention weights of these keys", _NAN),
    Quantity("kind_mass", "site", ("sample", "layer", "head", "query_kind", "key_kind"), "float32", "1",
             "attention that all keys of a kind get together, mean over the queries of a kind", _NAN),
    Quantity("kind_mass_max", "site", ("sample", "layer", "head", "query_kind", "key_kind"), "float32", "1",
             "attention that all keys of a kind get together, most that a query of a kind gives", _NAN),
    Quantity("kind_max", "site", ("sample", "layer", "head", "query_kind", "key_kind"), "float32", "1",
             "largest attention weight from a query of a kind to a key of a kind", _NAN),
    Quantity("attention_of_code", "site", ("code",), "float32", "1",
             "the attention weight that each stored code stands for (encoding compact)", _NAN),
    Quantity("score", "outputs", ("condition", "sample"), "float32", "1", "the target score of the model", _NAN),
    Quantity("query", "weights", ("layer", "head", "channel", "feature"), "float32", "1",
             "rows of the query projection of each head, before any rotary position", _NAN),
    Quantity("key", "weights", ("layer", "kv_head", "channel", "feature"), "float32", "1",
             "rows of the key projection of each key head, before any rotary position", _NAN),
    Quantity("norm_gain", "weights", ("layer", "feature"), "float32", "1",
             "gain of the norm that the projections' input comes from", _NAN),
    Quantity("query_bias", "weights", ("layer", "head", "channel"), "float32", "1",
             "bias of the query projection; 0 where there is none", _NAN),
    Quantity("key_bias", "weights", ("layer", "kv_head", "channel"), "float32", "1",
             "bias of the key projection; 0 where there is none", _NAN),
)  # fmt: skip

SITE_QUANTITIES = {q.name: q for q in QUANTITIES if q.group == "site" and {"sample", "element"} & set(q.dims)}
ANSWERS = {
    "answer_relevance": "attention_relevance",
    "answer_gradcam": "attention_gradcam",
    "answer_gradient": "attention_gradient",
    "answer_residual": "residual_gradient",
}
"""What is recorded for the logit of each written token by itself, and the quantity that it is of a single score."""
RESIDUALS = frozenset({"residual_norm", "residual_gradient", "answer_residual"})
"""How much of each query goes around the attention; found in the forward that gradients are taken of."""
SCORE_GRADIENTS = frozenset({"residual_norm", "residual_gradient", "attention_grad", *ANSWERS.values()})
"""What is recorded by the derivative of the score itself."""
GRADIENT_QUANTITIES = SCORE_GRADIENTS | set(ANSWERS)
DERIVED_FROM = {"attention_mean": "attention", "attention_relevance": "attention_grad"}
"""Reductions, and the full array that makes each of them needless to store (with `attention` for the second)."""
RULES = frozenset({"query_valid", "key_valid", "causal", "mask"})
"""Which query may attend to which key; recorded with whatever needs them, never asked for by name."""
TENSORS = ("query", "key", "value")
"""What the kernel received, stored in the model's own precision."""
FACTORS = frozenset({"query", "key", "log_sum_exp"})
"""What attention is computed again from where it is stored in factored form."""
RAGGED = frozenset({"attention_values", "attention_offset"})
"""What attention is laid out again from where samples are stored end to end."""
SUMMARIES = frozenset({"entropy", "top_key", "top_value", "kind_mass", "kind_mass_max", "kind_max"})
"""What answers questions over many samples without reading the attention; of the weights as they are stored."""
RANKS = 8
"""How many keys `top_key` and `top_value` have for each query, at most."""
EXTRACTABLE = frozenset(SITE_QUANTITIES) - RULES - RAGGED | {"weights", "score"}
ENCODINGS = ("float16", "exact", "compact")
"""How dense attention is stored: half precision, float32, or codes of its square root in 256 steps."""
FORMS = ("auto", "dense", "factored", "ragged")
"""How attention is stored: itself, as query and key, or itself without padding; 'auto' is what takes least."""


def quantity(group: Group, name: str) -> Quantity:
    """The row of the table; KeyError when there is none."""
    for row in QUANTITIES:
        if row.group == group and row.name == name:
            return row
    raise KeyError(f"the schema has no quantity {name!r} in group {group!r}")


@dataclass(frozen=True)
class ExtractSpec:
    """What to record: quantities, the sites and layers that they are wanted for (None: all), and the target.

    `target` names the scalar that gradients and scores are taken of: a class number, 'predicted', 'similarity',
    'cls_norm' or another name that the model's family knows; None is the family's default. `summaries`: with the
    attention, record what answers questions over many samples (`SUMMARIES`); on a CPU extraction then takes 1.3 to 1.8
    times as long. `generate`: let the model write up to so many tokens behind each prompt, and record them with it.
    `conditions` are changes of the inputs under which the model runs again; a run that stands gains
    those that it lacks.
    """

    quantities: frozenset[str] = frozenset({"attention"})
    sites: frozenset[str] | None = None
    layers: frozenset[int] | None = None
    target: str | int | None = None
    encoding: str = "float16"
    form: str = "auto"
    summaries: bool = False
    generate: int = 0
    conditions: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(self.quantities - EXTRACTABLE)
        if unknown:
            raise ValueError(f"unknown quantity {unknown[0]!r}; known are {', '.join(sorted(EXTRACTABLE))}")
        if self.encoding not in ENCODINGS:
            raise ValueError(f"unknown encoding {self.encoding!r}; known are {', '.join(ENCODINGS)}")
        if self.form not in FORMS:
            raise ValueError(f"unknown form {self.form!r}; known are {', '.join(FORMS)}")

    @property
    def recorded(self) -> frozenset[str]:
        """The quantities, with the summaries that come with the attention."""
        return self.quantities | SUMMARIES if self.summaries and "attention" in self.quantities else self.quantities

    @property
    def needs_gradient(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self.quantities & GRADIENT_QUANTITIES)

    @property
    def needs_forward(self) -> bool:
        """Whether the model has to see the samples at all; 'weights' alone don't ask for it."""
        return bool(self.quantities - {"weights"})

    def covers(self, other: "ExtractSpec") -> bool:
        """Whether a run of this spec holds all that `other` asks for, conditions aside: a run gains those later."""
        mine = self.recorded | {small for small, full in DERIVED_FROM.items() if full in self.quantities}
        return (
            other.quantities <= mine
            and _contains(self.sites, other.sites)
            and _contains(self.layers, other.layers)
            and (other.target is None or other.target == self.target)
        )

    def to_json(self) -> str:
        """A canonical text; equal specs give equal texts."""
        plain = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(self).items()}
        return json.dumps(plain, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ExtractSpec":
        """The spec that `to_json` wrote; fields that this version doesn't know are an error."""
        plain = json.loads(text)
        known = {f.name for f in fields(cls)}
        if set(plain) - known:
            raise ValueError(f"extraction spec has unknown fields {sorted(set(plain) - known)}")
        sets = ("quantities", "sites", "layers")
        fields_: dict[str, Any] = {k: frozenset(v) if k in sets and v is not None else v for k, v in plain.items()}
        fields_["conditions"] = tuple(Condition.from_json(c) for c in plain.get("conditions", ()))
        return cls(**fields_)


def union(specs: Iterable[ExtractSpec]) -> ExtractSpec:
    """What satisfies all of them: every quantity, site and layer, the wider encoding; targets must agree."""
    specs = list(specs)
    targets = {s.target for s in specs} - {None}
    if len(targets) > 1:
        raise ValueError(f"one run holds one target, got {', '.join(sorted(map(repr, targets)))}; extract them apart")
    quantities = frozenset().union(*(s.quantities for s in specs))
    stored = {small for small, full in DERIVED_FROM.items() if full in quantities and "attention" in quantities}
    forms = {s.form for s in specs} - {"auto"}
    if len(forms) > 1:
        raise ValueError(f"one run holds one form, got {' and '.join(sorted(forms))}")
    return ExtractSpec(
        quantities=quantities - stored,
        sites=_union_sets([s.sites for s in specs]),
        layers=_union_sets([s.layers for s in specs]),
        target=next(iter(targets), None),
        encoding=_widest({s.encoding for s in specs}),
        form=next(iter(forms), "auto"),
        summaries=any(s.summaries for s in specs),
        generate=max((s.generate for s in specs), default=0),
        conditions=distinct(c for s in specs for c in s.conditions),
    )


def _contains(mine: frozenset[T] | None, other: frozenset[T] | None) -> bool:
    return mine is None or (other is not None and other <= mine)


def _widest(encodings: set[str]) -> str:
    """The most exact of some encodings; the default where there are none."""
    return next((e for e in ("exact", "float16", "compact") if e in encodings), "float16")


def _union_sets(sets: list[frozenset[T] | None]) -> frozenset[T] | None:
    if not sets or any(s is None for s in sets):
        return None
    return frozenset().union(*(s for s in sets if s is not None))
