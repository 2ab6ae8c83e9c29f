"""Checking a run: every chunk is read and decoded, and what the marks claim is held against what is there.

Chunks carry checksums, so that a changed byte can't decode; a chunk that is gone is missed, since all are written but
those of masks. Metadata is held against the plan that the run was made by.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from zarr.storage import LocalStore

from attnscope.arrays import WHOLE_RUN, planned_arrays
from attnscope.attention_array import ATTENTION_OF_CODE, to_float32
from attnscope.quantities import ANSWERS, RULES, SITE_QUANTITIES, ExtractSpec
from attnscope.run import EXTRACTED, LEFT_OUT, MISSING, Run
from attnscope.stores import StoreError, keys, open_group
from attnscope.tokens import KIND_CODES

Region = tuple[slice, ...]
Listener = Callable[[int, int], None]

# Rounding to half precision changes a weight by at most one part in 2**11, so the sum of a row, which is 1, by no more;
# below the normal halves the step is 2**-24. Sums of float32 weights are off by what softmax itself is off.
# A code of the compact encoding is off by half a step of 1 / 255 in the square root of a weight p, so by sqrt(p) / 255
# in the weight, and the sum over a row of n weights by sqrt(n) / 255 at most.
_ROW_TOLERANCE = {"float16": 2.0**-11, "exact": 1e-5, "compact": 1e-5}
_COMPUTED_TOLERANCE = 1e-4
_HALF_STEP = 2.0**-25
_CODE_STEP = 0.25 / 255**2
_NAMED_AT_MOST = 6
# What is absent where it says nothing, and the marks, whose absence is what they say.
_SPARSE = frozenset({"mask", "status"})


@dataclass(frozen=True)
class Fault:
    """Something broken: where (a path in the run), what, and the positions of the samples that it touches."""

    place: str
    problem: str
    samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """What a check found: faults, and how much was looked at."""

    faults: tuple[Fault, ...]
    arrays: int
    chunks: int
    extracted: int
    left_out: int
    missing: int
    half_written: int

    def sentences(self, sample_ids: list[str]) -> list[str]:
        """One sentence for each fault, with the ids of the samples."""
        return [_sentence(fault, sample_ids) for fault in self.faults]


def check_run(run: Run, listener: Listener | None = None) -> CheckReport:
    """Read every chunk of a run and verify checksums, marks, and the row sums of attention.

    `listener` is told the number of chunks done, and of all.
    """
    faults: list[Fault] = []
    present = _present(run)
    arrays = _arrays(run, present, faults)
    misshapen = list(_misshapen(run, arrays)) or list(_edited(run, arrays))
    faults += misshapen
    arrays = {path: array for path, array in arrays.items() if path not in {fault.place for fault in misshapen}}
    status = _read_whole(arrays, "samples/status")
    total = sum(len(list(_regions(array))) for array in arrays.values())
    done = 0
    for path, array in arrays.items():
        look = _look(run, arrays, path, status)
        for whole in _regions(array):
            region = look.used(whole) if isinstance(look, _RaggedLook) else whole
            found = list(_checked(run, path, array, region, look))
            if not found and present is not None:
                found = list(_lost(run, path, array, region, present, _marks(arrays, path, status)))
            faults += found
            done += 1
            if listener is not None:
                listener(done, total)
    faults += _absent(run, arrays, present)
    if not faults:
        faults += _computed_rows(run)
    marks = status if status is not None else np.array([], np.uint8)
    wrong = np.flatnonzero(~np.isin(marks, (MISSING, EXTRACTED, LEFT_OUT)))
    if wrong.size:
        faults.append(Fault("samples/status", "holds marks that mean nothing", tuple(map(int, wrong))))
    return CheckReport(
        faults=tuple(_merged(faults)),
        arrays=len(arrays),
        chunks=total,
        extracted=int((marks == EXTRACTED).sum()),
        left_out=int((marks == LEFT_OUT).sum()),
        missing=int((marks == MISSING).sum()),
        half_written=_half_written(run),
    )


# -- what there is -----------------------------------------------------------------------------------------------------


def _present(run: Run) -> frozenset[str] | None:
    """Names of all stored objects; None in a store that can't be listed."""
    try:
        return frozenset(keys(run.store, ""))
    except StoreError:
        return None


def _arrays(run: Run, present: frozenset[str] | None, faults: list[Fault]) -> dict[str, zarr.Array]:
    """Every array of the run by path; one whose metadata can't be read is a fault."""
    found = {}
    for path in _paths(run, present):
        try:
            array = open_group(run.store)[path]
        except Exception as error:
            faults.append(Fault(path, f"has metadata that can't be read ({_one_line(error)})"))
            continue
        if isinstance(array, zarr.Array):
            found[path] = array
    return found


