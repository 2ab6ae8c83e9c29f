"""Whole shards, encoded here and written as one object each.

zarr 3.1 spends about twice as long on copies and on hops between threads as zstd does on the values (measured: 30 ms
for a shard of 7 MB, of which 11 ms are compression and checksum). What extraction writes is always a whole block of a
layer, so that no chunk has to be read, merged or looked up. The objects are those that the Zarr v3 specification of
`sharding_indexed` and of the codecs describes, and zarr reads them as it reads its own.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc, Zstd

from attnscope.stores import write

_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
_NO_CHUNK = 2**64 - 1
_Encoder = Callable[[np.ndarray], list[bytes]]
_Codec = Mapping[str, object]


def write_shard(array: zarr.Array, first: Sequence[int], values: np.ndarray) -> bool:
    """Write the values of one whole shard that begins at the element `first`; False for what zarr has to write.

    That are values of another type or of a part of what the shard has in the array, and codecs not known here. Along
    the last dimension, values may be those of the first chunks alone: the others are then missing.
    """
    shape = array.shards or array.chunks
    encoding = _encoding(array)
    *ahead, last = (min(s, n - f) for f, s, n in zip(first, shape, array.shape, strict=True))
    if encoding is None or values.dtype != array.dtype or any(f % s for f, s in zip(first, shape, strict=True)):
        return False
    encode, chunk = encoding
    length = values.size // math.prod(ahead)
    if values.size % math.prod(ahead) or not (length == last or (0 < length < last and length % chunk[-1] == 0)):
        return False
    chunks = _cut(values.reshape(*ahead, length), chunk, array.fill_value)
    if array.shards:
        parts = _sharded(chunks, tuple(s // c for s, c in zip(shape, chunk, strict=True)), encode)
    else:
        ((_, only),) = chunks
        parts = encode(only)
    key = array.metadata.encode_chunk_key(tuple(f // s for f, s in zip(first, shape, strict=True)))
    write(array.store, f"{array.path}/{key}", b"".join(parts))
    return True


def _cut(values: np.ndarray, chunk: Sequence[int], fill: object) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Chunks by their place, those at the end filled up."""
    for place in product(*(range(-(-n // c)) for n, c in zip(values.shape, chunk, strict=True))):
        part = values[tuple(slice(p * c, (p + 1) * c) for p, c in zip(place, chunk, strict=True))]
        if part.shape != tuple(chunk):
            missing = [(0, c - n) for c, n in zip(chunk, part.shape, strict=True)]
            part = np.pad(part, missing, constant_values=fill)  # type: ignore[call-overload]
        yield place, part


def _sharded(
    chunks: Iterable[tuple[tuple[int, ...], np.ndarray]], grid: tuple[int, ...], encode: _Encoder
) -> list[bytes]:
    """Chunks one behind the other, then the offset and length of each, then the checksum of these."""
    index = np.full((*grid, 2), _NO_CHUNK, "<u8")
    parts = []
    offset = 0
    for place, values in chunks:
        part = encode(values)
        length = sum(map(len, part))
        index[place] = offset, length
        offset += length
        parts += part
    return [*parts, index.tobytes(), _checksum(index.tobytes())]


def _encoding(array: zarr.Array) -> tuple[_Encoder, tuple[int, ...]] | None:
    """How a chunk becomes pieces of bytes, and its shape; None where a codec is not one that attnscope writes."""
    codecs: Sequence[_Codec] = array.metadata.to_dict()["codecs"]  # type: ignore[assignment]
    if codecs[0]["name"] == "sharding_indexed":
        configuration: Mapping[str, Sequence[_Codec]] = codecs[0]["configuration"]  # type: ignore[assignment]
        index = [codec["name"] for codec in configuration["index_codecs"]]
        if len(codecs) > 1 or index != ["bytes", "crc32c"] or configuration.get("index_location", "end") != "end":
            return None
        codecs = configuration["codecs"]
    is_checked = codecs[-1]["name"] == "crc32c"
    steps = list(_compressors(codecs[: len(codecs) - is_checked]))
    if None in steps:
        return None

    def encode(values: np.ndarray) -> list[bytes]:
        encoded: np.ndarray | bytes = np.ascontiguousarray(values)
        for step in steps:
            encoded = step(encoded)  # type: ignore[misc]
        content = encoded if isinstance(encoded, bytes) else encoded.tobytes()
        return [content, _checksum(content)] if is_checked else [content]

    return encode, array.chunks


def _compressors(codecs: Sequence[_Codec]) -> Iterator[Callable[[np.ndarray | bytes], bytes] | None]:
    for number, codec in enumerate(codecs):
        options: Mapping[str, object] = codec.get("configuration", {})  # type: ignore[assignment]
        match codec["name"]:
            # Values lie in memory as they are stored; one byte has no order.
            case "bytes" if number == 0 and options.get("endian", "little") == "little":
                continue
            case "zstd":
                yield Zstd(options["level"], checksum=options["checksum"]).encode
            case "blosc":
                shuffle = _SHUFFLES[str(options["shuffle"])]
                sizes = {name: options[name] for name in ("blocksize", "typesize")}
                yield Blosc(options["cname"], options["clevel"], shuffle, **sizes).encode
            case _:
                yield None


def _checksum(content: bytes) -> bytes:
    return google_crc32c.value(content).to_bytes(4, "little")
