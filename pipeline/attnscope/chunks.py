"""Chunks of an array, read and decoded here; and how they are encoded, for `whole_shards`.

zarr 3.1 spends about 0.6 ms on every chunk beside fetching and decoding it, and decodes one after another; a part of
an attention array takes hundreds. Here the indexes of all shards are fetched together, then all chunks, adjacent ones
at once, and threads decode them. Whatever is stored in another way is left to zarr.
"""

import asyncio
import math
import os
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc, Zstd
from zarr.abc.codec import Codec
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

NO_CHUNK = 2**64 - 1
_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
_THREADS = 4
_WORTH_THREADS = 2**21
Place = tuple[int, ...]
Content = bytes | memoryview
_Found = TypeVar("_Found")
_Fetched = list[tuple[Place, Content | None]]


class BrokenChunk(ValueError):
    """A chunk whose bytes are not those that were written."""


@dataclass(frozen=True)
class Layout:
    """How an array lies in its store: the shapes of its objects and of the chunks in them, and how these are encoded.

    `compressor` may be none; `is_checked` where a checksum stands behind each chunk.
    """

    shard: Place
    chunk: Place
    is_sharded: bool
    compressor: Zstd | Blosc | None
    is_checked: bool

    @property
    def grid(self) -> Place:
        """Chunks of a shard along each dimension."""
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    def encode(self, values: np.ndarray) -> list[bytes]:
        """The pieces that a chunk of these values consists of."""
        values = np.ascontiguousarray(values)
        content = values.tobytes() if self.compressor is None else self.compressor.encode(values)
        return [content, checksum(content)] if self.is_checked else [content]

    def decode(self, content: Content) -> Content:
        """The bytes of a chunk's values; ValueError or RuntimeError where they are not those that were written."""
        content = _unchecked(content) if self.is_checked else content
        return content if self.compressor is None else self.compressor.decode(content)


@dataclass(frozen=True)
class _Wanted:
    """One object of the store, and the places of the chunks in it that are wanted."""

    key: str
    first: Place
    chunks: list[Place]


def read_part(array: zarr.Array, index: slice | tuple[slice, ...]) -> np.ndarray:
    """The values of a contiguous part of an array; slices count from the start and take steps of 1.

    Raises
    ------
    BrokenChunk
        When a checksum doesn't agree with what is stored.
    """
    layout = layout_of(array)
    if layout is None:
        return np.asarray(array[index])
    region = _region(index, array.shape)
    result = np.empty([s.stop - s.start for s in region], array.dtype)
    if not result.size:
        return result
    wanted = list(_objects(array, layout, region))
    fetched = _fetched(array.store, layout, wanted)
    found = _without_waiting(fetched) if _is_local(array.store) else sync(fetched)

    def place(chunk: tuple[Place, Content | None]) -> None:
        origin, content = chunk
        into, out_of = [], []
        for start, size, span in zip(origin, layout.chunk, region, strict=True):
            low, high = max(start, span.start), min(start + size, span.stop)
            into.append(slice(low - span.start, high - span.start))
            out_of.append(slice(low - start, high - start))
        if content is None:
            result[tuple(into)] = array.fill_value
        else:
            result[tuple(into)] = _decoded(array, layout, content)[tuple(out_of)]

    threads = min(_THREADS, processor_cores(), len(found))
    if threads > 1 and len(found) * math.prod(layout.chunk) * array.dtype.itemsize > _WORTH_THREADS:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(place, found):
                pass
    else:
        for chunk in found:
            place(chunk)
    return result


def processor_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _region(index: slice | tuple[slice, ...], shape: Place) -> tuple[slice, ...]:
    given = index if isinstance(index, tuple) else (index,)
    spans = (*given, *(slice(None) for _ in shape[len(given) :]))
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(spans, shape, strict=True))


