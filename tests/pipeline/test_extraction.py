"""Extraction: what is stored is what the model did; nothing is lost when it is cut short."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
import zarr
from numcodecs import Blosc, Zstd
from PIL import Image

import attnscope
from attnscope import capturing, planning, quantities, writing
from attnscope.checking import check_run
from attnscope.extraction import DeadlineReached, extract
from attnscope.loading import ModelError, load_model
from attnscope.planning import RecordingError, check_rows
from attnscope.recording import AttentionCall
from attnscope.run import Run, RunError, open_run
from attnscope.samples import Sample, SampleError
from attnscope.stores import StoreError

EXACT = quantities.ExtractSpec(encoding="exact")


def eager_attention(folder: Path, inputs: dict[str, torch.Tensor], cls: type) -> tuple[torch.Tensor, ...]:
    """The model's own softmax, layer by layer, under transformers' eager implementation."""
    model = cls.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    return outputs


def encoded(folder: Path, samples: list[Sample]) -> dict[str, torch.Tensor]:
    loaded = load_model(folder)
    return loaded.family.encode(samples, loaded)


def assert_same_attention(stored: xr.DataArray, own: torch.Tensor, layer: int) -> None:
    """Equal to 2e-6 wherever stored, and stored wherever there is no padding."""
    mine = stored.sel(layer=layer).values
    theirs = own.numpy()[..., : mine.shape[-2], : mine.shape[-1]]
    real = ~np.isnan(mine)
    assert real.any()
    np.testing.assert_allclose(mine[real], theirs[real], atol=2e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stored_attention_is_the_eager_softmax_of_a_vit(
    tiny_vit: Path, captioned_images: Path, implementation: str
) -> None:
    samples = attnscope.read_samples(captioned_images)
    run = extract(tiny_vit, samples, spec=EXACT, attn_implementation=implementation, batch_size=4)
    own = eager_attention(tiny_vit, encoded(tiny_vit, samples), transformers.ViTForImageClassification).attentions
    assert run.sites == ("vision.self",)
    for layer in range(2):
        assert_same_attention(run.attention("vision.self"), own[layer], layer)
    assert not np.isnan(run.attention("vision.self").values).any()


@pytest.mark.parametrize(("spread", "expected"), [(0.05, "lz4"), (0.6, "zstd")], ids=["even", "sharp"])
def test_the_compressor_is_that_which_suits_the_attention(spread: float, expected: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, 0, spread)
    inputs = [{"pixel_values": torch.randn(2, 3, 224, 224)}]
    run = extract(model, inputs, out=tmp_path / "run.zarr")
    assert run.plan.sites["vision.self"].compressor == expected
    stored = np.asarray(zarr.open_array(tmp_path / "run.zarr/vision.self/attention")[:1])
    lz4, zstd = (
        sum(len(encode(head.ravel()[: head.size // 8 * 8])) for layer in stored[0] for head in layer)
        for encode in (Blosc("lz4", 1, Blosc.BITSHUFFLE).encode, Zstd(1).encode)
    )
    assert (lz4 <= 1.02 * zstd) == (expected == "lz4")
    exact = extract(model, inputs, encoding="exact").attention("vision.self")
    assert float(abs(run.attention("vision.self") - exact).max()) < 2.5e-4
    compact = extract(model, inputs, encoding="compact")
    assert compact.plan.sites["vision.self"].compressor == "zstd"
    shard = next(path for path in (tmp_path / "run.zarr/vision.self/attention/c").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    assert all(fault.place.startswith("vision.self/attention") for fault in check_run(run).faults)
    assert check_run(run).faults


@pytest.mark.parametrize("encoding", ["exact", "float16", "compact"])
def test_layers_that_come_batch_by_batch_are_stored_as_those_that_come_at_once(encoding: str, tmp_path: Path) -> None:
    """Maps so large that each sample has chunks of its own, from inputs of several lengths."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    inputs = [{"input_ids": torch.randint(50, (1, tokens))} for tokens in (301, 40, 150, 301, 7)]
    runs = {
        size: extract(model, inputs, out=tmp_path / f"{size}.zarr", encoding=encoding, batch_size=size)
        for size in (1, 2)
    }
    array = zarr.open_array(tmp_path / "1.zarr/text.self/attention")
    assert array.chunks[0] == 1 < array.shards[0]
    model.set_attn_implementation("eager")
    bound = float(array.attrs["bound"])
    for run in runs.values():
        assert not check_run(run).faults
        for sample, given in enumerate(inputs):
            tokens = given["input_ids"].shape[1]
            with torch.no_grad():
                own = torch.cat(model(**given, output_attentions=True).attentions)
            stored = run.attention("text.self").isel(sample=sample).values
            np.testing.assert_allclose(stored[..., :tokens, :tokens], own.numpy(), atol=bound, rtol=0)
            assert np.isnan(stored[..., tokens:, :]).all()
            assert np.isnan(stored[..., tokens:]).all()


