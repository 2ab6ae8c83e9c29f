"""The arrays of a run: which ones a plan asks for, how they are cut into chunks and shards, what they say."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import zarr
import zarr.codecs
from zarr.abc.codec import BytesBytesCodec
from zarr.storage import MemoryStore

from attnscope.attention_array import ATTENTION_OF_CODE
from attnscope.plan import RunPlan, SitePlan, stored_dtype
from attnscope.quantities import SITE_QUANTITIES, SUMMARIES, TENSORS, ExtractSpec, Quantity, quantity
from attnscope.tokens import KINDS

WHOLE_RUN = frozenset({"id", "text", "regions"})
_CHUNK_BYTES = 2**20
_TILE_BYTES = 2**17
_NAMES_AT_ONCE = 2**12
DENSE_BOUND = {"float16": "2.5e-4", "float32": "2e-6", "uint8": "3.92e-3"}
# The checksum of the decoded values doesn't cover the header of a zstd frame; that of the stored bytes does.
COMPRESSORS: tuple[BytesBytesCodec, ...] = (zarr.codecs.ZstdCodec(level=1, checksum=True), zarr.codecs.Crc32cCodec())
ATTENTION_COMPRESSORS: dict[str, tuple[BytesBytesCodec, ...]] = {
    "zstd": COMPRESSORS,
    "lz4": (zarr.codecs.BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), zarr.codecs.Crc32cCodec()),
}
_BFLOAT16_NAN = 0x7FC0


def planned_arrays(plan: RunPlan, spec: ExtractSpec, samples: int) -> dict[str, zarr.Array]:
    """The arrays of a new run of this plan by path, weights aside: how they are to be stored, in memory and empty."""
    root = zarr.create_group(MemoryStore())
    for array in arrays_of(plan, spec, samples):
        create_array(root, array, plan.unit)
    return {path: array for path, array in root.members(max_depth=None) if isinstance(array, zarr.Array)}


@dataclass(frozen=True)
class ArrayPlan:
    """One array to be made: where, its table row, its shape and how it is stored."""

    path: str
    row: Quantity
    shape: tuple[int, ...]
    dtype: str
    elements: tuple[int, int] = (0, 0)
    """Of a chunk and of a block, along the dimension `element`."""
    compressor: str = "zstd"

    @property
    def item_bytes(self) -> int:
        return 64 if self.dtype == "string" else 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def is_attention(self) -> bool:
        return self.row.group == "site" and self.row.name in ("attention", "attention_values")

    @property
    def compressors(self) -> tuple[BytesBytesCodec, ...]:
        if self.row.group == "site" and self.row.name in TENSORS:
            # Queries, keys and values don't compress (1.08 times, measured), which would only cost time.
            return COMPRESSORS[1:]
        return ATTENTION_COMPRESSORS[self.compressor] if self.is_attention else COMPRESSORS

    @property
    def attrs(self) -> dict[str, object]:
        attrs: dict[str, object] = {"long_name": self.row.meaning, "units": self.row.units}
        if self.is_attention:
            attrs["bound"] = DENSE_BOUND[self.dtype]
        if self.dtype == "bfloat16":
            attrs["encoded"] = "bfloat16: the upper half of a float32's bits"
        if self.is_attention and self.dtype == "uint8":
            attrs["encoded"] = "compact: places in attention_of_code"
        if "query_kind" in self.row.dims:
            attrs["kinds"] = " ".join(KINDS)
        if self.row.group == "stream" and self.row.name == "kind":
            attrs |= {"flag_values": list(range(len(KINDS))), "flag_meanings": " ".join(KINDS)}
        return attrs


def arrays_of(plan: RunPlan, spec: ExtractSpec, samples: int) -> Iterable[ArrayPlan]:
    """Every array that a run of this plan holds, weights aside."""

    def planned(path: str, row: Quantity, sizes: Mapping[str, int], dtype: str | None = None) -> ArrayPlan:
        shape = tuple(samples if d == "sample" else sizes[d] for d in row.dims)
        return ArrayPlan(path, row, shape, dtype or row.dtype)

    for name in ("id", "text", "regions", "image_digest", "reason", "status"):
        yield planned(f"samples/{name}", quantity("samples", name), plan.sizes())
    if plan.thumbnails:
        yield planned("samples/thumbnail", quantity("samples", "thumbnail"), plan.sizes())
    for stream, tokens in plan.streams.items():
        for name in ("token_text", "kind", "row", "column"):
            yield planned(f"{stream}/{name}", quantity("stream", name), {"token": tokens})
        if plan.regions:
            sizes = {"region": plan.regions, "token": tokens}
            yield planned(f"{stream}/region_share", quantity("stream", "region_share"), sizes)
        if stream in plan.boxed:
            yield planned(f"{stream}/box", quantity("stream", "box"), {"token": tokens, "side": 4})
    for name, site in plan.sites.items():
        for stored in sorted(site.stored(spec)):
            row = SITE_QUANTITIES[stored]
            dtype = stored_dtype(row, spec, site)
            sizes = plan.sizes(site)
            if "element" in row.dims:
                sizes["element"] *= -(-samples // plan.unit)
            array = planned(f"{name}/{stored}", row, sizes, dtype)
            yield replace(array, elements=(site.chunk_elements, site.block_elements), compressor=site.compressor)
            if array.is_attention and dtype == "uint8":
                yield planned(f"{name}/attention_of_code", quantity("site", "attention_of_code"), {"code": 256})
    if "score" in spec.quantities or spec.needs_gradient:
        yield planned("outputs/score", quantity("outputs", "score"), plan.sizes())


def create_array(root: zarr.Group, array: ArrayPlan, unit: int) -> None:
    if "element" in array.row.dims:
        chunks, shards = _element_chunks(array)
    elif array.row.dims[2:] == ("head", "query_token", "key_token"):
        chunks, shards = _tile_chunks(array.shape, unit, array.item_bytes)
    else:
        chunks, shards = _chunks(array.row, array.shape, unit, array.item_bytes)
    bits = array.dtype == "bfloat16"
    root.create_array(
        array.path,
        shape=array.shape,
        dtype=str if array.dtype == "string" else "uint16" if bits else array.dtype,
        chunks=chunks,
        shards=shards,
        compressors=array.compressors,
        fill_value=_BFLOAT16_NAN if bits else 0 if array.dtype == "uint8" else array.row.fill,
        dimension_names=array.row.dims,
        attributes=array.attrs,  # type: ignore[arg-type]
    )


def _chunks(
    row: Quantity, shape: tuple[int, ...], unit: int, itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Chunk near 1 MiB; shard of a whole block, and of one layer (and written token) where these come one by one."""
    # The number of samples doesn't matter, since it may grow.
    written = {"sample": unit, "layer": 1, "answer": 1}
    block = [written.get(d, n) for d, n in zip(row.dims, shape, strict=True)]
    layers = shape[1] if row.group == "site" and row.name in SUMMARIES else 1
    if row.group == "samples" and row.name in WHOLE_RUN:
        block[0] = _NAMES_AT_ONCE
    chunk = list(block)
    for axis in (row.dims.index(d) for d in ("sample", "head", "kv_head") if d in row.dims):
        while chunk[axis] > 1 and int(np.prod(chunk)) * itemsize > _CHUNK_BYTES and row.dtype != "string":
            chunk[axis] = _next_divisor(block[axis], chunk[axis])
    if "rank" in row.dims:
        # A threshold is settled by the first ranks alone.
        chunk[row.dims.index("rank")] = 1
    if layers > 1:
        # Written together, so that a question over all samples opens few files; read together where they are small.
        block[1] = layers
        chunk[1] = layers if layers * int(np.prod(chunk)) * itemsize <= _CHUNK_BYTES else 1
    block = [max(1, n) for n in block]
    chunk = [max(1, n) for n in chunk]
    return tuple(chunk), None if chunk == block else tuple(block)


