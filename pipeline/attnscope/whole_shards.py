"""Whole shards, encoded here and written as one object each.

zarr 3.1 spends about twice as long on copies and on hops between threads as zstd does on the values (measured: 30 ms
for a shard of 7 MB, of which 11 ms are compression and checksum). What extraction writes is always a whole block of a
layer, so that no chunk has to be read, merged or looked up. The objects are those that the Zarr v3 specification of
`sharding_indexed` and of the codecs describes, and zarr reads them as it reads its own.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import numpy as np
import zarr

from attnscope.chunks import NO_CHUNK, Layout, checksum, layout_of
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
    if layout.is_sharded:
        parts = _sharded(chunks, layout)
    else:
        ((_, only),) = chunks
        parts = layout.encode(only)
    key = array.metadata.encode_chunk_key(tuple(f // s for f, s in zip(first, shape, strict=True)))
    write(array.store, f"{array.path}/{key}", *parts)
    return True


def _cut(values: np.ndarray, chunk: Sequence[int], fill: object) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Chunks by their place, those at the end filled up."""
    for place in product(*(range(-(-n // c)) for n, c in zip(values.shape, chunk, strict=True))):
        part = values[tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunk, strict=True))]
        if part.shape != tuple(chunk):
            missing = [(0, c - n) for c, n in zip(chunk, part.shape, strict=True)]
            part = np.pad(part, missing, constant_values=fill)  # type: ignore[call-overload]
        yield place, part


def _sharded(chunks: Iterable[tuple[tuple[int, ...], np.ndarray]], layout: Layout) -> list[bytes]:
    """Chunks one behind the other, then the offset and length of each, then the checksum of these."""
    index = np.full((*layout.grid, 2), NO_CHUNK, "<u8")
    parts = []
    offset = 0
    for place, values in chunks:
        part = layout.encode(values)
        length = sum(map(len, part))
        index[place] = offset, length
        offset += length
        parts += part
    return [*parts, index.tobytes(), checksum(index.tobytes())]
