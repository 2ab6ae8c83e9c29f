"""Ablation of a modality: known losses, models with a modality cut off, and a model ablated by hand."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import attnscope
from attnscope import Region, Run, Sample, analyse
from attnscope.compatibility.examples import TEXT, VISION, image, numbers, text, widened
from attnscope.conditions import Condition
from attnscope.quantities import ExtractSpec
from attnscope_modality_ablation import ModalityAblation

WORDS = ("a", "red", "cat", "on", "the", "box", "blue", "dog")


@pytest.fixture
def known(run_with_outputs: Callable[..., Run]) -> Run:
    """Four samples with two phrases of 1 to 8 bits; the object costs 1 bit, all of the image 3; the last has no box."""
    base = np.arange(1.0, 9).reshape(4, 2)

    def outputs_of(condition: Condition) -> dict[str, Any]:
        cost = {"intact": 0, "object": 1, "all": 3}[condition.image] + {"intact": 0, "phrase": 0.5, "all": 1}.get(
            condition.text, 0
        )
        changed = np.full((4, 2), {"object": 4, "all": 8}.get(condition.image, 0))
        if "object" in (condition.image, condition.ask):
            changed[3] = -1
        loss = np.where(changed < 0, np.nan, np.log(2) * (base + cost))
        return {"loss": loss, "changed": changed, "correct": np.where(changed < 0, np.nan, 0.5)}

    return run_with_outputs(4, outputs_of, phrases=2)


def test_losses_and_influences_are_what_the_outputs_say_in_bits(known: Run) -> None:
    analyser = ModalityAblation(vision="object", operators=("mean", "zero"), thresholds=(0.0, 0.5))
    result = analyse(known, analyser, save=False)
    one = result.sel(direction="vision_for_language", operator="zero")
    # The six examples with a box: mean of 1 to 6.
    np.testing.assert_allclose(one["loss"], [3.5, 4.5, 6.5])
    np.testing.assert_allclose(one["influence"], [0, 1, 3], atol=1e-12)
    np.testing.assert_allclose(one["influence_low"], [0, 1, 3], atol=1e-12)
    assert float(one["loss_low"][0]) < 3.5 < float(one["loss_high"][0])
    assert int(one["examples"]) == 6
    other = result.sel(direction="language_for_vision", operator="mean")
    np.testing.assert_allclose(other["influence"], [0, 0.5, 1], atol=1e-12)
    np.testing.assert_allclose(result["asymmetry"], [2, 2])
    np.testing.assert_allclose(result["swept"].values, 1)
    np.testing.assert_allclose(result["swept_share"].values, 0.5)
    assert result["loss"].attrs["units"] == "bit"
    html = "".join(e.html() for e in analyser.report(result))
    assert html.count("<svg") == 5
    assert "all of the words" in html


def test_examples_without_a_region_are_counted_and_not_averaged_in(known: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = analyse(known, ModalityAblation(), save=False)
    # make_run gives each sample one phrase; the outputs have two, of which those of the last sample count for nothing.
    assert int(result["examples"][0, 0]) == 6
    assert float(result["loss"].sel(level="none")[0, 0]) == pytest.approx(3.5)


def vilt(folder: Path) -> "hf.ViltForMaskedLM":
    """A wide ViLT that tells masked words, with a tokenizer and a processor beside it."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    hf.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    hf.ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(folder)
    config = hf.ViltConfig(**(TEXT | VISION | {"vocab_size": len(vocabulary)}), max_position_embeddings=16)
    model = widened(hf.ViltForMaskedLM._from_config(config, attn_implementation="eager"), std=0.3)
    model.config._name_or_path = str(folder)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    """Four noise images with a red cat in the upper left quarter; a fifth whose phrase has no box."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(5)]
    boxes: list[tuple[float, float, float, float] | None] = [(0, 0, 8, 8)] * 4 + [None]
    return [
        Sample(f"s{i}", p, "a red cat on the box", (Region("red cat", b, (2, 9)),))
        for i, (p, b) in enumerate(zip(pictures, boxes, strict=True))
    ]


def test_a_model_ablated_by_hand_gives_the_same_losses(tmp_path: Path, scenes: list[Sample]) -> None:
    model = vilt(tmp_path)
    analyser = ModalityAblation(operators=("zero",))
    run = attnscope.extract(tmp_path, scenes, [analyser], spec=ExtractSpec(frozenset({"score"})), batch_size=2)
    result = analyse(run, analyser, save=False).squeeze()
    loaded = attnscope.loading.load_model(tmp_path)  # type: ignore[attr-defined]
    inputs = loaded.family.encode(scenes[:4], loaded)
    ids, asked = inputs["input_ids"].clone(), [2, 3]
    ids[:, asked] = loaded.tokenizer.mask_token_id
    expected = []
    for taken in (0, 8, 16):
        pixels = inputs["pixel_values"].clone()
        pixels[..., :taken, :taken] = 0
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "pixel_values": pixels}).logits[:, asked].double()
        told = torch.log_softmax(logits, -1).gather(-1, inputs["input_ids"][:, asked, None])
        expected.append(float(-told.mean()) / np.log(2))
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-5)
    assert (int(result["examples"]), int(result["skipped"])) == (4, 1)


def test_without_cross_modal_weights_the_influence_is_exactly_zero(tmp_path: Path, scenes: list[Sample]) -> None:
    model = vilt(tmp_path)
    # Patches and CLS of the image are one constant, and so is their place: no pixel reaches anything.
    with torch.no_grad():
        model.vilt.embeddings.patch_embeddings.projection.weight.zero_()
    model.save_pretrained(tmp_path)
    analyser = ModalityAblation(operators=("mean", "zero", "noise", "other"))
    run = attnscope.extract(tmp_path, scenes, [analyser], spec=ExtractSpec(frozenset({"score"})))
    result = analyse(run, analyser, save=False)
    assert (result["influence"] == 0).all()
    assert (result["effect_size"] == 0).all()
    assert (result["influence_low"] == 0).all()


def test_two_streams_cut_from_each_other_have_no_influence_in_either_direction(tmp_path: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    hf.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = hf.LxmertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=37, vocab_size=len(vocabulary), l_layers=1,
        x_layers=1, r_layers=1, visual_feat_dim=10, num_object_labels=7, num_attr_labels=3,
    )  # fmt: skip
    model = widened(hf.LxmertForPreTraining._from_config(config, attn_implementation="eager"), std=0.3)
    model.config._name_or_path = str(tmp_path)
    samples = [Sample(f"s{i}", Image.new("RGB", (20, 10)), "a red cat on the box", (Region("red cat", (0, 0, 10, 10)),))
               for i in range(3)]  # fmt: skip
    boxes = torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 0.4, 0.4], [0.6, 0.6, 1, 1]]).expand(3, 4, 4)
    inputs = {"visual_feats": numbers(3, 4, 10), "visual_pos": boxes}

    def encode(given: list[Sample], loaded: Any) -> dict[str, torch.Tensor]:
        rows = [int(s.id[1:]) for s in given]
        words = loaded.tokenizer([s.text for s in given], padding=True, return_tensors="pt")
        return {**words, **{name: tensor[rows] for name, tensor in inputs.items()}}

    from attnscope import loading
    from attnscope.families import find_family

    family = dataclasses.replace(find_family("lxmert"), encode=encode)
    analyser = ModalityAblation(vision="object", operators=("mean", "zero"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_family_of", lambda model: family)
        run = attnscope.extract(model, samples, [analyser], spec=ExtractSpec(frozenset({"score"})))
        used = analyse(run, analyser, save=False)
        assert (np.abs(used["influence"].sel(level="all")) > 1e-4).all()
        # The region that covers the box whole is ablated, and is the one that is asked for.
        assert (used["examples"] == 3).all()
        with torch.no_grad():
            for layer in model.lxmert.encoder.x_layers:
                layer.visual_attention.output.dense.weight.zero_()
        run = attnscope.extract(model, samples, [analyser], spec=ExtractSpec(frozenset({"score"})))
        cut = analyse(run, analyser, save=False)
    assert (cut["influence"] == 0).all()


def test_dual_encoders_are_asked_for_their_similarity() -> None:
    config = hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    model = widened(hf.CLIPModel._from_config(config, attn_implementation="eager"))
    inputs = text() | image()
    condition = Condition(image="all", operator="zero")
    spec = ExtractSpec(frozenset({"score"}), conditions=(Condition(), condition))
    found = attnscope.extract(model, [inputs], spec=spec).outputs_under(spec.conditions)["score"].values
    with torch.no_grad():
        intact = model(**inputs).logits_per_image.diagonal()
        blank = model(**{**inputs, "pixel_values": 0 * inputs["pixel_values"]}).logits_per_image.diagonal()
    np.testing.assert_allclose(found, np.stack([intact, blank]), atol=1e-4)


def test_a_model_that_writes_is_asked_for_its_answer(writer: Callable[[str], Path], asked: list[Sample]) -> None:
    """Cross entropy of the words that it wrote, by runs of the whole text with blank pixels, and without its prompt."""
    folder = writer("llava")
    analyser = ModalityAblation(language="answer", vision="answer", operators=("zero",), text_operator="drop")
    spec = ExtractSpec(frozenset({"score"}), generate=4)
    run = attnscope.extract(folder, asked, [analyser], spec=spec)
    result = analyse(run, analyser, save=False).squeeze()
    loaded = attnscope.loading.load_model(folder)  # type: ignore[attr-defined]
    losses = []
    for sample in asked:
        inputs = loaded.family.encode([sample], loaded)
        ids = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        start, is_image = inputs["input_ids"].shape[1], ids[0] == 4
        alone = torch.cat([ids[:, :start][:, is_image[:start]], ids[:, start:]], dim=1)
        row = []
        for text_of, pixels in ((ids, 1), (ids, 0), (alone, 1)):
            written = text_of.shape[1] - ids.shape[1] + start
            given = {"input_ids": text_of, "pixel_values": pixels * inputs["pixel_values"]}
            with torch.no_grad():
                told = torch.log_softmax(loaded.model(**given).logits[0].double(), -1)
            chosen = [told[at - 1, text_of[0, at]] for at in range(written, text_of.shape[1])]
            row.append(float(-torch.stack(chosen).mean()) / np.log(2))
        losses.append(row)
    intact, blank, mute = np.mean(losses, axis=0)
    np.testing.assert_allclose(result["loss"].sel(direction="vision_for_language", level="none"), intact, rtol=1e-4)
    np.testing.assert_allclose(result["loss"].sel(direction="vision_for_language", level="all"), blank, rtol=1e-4)
    np.testing.assert_allclose(result["loss"].sel(direction="language_for_vision", level="all"), mute, rtol=1e-4)
    assert result["loss"].attrs["units"] == "bit"
    # Without phrases there is no part of either to take away, and both samples count all the same.
    assert np.isnan(result["loss"].sel(level="part")).all()
    assert (result["examples"] == 2).all()
    assert (result["skipped"] == 0).all()
    each = np.array([(row[1] - row[0]) - (row[2] - row[0]) for row in losses])
    np.testing.assert_allclose(result["asymmetry"], each.mean(), rtol=1e-4)
    np.testing.assert_allclose(result["asymmetry_effect_size"], each.mean() / each.std(ddof=1), rtol=1e-3)
    placed = attnscope.extract(folder, asked, [analyser], spec=ExtractSpec(frozenset({"score"}), target="token:0"))
    with pytest.raises(ValueError, match="holds no answers"):
        analyse(placed, analyser, save=False)


def test_the_answer_of_a_text_with_masks_is_what_they_stand_for(tmp_path: Path, scenes: list[Sample]) -> None:
    model = vilt(tmp_path)
    samples = [
        dataclasses.replace(s, text="a [MASK] cat on the box", regions=(), targets={"masked": "red"}) for s in scenes
    ]
    analyser = ModalityAblation(language="answer", operators=("zero",), target="masked")
    run = attnscope.extract(tmp_path, samples, [analyser], spec=ExtractSpec(frozenset({"score"})), target="masked")
    result = analyse(run, analyser, save=False).squeeze()
    loaded = attnscope.loading.load_model(tmp_path)  # type: ignore[attr-defined]
    inputs = {k: v for k, v in loaded.family.encode(samples, loaded).items() if not k.startswith("_")}
    place, word = 2, loaded.tokenizer.convert_tokens_to_ids("red")
    for level, scale in (("none", 1), ("all", 0)):
        with torch.no_grad():
            logits = model(**{**inputs, "pixel_values": scale * inputs["pixel_values"]}).logits[:, place].double()
        told = float(-torch.log_softmax(logits, -1)[:, word].mean()) / np.log(2)
        np.testing.assert_allclose(result["loss"].sel(level=level), told, rtol=1e-5)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="an operator and a direction at least"):
        ModalityAblation(language="none")
    assert ModalityAblation(language="target", vision="target").requires().conditions[0].by_phrase is False
