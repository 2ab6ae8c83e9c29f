"""Chunks read and written here are zarr's own: equal values whichever of the two reads, and no more bytes."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore, MemoryStore

from attnscope.arrays import COMPRESSORS
from attnscope.chunks import BrokenChunk, read_part
from attnscope.whole_shards import write_shard

SHAPE, CHUNKS, SHARDS = (5, 3, 7, 9), (2, 1, 3, 9), (4, 1, 9, 9)


def made(
    store: LocalStore | MemoryStore, dtype: str = "float16", sharded: bool = True
) -> tuple[zarr.Array, np.ndarray]:
    """An array whose shards reach over its end, and its values; one shard was never written."""
    values = np.random.default_rng(0).random(SHAPE).astype(dtype)
    array = zarr.create_array(
        store, name="a", shape=SHAPE, dtype=dtype, chunks=CHUNKS, shards=SHARDS if sharded else None,
        compressors=COMPRESSORS, fill_value=np.nan,
    ).with_config({"write_empty_chunks": True})  # fmt: skip
    array[:] = values
    array[4:, 2] = values[4:, 2] = np.nan
    return array, values


@pytest.fixture(scope="module", params=["folder", "memory", "unsharded"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[zarr.Array, np.ndarray]:
    store = MemoryStore() if request.param == "memory" else LocalStore(tmp_path_factory.mktemp("store"))
    return made(store, sharded=request.param != "unsharded")


@settings(max_examples=60, deadline=None)
@given(st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)) for n in SHAPE)))
def test_a_part_is_what_numpy_gives(both: tuple[zarr.Array, np.ndarray], spans: tuple[tuple[int, int], ...]) -> None:
    array, values = both
    index = tuple(slice(min(span), max(span)) for span in spans)
    np.testing.assert_array_equal(read_part(array, index), values[index])
    np.testing.assert_array_equal(read_part(array, index[0]), values[index[0]])


def test_a_shard_that_was_never_written_is_the_fill_value(tmp_path: Path) -> None:
    array, _ = made(LocalStore(tmp_path))
    (tmp_path / "a/c/1/0/0/0").unlink()
    assert np.isnan(read_part(array, (slice(4, 5), slice(0, 1)))).all()


@pytest.mark.parametrize("at", [3, -40, -2])
def test_a_flipped_byte_is_never_read_as_a_value(tmp_path: Path, at: int) -> None:
    array, _ = made(LocalStore(tmp_path))
    path = tmp_path / "a/c/0/1/0/0"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(BrokenChunk, match="attnscope check"):
        read_part(array, (slice(0, 4), slice(1, 2)))


def test_only_the_chunks_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnscope import chunks

    array, values = made(LocalStore(tmp_path))
    sizes: list[int] = []
    of_file = chunks._of_file

    def spy(path: Path, part: object) -> object:
        found = of_file(path, part)  # type: ignore[arg-type]
        sizes.append(len(found) if found is not None else 0)
        return found

    monkeypatch.setattr(chunks, "_of_file", spy)
    np.testing.assert_array_equal(read_part(array, (slice(0, 1), slice(0, 1), slice(0, 1))), values[:1, :1, :1])
    index, chunk = sizes
    assert index == 2 * 3 * 16 + 4
    assert chunk < (tmp_path / "a/c/0/0/0/0").stat().st_size / 4


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_as_a_whole_shard_zarr_reads(tmp_path: Path, dtype: str) -> None:
    array, values = made(LocalStore(tmp_path), dtype)
    values = np.arange(values.size, dtype=dtype).reshape(SHAPE)
    for sample in (0, 4):
        for layer in range(3):
            assert write_shard(array, (sample, layer, 0, 0), values[sample : sample + 4, layer])
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(read_part(array, slice(None)), values)
    assert not write_shard(array, (1, 0, 0, 0), values[1:5, 0])
    assert not write_shard(array, (0, 0, 0, 0), values[:3, 0])
