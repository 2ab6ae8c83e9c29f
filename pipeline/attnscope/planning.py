"""Before the first block: what the samples are like, what the model's attention is like, and how large a run gets."""

import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numcodecs import Blosc, Zstd

from attnscope.families import Fold, Inputs, Placement
from attnscope.loading import LoadedModel, ModelError
from attnscope.plan import Recipe, RunPlan, SitePlan, stored_dtype, unit_for
from attnscope.quantities import ANSWERS, SITE_QUANTITIES, ExtractSpec
from attnscope.ragged import chunk_for, end_to_end_sizes
from attnscope.recipes import DTYPES, proved_rows, recipe_of
from attnscope.recording import AttentionCall, recording
from attnscope.samples import Sample, SampleError
from attnscope.stores import StoreError, is_url
from attnscope.writing import encoded_attention

_ROW_SUM_TOLERANCE = 2e-3
_FACTORED_FROM = 512
_RAGGED_BELOW = 0.5
# Query rows of which it is told how small the attention of the first sample gets.
_COMPRESSED_ROWS = 512
# How much larger than by zstd attention may be by lz4, which is then the better one for its speed.
_AS_SMALL = 1.02
# Largest difference between attention times value and what the kernel returned, in units of the largest value.
_OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class RecordingError(RuntimeError):
    """What was recorded does not reproduce what the model did; the message names the module."""


@dataclass(frozen=True)
class Prepared:
    """The samples of a run, the tokens of each, the most of each stream, and what is wrong with those left out.

    `tokens`: of each stream that differs between samples, how many each has; 0 where that isn't known. Where these are
    the samples of one part of the run, the first stands at the place `start` of the run; `problems` go by places in it.
    """

    samples: Sequence[Sample]
    lengths: np.ndarray
    problems: dict[int, str]
    longest: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict)
    start: int = 0

    def sample(self, place: int) -> Sample:
        """The sample at a place of the run."""
        return self.samples[place - self.start]

    def length(self, place: int) -> int:
        """The tokens of the sample at a place of the run."""
        return int(self.lengths[place - self.start])

    def longest_first(self) -> list[int]:
        """Places in the run, those of the longest samples first."""
        return [int(at) + self.start for at in np.argsort(-self.lengths, kind="stable")]

    def at(self, start: int) -> "Prepared":
        """The same samples, as a part of a run that begins at the place `start`."""
        return replace(self, problems={at + start: told for at, told in self.problems.items()}, start=start)


@dataclass(frozen=True)
class ProbedCall:
    """What one attention call looked like: its role, its sizes, and how it can be computed again.

    `number` is -1 where all calls of the module make one layer together; then, and where the batch of the call wasn't
    the batch of samples, it is `folded`.
    """

    module: str
    number: int
    kernel: str
    tier: str
    placement: Placement
    heads: int
    kv_heads: int
    queries: int
    keys: int
    channels: int
    value_channels: int
    compressed_bytes: int
    lz4_bytes: int
    folded: bool
    has_fold: bool
    dtype: str
    recipe: Recipe | None
    turn: int = 0
    is_leaky: bool = False

    @property
    def shape_class(self) -> tuple[object, ...]:
        """Calls of one site share these. Where a role is only guessed, so is whether two stacks of layers have one."""
        stack = re.sub(r"\d+", "", self.module) if self.placement.guessed else ""
        sizes = (self.heads, self.kv_heads, self.queries, self.keys, self.channels, self.value_channels)
        return (self.placement.site, stack, self.placement.guessed, self.folded, self.dtype, *sizes)


def prepare(
    samples: Sequence[Sample],
    loaded: LoadedModel,
    which: Iterable[int] | None = None,
    room: Mapping[str, int] | None = None,
) -> Prepared:
    """Measure every sample, or those at `which` places; those with a problem of their own are left out.

    So are those that the model can't take, or that have more tokens of a stream than there is room for.
    """
    lengths = np.zeros(len(samples), np.int64)
    problems = {i: s.problem for i, s in enumerate(samples) if s.problem}
    tokens: dict[str, np.ndarray] = {}
    for i in range(len(samples)) if which is None else which:
        if i in problems:
            continue
        try:
            measured = loaded.family.measure(samples[i], loaded)
            _check_room(measured, room or {})
        except SampleError as error:
            problems[i] = str(error)
            continue
        lengths[i] = sum(measured.values())
        for stream, count in measured.items():
            tokens.setdefault(stream, np.zeros(len(samples), np.int64))[i] = count
    longest = {stream: int(counts.max()) for stream, counts in tokens.items()}
    return Prepared(samples, lengths, problems, longest, tokens)