def test_a_sample_left_out_of_a_layer_that_comes_batch_by_batch_holds_nothing(
    captioned_images: Path, tmp_path: Path
) -> None:
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    model, folder = transformers.ViTModel(config), tmp_path / "vit"
    model.save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    samples = attnscope.read_samples(captioned_images)[:3]
    (tmp_path / "broken.png").write_bytes(b"not an image")
    broken = Sample("broken", image=tmp_path / "broken.png")
    out = tmp_path / "run.zarr"
    run = extract(folder, [samples[0], broken, *samples[1:]], out=out, batch_size=1)
    assert zarr.open_array(out / "vision.self/attention").chunks[0] == 1
    stored = run.attention("vision.self").values
    assert np.isnan(stored[1]).all()
    np.testing.assert_allclose(stored[[0, 2, 3]].sum(-1), 1, atol=2e-3)
    assert not check_run(run).faults


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_stored_attention_is_the_eager_softmax_of_a_bert_with_padding(
    tiny_bert: Path, captioned_images: Path, batch_size: int
) -> None:
    samples = attnscope.read_samples(captioned_images)
    run = extract(tiny_bert, samples, spec=EXACT, batch_size=batch_size)
    inputs = encoded(tiny_bert, samples)
    own = eager_attention(tiny_bert, inputs, transformers.BertModel).attentions
    stored = run.attention("text.self")
    for layer in range(2):
        assert_same_attention(stored, own[layer], layer)
    lengths = inputs["attention_mask"].sum(1).numpy()
    assert len(set(lengths)) > 5
    real = (~np.isnan(stored.values)).all(axis=(1, 2))
    for i, length in enumerate(lengths):
        assert real[i, :length, :length].all()
        assert real[i].sum() == length**2


def test_stored_attention_is_the_eager_softmax_of_both_encoders_of_a_clip(
    tiny_clip: Path, captioned_images: Path
) -> None:
    samples = attnscope.read_samples(captioned_images)
    run = extract(tiny_clip, samples, spec=EXACT, batch_size=4)
    assert set(run.sites) == {"vision.self", "text.self"}
    own = eager_attention(tiny_clip, encoded(tiny_clip, samples), transformers.CLIPModel)
    for layer in range(2):
        assert_same_attention(run.attention("vision.self"), own.vision_model_output.attentions[layer], layer)
        assert_same_attention(run.attention("text.self"), own.text_model_output.attentions[layer], layer)


def test_default_encoding_keeps_its_stated_bound(tiny_vit: Path, captioned_images: Path) -> None:
    samples = attnscope.read_samples(captioned_images)
    exact = extract(tiny_vit, samples, spec=EXACT).attention("vision.self")
    half = extract(tiny_vit, samples).attention("vision.self")
    assert float(half.attrs["bound"]) == 2.5e-4
    assert 0 < float(abs(exact - half).max()) <= 2.5e-4


