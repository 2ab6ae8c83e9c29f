"""Shards that are encoded here are what zarr reads as its own."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import zarr
import zarr.codecs
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from attnscope.arrays import COMPRESSORS, ArrayPlan, create_array
from attnscope.quantities import quantity
from attnscope.whole_shards import write_shard

SITE = quantity("site", "attention")
BLOSC = (zarr.codecs.BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=2), zarr.codecs.Crc32cCodec())
SHAPE, CHUNK, SHARD = (8, 3, 4, 5, 6), (1, 1, 2, 5, 6), (4, 1, 4, 5, 6)


def made(
    dtype: str = "float16",
    compressors: Sequence[object] = COMPRESSORS,
    shards: tuple[int, ...] | None = SHARD,
    chunks: tuple[int, ...] = CHUNK,
) -> zarr.Array:
    return zarr.create_array(
        MemoryStore(), name="site/attention", shape=SHAPE, dtype=dtype, chunks=chunks, shards=shards,
        compressors=compressors, fill_value=0,
    )  # fmt: skip


def values(dtype: str = "float16") -> np.ndarray:
    drawn = np.random.default_rng(0).integers(0, 200, SHARD)
    return (drawn / 199 if dtype.startswith("float") else drawn).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "uint16", "int32", "bool"])
@pytest.mark.parametrize("compressors", [COMPRESSORS, COMPRESSORS[1:], BLOSC, ()], ids=["zstd", "crc", "blosc", "none"])
@pytest.mark.parametrize("sharded", [True, False])
def test_zarr_reads_the_values_of_a_whole_shard(dtype: str, compressors: Sequence[object], sharded: bool) -> None:
    array = made(dtype, compressors) if sharded else made(dtype, compressors, None, SHARD)
    assert write_shard(array, (4, 2, 0, 0, 0), values(dtype)[:, 0])
    read = zarr.open_array(array.store, path="site/attention", mode="r")
    np.testing.assert_array_equal(read[4:8, 2], values(dtype)[:, 0])
    assert not read[:4].any()
    assert not read[:, :2].any()


def test_an_object_is_as_large_as_the_one_that_zarr_writes() -> None:
    mine, theirs = made(), made()
    assert write_shard(mine, (0, 1, 0, 0, 0), values())
    theirs[0:4, 1:2] = values()
    found = [{key: len(content) for key, content in a.store._store_dict.items()} for a in (mine, theirs)]
    assert found[0] == found[1]


@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 600),
    st.integers(1, 600),
    st.sampled_from(["float16", "float32", "uint8"]),
)
def test_a_bit_shuffle_reaches_every_weight_of_a_chunk(
    unit: int, heads: int, queries: int, keys: int, dtype: str
) -> None:
    """Blosc leaves what is behind the last multiple of 8 numbers as it is, of a small chunk all of it."""
    root = zarr.create_group(MemoryStore())
    create_array(root, ArrayPlan("attention", SITE, (3 * unit, 2, heads, queries, keys), dtype), unit)
    array = root["attention"]
    assert isinstance(array, zarr.Array)
    assert math.prod(array.chunks) % 8 == 0
    shard = array.shards or array.chunks
    assert all(s % c == 0 for s, c in zip(shard, array.chunks, strict=True))
    assert shard[0] == unit
    assert shard[3] >= queries
    assert math.prod(array.chunks) * array.dtype.itemsize <= 2**18 or array.chunks[:4] == (1, 1, 1, min(8, queries))


def test_a_changed_bit_in_any_chunk_is_seen() -> None:
    array = made()
    assert write_shard(array, (0, 0, 0, 0, 0), values())
    key = next(k for k in array.store._store_dict if "/c/" in k)
    whole = array.store._store_dict[key].to_bytes()
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        broken = bytearray(whole)
        broken[place] ^= 4
        array.store._store_dict[key] = array.store._store_dict[key].from_bytes(bytes(broken))
        with pytest.raises((ValueError, RuntimeError)):
            array[0:4, 0]


@pytest.mark.parametrize(
    ("array", "first", "given"),
    [
        (made(), (2, 0, 0, 0, 0), values()),
        (made(), (0, 0, 0, 0, 0), values("float32")),
        (made(), (0, 0, 0, 0, 0), values()[:2]),
        (made(compressors=zarr.codecs.GzipCodec()), (0, 0, 0, 0, 0), values()),
    ],
    ids=["begins inside a shard", "another type", "a part", "another codec"],
)
def test_what_is_not_a_whole_shard_of_ours_is_left_to_zarr(
    array: zarr.Array, first: tuple[int, ...], given: np.ndarray
) -> None:
    assert not write_shard(array, first, given)
    assert not array[:].any()
