"""Whole shards, encoded here and written as one object each.

zarr 3.1 spends about twice as long on copies and on hops between threads as zstd does on the values (measured: 30 ms
for a shard of 7 MB, of which 11 ms are compression and checksum). What extraction writes is always a whole block of a
layer, so that no chunk has to be read, merged or looked up. The objects are those that the Zarr v3 specification of
`sharding_indexed` and of the codecs describes, and zarr reads them as it reads its own.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import zarr

from attnscope.chunks import NO_CHUNK, Layout, Place, checksum, layout_of
from attnscope.stores import UnfinishedObject, write

# What is filled up to whole chunks by one copy. With a copy for each chunk, threads that encode wait for each other at
# every one: what copies lets go of the interpreter's lock, and has to get it back (measured: a tenth of the time).
_FILLED_AT_ONCE = 2**22


def write_shard(array: zarr.Array, first: Sequence[int], values: np.ndarray) -> bool:
    """Write the values of one whole shard that begins at the element `first`; False for what zarr has to write.

    That are values of another type or of a part of what the shard has in the array, and codecs not known here. Along
    the last dimension, values may be those of the first chunks alone: the others are then missing.
    """
    layout = layout_of(array)
    if layout is None:
        return False
    shape, chunk = layout.shard, layout.chunk
    *ahead, last = (min(s, n - f) for f, s, n in zip(first, shape, array.shape, strict=True))
    if values.dtype != array.dtype or any(f % s for f, s in zip(first, shape, strict=True)):
        return False
    length = values.size // math.prod(ahead)
    if values.size % math.prod(ahead) or not (length == last or (0 < length < last and length % chunk[-1] == 0)):
        return False
    chunks = _cut(values.reshape(*ahead, length), chunk, array.fill_value)
    key = _key(array, layout, first)
    if layout.is_sharded:
        index = _Index(layout)
        parts = [part for place, values in chunks for part in index.add(place, layout.encode(values))]
        parts += index.parts()
    else:
        ((_, only),) = chunks
        parts = layout.encode(only)
    write(array.store, key, *parts)
    return True


def _key(array: zarr.Array, layout: Layout, first: Sequence[int]) -> str:
    place = tuple(f // s for f, s in zip(first, layout.shard, strict=True))
    return f"{array.path}/{array.metadata.encode_chunk_key(place)}"


class OpenShard:
    """A shard whose samples come one by one, in any order; they are encoded and written at once, from any thread.

    When so many as `expected` have come it is there. Others are missing in it, which reads as the fill value.
    """

    def __init__(self, array: zarr.Array, layout: Layout, first: Sequence[int], expected: int) -> None:
        self._layout = layout
        self._fill = array.fill_value
        self._object = UnfinishedObject(array.store, _key(array, layout, first))
        self._index = _Index(layout)
        self._lock = threading.Lock()
        self._to_come = expected
        self._is_abandoned = False

    def add(self, samples: Sequence[int], values: np.ndarray | None) -> None:
        """Write samples by their places in the shard: values (sample, ...), without axes of which the shard has one.

        Shorter values are those of the first elements along each axis; None for samples that have no values.
        """
        encoded = [] if values is None else [self._encoded(*one) for one in zip(samples, values, strict=True)]
        with self._lock:
            if self._is_abandoned:
                return
            self._object.append([part for chunks in encoded for chunk in chunks for part in self._index.add(*chunk)])
            self._to_come -= len(samples)
            if not self._to_come:
                self._object.append(self._index.parts())
                self._object.finish()

    def abandon(self) -> None:
        """Leave nothing behind, whatever still comes."""
        with self._lock:
            self._is_abandoned = True
            self._object.abandon()

    def _encoded(self, sample: int, values: np.ndarray) -> list[tuple[tuple[int, ...], list[bytes]]]:
        whole = values.reshape(*(1 for _ in range(len(self._layout.chunk) - values.ndim)), *values.shape)
        chunks = _cut(whole, self._layout.chunk, self._fill)
        return [((sample, *place[1:]), self._layout.encode(chunk)) for place, chunk in chunks]


def open_shard(
    array: zarr.Array, first: Sequence[int], samples: int, expected: int, dtype: np.dtype
) -> OpenShard | None:
    """A shard that begins at the element `first`, with so many samples, the first axis; None for what can't be one.

    That are values of another type, a part of what the shard has in the array, several samples in a chunk, and codecs
    not known here.
    """
    layout = layout_of(array)
    if layout is None or not layout.is_sharded or layout.chunk[0] != 1 or dtype != array.dtype:
        return None
    if any(f % s for f, s in zip(first, layout.shard, strict=True)):
        return None
    is_whole = samples == min(layout.shard[0], array.shape[0] - first[0])
    return OpenShard(array, layout, first, expected) if is_whole else None


class _Index:
    """Where in its object each chunk of a shard lies."""

    def __init__(self, layout: Layout) -> None:
        self._grid = layout.grid
        # No array before the end: what a shard holds while it is open is malloc'ed between the model's activations,
        # and each such piece keeps the C library from reusing the room beside it (measured: 300 MiB in a ViT-B/16).
        self._spans: dict[tuple[int, ...], tuple[int, int]] = {}
        self._end = 0

    def add(self, place: tuple[int, ...], parts: list[bytes]) -> list[bytes]:
        """The parts of a chunk, which lies behind the others."""
        length = sum(map(len, parts))
        self._spans[place] = self._end, length
        self._end += length
        return parts

    def parts(self) -> list[bytes]:
        """Offset and length of each chunk, and the checksum of these, which stand at the end."""
        spans = np.full((*self._grid, 2), NO_CHUNK, "<u8")
        for place, span in self._spans.items():
            spans[place] = span
        content = spans.tobytes()
        return [content, checksum(content)]


def _cut(values: np.ndarray, chunk: Place, fill: object) -> Iterable[tuple[Place, np.ndarray]]:
    """Chunks by their place, those at the end filled up."""
    if any(n % c for n, c in zip(values.shape, chunk, strict=True)):
        axis = next((at for at, (n, c) in enumerate(zip(values.shape, chunk, strict=True)) if n > c), None)
        if axis is not None and values.nbytes > _FILLED_AT_ONCE:
            return _cut_along(axis, values, chunk, fill)
        values = _filled_up(values, chunk, fill)
    return [(place, values[part]) for place, part in _places(values.shape, chunk)]


def _cut_along(axis: int, values: np.ndarray, chunk: Place, fill: object) -> Iterator[tuple[Place, np.ndarray]]:
    for at in range(-(-values.shape[axis] // chunk[axis])):
        slab = values[(*(slice(None),) * axis, slice(at * chunk[axis], (at + 1) * chunk[axis]))]
        for place, part in _cut(slab, chunk, fill):
            yield (*place[:axis], at, *place[axis + 1 :]), part


def _filled_up(values: np.ndarray, chunk: Place, fill: object) -> np.ndarray:
    """The values in an array of whole chunks."""
    filled = np.empty([-(-n // c) * c for n, c in zip(values.shape, chunk, strict=True)], values.dtype)
    for axis, n in enumerate(values.shape):
        filled[(*(slice(None),) * axis, slice(n, None))] = fill
    filled[tuple(slice(n) for n in values.shape)] = values
    return filled


@lru_cache(maxsize=256)
def _places(shape: Place, chunk: Place) -> list[tuple[Place, tuple[slice, ...]]]:
    """The places of the chunks of an array that consists of whole ones, and where each lies in it."""
    grid = [range(n // c) for n, c in zip(shape, chunk, strict=True)]
    return [
        (place, tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunk, strict=True))) for place in product(*grid)
    ]