def _paths(run: Run, present: frozenset[str] | None) -> list[str]:
    """Paths of everything that has metadata."""
    if present is None:
        return sorted(path for path, _ in open_group(run.store).members(max_depth=None))
    return sorted(key.removesuffix("/zarr.json") for key in present if key.endswith("/zarr.json"))


def _expected(run: Run) -> Iterator[str]:
    """Paths of the groups and arrays that a run of this plan holds."""
    yield from ("samples", *run.streams, *run.sites)
    for name in ("id", "text", "regions", "image_digest", "reason", "status"):
        yield f"samples/{name}"
    for stream in run.streams:
        for name in ("token_text", "kind", "row", "column"):
            yield f"{stream}/{name}"
    for site, plan in run.plan.sites.items():
        for name in (*sorted(plan.stored(run.spec)), "layer", "head"):
            yield f"{site}/{name}"


def _absent(run: Run, arrays: dict[str, zarr.Array], present: frozenset[str] | None) -> Iterator[Fault]:
    known = set(_paths(run, present))
    for path in _expected(run):
        if path not in arrays and path not in known:
            yield Fault(path, "is gone: the run was made with it, and it is not there")


def _misshapen(run: Run, arrays: dict[str, zarr.Array]) -> Iterator[Fault]:
    """Arrays whose sizes are not those that the run was planned with."""
    for path, array in arrays.items():
        group = path.rpartition("/")[0]
        sizes = _sizes(run, group)
        for name, length in zip(array.metadata.dimension_names or (), array.shape, strict=False):  # type: ignore[union-attr]
            if sizes.get(str(name), length) != length:
                yield Fault(path, f"has {length} along {name} where the run has {sizes[str(name)]}")


def _edited(run: Run, arrays: dict[str, zarr.Array]) -> Iterator[Fault]:
    """Arrays that are not stored as a run of this plan stores them."""
    counts = [arrays[path].shape[0] for path in ("samples/status", "samples/id") if path in arrays]
    if not counts:
        return
    for path, planned in planned_arrays(run.plan, run.spec, counts[0]).items():
        if path not in arrays:
            continue
        mine, theirs = _storage(arrays[path]), _storage(planned)
        changed = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if changed:
            yield Fault(path, f"has another {' and '.join(changed)} than the run was planned with")


def _storage(array: zarr.Array) -> dict[str, str]:
    """How an array is stored, by the names of its metadata; wording aside."""
    found = dict(array.metadata.to_dict())
    attributes = found.pop("attributes", {})
    found |= {name: value for name, value in attributes.items() if name.startswith(("flag_", "encoded"))}  # type: ignore[union-attr]
    return {name: repr(value) for name, value in found.items()}


def _sizes(run: Run, group: str) -> dict[str, int]:
    """The length of the dimensions of a stream's or site's arrays."""
    if group in run.streams:
        return {"token": run.plan.streams[group]}
    if group not in run.sites:
        return {}
    return {name: n for name, n in run.plan.sizes(run.plan.sites[group]).items() if name != "element"}


def _regions(array: zarr.Array) -> Iterator[Region]:
    """The parts of an array that are stored as one object each."""
    return _tiles(tuple(slice(0, n) for n in array.shape), array.shards or array.chunks)


def _tiles(whole: Region, sizes: tuple[int, ...]) -> Iterator[Region]:
    spans = [
        [slice(at, min(at + size, part.stop)) for at in range(part.start, part.stop, size)]
        for part, size in zip(whole, sizes, strict=True)
    ]
    return itertools.product(*spans)


def _half_written(run: Run) -> int:
    if not isinstance(run.store, LocalStore):
        return 0
    return sum(1 for _ in Path(run.store.root).rglob("*.partial"))


# -- what is looked at -------------------------------------------------------------------------------------------------

Look = Callable[[Region, np.ndarray], Iterator[Fault]]


def _checked(run: Run, path: str, array: zarr.Array, region: Region, look: Look | None) -> Iterator[Fault]:
    try:
        values = np.asarray(array[region])
    except Exception as error:
        yield from _unreadable(run, path, array, region, error)
        return
    if look is not None:
        yield from look(region, values)