def test_ready_inputs_give_what_samples_give(tiny_bert: Path, captioned_images: Path) -> None:
    samples = attnscope.read_samples(captioned_images)
    inputs = encoded(tiny_bert, samples)
    batches = [{k: v[i : i + 3] for k, v in inputs.items()} for i in (0, 3, 6)]
    model = load_model(tiny_bert).model
    ready = extract(model, batches, spec=EXACT, batch_size=3).attention("text.self")
    listed = extract(tiny_bert, samples, spec=EXACT, batch_size=3).attention("text.self")
    np.testing.assert_allclose(ready.values, listed.values, atol=2e-6)


def _drop_mask(call: AttentionCall) -> None:
    call.mask = None


def _drop_scale(call: AttentionCall) -> None:
    call.scale = 1.0


def _swap_query_and_key(call: AttentionCall) -> None:
    call.query, call.key = call.key, call.query


@pytest.mark.parametrize("mutate", [_drop_mask, _drop_scale, _swap_query_and_key])
def test_a_broken_tap_is_caught_before_anything_is_stored(
    tiny_bert: Path, captioned_images: Path, monkeypatch: pytest.MonkeyPatch, mutate: object
) -> None:
    proper = AttentionCall.__post_init__

    def broken(call: AttentionCall) -> None:
        mutate(call)  # type: ignore[operator]
        proper(call)

    monkeypatch.setattr(AttentionCall, "__post_init__", broken)
    inputs = encoded(tiny_bert, attnscope.read_samples(captioned_images))
    with pytest.raises(RecordingError, match=r"encoder\.layer\.0"):
        planning.probe(load_model(tiny_bert), inputs)


def test_layers_swapped_would_be_seen(tiny_vit: Path, captioned_images: Path) -> None:
    samples = attnscope.read_samples(captioned_images)
    run = extract(tiny_vit, samples, spec=EXACT)
    own = eager_attention(tiny_vit, encoded(tiny_vit, samples), transformers.ViTForImageClassification).attentions
    with pytest.raises(AssertionError):
        assert_same_attention(run.attention("vision.self"), own[1], 0)


def test_relevance_inputs_equal_eager_autograd(tiny_vit: Path, captioned_images: Path) -> None:
    samples = attnscope.read_samples(captioned_images)
    spec = quantities.ExtractSpec(frozenset({"attention_grad", "attention_relevance", "score"}), target=3)
    run = extract(tiny_vit, samples, spec=spec, batch_size=4)
    model = transformers.ViTForImageClassification.from_pretrained(tiny_vit, attn_implementation="eager").eval()
    outputs = model(**encoded(tiny_vit, samples), output_attentions=True)
    score = outputs.logits[:, 3]
    gradients = torch.autograd.grad(score.sum(), outputs.attentions)
    np.testing.assert_allclose(run.outputs.score.values[0], score.detach().numpy(), atol=1e-5)
    for layer, (own, slope) in enumerate(zip(outputs.attentions, gradients, strict=True)):
        stored = run.array("vision.self", "attention_grad").sel(layer=layer).values
        assert np.abs(stored - slope.numpy()).max() <= 1e-5 * slope.abs().max()
        expected = (own * slope).clamp(min=0).mean(1).detach().numpy()
        got = run.array("vision.self", "attention_relevance").sel(layer=layer).values
        assert np.abs(got - expected).max() <= 1e-5 * expected.max()


