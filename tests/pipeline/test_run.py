"""The run: labelled, lazy, the same numbers in every form, and readable without attnscope."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import attnscope
from attnscope import chunks
from attnscope.attention_array import to_float32
from attnscope.checking import check_run
from attnscope.extraction import extract
from attnscope.loading import ModelError
from attnscope.plan import unit_for
from attnscope.quantities import QUANTITIES, ExtractSpec, union
from attnscope.run import MissingQuantity, Run, RunError, open_run
from attnscope.testing import make_run

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def wide(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name))
    return model.eval()


def decoders() -> dict[str, torch.nn.Module]:
    grouped = {**SMALL, **IDS, "num_key_value_heads": 2}
    return {
        "grouped heads": transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped)),
        "sliding window": transformers.MistralForCausalLM(transformers.MistralConfig(**grouped, sliding_window=3)),
        "softcap": transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**grouped, head_dim=8, attn_logit_softcapping=5.0, sliding_window=4)
        ),
        "sinks": transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**grouped, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
        ),
    }


def padded_inputs(side: str) -> dict[str, torch.Tensor]:
    """Four texts of 9, 6, 4 and 1 tokens."""
    ids = torch.randint(5, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 4, 1)):
        mask[row, slice(length, None) if side == "right" else slice(0, 9 - length)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["grouped heads", "sliding window", "softcap", "sinks"])
def test_factored_attention_is_the_dense_one(name: str, side: str) -> None:
    model = wide(decoders()[name])
    inputs = padded_inputs(side)
    dense = extract(model, [inputs], spec=ExtractSpec(encoding="exact", form="dense")).attention("text.self")
    factored = extract(model, [inputs], spec=ExtractSpec(form="factored")).attention("text.self")
    assert float(factored.attrs["bound"]) == 2e-6
    np.testing.assert_array_equal(np.isnan(dense.values), np.isnan(factored.values))
    np.testing.assert_allclose(factored.values, dense.values, atol=2e-6)
    assert not check_run(extract(model, [inputs], spec=ExtractSpec(form="dense"))).faults
    sums = dense.sum("key_token").values[~np.isnan(dense.values).all(-1)]
    assert (sums < 1 - 1e-3).any() if name == "sinks" else np.allclose(sums, 1, atol=1e-5)


def test_factored_attention_of_a_bfloat16_model_is_exact_for_its_query_and_key() -> None:
    model = wide(decoders()["grouped heads"]).to(torch.bfloat16)
    spec = ExtractSpec(frozenset({"attention", "query"}), form="factored", encoding="exact")
    factored = extract(model, [padded_inputs("right")], spec=spec)
    dense = extract(model, [padded_inputs("right")], spec=ExtractSpec(form="dense", encoding="exact"))
    assert factored._array("text.self/query").dtype == np.uint16
    assert factored.array("text.self", "query").dtype == np.float32
    np.testing.assert_allclose(factored.attention("text.self").values, dense.attention("text.self").values, atol=2e-6)


def test_a_bias_between_tokens_is_refused_in_factored_form() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50, decoder_start_token_id=0
    )
    model = wide(transformers.T5EncoderModel(config))
    with pytest.raises(ModelError, match="can't be stored factored"):
        extract(model, [padded_inputs("right")], spec=ExtractSpec(form="factored"))
    assert extract(model, [padded_inputs("right")]).plan.sites


@pytest.fixture(scope="module")
def both_forms() -> tuple[np.ndarray, Run, Run]:
    """The attention of a decoder as a numpy array, and runs that hold it dense and factored."""
    model = wide(decoders()["grouped heads"])
    dense, factored = (
        extract(model, [padded_inputs("right")], spec=ExtractSpec(encoding="exact", form=form))
        for form in ("dense", "factored")
    )
    return dense.attention("text.self").values, dense, factored


INDEXES = {
    "integers": {"sample": 1, "layer": -1, "head": 2, "query_token": 3, "key_token": 0},
    "slices": {"sample": slice(1, 3), "head": slice(None, None, 2), "key_token": slice(2, 7)},
    "negative steps": {"sample": slice(None, None, -1), "query_token": slice(8, 1, -3)},
    "outer lists": {"sample": [2, 0, 2], "layer": [1, 0], "head": [3, 0], "query_token": [5, 1], "key_token": [8, 4]},
    "empty": {"head": slice(2, 2)},
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_lazy_indexing_is_numpy_indexing(both_forms: tuple[np.ndarray, Run, Run], index: dict[str, object]) -> None:
    whole, *runs = both_forms
    reference = xr.DataArray(whole, dims=runs[0].attention("text.self").dims).isel(index)
    for run in runs:
        got = run.attention("text.self").isel(index)
        assert got.dims == reference.dims
        np.testing.assert_allclose(got.values, reference.values, atol=2e-6)


def _positions(length: int) -> st.SearchStrategy[int | slice | list[int]]:
    numbers = st.integers(-length, length - 1)
    slices = st.slices(length).filter(lambda s: len(range(length)[s]) > 0)
    return st.one_of(numbers, slices, st.lists(numbers, min_size=1, max_size=4), st.just(slice(None)))


@settings(max_examples=60, deadline=None)
@given(
    sample=_positions(4), layer=st.sampled_from([0, 1, slice(None), [1, 0]]), head=_positions(4), query=_positions(9),
    key=_positions(9),
)  # fmt: skip
def test_select_equals_numpy_indexing_in_both_forms(
    both_forms: tuple[np.ndarray, Run, Run], sample: Any, layer: Any, head: Any, query: Any, key: Any
) -> None:
    expected, *runs = both_forms
    for axis, choice in reversed(list(enumerate([sample, layer, head, query, key]))):
        expected = expected[(slice(None),) * axis + (choice,)]
    for run in runs:
        found = run.select("text.self", sample=sample, layer=layer, head=head, query=query, key=key)
        np.testing.assert_allclose(found.values, expected, atol=2e-6)


def test_pointwise_indexing(both_forms: tuple[np.ndarray, Run, Run]) -> None:
    whole, *runs = both_forms
    points = {d: xr.DataArray(v, dims="point") for d, v in {"sample": [0, 1, 2], "query_token": [8, 2, 3]}.items()}
    for run in runs:
        got = run.attention("text.self").isel(points)
        reference = xr.DataArray(whole, dims=run.attention("text.self").dims).isel(points)
        assert got.dims == reference.dims
        np.testing.assert_allclose(got.values, reference.values, atol=2e-6)


def test_lazy_attention_is_pickled_and_computed_under_dask(tmp_path: Path) -> None:
    pytest.importorskip("dask")
    run = make_run(location=str(tmp_path / "run.zarr"))
    attention = run.attention("vision.self")
    again = pickle.loads(pickle.dumps(attention))
    np.testing.assert_array_equal(again.values, attention.values)
    np.testing.assert_array_equal(attention.chunk(sample=1, layer=1).compute().values, attention.values)


def test_selecting_reads_only_the_chunks_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(6, layers=3, location=str(tmp_path / "run.zarr"))
    read: list[str] = []
    proper = zarr.storage.LocalStore.get

    async def spy(self: zarr.storage.LocalStore, key: str, *args: object, **kwargs: object) -> object:
        read.append(key)
        return await proper(self, key, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", spy)
    of_file = chunks._of_file

    def spy_on_files(path: Path, part: object) -> object:
        read.append(str(path.relative_to(tmp_path / "run.zarr")))
        return of_file(path, part)

    monkeypatch.setattr(chunks, "_of_file", spy_on_files)
    run.attention("vision.self").isel(sample=3, layer=1).load()
    found = [k for k in read if k.startswith("vision.self/attention/c/")]
    assert found == ["vision.self/attention/c/1/1/0/0/0"]


def test_samples_that_are_not_extracted_are_nan(tmp_path: Path) -> None:
    run = make_run(4, location=str(tmp_path / "run.zarr"))
    run.commit(range(2, 4), np.zeros(2))
    attention = run.attention("vision.self")
    assert np.isnan(attention.values[2:]).all()
    assert not np.isnan(attention.values[:2]).any()
    assert run.missing() == [range(2, 4)]


def test_plain_xarray_and_zarr_open_a_run(tmp_path: Path) -> None:
    run = make_run(location=str(tmp_path / "run.zarr"))
    tree = xr.open_datatree(tmp_path / "run.zarr", engine="zarr", consolidated=False)
    np.testing.assert_array_equal(tree["vision.self/attention"].values, run.attention("vision.self").values)
    assert tree["samples"].id.values.tolist() == ["sample-0", "sample-1", "sample-2"]
    assert tree["vision.self/attention"].dims == ("sample", "layer", "head", "query_token", "key_token")
    group = zarr.open_group(str(tmp_path / "run.zarr"), mode="r")
    assert group.attrs["schema"] == 1


def test_every_array_of_a_run_is_in_the_table(tmp_path: Path) -> None:
    location = tmp_path / "run.zarr"
    make_run(location=str(location))
    known = {(q.name, q.dims) for q in QUANTITIES}
    coordinates = {"layer", "head"}
    for path, node in zarr.open_group(str(location), mode="r").members(max_depth=None):
        if isinstance(node, zarr.Array) and (name := path.rsplit("/", 1)[-1]) not in coordinates:
            assert (name, node.metadata.dimension_names) in known, path


def test_what_is_not_a_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run"):
        open_run(tmp_path / "nowhere.zarr")
    with pytest.raises(RunError, match="not a run"):
        open_run(tmp_path)
    location = tmp_path / "run.zarr"
    make_run(location=str(location))
    header = json.loads((location / "zarr.json").read_text())
    header["attributes"]["schema"] = 7
    (location / "zarr.json").write_text(json.dumps(header))
    with pytest.raises(RunError, match="has schema 7, this attnscope reads 1"):
        open_run(location)


def test_asking_for_what_is_not_there_names_what_is() -> None:
    run = make_run()
    with pytest.raises(MissingQuantity, match=r"no site 'text\.self'; it has vision\.self"):
        run.attention("text.self")
    with pytest.raises(MissingQuantity, match="no stream 'text'"):
        run.tokens("text")
    with pytest.raises(MissingQuantity, match="does not hold 'value'"):
        run.array("vision.self", "value")
    with pytest.raises(MissingQuantity, match="no analysis 'nothing'; it has none"):
        run.analysis("nothing")
    with pytest.raises(MissingQuantity, match="needs 'attention_grad'"):
        run.missing(ExtractSpec(frozenset({"attention_grad"})))


def test_a_saved_analysis_comes_back_whole_and_replaces_the_one_before(tmp_path: Path) -> None:
    run = make_run(location=str(tmp_path / "run.zarr"))
    for value in (1.0, 2.0):
        variable = ("sample", np.full(3, value), {"long_name": "a", "units": "1"})
        run.save_analysis("mine", xr.Dataset({"a": variable}, coords={"sample": ["x", "y", "ü"]}, attrs={"k": 1}))
    again = open_run(run.location).analysis("mine")
    assert again.a.values.tolist() == [2.0] * 3
    assert again.sample.values.tolist() == ["x", "y", "ü"]
    assert again.attrs["k"] == 1


@pytest.mark.parametrize("beside_torch", [True, False])
def test_the_cast_of_halves_is_numpys(beside_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not beside_torch:
        monkeypatch.delitem(sys.modules, "torch")
    every_half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(to_float32(every_half), every_half.astype(np.float32))


def test_the_cast_of_bfloat16_is_torchs() -> None:
    floats = torch.randn(1000).to(torch.bfloat16)
    np.testing.assert_array_equal(to_float32(floats.view(torch.uint16).numpy()), floats.float().numpy())


def test_union_of_specs_holds_what_each_asks_for() -> None:
    one = ExtractSpec(frozenset({"attention_mean"}), layers=frozenset({1}), target=3)
    other = ExtractSpec(frozenset({"attention"}), layers=frozenset({0}), encoding="exact")
    both = union([one, other])
    assert both.covers(one)
    assert both.covers(other)
    assert both.quantities == {"attention"}
    assert both.encoding == "exact"
    assert ExtractSpec.from_json(both.to_json()) == both
    with pytest.raises(ValueError, match="one target"):
        union([one, ExtractSpec(target=4)])


@pytest.mark.parametrize(
    ("nbytes", "samples", "batch", "unit"),
    [(2**20, 1000, 1, 64), (2**25, 1000, 1, 4), (2**30, 10, 1, 1), (1, 3, 1, 2), (2**30, 99, 8, 8)],
)
def test_blocks_hold_about_128_mebibytes(nbytes: int, samples: int, batch: int, unit: int) -> None:
    assert unit_for(nbytes, samples, batch) == unit


def test_importing_the_core_is_enough_to_read(tmp_path: Path) -> None:
    run = make_run(location=str(tmp_path / "run.zarr"))
    assert attnscope.open_run(run.location).attention("vision.self").sel(layer=1, head=0).shape == (3, 10, 10)


def test_adding_to_the_header_keeps_the_plan(tmp_path: Path) -> None:
    run = make_run(location=str(tmp_path / "run.zarr"))
    run.set_attrs(note="kept")
    assert open_run(tmp_path / "run.zarr").plan == run.plan
