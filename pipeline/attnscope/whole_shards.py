"""Whole shards, encoded here and written as one object each.

zarr 3.1 spends about twice as long on copies and on hops between threads as zstd does on the values (measured: 30 ms
for a shard of 7 MB, of which 11 ms are compression and checksum). What extraction writes is always a whole block of a
layer, so that no chunk has to be read, merged or looked up. The objects are those that the Zarr v3 specification of
`sharding_indexed` and of the codecs describes, and zarr reads them as it reads its own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import zarr

from attnscope.chunks import NO_CHUNK, Content, Layout, Place, checksum, layout_of
from attnscope.stores import write


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
    parts: Sequence[Content]
    if layout.is_sharded:
        parts = _sharded({place: layout.encode(part) for place, part in chunks}, layout)
    else:
        ((_, only),) = chunks
        parts = layout.encode(only)
    write(array.store, _key(array, layout, first), *parts)
    return True


class ShardInParts:
    """One shard whose samples come in several batches: each is encoded when it comes, and all are written together.

    Threads may encode different samples side by side.
    """

    def __init__(self, array: zarr.Array, layout: Layout, first: Place) -> None:
        self._array = array
        self._layout = layout
        self._first = first
        self._chunks: dict[Place, list[Content]] = {}

    @classmethod
    def begin(cls, array: zarr.Array, first: Place, samples: int, dtype: np.dtype) -> "ShardInParts | None":
        """The shard that begins at the element `first`; `first` is as long as the dimensions a sample's values lack.

        None where samples of this type aren't chunks of their own or don't fill the shard: it is to be written at once.
        """
        layout = layout_of(array)
        if layout is None or not layout.is_sharded or dtype != array.dtype:
            return None
        ahead = len(first)
        alone = all(size == 1 for size in (*layout.chunk[:ahead], *layout.shard[1:ahead]))
        whole = first[0] % layout.shard[0] == 0 and samples == min(layout.shard[0], array.shape[0] - first[0])
        return cls(array, layout, first) if alone and whole else None

    @property
    def shape_of_sample(self) -> Place:
        """The shape of what one sample has."""
        return self._array.shape[len(self._first) :]

    @property
    def bytes_of_sample(self) -> int:
        """How large that is before it is encoded."""
        return math.prod(self.shape_of_sample) * self._array.dtype.itemsize

    def put(self, sample: int, values: np.ndarray) -> None:
        """Encode what one sample has, by its position in the shard."""
        lead = (sample, *(0 for _ in self._first[1:]))
        chunk = self._layout.chunk[len(lead) :]
        parts = {place: self._layout.encode(part) for place, part in _cut(values, chunk, self._array.fill_value)}
        # One piece of memory, which the system has back at once; many small ones stay with the threads.
        whole, start = memoryview(b"".join(piece for pieces in parts.values() for piece in pieces)), 0
        for place, pieces in parts.items():
            end = start + sum(map(len, pieces))
            self._chunks[*lead, *place] = [whole[start:end]]
            start = end

    def write(self) -> None:
        """Write the shard; all samples must have come."""
        first = (*self._first, *(0 for _ in self._layout.chunk[len(self._first) :]))
        write(self._array.store, _key(self._array, self._layout, first), *_sharded(self._chunks, self._layout))


def _key(array: zarr.Array, layout: Layout, first: Sequence[int]) -> str:
    place = tuple(f // s for f, s in zip(first, layout.shard, strict=True))
    return f"{array.path}/{array.metadata.encode_chunk_key(place)}"


def _cut(values: np.ndarray, chunk: Place, fill: Any) -> Iterator[tuple[Place, np.ndarray]]:
    """Chunks by their place, those at the end filled up."""
    for place in product(*(range(-(-n // c)) for n, c in zip(values.shape, chunk, strict=True))):
        part = values[tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunk, strict=True))]
        if part.shape != tuple(chunk):
            whole = np.full(chunk, fill, part.dtype)
            whole[tuple(slice(0, n) for n in part.shape)] = part
            part = whole
        yield place, part


def _sharded(chunks: Mapping[Place, Sequence[Content]], layout: Layout) -> list[Content]:
    """Encoded chunks one behind the other, then the offset and length of each, then the checksum of these."""
    index = np.full((*layout.grid, 2), NO_CHUNK, "<u8")
    parts: list[Content] = []
    offset = 0
    for place in sorted(chunks):
        length = sum(map(len, chunks[place]))
        index[place] = offset, length
        offset += length
        parts += chunks[place]
    return [*parts, index.tobytes(), checksum(index.tobytes())]