@pytest.mark.parametrize("heads_a_tile", [1, 3])
def test_tiles_of_heads_give_what_all_heads_at_once_give(
    tiny_vit: Path, captioned_images: Path, heads_a_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 heads, so that the last tile may be a smaller one."""
    names = {"attention", "attention_mean", *quantities.SCORE_GRADIENTS - quantities.RESIDUALS}
    spec = quantities.ExtractSpec(frozenset(names), target=3, encoding="exact")
    whole = extract(tiny_vit, captioned_images, spec=spec, batch_size=4)
    arrays = 4
    monkeypatch.setitem(writing._TILE_BYTES, "cpu", arrays * heads_a_tile * 4 * 4 * 65 * 65)
    seen: list[int] = []
    gathered = capturing.gathered
    monkeypatch.setattr(capturing, "gathered", lambda w, t, h, n: seen.append(t.shape[1]) or gathered(w, t, h, n))
    tiled = extract(tiny_vit, captioned_images, spec=spec, batch_size=4)
    assert {1, heads_a_tile} <= set(seen)
    for name in sorted(names):
        expected = whole.array("vision.self", name).values
        np.testing.assert_allclose(tiled.array("vision.self", name).values, expected, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("encoding", ["float16", "exact", "compact"])
def test_tiles_of_samples_give_what_all_samples_at_once_give(
    tiny_bert: Path, captioned_images: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = attnscope.read_samples(captioned_images)
    own = eager_attention(tiny_bert, encoded(tiny_bert, samples), transformers.BertModel).attentions
    found: list[np.ndarray] = []
    asked: list[object] = []
    by_kernel = AttentionCall.attention_by_kernel
    monkeypatch.setattr(
        AttentionCall, "attention_by_kernel", lambda call, heads: asked.append(heads) or by_kernel(call, heads)
    )
    for cached, room in ((2**40, 2**40), (0, 2**40), (0, 0)):
        monkeypatch.setattr(writing, "_CACHED_BYTES", cached)
        monkeypatch.setitem(writing._TILE_BYTES, "cpu", room)
        run = extract(tiny_bert, samples, batch_size=9, encoding=encoding, form="dense", summaries=False)
        found.append(np.stack([run.attention("text.self").sel(layer=layer).values for layer in range(2)]))
    assert bool(asked) == (encoding != "exact")
    real = ~np.isnan(found[0])
    bound = {"float16": 2.5e-4, "exact": 2e-6, "compact": 4e-3}[encoding]
    for each in found:
        assert np.array_equal(~np.isnan(each), real)
        for layer in range(2):
            difference = np.abs(each[layer] - own[layer].numpy())[real[layer]]
            assert difference.max() <= bound


def test_gradients_of_a_bert_with_padding_equal_eager_autograd(tiny_bert: Path, captioned_images: Path) -> None:
    samples = attnscope.read_samples(captioned_images)
    spec = quantities.ExtractSpec(frozenset({"attention_grad"}), target="cls_norm")
    run = extract(tiny_bert, samples, spec=spec, batch_size=9)
    model = transformers.BertModel.from_pretrained(tiny_bert, attn_implementation="eager").eval()
    inputs = encoded(tiny_bert, samples)
    outputs = model(**inputs, output_attentions=True)
    gradients = torch.autograd.grad(outputs.last_hidden_state[:, 0].norm(dim=-1).sum(), outputs.attentions)
    for layer, slope in enumerate(gradients):
        stored = run.array("text.self", "attention_grad").sel(layer=layer).values
        assert np.abs(stored - slope.numpy()).max() <= 1e-5 * slope.abs().max()


def test_weights_are_the_models_own_by_head(tiny_vit: Path, captioned_images: Path) -> None:
    run = extract(tiny_vit, captioned_images, spec=quantities.ExtractSpec(frozenset({"attention", "weights"})))
    state = transformers.ViTForImageClassification.from_pretrained(tiny_vit).state_dict()
    weights = run.weights("vision.self")
    for layer in range(2):
        for side, short in (("query", "q_proj"), ("key", "k_proj")):
            name = next(n for n in state if f".{layer}." in n and n.endswith(f"{short}.weight"))
            mine = weights[side].sel(layer=layer).values.reshape(32, 32)
            np.testing.assert_array_equal(mine, state[name].numpy())
            bias = weights[f"{side}_bias"].sel(layer=layer).values.reshape(32)
            np.testing.assert_array_equal(bias, state[name.replace("weight", "bias")].numpy())


def test_token_layouts_name_every_token(tiny_clip: Path, captioned_images: Path) -> None:
    run = extract(tiny_clip, captioned_images)
    vision = run.tokens("vision")
    kinds = vision.kind.attrs["flag_meanings"].split()
    assert [kinds[k] for k in vision.kind.values[0]] == ["cls"] + ["image"] * 16
    assert vision.row.values[0, 1:].tolist() == [r for r in range(4) for _ in range(4)]
    assert vision.column.values[0, 1:].tolist() == [0, 1, 2, 3] * 4
    text = run.tokens("text")
    first = text.isel(sample=0)
    assert [str(t) for t in first.token_text.values[:4]] == ["[CLS]", "a", "[SEP]", "[PAD]"]
    assert [kinds[k] for k in first.kind.values[:4]] == ["cls", "text", "special", "padding"]


def test_bad_samples_are_left_out_with_a_reason_and_shift_nobody(
    tiny_clip: Path, captioned_images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(captioned_images, folder)
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:60])
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    records.insert(2, {"id": "corrupt", "file_name": "broken.png", "text": "a cat"})
    records.insert(3, {"id": "gone", "file_name": "nowhere.png", "text": "a cat"})
    records.insert(5, {"id": "silent", "file_name": "3.png"})
    records.insert(6, {"id": "long", "file_name": "3.png", "text": "cat " * 40})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)) + "\nnot json\n")
    run = extract(tiny_clip, folder, spec=EXACT, batch_size=2)
    reasons = {i: str(r) for i, r in zip(run.sample_ids, run.samples.reason.values, strict=True) if str(r)}
    assert set(reasons) == {"corrupt", "gone", "silent", "long", "record-13"}
    assert "decoded" in reasons["corrupt"]
    assert "missing" in reasons["gone"]
    assert "no text" in reasons["silent"]
    assert "42 tokens" in reasons["long"]
    assert "JSON" in reasons["record-13"]
    alone = extract(tiny_clip, captioned_images, spec=EXACT, batch_size=2)
    for site in run.sites:
        mine = run.attention(site).sel(sample=alone.sample_ids).values
        np.testing.assert_allclose(mine, alone.attention(site).values, atol=2e-6)


def test_one_corrupt_image_costs_its_batch_nothing(tiny_vit: Path, captioned_images: Path) -> None:
    samples = attnscope.read_samples(captioned_images)
    samples[4] = Sample("s4", image=b"not an image")
    run = extract(tiny_vit, samples, batch_size=9)
    assert run.status.tolist() == [1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert np.isnan(run.attention("vision.self").sel(sample="s4").values).all()


def test_all_samples_bad_is_one_error(tiny_vit: Path) -> None:
    with pytest.raises(SampleError, match="none of the 2 samples can be used"):
        extract(tiny_vit, [Sample("a", image=b"x"), Sample("b", image=b"y")])


_EXTRACT = """
import sys
from attnscope.extraction import extract
from attnscope.quantities import ExtractSpec
spec = ExtractSpec(frozenset({"attention", "attention_relevance", "score", "weights"}), encoding="exact")
def show(progress):
    print(progress.stage, progress.done, flush=True)
extract(sys.argv[1], sys.argv[2], out=sys.argv[3], spec=spec, batch_size=1, progress=show)
"""


def _many_images(folder: Path, count: int) -> Path:
    generator = np.random.default_rng(1)
    folder.mkdir()
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")
    return folder


def assert_same_runs(one: Run, other: Run) -> None:
    """Every array of both runs is equal, value for value."""
    mine, theirs = (xr.open_datatree(r.location, engine="zarr", consolidated=False) for r in (one, other))
    assert set(mine.groups) == set(theirs.groups)
    for path in mine.groups:
        xr.testing.assert_equal(mine[path].to_dataset(), theirs[path].to_dataset())


def test_a_killed_extraction_is_finished_by_the_same_command(tiny_vit: Path, tmp_path: Path) -> None:
    images = _many_images(tmp_path / "images", 300)
    arguments = [sys.executable, "-c", _EXTRACT, str(tiny_vit), str(images)]
    killed = tmp_path / "killed.zarr"
    with subprocess.Popen([*arguments, str(killed)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("extract"))
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    begun = open_run(killed)
    assert 0 < (begun.status != 0).sum() < 300
    assert begun.missing()
    subprocess.run([*arguments, str(killed)], check=True, capture_output=True)
    subprocess.run([*arguments, str(tmp_path / "whole.zarr")], check=True, capture_output=True)
    finished = open_run(killed)
    assert not finished.missing()
    assert_same_runs(finished, open_run(tmp_path / "whole.zarr"))
    assert not list(killed.rglob("*.partial"))


def test_a_run_killed_while_it_was_made_is_made_again(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    extract(tiny_vit, captioned_images, out=out)
    header = json.loads((out / "zarr.json").read_text())
    del header["attributes"]["schema"]
    header["attributes"]["making"] = "attnscope run"
    (out / "zarr.json").write_text(json.dumps(header))
    again = extract(tiny_vit, captioned_images, out=out)
    assert not again.missing()


def test_a_folder_with_other_things_is_respected(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        extract(tiny_vit, captioned_images, out=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_deadline_leaves_a_run_that_can_be_finished(tiny_vit: Path, tmp_path: Path) -> None:
    images = _many_images(tmp_path / "images", 130)
    out = tmp_path / "run.zarr"
    with pytest.raises(DeadlineReached, match="0 of 130"):
        extract(tiny_vit, images, out=out, deadline=0.0)
    assert not extract(tiny_vit, images, out=out).missing()


def test_a_finished_run_asks_nothing_of_the_model(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    extract(tiny_vit, captioned_images, out=out)
    model = load_model(tiny_vit).model
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    extract(model, captioned_images, out=out)
    assert not calls


def test_a_run_of_other_weights_samples_or_needs_is_refused(
    tiny_vit: Path, captioned_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    samples = attnscope.read_samples(captioned_images)
    extract(tiny_vit, samples, out=out)
    with pytest.raises(RunError, match="other samples"):
        extract(tiny_vit, samples[:3], out=out)
    with pytest.raises(RunError, match="attention_relevance"):
        extract(tiny_vit, samples, out=out, spec=quantities.ExtractSpec(frozenset({"attention_relevance"})))
    other = load_model(tiny_vit).model
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(RunError, match="other weights"):
        extract(other, samples, out=out)


def test_extraction_leaves_the_model_as_it_was(tiny_vit: Path, captioned_images: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(tiny_vit).train()
    model.vit.layers[0].eval() if hasattr(model.vit, "layers") else None
    modes = [m.training for m in model.modules()]
    spec = quantities.ExtractSpec(frozenset({"attention", "attention_relevance"}))
    extract(model, captioned_images, spec=spec)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_models_that_cannot_be_loaded_are_named_in_one_sentence(tmp_path: Path, tiny_vit: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    shutil.copy(tiny_vit / "config.json", tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="as pickle"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"damaged|can't be loaded"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="embedded:dinov2-small"):
        load_model("embedded:nothing")
    with pytest.raises(ModelError, match="unknown model 'nobody/nothing'"):
        load_model("nobody/nothing")


def test_a_place_that_cannot_be_written_is_one_sentence(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        extract(tiny_vit, captioned_images, out=tmp_path / "file")
    with pytest.raises(StoreError, match="can't be written"):
        extract(tiny_vit, captioned_images, out=tmp_path / "file" / "below")


def test_a_run_that_cannot_fit_is_refused_before_the_first_block(
    tiny_vit: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(StoreError, match="the run would take"):
        extract(tiny_vit, captioned_images, out=tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    tiny_vit: Path, captioned_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_vit).model
    plain = extract(model, attnscope_inputs(tiny_vit, captioned_images), spec=EXACT, batch_size=8)
    proper = type(model).forward
    sizes: list[int] = []

    def small_memory(self: torch.nn.Module, pixel_values: torch.Tensor, **kwargs: object) -> object:
        outputs = proper(self, pixel_values=pixel_values, **kwargs)
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outputs

    monkeypatch.setattr(type(model), "forward", small_memory)
    messages: list[str] = []
    halved = extract(
        model,
        attnscope_inputs(tiny_vit, captioned_images),
        spec=EXACT,
        batch_size=8,
        progress=lambda p: messages.append(p.message),
    )
    assert sizes[1:] == [8, 4, 2, 2, 2, 2, 1]
    assert "memory ran out; going on with batches of 2" in messages
    np.testing.assert_allclose(halved.attention("vision.self").values, plain.attention("vision.self").values, atol=2e-6)


def attnscope_inputs(folder: Path, images: Path) -> list[dict[str, torch.Tensor]]:
    """Ready inputs of the images in one batch."""
    return [encoded(folder, attnscope.read_samples(images))]


_HIGH_WATER = """
# Not `ru_maxrss`, which a process inherits from the one that starts it: the tests' own would hide any growth.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) // 1024)
"""

_PEAK = """
import pathlib, re, sys, torch, transformers
from attnscope.extraction import extract
torch.manual_seed(0)
config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                image_size=128, patch_size=8)
model = transformers.ViTModel(config, add_pooling_layer=False)
batches = [{"pixel_values": torch.zeros(8, 3, 128, 128)}] * int(sys.argv[1])
extract(model, batches, out=sys.argv[2], batch_size=8)
"""

_PEAK_OF_A_LONG_TEXT = """
import pathlib, re, sys, torch, transformers
from attnscope.extraction import extract
torch.manual_seed(0)
config = transformers.LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=8, intermediate_size=64,
                                  vocab_size=100)