def _check_room(measured: Mapping[str, int], room: Mapping[str, int]) -> None:
    for stream, tokens in measured.items():
        if tokens > room.get(stream, tokens):
            raise SampleError(
                f"it has {tokens} tokens of the stream {stream!r}, and the run was made for at most {room[stream]}"
            )


def run_model(loaded: LoadedModel, inputs: Inputs) -> object:
    """One forward; inputs whose names begin with an underscore are notes for the layouts, not for the model."""
    return loaded.model(**{k: _placed(v, loaded) for k, v in inputs.items() if not k.startswith("_")})


def _placed(tensor: torch.Tensor, loaded: LoadedModel) -> torch.Tensor:
    return tensor.to(loaded.device, loaded.dtype if tensor.is_floating_point() else None)


def probe(loaded: LoadedModel, inputs: Inputs) -> tuple[list[ProbedCall], object]:
    """Run one sample under the full audit, and prove on it that what was recorded is what the model did.

    Returns its calls, and what the model gave.

    Raises
    ------
    UnrecordedAttention
        When an attention kernel ran that no tap saw.
    RecordingError
        When attention times value isn't what a kernel returned.
    ModelError
        When the model has no attention at all.
    """
    found: list[ProbedCall] = []

    def look(call: AttentionCall) -> None:
        check_output(call)
        found.append(_probed(call, loaded, inputs))

    with torch.no_grad(), recording(loaded.model, on_call=look):
        outputs = run_model(loaded, inputs)
    if not found:
        raise ModelError(f"{loaded.name!r} ran no attention: there is nothing to extract")
    return _merged(found, _is_one_image(inputs)), outputs


def _probed(call: AttentionCall, loaded: LoadedModel, inputs: Inputs) -> ProbedCall:
    batch, heads, queries, keys = call.shape
    fold = fold_of(call, loaded, inputs)
    # Of many rows a part, evenly spread, tells how small all of them get.
    rows = torch.linspace(0, queries - 1, min(queries, _COMPRESSED_ROWS), device="cpu").round().long().unique()
    encoded = encoded_attention(call, "float16", rows)
    return ProbedCall(
        module=call.module,
        number=call.number,
        kernel=call.kernel,
        tier=call.tier,
        placement=loaded.family.place(call, loaded),
        heads=heads,
        kv_heads=heads if call.key is None else call.key.shape[1],
        queries=queries * batch if fold is None else int(fold.queries.max()) + 1,
        keys=keys * batch if fold is None else int(fold.keys.max()) + 1,
        channels=0 if call.query is None else call.query.shape[-1],
        value_channels=0 if call.value is None else call.value.shape[-1],
        compressed_bytes=_compressed(encoded, "zstd", queries),
        lz4_bytes=_compressed(encoded, "lz4", queries),
        folded=batch != 1 or fold is not None,
        has_fold=fold is not None,
        dtype="float32" if call.query is None else DTYPES.get(call.query.dtype, "float32"),
        recipe=recipe_of(call),
        is_leaky=_is_leaky(call.attention(proved_rows(call)).sum(dim=-1)),
    )


def fold_of(call: AttentionCall, loaded: LoadedModel, inputs: Inputs) -> Fold | None:
    """Where the parts of a call belong, by its family; None where its batch is the batch of samples."""
    return None if loaded.family.fold is None else loaded.family.fold(call, inputs, loaded)


def _is_one_image(inputs: Inputs) -> bool:
    """Whether a sample has one whole image: nothing that a module does twice is a part of the same."""
    pixels = inputs.get("pixel_values")
    return pixels is not None and pixels.ndim == 4 and len(pixels) == 1 and "target_sizes" not in inputs