def _objects(array: zarr.Array, layout: Layout, region: Sequence[slice]) -> Iterator[_Wanted]:
    """What has to be read of which object for a region, in order."""
    spans = [range(s.start // n, -(-s.stop // n)) for s, n in zip(region, layout.shard, strict=True)]
    for place in product(*spans):
        first = tuple(p * n for p, n in zip(place, layout.shard, strict=True))
        inside = [
            range(max(0, (s.start - f) // c), min(g, -(-(s.stop - f) // c)))
            for s, f, c, g in zip(region, first, layout.chunk, layout.grid, strict=True)
        ]
        yield _Wanted(f"{array.path}/{array.metadata.encode_chunk_key(place)}", first, list(product(*inside)))


class _Source:
    """Objects of a store, many at once; of a folder one after another, since reading files never waits."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._few = asyncio.Semaphore(zarr.config.get("async.concurrency"))

    async def get(self, key: str, part: ByteRequest | None = None) -> Content | None:
        if _is_local(self._store):
            return _of_file(Path(self._store.root) / key, part)  # type: ignore[attr-defined]
        async with self._few:
            found = await self._store.get(key, default_buffer_prototype(), part)
        return None if found is None else memoryview(found.to_bytes())

    async def all(self, wanted: Iterable[Awaitable[_Found]]) -> list[_Found]:
        return [await one for one in wanted] if _is_local(self._store) else await asyncio.gather(*wanted)


async def _fetched(store: Store, layout: Layout, wanted: Sequence[_Wanted]) -> _Fetched:
    """The wanted chunks by where they begin in the array; None for one that isn't there."""
    source = _Source(store)
    parts = await source.all(_of_object(source, layout, one) for one in wanted)
    return [
        (tuple(f + p * c for f, p, c in zip(one.first, place, layout.chunk, strict=True)), content)
        for one, contents in zip(wanted, parts, strict=True)
        for place, content in zip(one.chunks, contents, strict=True)
    ]


def _is_local(store: Store) -> bool:
    return type(store) is LocalStore


def _without_waiting(fetched: "Coroutine[None, None, _Fetched]") -> _Fetched:
    """What is fetched without ever waiting, as files are: hops to zarr's event loop take far longer than reading."""
    try:
        fetched.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a file was waited for")


async def _of_object(source: _Source, layout: Layout, one: _Wanted) -> list[Content | None]:
    if not layout.is_sharded:
        return [await source.get(one.key)]
    total = math.prod(layout.grid)
    length = 16 * total + 4
    whole = len(one.chunks) == total
    content = await source.get(one.key, None if whole else SuffixByteRequest(length))
    if content is None:
        return [None] * len(one.chunks)
    try:
        index = np.frombuffer(_unchecked(content[-length:]), "<u8").reshape(*layout.grid, 2)
    except ValueError as error:
        raise BrokenChunk(
            f"the run can't be read (the index of {one.key!r}: {error}); attnscope check names what is broken"
        ) from None
    spans = [(int(index[place][0]), int(index[place][1])) for place in one.chunks]
    if whole:
        return [None if offset == NO_CHUNK else content[offset : offset + size] for offset, size in spans]
    return await _spans(source, one.key, spans)


async def _spans(source: _Source, key: str, spans: Sequence[tuple[int, int]]) -> list[Content | None]:
    """Parts (offset, length) of an object; such as lie one behind another are read at once."""
    there = sorted({span for span in spans if span[0] != NO_CHUNK})
    groups: list[list[tuple[int, int]]] = []
    for span in there:
        if groups and sum(groups[-1][-1]) == span[0]:
            groups[-1].append(span)
        else:
            groups.append([span])
    contents = await source.all(source.get(key, RangeByteRequest(g[0][0], sum(g[-1]))) for g in groups)
    found: dict[tuple[int, int], Content | None] = {}
    for group, content in zip(groups, contents, strict=True):
        for offset, size in group:
            begin = offset - group[0][0]
            found[offset, size] = None if content is None else content[begin : begin + size]
    return [found.get(span) for span in spans]


def _of_file(path: Path, part: ByteRequest | None) -> Content | None:
    """A file or a part of it; None where there is none."""
    try:
        with path.open("rb", buffering=0) as file:
            if isinstance(part, SuffixByteRequest):
                file.seek(max(0, file.seek(0, os.SEEK_END) - part.suffix))
            elif isinstance(part, RangeByteRequest):
                file.seek(part.start)
                return memoryview(file.read(part.end - part.start))
            return memoryview(file.read())
    except FileNotFoundError:
        return None


def _decoded(array: zarr.Array, layout: Layout, content: Content) -> np.ndarray:
    try:
        return np.frombuffer(layout.decode(content), array.dtype).reshape(layout.chunk)
    except (RuntimeError, ValueError) as error:
        raise BrokenChunk(
            f"the run can't be read (a chunk of {array.path!r}: {error}); attnscope check names what is broken"
        ) from None


def layout_of(array: zarr.Array) -> Layout | None:
    """None for what attnscope doesn't write, which is zarr's to read and write."""
    codecs: Sequence[Codec] = array.metadata.codecs  # type: ignore[union-attr]
    sharding = codecs[0] if len(codecs) == 1 and isinstance(codecs[0], ShardingCodec) else None
    if sharding is not None:
        codecs = sharding.codecs
        plain = [type(codec) for codec in sharding.index_codecs] == [BytesCodec, Crc32cCodec]
        if not plain or sharding.index_location.value != "end":
            return None
    first, *rest = codecs
    little = isinstance(first, BytesCodec) and (first.endian is None or first.endian.value == "little")
    is_checked = bool(rest) and isinstance(rest[-1], Crc32cCodec)
    compressors = [_compressor(codec) for codec in rest[: len(rest) - is_checked]]
    if not little or len(compressors) > 1 or None in compressors or array.dtype.kind not in "fiub":
        return None
    shard = array.shards or array.chunks
    return Layout(shard, array.chunks, sharding is not None, next(iter(compressors), None), is_checked)


def _compressor(codec: Codec) -> Zstd | Blosc | None:
    if isinstance(codec, ZstdCodec):
        return Zstd(codec.level, checksum=codec.checksum)
    if isinstance(codec, BloscCodec):
        shuffle = _SHUFFLES[codec.shuffle.value]
        return Blosc(codec.cname.value, codec.clevel, shuffle, blocksize=codec.blocksize, typesize=codec.typesize)
    return None


def checksum(content: bytes) -> bytes:
    """CRC32C of some bytes, as it stands behind them."""
    return google_crc32c.value(content).to_bytes(4, "little")


def _unchecked(content: Content) -> Content:
    """What stands before a checksum that agrees with it."""
    body = bytes(content[:-4])
    if checksum(body) != content[-4:]:
        raise ValueError("its checksum doesn't agree")
    return body
