"""The plan of a run: its streams, sites and sizes, and how many samples make a block."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from attnscope.quantities import FACTORS, RAGGED, RANKS, RULES, SITE_QUANTITIES, TENSORS, ExtractSpec, Quantity
from attnscope.tokens import KINDS

THUMBNAIL_PIXELS = 224
_UNIT_BYTES = 2**27
_UNIT_LIMIT = 64
_STORED_OF_FORM = {"dense": frozenset[str](), "factored": FACTORS | RULES, "ragged": RAGGED}
_DENSE_DTYPE = {"float16": "float16", "exact": "float32", "compact": "uint8"}


@dataclass(frozen=True)
class Recipe:
    """How a layer makes attention of query and key, beyond the rules that are stored sample by sample.

    score = scale * query . key, then softcap * tanh(score / softcap) where there is one; a query at position i stands
    at key position i + causal_offset, and attends to keys nearer than `window`. `sinks` are one extra score a head.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    causal_offset: int = 0
    sinks: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SitePlan:
    """One kind of attention between streams over layers: its streams, layers and sizes.

    `call_numbers` tell calls of one module apart; -1 stands for all of them, whose tokens are put together. `dtype` is
    the model's, in which query and key are stored; `recipes` (one a layer) stand where the form is 'factored'. Where it
    is 'ragged', a sample has `elements` weights in a head on average, and room for `block_elements` of them is kept for
    each block, in chunks of `chunk_elements`. `turns` are the places of the layers in the order in which the model ran
    the attention of all sites. `leaky` are the positions of layers whose rows may sum to less than 1, as they do where
    sinks have a share. `compressor` is what makes its attention small, 'zstd' or 'lz4'.
    """

    queries: str
    keys: str
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    heads: int
    kv_heads: int
    query_tokens: int
    key_tokens: int
    channels: int = 0
    value_channels: int = 0
    call_numbers: tuple[int, ...] = ()
    kernels: tuple[str, ...] = ()
    guessed: bool = False
    form: str = "dense"
    dtype: str = "float32"
    recipes: tuple[Recipe, ...] = ()
    turns: tuple[int, ...] = ()
    elements: int = 0
    block_elements: int = 0
    chunk_elements: int = 0
    leaky: tuple[int, ...] = ()
    compressor: str = "zstd"

    @property
    def factored_bytes(self) -> int:
        """Bytes of query, key and log-sum-exp of one sample, all layers."""
        item = 4 if self.dtype == "float32" else 2
        rows = self.heads * self.query_tokens
        return len(self.layers) * (item * self.channels * (rows + self.kv_heads * self.key_tokens) + 4 * rows)

    def stored(self, spec: ExtractSpec) -> frozenset[str]:
        """Names of the site quantities that are stored for a spec: of attention, what its form makes of it."""
        names = spec.recorded & set(SITE_QUANTITIES)
        if "attention" in names:
            names |= _STORED_OF_FORM[self.form]
            names -= set() if self.form == "dense" else {"attention"}
        return names | {"query_valid"}


@dataclass(frozen=True)
class RunPlan:
    """The sizes of a run: tokens of each stream, the sites, how many samples make a block, and regions a sample.

    `answers` is how many written tokens a sample may have, where something is recorded for each of them; `boxed` are
    the streams whose tokens are a detector's regions, of which the boxes are known.
    """

    streams: Mapping[str, int]
    sites: Mapping[str, SitePlan]
    unit: int
    conditions: tuple[str, ...] = ("intact",)
    thumbnails: bool = False
    regions: int = 0
    answers: int = 0
    boxed: tuple[str, ...] = ()

    def sizes(self, site: SitePlan | None = None) -> dict[str, int]:
        """The length of every dimension but `sample` and `token`."""
        sizes = {"condition": len(self.conditions), "colour": 3, "answer": self.answers}
        sizes |= {"image_row": THUMBNAIL_PIXELS, "image_column": THUMBNAIL_PIXELS}
        if site is not None:
            sizes |= {"layer": len(site.layers), "head": site.heads, "kv_head": site.kv_heads}
            sizes |= {"query_token": site.query_tokens, "key_token": site.key_tokens}
            sizes |= {"channel": site.channels, "value_channel": site.value_channels}
            sizes |= {"element": site.block_elements}
            sizes |= {"rank": min(RANKS, site.key_tokens), "query_kind": len(KINDS), "key_kind": len(KINDS)}
        return sizes

    def sample_bytes(self, spec: ExtractSpec) -> int:
        """Bytes that one sample takes before compression, all site quantities of the spec together."""
        return sum(
            _item_bytes(SITE_QUANTITIES[name], spec, site)
            * _count(SITE_QUANTITIES[name], self.sizes(site) | {"element": site.elements})
            for site in self.sites.values()
            for name in site.stored(spec) - RULES
        )


def unit_for(bytes_per_sample: int, samples: int | None, batch_size: int = 1) -> int:
    """Samples per block: a power of two that keeps a block near 128 MiB, at least a batch, at most what there is.

    Where there may be any number of `samples` (None), nothing but their size counts.
    """
    fitting = min(_UNIT_LIMIT, max(1, _UNIT_BYTES // max(1, bytes_per_sample)))
    samples = fitting if samples is None else samples
    return max(1 << (min(fitting, max(samples, 1)).bit_length() - 1), batch_size)


def stored_dtype(row: Quantity, spec: ExtractSpec, site: SitePlan) -> str:
    if row.name in ("attention", "attention_values"):
        return _DENSE_DTYPE[spec.encoding]
    if row.name == "top_value":
        return "float16" if spec.encoding == "float16" and site.form != "factored" else "float32"
    return site.dtype if row.name in TENSORS else row.dtype


def _item_bytes(row: Quantity, spec: ExtractSpec, site: SitePlan) -> int:
    dtype = stored_dtype(row, spec, site)
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _count(row: Quantity, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[d] for d in row.dims if d != "sample")


def plan_to_attrs(plan: RunPlan) -> dict[str, object]:
    return json.loads(json.dumps(asdict(plan)))


def plan_from_attrs(plain: Mapping[str, object]) -> RunPlan:
    sites = {}
    for name, fields in plain["sites"].items():  # type: ignore[attr-defined]
        recipes = tuple(
            Recipe(**r | {"sinks": None if r["sinks"] is None else tuple(r["sinks"])}) for r in fields["recipes"]
        )
        plainly: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        sites[name] = SitePlan(**plainly | {"recipes": recipes})
    return RunPlan(
        streams=dict(plain["streams"]),  # type: ignore[call-overload]
        sites=sites,
        unit=int(plain["unit"]),  # type: ignore[call-overload]
        conditions=tuple(plain["conditions"]),  # type: ignore[arg-type]
        thumbnails=bool(plain["thumbnails"]),
        regions=int(plain.get("regions", 0)),  # type: ignore[call-overload]
        answers=int(plain.get("answers", 0)),  # type: ignore[call-overload]
        boxed=tuple(plain.get("boxed", ())),  # type: ignore[arg-type]
    )
