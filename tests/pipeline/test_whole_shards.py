"""Shards that are encoded here are what zarr reads as its own."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import zarr
import zarr.codecs
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore

from attnscope import whole_shards
from attnscope.arrays import COMPRESSORS, ArrayPlan, create_array
from attnscope.quantities import quantity
from attnscope.whole_shards import OpenShard, open_shard, write_shard

SITE = quantity("site", "attention")
BLOSC = (zarr.codecs.BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=2), zarr.codecs.Crc32cCodec())
SHAPE, CHUNK, SHARD = (8, 3, 4, 5, 6), (1, 1, 2, 5, 6), (4, 1, 4, 5, 6)


def made(
    dtype: str = "float16",
    compressors: Sequence[object] = COMPRESSORS,
    shards: tuple[int, ...] | None = SHARD,
    chunks: tuple[int, ...] = CHUNK,
    store: Store | None = None,
) -> zarr.Array:
    return zarr.create_array(
        store or MemoryStore(), name="site/attention", shape=SHAPE, dtype=dtype, chunks=chunks, shards=shards,
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


def opened(array: zarr.Array, expected: int = 4, first: tuple[int, ...] = (4, 2, 0, 0, 0)) -> OpenShard:
    shard = open_shard(array, first, 4, expected, np.dtype("float16"))
    assert shard is not None
    return shard


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path) if request.param == "folder" else MemoryStore()


def test_samples_that_come_one_by_one_in_any_order_are_what_comes_together(store: Store) -> None:
    array, given = made(store=store), values()[:, 0]
    shard = opened(array)
    shard.add([3], given[3:])
    shard.add([1, 0], given[[1, 0]])
    assert not array[:].any()
    shard.add([2], given[2:3])
    np.testing.assert_array_equal(array[4:8, 2], given)
    assert not array[:4].any()
    assert not array[:, :2].any()


def test_shorter_and_missing_samples_leave_the_fill_value(store: Store) -> None:
    array = made(store=store)
    given = 1 + values()[:, 0]
    shard = opened(array, expected=3)
    shard.add([2], given[2:3, :, :3])
    shard.add([0], None)
    shard.add([3], given[3:])
    wanted = np.zeros_like(given)
    wanted[2, :, :3], wanted[3] = given[2, :, :3], given[3]
    np.testing.assert_array_equal(array[4:8, 2], wanted)


@pytest.mark.parametrize("at_once", [0, 2**22])
@pytest.mark.parametrize("cut", [(4, 4, 5, 6), (4, 3, 4, 5), (1, 1, 1, 1), (2, 4, 4, 6)])
def test_values_are_filled_up_to_whole_chunks(
    cut: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once or, where they are many, part by part."""
    monkeypatch.setattr(whole_shards, "_FILLED_AT_ONCE", at_once)
    array = made(chunks=(1, 1, 2, 2, 4), shards=(4, 1, 4, 6, 8))
    given = (1 + values()[:, 0])[tuple(slice(n) for n in cut)]
    shard = opened(array, expected=len(given))
    shard.add(range(len(given)), given)
    wanted = np.zeros((4, 4, 5, 6), np.float16)
    wanted[tuple(slice(n) for n in cut)] = given
    np.testing.assert_array_equal(array[4:8, 2], wanted)


def test_an_abandoned_shard_leaves_nothing(tmp_path: Path) -> None:
    array, given = made(store=LocalStore(tmp_path)), values()[:, 0]
    before = sorted(tmp_path.rglob("*"))
    shard = opened(array)
    shard.add([0], given[:1])
    assert len(sorted(tmp_path.rglob("*.partial"))) == 1
    shard.abandon()
    shard.add([1, 2, 3], given[1:])
    assert [p for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [p for p in before if p.is_file()]


@pytest.mark.parametrize(
    ("array", "first", "samples", "dtype"),
    [
        (made(), (2, 0, 0, 0, 0), 4, "float16"),
        (made(), (0, 0, 0, 0, 0), 2, "float16"),
        (made(), (0, 0, 0, 0, 0), 4, "float32"),
        (made(chunks=(2, 1, 2, 5, 6)), (0, 0, 0, 0, 0), 4, "float16"),
        (made(shards=None, chunks=SHARD), (0, 0, 0, 0, 0), 4, "float16"),
    ],
    ids=["begins inside a shard", "a part", "another type", "several samples in a chunk", "no shard"],
)
def test_samples_that_can_not_be_written_alone(
    array: zarr.Array, first: tuple[int, ...], samples: int, dtype: str
) -> None:
    assert open_shard(array, first, samples, samples, np.dtype(dtype)) is None


def test_an_object_is_whole_where_the_system_takes_less_than_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does near the end of a disk, and always on systems without gathered writing."""
    together, write = os.writev, os.write
    monkeypatch.setattr(os, "writev", lambda file, parts: together(file, parts[: len(parts) // 2]))
    monkeypatch.setattr(os, "write", lambda file, part: write(file, part[: 1 + len(part) // 2]))
    array, given = made(store=LocalStore(tmp_path)), values()[:, 0]
    assert write_shard(array, (4, 2, 0, 0, 0), given)
    np.testing.assert_array_equal(array[4:8, 2], given)
