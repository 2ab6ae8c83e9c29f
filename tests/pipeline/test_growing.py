"""Runs that grow: only what is new is extracted, in the run's own order, and a crash in the middle loses nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

import attnscope.blocks
from attnscope.checking import check_run
from attnscope.extraction import extract
from attnscope.quantities import ExtractSpec
from attnscope.run import EXTRACTED, LEFT_OUT, MISSING, Run, RunError, open_run
from attnscope.samples import Sample

SPEC = ExtractSpec(frozenset({"attention", "attention_relevance", "score"}), target="cls_norm", encoding="exact")
WORDS = ("the", "dog", "sees", "a", "cat")
UNIT = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnscope.plan._UNIT_LIMIT", UNIT)


def texts(count: int, start: int = 0) -> list[Sample]:
    return [Sample(f"t{i}", text=" ".join(WORDS[(i + j) % 5] for j in range(3 + i % 3))) for i in range(start, count)]


def grown(model: Path, samples: Sequence[Sample], out: Path, grow: bool = True) -> Run:
    extract(model, samples, out=out, spec=SPEC, grow=grow, batch_size=1)
    return open_run(out)


def noted_blocks(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The blocks that are extracted from now on."""
    blocks: list[range] = []
    whole = attnscope.blocks._extract_block

    def noted(job: object, block: range) -> tuple[int, int]:
        blocks.append(block)
        return whole(job, block)

    monkeypatch.setattr(attnscope.blocks, "_extract_block", noted)
    return blocks


def assert_same_values(mine: Run, theirs: Run) -> None:
    """All stored values are equal, sample by sample, and the runs are sound."""
    assert mine.sample_ids == theirs.sample_ids
    np.testing.assert_array_equal(mine.status, theirs.status)
    for site in theirs.sites:
        for name in theirs.quantities(site):
            xr.testing.assert_equal(mine.array(site, name).load(), theirs.array(site, name).load())
    xr.testing.assert_equal(mine.outputs.load(), theirs.outputs.load())
    xr.testing.assert_equal(mine.tokens("text").load(), theirs.tokens("text").load())
    xr.testing.assert_equal(mine.samples.load(), theirs.samples.load())
    assert check_run(mine).faults == ()


def test_a_grown_run_equals_one_made_at_once_and_extracts_only_what_is_new(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = grown(tiny_bert, texts(11), tmp_path / "whole.zarr")
    grown(tiny_bert, texts(6), tmp_path / "run.zarr")
    blocks = noted_blocks(monkeypatch)
    run = grown(tiny_bert, texts(11), tmp_path / "run.zarr")
    # The second block was half full: its new half alone is extracted.
    assert blocks == [range(6, 8), range(8, 11)]
    assert run.missing() == []
    assert_same_values(run, whole)
    grown(tiny_bert, texts(11), tmp_path / "run.zarr")
    assert len(blocks) == 2


def test_samples_are_known_by_their_names_wherever_they_are_listed(tiny_bert: Path, tmp_path: Path) -> None:
    first, later = texts(3), texts(5)
    grown(tiny_bert, first, tmp_path / "run.zarr")
    run = grown(tiny_bert, [later[4], *first[1:], later[3]], tmp_path / "run.zarr")
    assert run.sample_ids == ["t0", "t1", "t2", "t4", "t3"]
    assert (run.status == EXTRACTED).all()
    alone = grown(tiny_bert, [later[4]], tmp_path / "alone.zarr", grow=False).attention("text.self")
    tokens = alone.sizes["key_token"]
    added = run.attention("text.self").sel(sample="t4")[..., :tokens, :tokens]
    np.testing.assert_array_equal(added, alone[0])


def test_a_run_does_not_grow_unasked(tiny_bert: Path, tmp_path: Path) -> None:
    grown(tiny_bert, texts(3), tmp_path / "run.zarr")
    with pytest.raises(RunError, match="other samples than these; choose another place, or let it grow"):
        grown(tiny_bert, texts(4), tmp_path / "run.zarr", grow=False)


@pytest.mark.parametrize("resized", [0, 1, 4, 9])
def test_killed_while_growing_the_run_is_what_it_was(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resized: int
) -> None:
    before = grown(tiny_bert, texts(6), tmp_path / "run.zarr")
    attention = before.attention("text.self").load()
    resize = zarr.Array.resize
    done: list[str] = []

    def killed(array: zarr.Array, shape: tuple[int, ...]) -> None:
        if len(done) == resized:
            raise KeyboardInterrupt
        done.append(array.path)
        resize(array, shape)

    monkeypatch.setattr(zarr.Array, "resize", killed)
    with pytest.raises(KeyboardInterrupt):
        grown(tiny_bert, texts(9), tmp_path / "run.zarr")
    monkeypatch.undo()
    monkeypatch.setattr("attnscope.plan._UNIT_LIMIT", UNIT)
    assert len(done) == resized
    run = open_run(tmp_path / "run.zarr")
    assert run.sample_ids == before.sample_ids
    assert run.missing() == []
    xr.testing.assert_equal(run.attention("text.self").load(), attention)
    xr.testing.assert_equal(run.samples.load(), before.samples.load())
    assert run.tokens("text").sizes["sample"] == run.outputs.sizes["sample"] == 6
    # The source has shrunk meanwhile: what was made room for and never came leaves no trace.
    run = grown(tiny_bert, texts(8), tmp_path / "run.zarr")
    assert_same_values(run, grown(tiny_bert, texts(8), tmp_path / "whole.zarr"))


def test_a_cut_short_growth_is_finished_by_the_same_call(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown(tiny_bert, texts(3), tmp_path / "run.zarr")
    whole = attnscope.blocks._extract_block

    def killed(job: object, block: range) -> tuple[int, int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(attnscope.blocks, "_extract_block", killed)
    with pytest.raises(KeyboardInterrupt):
        grown(tiny_bert, texts(7), tmp_path / "run.zarr")
    monkeypatch.setattr(attnscope.blocks, "_extract_block", whole)
    run = open_run(tmp_path / "run.zarr")
    assert list(run.status) == [EXTRACTED] * 3 + [MISSING] * 4
    assert np.isfinite(run.attention("text.self")[:3, :, :, 0, 0]).all()
    assert check_run(run).faults == ()
    run = grown(tiny_bert, texts(7), tmp_path / "run.zarr")
    assert_same_values(run, grown(tiny_bert, texts(7), tmp_path / "whole.zarr"))


def test_a_sample_that_is_longer_than_the_run_has_room_for_is_left_out_by_name(tiny_bert: Path, tmp_path: Path) -> None:
    grown(tiny_bert, [Sample("short", text="the dog")], tmp_path / "run.zarr")
    long = Sample("long", text=" ".join(["dog"] * 12))
    run = grown(tiny_bert, [Sample("short", text="the dog"), Sample("twice", text="the dog sees a cat"), long],
                tmp_path / "run.zarr")  # fmt: skip
    assert list(run.status) == [EXTRACTED, EXTRACTED, LEFT_OUT]
    assert str(run.samples["reason"].values[2]) == (
        "it has 14 tokens of the stream 'text', and the run was made for at most 8"
    )


def test_a_sample_that_left_the_source_stays_in_the_run(tiny_bert: Path, tmp_path: Path) -> None:
    grown(tiny_bert, texts(3), tmp_path / "run.zarr")
    run = grown(tiny_bert, texts(5, start=2), tmp_path / "run.zarr")
    assert run.sample_ids == ["t0", "t1", "t2", "t3", "t4"]
    assert (run.status == EXTRACTED).all()