def _merged(calls: Sequence[ProbedCall], is_whole: bool) -> list[ProbedCall]:
    """Calls of one module with one role become one: their tokens lie side by side.

    Where roles are guessed, only images come in parts, unless the sample `is_whole`; a module that reads a whole text
    again is another layer of it.
    """
    groups: dict[tuple[object, ...], list[ProbedCall]] = {}
    for call in calls:
        alone = call.placement.guessed and not call.folded and (is_whole or call.placement.queries != "vision")
        groups.setdefault((call.module, call.placement, call.number if alone else -1), []).append(call)
    merged = []
    for group in groups.values():
        first = group[0]
        if len(group) == 1:
            merged.append(first if not first.folded else replace(first, number=-1))
            continue
        together = max if first.has_fold else sum
        merged.append(
            replace(
                first,
                number=-1,
                folded=True,
                queries=together(c.queries for c in group),
                keys=together(c.keys for c in group),
                compressed_bytes=sum(c.compressed_bytes for c in group),
                lz4_bytes=sum(c.lz4_bytes for c in group),
            )
        )
    return merged


def _compressed(values: np.ndarray, compressor: str, rows: int) -> int:
    """Bytes of so many rows of attention as they are stored, from some of them (batch, head, row, ...).

    Each head by itself, as a multiple of 8 numbers.
    """
    encode = Zstd(level=1).encode if compressor == "zstd" else Blosc("lz4", 1, Blosc.BITSHUFFLE).encode
    heads = values.reshape(-1, math.prod(values.shape[2:]))
    filled = np.pad(heads, ((0, 0), (0, -heads.shape[1] % 8)), mode="edge")
    return sum(len(encode(head)) for head in filled) * rows // max(1, values.shape[2])


def check_output(call: AttentionCall, rows: torch.Tensor | None = None) -> None:
    """Raise RecordingError unless attention times value is what the kernel returned, over all rows or some."""
    if call.value is None or call.output is None or not call.value.numel() or call.output.isnan().any():
        return
    allowed = _OUTPUT_TOLERANCE.get(call.value.dtype, 3e-2) * max(float(call.value.abs().max()), 1e-6)
    error = call.output_error() if rows is None else call.output_error(rows)
    if error > allowed:
        raise RecordingError(
            f"attention of module {call.module!r} was recorded wrongly: attention times value differs from the"
            f" kernel's output by {error:.2g}, allowed are {allowed:.2g}"
        )


def check_rows(attention: torch.Tensor, call: AttentionCall) -> None:
    """Raise RecordingError unless rows are probabilities: not negative, and summing to 1 (less with sinks, or 0).

    Rows that were computed here from query and key are so by construction, unless those aren't finite.
    """
    if call.probabilities is None:
        # A softmax makes the whole of a row NaN where a single score is, or is infinite.
        if not np.isfinite(float(attention[..., :1].sum())):
            raise RecordingError(f"attention of module {call.module!r} is not finite: its query or key isn't")
        return
    sums = attention.sum(dim=-1)
    low, high = float(sums.min()), float(sums.max())
    short = call.sinks is None and _is_leaky(sums)
    if short and call.value is not None and call.output is not None:
        # A part of the softmax that meets no value: fine, where what is left is what the kernel used.
        check_output(call, proved_rows(call))
        short = False
    if not np.isfinite([low, high]).all() or high > 1 + _ROW_SUM_TOLERANCE or short or float(attention.min()) < 0:
        raise RecordingError(
            f"attention of module {call.module!r} is not a softmax: its rows sum to {low:.4g} to {high:.4g}"
        )


def _is_leaky(sums: torch.Tensor) -> bool:
    """Whether rows that aren't empty sum to less than 1."""
    valid = sums[sums > 0]
    return bool(len(valid)) and float(valid.min()) < 1 - _ROW_SUM_TOLERANCE


