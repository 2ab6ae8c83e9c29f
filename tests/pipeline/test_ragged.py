"""Ragged samples: stored end to end without padding, behind the same view as every other form."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.checking import check_run
from attnscope.extraction import extract
from attnscope.quantities import ExtractSpec
from attnscope.repairing import repair_run
from attnscope.run import Run, open_run
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES

WORDS = ["a", "red", "green", "blue", "cat", "dog", "circle", "square", "on", "left", "of", "the"]
LENGTHS = (13, 1, 3, 2, 6, 1, 2, 5, 1, 4, 3)
SITE = "text.self"


def texts() -> list[Sample]:
    """Eleven texts, one of them far longer than the others."""
    generator = np.random.default_rng(0)
    return [Sample(f"s{i}", text=" ".join(generator.choice(WORDS, n))) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def both(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Run]:
    """The attention of a run that holds it dense, and a ragged run of the same in blocks of eight."""
    folder = tmp_path_factory.mktemp("ragged")
    found = []
    for form in ("dense", "ragged"):
        spec = ExtractSpec(form=form, encoding="exact")
        found.append(extract(tiny_bert, texts(), spec=spec, batch_size=4, out=folder / form))
    assert found[1].plan.sites[SITE].form == "ragged"
    return found[0].attention(SITE).values, found[1]


def test_it_is_chosen_where_most_of_the_padded_form_is_padding(tiny_bert: Path) -> None:
    assert extract(tiny_bert, texts()).plan.sites[SITE].form == "ragged"
    alike = [Sample(str(i), text=" ".join(WORDS[: 8 + i % 2])) for i in range(4)]
    assert extract(tiny_bert, alike).plan.sites[SITE].form == "dense"
    assert extract(tiny_bert, alike, form="ragged").plan.sites[SITE].form == "ragged"
    assert extract(tiny_bert, texts(), form="dense").plan.sites[SITE].form == "dense"


def test_the_view_is_that_of_the_dense_form(both: tuple[np.ndarray, Run]) -> None:
    dense, ragged = both
    attention = ragged.attention(SITE)
    assert attention.dims == ("sample", "layer", "head", "query_token", "key_token")
    assert float(attention.attrs["bound"]) == 2e-6
    np.testing.assert_array_equal(attention.values, dense)
    assert np.isnan(dense).mean() > 0.5
    assert "attention_values" not in ragged.quantities(SITE)


def _positions(length: int) -> st.SearchStrategy[int | slice | list[int]]:
    numbers = st.integers(-length, length - 1)
    slices = st.slices(length).filter(lambda s: len(range(length)[s]) > 0)
    return st.one_of(numbers, slices, st.lists(numbers, min_size=1, max_size=4), st.just(slice(None)))


@settings(max_examples=40, deadline=None)
@given(
    sample=_positions(11), layer=st.sampled_from([0, 1, slice(None), [1, 0]]), head=_positions(4), query=_positions(15),
    key=_positions(15),
)  # fmt: skip
def test_select_equals_numpy_indexing(
    both: tuple[np.ndarray, Run], sample: Any, layer: Any, head: Any, query: Any, key: Any
) -> None:
    dense, ragged = both
    index = {"sample": sample, "layer": layer, "head": head, "query_token": query, "key_token": key}
    attention = ragged.attention(SITE)
    expected = xr.DataArray(dense, dims=attention.dims).isel(index)
    np.testing.assert_array_equal(attention.isel(index).values, expected.values)
    chosen = ragged.select(SITE, sample=sample, layer=layer, head=head, query=query, key=key)
    np.testing.assert_array_equal(chosen.values, expected.values)


def test_it_is_indexed_point_by_point_pickled_and_read_by_dask_threads(both: tuple[np.ndarray, Run]) -> None:
    dense, ragged = both
    attention = ragged.attention(SITE)
    points = {name: xr.DataArray([0, 3, 1], dims="point") for name in ("sample", "head", "query_token", "key_token")}
    expected = xr.DataArray(dense, dims=attention.dims).isel(points)
    np.testing.assert_array_equal(attention.isel(points).values, expected.values)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(attention)).values, dense)
    np.testing.assert_array_equal(attention.chunk({"sample": 3, "query_token": 4}).compute(num_workers=4), dense)
    np.testing.assert_array_equal(attention.chunk({}).compute(), dense)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("encoding", ["float16", "compact", "exact"])
def test_padding_on_either_side_is_left_out(side: str, encoding: str, padded_decoder: Callable[[str], Any]) -> None:
    model, inputs = padded_decoder(side)
    dense, ragged = (
        extract(model, [inputs], spec=ExtractSpec(form=form, encoding=encoding, summaries=True), batch_size=3)
        for form in ("dense", "ragged")
    )
    np.testing.assert_array_equal(dense.attention(SITE).values, ragged.attention(SITE).values)
    kinds = ragged.tokens("text")["kind"].values
    lengths = (kinds != KIND_CODES["padding"]).sum(axis=1)
    stored = ragged._array(f"{SITE}/attention_values")[0, 0]
    unfilled = (stored == 0) if encoding == "compact" else np.isnan(stored)
    assert (~unfilled).sum() <= (lengths**2).sum()
    assert not check_run(ragged).faults
    for name in ("entropy", "top_key", "kind_mass"):
        np.testing.assert_array_equal(dense.array(SITE, name).values, ragged.array(SITE, name).values)


@pytest.mark.parametrize("broken", ["flipped byte", "lost shard", "lost chunk", "wrong offset"])
def test_what_is_broken_is_named_and_repaired(broken: str, both: tuple[np.ndarray, Run], tmp_path: Path) -> None:
    _, sound = both
    folder = tmp_path / "run.zarr"
    shutil.copytree(sound.location, folder)
    run = open_run(folder, read_only=False)
    shards = sorted(path for path in (folder / SITE / "attention_values" / "c").rglob("*") if path.is_file())
    assert len(shards) == 2 * 2
    if broken == "flipped byte":
        content = bytearray(shards[1].read_bytes())
        content[len(content) // 3] ^= 4
        shards[1].write_bytes(content)
    elif broken == "lost shard":
        shards[1].unlink()
    elif broken == "lost chunk":
        array = run._array(f"{SITE}/attention_values").with_config({"write_empty_chunks": False})
        elements = run.plan.sites[SITE].block_elements
        array[0, :, elements : 2 * elements] = np.nan
    else:
        run._array(f"{SITE}/attention_offset")[9] -= 1
    found = check_run(open_run(folder))
    assert found.faults
    assert {at for fault in found.faults for at in fault.samples} <= {8, 9, 10}
    repair_run(open_run(folder, read_only=False), found)
    assert [list(block) for block in open_run(folder).missing()] == [[8, 9, 10]]
    assert np.isnan(open_run(folder).attention(SITE)[8:].values).all()


@pytest.fixture(scope="module")
def padded_decoder() -> Callable[[str], Any]:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name))

    def padded(side: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        ids = torch.randint(5, 50, (4, 9), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        for row, length in enumerate((9, 6, 4, 1)):
            mask[row, slice(length, None) if side == "right" else slice(0, 9 - length)] = 0
        return model.eval(), {"input_ids": ids, "attention_mask": mask}

    return padded


def test_a_run_grows_without_moving_what_it_has(both: tuple[np.ndarray, Run], tiny_bert: Path, tmp_path: Path) -> None:
    dense, _ = both
    out = tmp_path / "run.zarr"
    for count in (2, 5, 11):
        extract(tiny_bert, texts()[:count], form="ragged", encoding="exact", batch_size=4, out=out, grow=True)
        run = open_run(out)
        assert run.plan.unit > 2
        tokens = run.plan.sites[SITE].query_tokens
        assert not check_run(run).faults
        found = run.attention(SITE).values
        shared = min(tokens, dense.shape[-1])
        np.testing.assert_allclose(found[..., :shared, :shared], dense[:count, ..., :shared, :shared], atol=2e-6)
        assert np.isnan(found[..., shared:]).all()


def test_what_was_cut_short_is_finished_to_the_same_values(
    both: tuple[np.ndarray, Run], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, _ = both
    out = tmp_path / "run.zarr"
    commit = Run.commit

    def refuse_the_second(run: Run, block: range, status: np.ndarray) -> None:
        if block.start:
            raise KeyboardInterrupt
        commit(run, block, status)

    monkeypatch.setattr(Run, "commit", refuse_the_second)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            extract(tiny_bert, texts(), form="ragged", encoding="exact", batch_size=4, out=out)
    begun = open_run(out)
    np.testing.assert_array_equal(begun.attention(SITE)[:8].values, dense[:8])
    assert (begun._array(f"{SITE}/attention_offset")[:] >= 0).all()
    assert np.isnan(begun.attention(SITE)[8:].values).all()
    monkeypatch.undo()
    finished = extract(tiny_bert, texts(), form="ragged", encoding="exact", batch_size=4, out=out)
    np.testing.assert_array_equal(finished.attention(SITE).values, dense)
    assert not check_run(finished).faults


def test_plain_xarray_finds_a_sample_by_its_offset(both: tuple[np.ndarray, Run]) -> None:
    dense, ragged = both
    tree = xr.open_datatree(ragged.location, engine="zarr", consolidated=False)
    site = tree[SITE].to_dataset()
    for sample, length in enumerate(LENGTHS):
        tokens = int((tree["text"]["kind"][sample] != KIND_CODES["padding"]).sum())
        assert tokens == length + 2
        begin = int(site["attention_offset"][sample])
        values = site["attention_values"].isel(element=slice(begin, begin + tokens**2)).values
        np.testing.assert_array_equal(values.reshape(2, 4, tokens, tokens), dense[sample, :, :, :tokens, :tokens])