model = transformers.LlamaModel(config).eval()
ids = torch.randint(5, 100, (1, 2048))
with torch.no_grad():
    model(ids)
if sys.argv[1] == "extract":
    extract(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], out=sys.argv[2])
"""


def peak_memory(script: str, *arguments: str) -> int:
    """MiB that a script needs, in a process of its own."""
    # Every large array comes from the system: what the C library keeps of freed ones differs from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script + _HIGH_WATER, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    few, many = (peak_memory(_PEAK, str(n), str(tmp_path / f"{n}.zarr")) for n in (16, 64))
    # 48 more batches of 8 would hold 400 MB of attention.
    assert many - few < 30


def test_a_long_text_never_has_the_whole_attention_of_a_layer_in_memory(tmp_path: Path) -> None:
    forward, extraction = (peak_memory(_PEAK_OF_A_LONG_TEXT, w, str(tmp_path / w)) for w in ("forward", "extract"))
    # That takes 134 MB in float32.
    assert extraction - forward < 80


def test_weights_that_a_checkpoint_lacks_are_the_same_each_time(tmp_path: Path, captioned_images: Path) -> None:
    config = transformers.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8)  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    first, second = (load_model(tmp_path) for _ in range(2))
    assert "pooler.dense.weight" in first.model.state_dict()
    assert first.digest() == second.digest()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("row", [0, 2, 5])
@pytest.mark.parametrize("tensor", ["query", "key"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_attention_of_a_single_number_that_is_not_finite_is_refused(tensor: str, row: int, value: float) -> None:
    drawn = torch.randn(3, 2, 3, 6, 4, generator=torch.Generator().manual_seed(0)).abs()
    query, key, values = drawn
    call = AttentionCall("attention", 0, 0, "sdpa", "interface", query, key, values, None)
    check_rows(call.attention(), call)
    {"query": query, "key": key}[tensor][1, 2, row, 3] = value
    broken = AttentionCall("attention", 0, 0, "sdpa", "interface", query, key, values, None)
    with pytest.raises(RecordingError, match="not finite"):
        check_rows(broken.attention(), broken)