def plan_run(
    calls: Sequence[ProbedCall],
    spec: ExtractSpec,
    prepared: Prepared,
    batch_size: int | None,
    thumbnails: bool,
    grows: bool = False,
) -> RunPlan:
    """Sites, streams and block size from the probed calls, for the sites and layers that the spec wants.

    Blocks of a run that `grows` are as large as where there are many samples already.
    """
    ordered = [replace(call, turn=turn) for turn, call in enumerate(calls)]
    wanted = [c for c in _numbered(ordered) if _is_wanted(c.placement, spec)]
    if not wanted:
        had = ", ".join(sorted({c.placement.site for c in calls}))
        raise ModelError(f"the model has none of the wanted sites and layers; its sites are {had}")
    sizes: dict[str, tuple[int, bool]] = {}
    sites: dict[str, SitePlan] = {}
    calls_of: dict[str, Sequence[ProbedCall]] = {}
    for group in _grouped(wanted):
        first = group[0]
        # Windows and tiles of a model that nobody knows lie in an order that nobody knows.
        packed = first.folded and not first.has_fold and first.placement.guessed
        queries = _stream(sizes, first.placement.queries, (first.queries, packed))
        keys = _stream(sizes, first.placement.keys, (first.keys, packed))
        name = _free_name(sites, first.placement.site)
        sites[name], calls_of[name] = _site_plan(group, queries, keys), group
    streams = {name: tokens for name, (tokens, _) in sizes.items()}
    # The probe saw the longest sample, but the longest text and the largest image may be two samples'.
    streams |= {name: max(most, streams[name]) for name, most in prepared.longest.items() if name in streams}
    sites = {
        name: _formed(
            replace(site, query_tokens=streams[site.queries], key_tokens=streams[site.keys]),
            calls_of[name],
            prepared,
            spec,
        )
        for name, site in sites.items()
    }
    answers = spec.generate if spec.quantities & ANSWERS.keys() else 0
    plan = RunPlan(streams=streams, sites=sites, unit=1, thumbnails=thumbnails, answers=answers)
    unit = unit_for(plan.sample_bytes(spec), None if grows else len(prepared.samples), batch_size or 1)
    return replace(plan, unit=unit, sites={name: end_to_end_sizes(site, unit) for name, site in sites.items()})


def _site_plan(group: Sequence[ProbedCall], queries: str, keys: str) -> SitePlan:
    first = group[0]
    recipes = tuple(c.recipe for c in group if c.recipe is not None and not c.folded)
    return SitePlan(
        queries=queries,
        keys=keys,
        layers=tuple(c.placement.layer for c in group),
        modules=tuple(c.module for c in group),
        heads=first.heads,
        kv_heads=first.kv_heads,
        query_tokens=first.queries,
        key_tokens=first.keys,
        channels=first.channels,
        value_channels=first.value_channels,
        call_numbers=tuple(c.number for c in group),
        kernels=tuple(sorted({c.kernel for c in group})),
        guessed=any(c.placement.guessed for c in group),
        dtype=first.dtype,
        recipes=recipes if len(recipes) == len(group) else (),
        turns=tuple(c.turn for c in group),
        leaky=tuple(position for position, c in enumerate(group) if c.is_leaky),
    )


def _formed(plan: SitePlan, calls: Sequence[ProbedCall], prepared: Prepared, spec: ExtractSpec) -> SitePlan:
    """The site with the form that takes least: without padding, or factored, or as it is; or what was asked for.

    Padding is left out where it is more than half; it costs little on the disk, but time.
    """
    dense_bytes = sum(c.compressed_bytes for c in calls)
    # It takes about a third of the time; of sharp attention it leaves a quarter more, and of one-byte codes as well.
    if spec.encoding != "compact" and sum(c.lz4_bytes for c in calls) <= _AS_SMALL * dense_bytes:
        plan = replace(plan, compressor="lz4")
    elements = _elements(plan, calls[0], prepared)
    share = float(elements.mean()) / max(1, calls[0].queries * calls[0].keys) if len(elements) else 1.0
    form = _form(plan, dense_bytes, spec)
    smaller = form == "dense" or (form == "factored" and dense_bytes * share < plan.factored_bytes)
    if spec.form == "auto" and share < _RAGGED_BELOW and smaller:
        form = "ragged"
    if form != "ragged":
        return replace(plan, form=form)
    chunk = chunk_for(elements, stored_dtype(SITE_QUANTITIES["attention_values"], spec, plan))
    return replace(plan, form=form, elements=math.ceil(elements.mean()), chunk_elements=chunk)


def _form(plan: SitePlan, dense_bytes: int, spec: ExtractSpec) -> str:
    """Factored where query and key determine the attention and take less room, or where it is asked for."""
    if spec.form == "factored" and not plan.recipes:
        raise ModelError(
            f"attention of queries {plan.queries!r} over keys {plan.keys!r} can't be stored factored: query, key and a"
            f" mask don't determine it (module {plan.modules[0]!r}); use the form 'auto'"
        )
    if spec.form != "auto":
        return spec.form
    worth_it = plan.key_tokens >= _FACTORED_FROM and plan.factored_bytes < dense_bytes
    return "factored" if plan.recipes and worth_it else "dense"