def _lost(
    run: Run, path: str, array: zarr.Array, region: Region, present: frozenset[str], status: np.ndarray | None
) -> Iterator[Fault]:
    """A chunk that isn't there, though its value alone, the fill value, might be right."""
    group, _, name = path.rpartition("/")
    written = array.shards or array.chunks
    place = array.metadata.encode_chunk_key(tuple(p.start // n for p, n in zip(region, written, strict=True)))
    if f"{path}/{place}" in present or name in _SPARSE or status is None:
        return
    samples = _samples(run, array, region)
    if samples and name not in WHOLE_RUN:
        wanted = (EXTRACTED,) if group and name in SITE_QUANTITIES else (EXTRACTED, LEFT_OUT)
        samples = tuple(at for at in samples if status[at] in wanted)
        if not samples:
            return
    yield Fault(path, f"lacks a chunk that was written{_where(array, region)}", samples)


def _marks(arrays: dict[str, zarr.Array], path: str, status: np.ndarray | None) -> np.ndarray | None:
    """The marks that an array goes by: those of the run, or of the outputs that it lies among."""
    own = f"{path.rpartition('/')[0]}/status"
    return _read_whole(arrays, own) if path.startswith("outputs/") and own in arrays else status


def _samples(run: Run, array: zarr.Array, region: Region) -> tuple[int, ...]:
    """The samples that a part of an array tells of; none where it isn't by sample."""
    for axis, (name, span) in enumerate(zip(array.metadata.dimension_names or (), region, strict=False)):  # type: ignore[union-attr]
        if name == "sample":
            return tuple(range(span.start, span.stop))
        if name == "element":
            first = span.start // (array.shards or array.chunks)[axis] * run.plan.unit
            return tuple(range(first, min(first + run.plan.unit, run.sample_count)))
    return ()


def _unreadable(run: Run, path: str, array: zarr.Array, region: Region, error: Exception) -> Iterator[Fault]:
    """One fault for each unreadable chunk of a region; for the region where its index itself is broken."""
    broken = [(region, error)]
    if array.shards is not None:
        broken = list(_broken_chunks(array, region)) or broken
    for part, reason in broken:
        yield Fault(path, f"can't be decoded{_where(array, part)} ({_one_line(reason)})", _samples(run, array, part))


def _broken_chunks(array: zarr.Array, region: Region) -> Iterator[tuple[Region, Exception]]:
    for part in _tiles(region, array.chunks):
        try:
            array[part]
        except Exception as error:
            yield part, error


def _where(array: zarr.Array, region: Region) -> str:
    names = array.metadata.dimension_names or ()  # type: ignore[union-attr]
    for name, span in zip(names, region, strict=False):
        if name == "layer" and len(array.shape) > 1:
            return f" at layer position {span.start}"
    return ""


def _look(run: Run, arrays: dict[str, zarr.Array], path: str, status: np.ndarray | None) -> Look | None:
    """What else is asked of an array's values, beyond that they decode."""
    group, _, name = path.rpartition("/")
    look: Look | None = None
    if status is None:
        return None
    if name == "attention_values" and group in run.sites:
        look = _RaggedLook(run, arrays, group, status)
    elif name == "attention_offset" and group in run.sites:
        look = _RaggedLook(run, arrays, group, status).offsets
    elif group in run.sites and (name == "query_valid" or name in SITE_QUANTITIES.keys() - RULES - ANSWERS.keys()):
        look = _SiteLook(run, arrays, group, name, status)
    elif group in run.streams and name == "kind":
        look = partial(_without_tokens, path, status)
    elif path == "samples/id":
        look = _without_names
    elif name in ("layer", "head") and group.removeprefix("weights/") in run.sites:
        plan = run.plan.sites[group.removeprefix("weights/")]
        look = partial(_renumbered, path, np.array(plan.layers) if name == "layer" else np.arange(plan.heads))
    elif group.startswith("weights/"):
        look = partial(_without_weights, path)
    return look


class _SiteLook:
    """Extracted samples have values in every layer and head; rows of attention sum to 1."""

    def __init__(self, run: Run, arrays: dict[str, zarr.Array], site: str, name: str, status: np.ndarray) -> None:
        self._path = f"{site}/{name}"
        self._name = name
        self._status = status
        self._by_head = "head" in SITE_QUANTITIES[name].dims or "kv_head" in SITE_QUANTITIES[name].dims
        plan = run.plan.sites[site]
        self._layers = plan.layers
        self._valid = _read_whole(arrays, f"{site}/query_valid")
        self._query_kind = _read_whole(arrays, f"{plan.queries}/kind")
        self._key_kind = _read_whole(arrays, f"{plan.keys}/kind")
        self._tolerance = _tolerance(run.spec, plan.key_tokens)
        self._sinks = [recipe.sinks is not None for recipe in plan.recipes] or [
            position in plan.leaky for position in range(len(plan.layers))
        ]

    def __call__(self, region: Region, values: np.ndarray) -> Iterator[Fault]:
        if self._valid is None or self._query_kind is None or self._key_kind is None:
            return
        samples, layers = region[0], region[1]
        padding = KIND_CODES["padding"]
        real = self._query_kind[samples] != padding
        done = self._status[samples] == EXTRACTED
        if self._name == "query_valid":
            unmarked = np.asarray(~values.any(axis=-1))
            yield from self._told(region, done & real.any(axis=1), unmarked, "marks no query row as valid")
            return
        rows = self._valid[samples, layers] & real[:, None]
        due = done[:, None] & rows.any(axis=-1)
        values = _floats(values)
        heads = values.shape[2] if self._by_head else 1
        empty = np.isnan(values).reshape(*values.shape[:2], heads, -1).all(axis=-1).any(axis=-1)
        yield from self._told(region, due, empty, "holds no values")
        if self._name == "attention":
            keys = self._key_kind[samples] != padding
            off = self._off(values, rows, keys, self._sinks[layers])
            yield from self._told(
                region, due & ~empty, off, f"has rows that do not sum to 1 within {self._tolerance:.1e}"
            )

    def _off(self, values: np.ndarray, rows: np.ndarray, keys: np.ndarray, sinks: list[bool]) -> np.ndarray:
        """Samples and layers (sample, layer) with a row whose sum is not 1, or above it where a sink has a share."""
        wrong = np.zeros(values.shape[:2], bool)
        for sample, layer in np.ndindex(*wrong.shape):
            tile = values[sample, layer][:, rows[sample, layer]][..., keys[sample]]
            sums = tile.sum(axis=-1, dtype=np.float32)
            excess = sums - 1 if sinks[layer] else np.abs(sums - 1)
            wrong[sample, layer] = not (excess <= self._tolerance).all()
        return wrong

    def _told(self, region: Region, due: np.ndarray, broken: np.ndarray, problem: str) -> Iterator[Fault]:
        due = due[:, None] if due.ndim == 1 else due
        for position, column in enumerate((due & broken).T):
            touched = tuple(int(at) + region[0].start for at in np.flatnonzero(column))
            if touched:
                layer = self._layers[region[1].start + position]
                yield Fault(self._path, f"{problem} in layer {layer}, though marked as extracted", touched)


class _RaggedLook(_SiteLook):
    """The same of samples that are stored end to end; and each begins where the one before it ends."""

    def __init__(self, run: Run, arrays: dict[str, zarr.Array], site: str, status: np.ndarray) -> None:
        super().__init__(run, arrays, site, "attention", status)
        self._path = f"{site}/attention_values"
        self._unit, self._room = run.plan.unit, run.plan.sites[site].block_elements
        self._offsets = _read_whole(arrays, f"{site}/attention_offset")

    def __call__(self, region: Region, values: np.ndarray) -> Iterator[Fault]:
        for sample, begin, real in self._placed(region[2].start):
            rows, columns = map(np.flatnonzero, real)
            end = begin + len(rows) * len(columns)
            if not 0 <= begin <= end <= values.shape[2]:
                continue
            padded = np.full((1, 1, values.shape[1], len(real[0]), len(real[1])), np.nan, np.float32)
            stored = _floats(values[0, :, begin:end]).reshape(-1, len(rows), len(columns))
            padded[0, 0][:, rows[:, None], columns] = stored
            yield from super().__call__((slice(sample, sample + 1), region[0]), padded)

    def used(self, region: Region) -> Region:
        """The part of a block's region that its samples take."""
        ends = [begin + int(real[0].sum() * real[1].sum()) for _, begin, real in self._placed(region[2].start)]
        length = min(max([0, *ends]), region[2].stop - region[2].start)
        return (*region[:2], slice(region[2].start, region[2].start + length))

    def offsets(self, region: Region, _: np.ndarray) -> Iterator[Fault]:
        """What is wrong with where samples begin: behind one another, in the region of their block."""
        start = region[0].start // self._unit * self._room
        free = 0
        touched = []
        for sample, begin, real in self._placed(start):
            end = begin + int(real[0].sum() * real[1].sum())
            if free <= begin and end <= self._room:
                free = end
            else:
                touched.append(sample)
        if touched:
            yield Fault(self._path.replace("_values", "_offset"), "does not say where samples begin", tuple(touched))

    def _placed(self, start: int) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        """The extracted samples of the block whose elements begin there: where each begins in it, and its tokens."""
        if self._query_kind is None or self._key_kind is None or self._offsets is None:
            return
        first = start // self._room * self._unit
        for sample in range(first, min(first + self._unit, len(self._status))):
            if self._status[sample] == EXTRACTED:
                real = [kind[sample] != KIND_CODES["padding"] for kind in (self._query_kind, self._key_kind)]
                yield sample, int(self._offsets[sample]) - start, real


def _floats(values: np.ndarray) -> np.ndarray:
    """Stored values as float32; bfloat16 is stored as the upper half of its bits, compact attention as codes."""
    if values.dtype == np.uint8:
        return ATTENTION_OF_CODE[values]
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return to_float32(values)


def _computed_rows(run: Run) -> Iterator[Fault]:
    """Rows of attention that is computed from query and key: they sum to 1, or less where there are sinks."""
    done = np.flatnonzero(run.status == EXTRACTED)
    for site, plan in run.plan.sites.items():
        if plan.form != "factored" or "attention" not in run.spec.quantities:
            continue
        attention = run.attention(site)
        for position, layer in enumerate(plan.layers):
            sinks = plan.recipes[position].sinks is not None
            broken = [int(at) for at in done if not _sums_hold(_in_halves(attention[int(at), position]), sinks)]
            if broken:
                problem = f"gives rows that do not sum to 1 within {_COMPUTED_TOLERANCE:.1e} in layer {layer}"
                yield Fault(f"{site}/query", problem, tuple(broken))


def _in_halves(attention: xr.DataArray) -> np.ndarray:
    """The values, read as two halves of the keys: whole rows would be normalised by their own sum."""
    half = attention.sizes["key_token"] // 2
    return np.concatenate([attention[..., :half].values, attention[..., half:].values], axis=-1)


def _sums_hold(attention: np.ndarray, sinks: bool) -> bool:
    sums = np.nansum(attention, axis=-1)[~np.isnan(attention).all(axis=-1)]
    upper = sums <= 1 + _COMPUTED_TOLERANCE
    return bool((upper if sinks else upper & (sums >= 1 - _COMPUTED_TOLERANCE)).all())


def _tolerance(spec: ExtractSpec, keys: int) -> float:
    by_key = {"float16": keys * _HALF_STEP, "compact": keys**0.5 / 255 + keys * _CODE_STEP}
    return _ROW_TOLERANCE[spec.encoding] + by_key.get(spec.encoding, 0)


def _without_tokens(path: str, status: np.ndarray, region: Region, kinds: np.ndarray) -> Iterator[Fault]:
    bare = (status[region[0]] == EXTRACTED) & (kinds == KIND_CODES["padding"]).all(axis=1)
    if bare.any():
        touched = tuple(int(at) + region[0].start for at in np.flatnonzero(bare))
        yield Fault(path, "knows no tokens, though marked as extracted", touched)


def _without_names(region: Region, ids: np.ndarray) -> Iterator[Fault]:
    nameless = tuple(at + region[0].start for at, name in enumerate(ids) if not str(name))
    if nameless:
        yield Fault("samples/id", "is empty", nameless)


def _without_weights(path: str, _: Region, values: np.ndarray) -> Iterator[Fault]:
    if np.isnan(values).any():
        yield Fault(path, "lacks weights of a layer")


def _renumbered(path: str, labels: np.ndarray, region: Region, values: np.ndarray) -> Iterator[Fault]:
    if not np.array_equal(values, labels[region[0]]):
        yield Fault(path, "holds other numbers than the run was planned with")


def _read_whole(arrays: dict[str, zarr.Array], path: str) -> np.ndarray | None:
    if path not in arrays:
        return None
    try:
        return np.asarray(arrays[path][...])
    except Exception:
        # Told where the chunks of this array themselves are looked at.
        return None


# -- words -------------------------------------------------------------------------------------------------------------


def _merged(faults: Iterable[Fault]) -> Iterator[Fault]:
    """Faults that differ in their samples alone become one."""
    found: dict[tuple[str, str], Fault] = {}
    for fault in faults:
        known = found.get((fault.place, fault.problem), replace(fault, samples=()))
        found[fault.place, fault.problem] = replace(known, samples=tuple(sorted({*known.samples, *fault.samples})))
    return iter(found.values())


def _sentence(fault: Fault, sample_ids: list[str]) -> str:
    if not fault.samples:
        return f"{fault.place} {fault.problem}"
    names = [json.dumps(sample_ids[at]) if at < len(sample_ids) else f"#{at}" for at in fault.samples]
    shown = ", ".join(names[:_NAMED_AT_MOST])
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return f"{fault.place} {fault.problem}: sample {shown}{more}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