def _tile_chunks(shape: tuple[int, ...], unit: int, itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Chunk near 128 KiB, cut across heads and query rows alike, so that few of either are read without the others.

    A chunk has rows enough for a multiple of 8 numbers, and the shard is filled up to whole chunks.
    """
    _, _, heads, queries, keys = shape
    samples, together, rows = unit, heads, queries

    def filled_up() -> int:
        # A bit shuffle leaves the end of what is not a multiple of 8 numbers as it is.
        step = 8 // math.gcd(8, samples * together * keys)
        return -(-rows // step) * step

    while samples * together * filled_up() * keys * itemsize > _TILE_BYTES and max(samples, together, rows) > 1:
        if samples > 1:
            samples = _next_divisor(unit, samples)
        elif rows > 1 and (together == 1 or queries * together <= heads * rows):
            rows = -(-rows // 2)
        else:
            together = _next_divisor(heads, together)
    rows = filled_up()
    chunk = (samples, 1, together, rows, keys)
    block = (unit, 1, heads, -(-queries // rows) * rows, keys)
    return chunk, None if chunk == block else block


def _element_chunks(array: ArrayPlan) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shard of a whole block and one layer; chunk of so many elements as planned, and heads that make about 1 MiB."""
    _, heads, _ = array.shape
    chunk, block = array.elements
    together = heads
    while together > 1 and together * chunk * array.item_bytes > _CHUNK_BYTES:
        together = _next_divisor(heads, together)
    sizes = (1, together, chunk)
    return sizes, None if sizes == (1, heads, block) else (1, heads, block)


def _next_divisor(whole: int, below: int) -> int:
    return next(n for n in range(below - 1, 0, -1) if whole % n == 0)


def write_site_coordinates(group: zarr.Group, site: SitePlan) -> None:
    group.attrs.put({"queries": site.queries, "keys": site.keys, "modules": list(site.modules),
                     "kernels": list(site.kernels), "guessed": site.guessed, "form": site.form,
                     "recipes": [asdict(r) for r in site.recipes]})  # fmt: skip
    write_layers(group, site)
    write_numbers(group, "head", np.arange(site.heads))
    if "attention_of_code" in group:
        group["attention_of_code"][:] = ATTENTION_OF_CODE  # type: ignore[index]


def write_layers(group: zarr.Group, site: SitePlan) -> None:
    write_numbers(group, "layer", np.array(site.layers, np.int64))


def write_numbers(group: zarr.Group, name: str, numbers: np.ndarray) -> None:
    # The number of a single layer or head is 0, which zarr would leave away.
    group.create_array(
        name, data=numbers, dimension_names=(name,), compressors=COMPRESSORS, overwrite=True,
        config={"write_empty_chunks": True},
    )  # fmt: skip