def _elements(site: SitePlan, probed: ProbedCall, prepared: Prepared) -> np.ndarray:
    """How many weights each sample has in a head, padding left out: (sample,); all, where that wasn't measured."""
    counts = []
    for stream, most in ((site.queries, probed.queries), (site.keys, probed.keys)):
        measured = prepared.tokens.get(stream)
        # What doesn't agree with the longest sample's forward doesn't tell the others' tokens either.
        if measured is None or measured.max() != most:
            measured = np.full(len(prepared.samples), most)
        counts.append(measured)
    return counts[0] * counts[1]


def forecast_bytes(calls: Sequence[ProbedCall], plan: RunPlan, spec: ExtractSpec, samples: int) -> int:
    """Bytes that the run will take on disk, from how well the probed sample's attention compressed."""
    raw = plan.sample_bytes(spec)
    if "attention" in spec.quantities and spec.encoding == "float16":
        shares = {
            call: s.elements / (s.query_tokens * s.key_tokens) if s.form == "ragged" else 1
            for s in plan.sites.values()
            for call in zip(s.modules, s.call_numbers, strict=True)
            if s.form != "factored"
        }
        saved = (
            shares.get((c.module, c.number), 0) * (2 * c.heads * c.queries * c.keys - c.compressed_bytes) for c in calls
        )
        raw -= int(sum(saved))
    return max(raw, 0) * samples


def check_space(forecast: int, out: object) -> None:
    """Raise StoreError when the forecast can't fit on the disk of a local run."""
    if not isinstance(out, str | Path) or is_url(out):
        return
    existing = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if forecast > free:
        raise StoreError(
            f"the run would take about {forecast / 1e9:.1f} GB, and {str(existing)!r} has {free / 1e9:.1f} GB free;"
            " record fewer layers, sites or samples"
        )


def _is_wanted(placement: Placement, spec: ExtractSpec) -> bool:
    return (spec.sites is None or placement.site in spec.sites) and (
        spec.layers is None or placement.layer in spec.layers
    )


def _numbered(calls: Sequence[ProbedCall]) -> list[ProbedCall]:
    """The calls, with layers in call order where guessed layer numbers of calls of one site and size collide.

    Calls of one module with different sizes are one layer.
    """
    turns: dict[str, list[tuple[str, int]]] = {}
    repeats: dict[tuple[str, object], int] = {}
    first: dict[tuple[object, int], int] = {}
    collide = set()
    places: list[int] = []
    for call in calls:
        size, layer = call.shape_class, call.placement.layer
        repeat = repeats.setdefault((call.module, size), 0)
        repeats[call.module, size] += 1
        if first.setdefault((size, layer), len(places)) != len(places) and call.placement.guessed:
            collide.add(call.placement.site)
        order = turns.setdefault(call.placement.site, [])
        if (call.module, repeat) not in order:
            order.append((call.module, repeat))
        places.append(order.index((call.module, repeat)))
    return [
        replace(call, placement=replace(call.placement, layer=place)) if call.placement.site in collide else call
        for call, place in zip(calls, places, strict=True)
    ]


def _grouped(calls: Sequence[ProbedCall]) -> list[list[ProbedCall]]:
    """Calls that share a site: equal role and sizes, each layer once; in call order."""
    groups: list[list[ProbedCall]] = []
    for call in calls:
        for group in groups:
            same = group[0].shape_class == call.shape_class
            if same and call.placement.layer not in [c.placement.layer for c in group]:
                group.append(call)
                break
        else:
            groups.append([call])
    return groups


def _stream(sizes: dict[str, tuple[int, bool]], name: str, size: tuple[int, bool]) -> str:
    """The stream of this name, length and order; a further one where the name has another length or order already."""
    number, candidate = 1, name
    while sizes.setdefault(candidate, size) != size:
        number += 1
        candidate = f"{name}.{number}"
    return candidate


def _free_name(taken: "dict[str, SitePlan]", name: str) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    return candidate
