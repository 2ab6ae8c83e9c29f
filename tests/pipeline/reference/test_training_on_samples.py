"""A user's own images and texts are learned from, in one process or several, and after a kill, as they should be."""

import dataclasses
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from attnscope import ExtractSpec
from attnscope.cli import main
from attnscope.extraction import extract
from attnscope.families.lxmert import encode_regions
from attnscope.loading import load_model
from attnscope.reference import making, spreading
from attnscope.reference.examining import write_captions
from attnscope.reference.learners import Clip, Lxmert, Mapper, Seen, Sizes, Vilt, lxmert_config
from attnscope.reference.lessons import draw_scenes, joint_losses, mapper_losses, mask_words_at_random
from attnscope.reference.making import ReferenceError, recipe_of
from attnscope.reference.mapper import MapperForConditionalGeneration
from attnscope.reference.pairs import open_prepared
from attnscope.reference.spreading import ProcessDied
from attnscope.reference.training import RECIPES, Recipe, Training, TrainingProgress
from attnscope.reference.weights import read_learner, weights_digest
from attnscope.run import EXTRACTED, LEFT_OUT
from attnscope.samples import Region, Sample, SampleError, read_samples

SIZES = {"side": 16, "patch": 8, "width": 16, "heads": 2, "layers": 1, "text_layers": 1, "length": 12}
SHORT = SIZES | {"batch": 8, "steps": 4, "decay": 4, "examine_every": 3, "validation_scenes": 2}


def recipe(model: str, photographs: Path, **changes: object) -> Recipe:
    return recipe_of(model, SHORT | {"samples": str(photographs)} | changes)


def name_boxes(photographs: Path) -> None:
    """Name boxes of every other photograph: none of the first, one of the next, and so on to eleven."""
    metadata = photographs / "metadata.jsonl"
    records = [json.loads(line) for line in metadata.read_text().splitlines()]
    for number, record in enumerate(records[::2]):
        boxes = [[2 * k, 0.5, 2 * k + 5, 15.5] for k in range(number, 0, -1)]
        record["regions"] = [{"box": box} for box in boxes]
        record["regions"] += [{"phrase": "photograph"}]
    metadata.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def clip(photographs: Path, tmp_path: Path) -> Path:
    """A small clip that learned a little of the photographs."""
    making.train(recipe("clip", photographs, peak_rate=5e-3, steps=40), 0, str(tmp_path / "clip"))
    return tmp_path / "clip"


def encoders_of(folder: Path) -> dict[str, np.ndarray]:
    """The weights of both encoders in the folder of a clip or of a mapper."""
    stored = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("model."): value for name, value in stored.items()}
    return {name: value for name, value in plain.items() if name.startswith(("text_model.", "vision_model."))}


@pytest.mark.parametrize("model", ["clip", "text", "simla", "vilt", "lxmert"])
def test_a_model_of_samples_is_a_folder_that_transformers_reads(model: str, photographs: Path, tmp_path: Path) -> None:
    import transformers

    chosen = recipe(model, photographs)
    receipt = making.train(chosen, 0, str(tmp_path / "out"))
    examined = making.examine(chosen, 0, str(tmp_path / "out"))
    assert receipt["steps"] == 8
    kind = {
        "clip": transformers.CLIPModel,
        "text": transformers.BertForMaskedLM,
        "simla": transformers.BlipForImageTextRetrieval,
        "vilt": transformers.ViltForImageAndTextRetrieval,
        "lxmert": transformers.LxmertForPreTraining,
    }[model]
    read, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    # SIMLA's further heads are no part of BLIP's retrieval, nor ViLT's for words of its matching.
    heads = ("cls.", "code_classifier.", "keyword_classifier.", "codes", "log_temperature", "mlm_score.")
    assert not report["missing_keys"] and all(key.startswith(heads) for key in report["unexpected_keys"])
    assert model in ("simla", "vilt") or not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 12
    learner = read_learner(model, tmp_path / "out")
    words = torch.tensor([tokenizer("A red photograph, number 0.")["input_ids"]])
    if isinstance(learner, Clip):
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        pixels = processor(Image.open(photographs / "p0.png"), return_tensors="pt")["pixel_values"]
        out = read(input_ids=words, pixel_values=pixels)
        pairs = open_prepared(tmp_path / "out" / "data").split("train")
        torch.testing.assert_close(out.text_embeds, learner.embed_texts(words))
        assert pixels.shape[-1] == pairs.pixels[:1].shape[1] == 16
    if isinstance(learner, Vilt):
        inputs = transformers.AutoProcessor.from_pretrained(tmp_path / "out")(
            images=Image.open(photographs / "p0.png").resize((40, 20)), text="A red photograph.", return_tensors="pt"
        )
        assert inputs["pixel_values"].shape[-2:] == (16, 16)
        hidden = learner.encode(inputs["input_ids"], Seen(inputs["pixel_values"]))
        torch.testing.assert_close(read(**inputs).logits[:, 0], learner.match(hidden))
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert not any(key.startswith(("classifier.", "patch_classifier.")) for key in stored)
    if isinstance(learner, Lxmert):
        seen = learner.see(open_prepared(tmp_path / "out" / "data").split("train"), np.arange(1))
        out = read(input_ids=words, visual_feats=seen.pixels, visual_pos=seen.boxes)
        hidden = learner.encode(words, seen)
        torch.testing.assert_close(out.prediction_logits, learner.words(hidden))
        scores = out.cross_relationship_score
        torch.testing.assert_close(scores[:, 1] - scores[:, 0], learner.match(hidden))
        untaught = [*learner.answer_head.parameters(), *learner.obj_predict_head.parameters()]
        count = sum(p.numel() for p in learner.parameters()) - sum(p.numel() for p in untaught)
        assert json.loads((tmp_path / "out" / "card.json").read_text())["parameters"] == count
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["samples"]["train"] == 20 and card["examined_scenes"] == 2
    assert card["digest"] == examined["digest"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"on 20 samples of {photographs} (left out: 0" in page


def test_training_on_samples_learns_what_they_show(photographs: Path, tmp_path: Path) -> None:
    chosen = recipe("clip", photographs, steps=120, decay=40, peak_rate=5e-3, examine_every=40)
    told: list[TrainingProgress] = []
    making.train(chosen, 0, str(tmp_path), told.append)
    losses = [p.losses["images"] * 2 for p in told if p.stage == "training"]
    # Who tells nothing apart has log 8; who knows the colours alone has the mean log of how many of the eight share
    # one, which is 1.0 to 1.1.
    assert losses[-1] < 1.2 < 0.6 * np.log(8)


def test_regions_that_are_learned_from_are_those_of_an_extraction(photographs: Path, tmp_path: Path) -> None:
    """Of named boxes, of too few and of too many of them, and with another score in the attention."""
    name_boxes(photographs)
    chosen = recipe("lxmert", photographs, alignment="general_qwk", validation_scenes=1)
    notes = making.train(chosen, 0, str(tmp_path / "out"))["notes"]
    assert "13 of 24 samples name no box; their regions are the same parts of every image" in notes  # type: ignore
    prepared = open_prepared(tmp_path / "out" / "data")
    learner = read_learner("lxmert", tmp_path / "out")
    assert isinstance(learner, Lxmert)
    samples = {sample.text: sample for sample in read_samples(photographs)}
    loaded = load_model(str(tmp_path / "out"))
    pairs = prepared.split("train")
    checked = set()
    for row in range(len(pairs)):
        words = [prepared.vocabulary[number] for number in pairs.words[row] if number > 4]
        name = next(word for word in words if word.isdigit())
        sample = next(s for text, s in samples.items() if str(text).endswith(f" {name}."))
        inputs = encode_regions([sample], loaded)
        seen = learner.see(pairs, np.array([row]))
        assert seen.boxes is not None and seen.pixels.shape == (1, 9, 3 * 8 * 8)
        torch.testing.assert_close(inputs["visual_feats"], seen.pixels, rtol=0, atol=0)
        torch.testing.assert_close(inputs["visual_pos"], seen.boxes, rtol=0, atol=0)
        named = sum(region.box is not None for region in sample.regions)
        # Boxes by their place, then the whole image.
        height = 20 + int(name)
        assert seen.boxes[0, :named, 0].tolist() == pytest.approx([2 * (k + 1) / 30 for k in range(min(named, 9))])
        assert seen.boxes[0, :named, 3].tolist() == pytest.approx([15.5 / height] * min(named, 9))
        assert named >= 9 or seen.boxes[0, named].tolist() == [0, 0, 1, 1]
        checked.add(named)
    assert 0 in checked and checked & {*range(1, 9)} and max(checked) > 9
    # A box that reaches out of its image costs its sample here as well.
    given = read_samples(photographs)[:3]
    given[1] = dataclasses.replace(given[1], regions=(Region(box=(0, 0, 31, 5)),))
    run = extract(str(tmp_path / "out"), given, out=tmp_path / "run")
    assert run.status.tolist() == [EXTRACTED, LEFT_OUT, EXTRACTED]
    assert run.attention("text.vision").shape[-1] == 9


def test_a_single_pair_that_is_held_out_has_no_other_text(photographs: Path, tmp_path: Path) -> None:
    chosen = recipe("vilt", photographs, validation_scenes=1)
    making.train(chosen, 0, str(tmp_path))
    making.examine(chosen, 0, str(tmp_path))
    figures = json.loads((tmp_path / "card.json").read_text())["figures"]["test"]
    assert figures.keys() == {"words", "words_bits"}


@pytest.mark.parametrize(("model", "alignment"), [("vilt", ""), ("vilt", "cosine"), ("lxmert", "")])
def test_a_joint_stream_learns_which_text_fits(model: str, alignment: str, photographs: Path, tmp_path: Path) -> None:
    changes = {"width": 32, "layers": 2, "batch": 20, "steps": 500, "decay": 100, "warm_up": 20, "examine_every": 100}
    chosen = recipe(model, photographs, peak_rate=3e-3, alignment=alignment, **changes)
    told: list[TrainingProgress] = []
    notes = making.train(chosen, 0, str(tmp_path), told.append)["notes"]
    assert "without the loss of answers" in notes[-1] and "hidden_units" in notes[-1]  # type: ignore[index]
    losses = [p.losses for p in told if p.stage == "training"]
    # Half of the texts fit; who can't tell has log 2. The colour says which do, except of another of the same colour.
    assert losses[0]["match"] > 0.6 and losses[-1]["match"] < 0.45
    assert losses[-1]["words"] < 0.7 * losses[0]["words"]
    assert json.loads((tmp_path / "config.json").read_text()).get("attention_alignment", "") == alignment
    figures = making.examine(chosen, 0, str(tmp_path)) and json.loads((tmp_path / "card.json").read_text())["figures"]
    assert {"words", "words_bits", "matching_true", "matching_other", "matching_balanced"} == figures["test"].keys()


@pytest.mark.parametrize("model", [Vilt, Lxmert])
def test_a_joint_stream_is_asked_for_masked_words_and_for_wrong_texts(
    model: type[Vilt] | type[Lxmert], photographs: Path, tmp_path: Path
) -> None:
    """Against the losses of single pairs, added up."""
    name_boxes(photographs)
    chosen = recipe(model.__name__.lower(), photographs)
    prepared = making.prepare_samples(chosen, tmp_path / "training")
    pairs = prepared.split("train")
    torch.manual_seed(0)
    learner = model.of(chosen.sizes(prepared))
    for parameter in learner.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    found = joint_losses(learner, pairs, np.random.Generator(np.random.PCG64(7)), batch=20)
    rng = np.random.Generator(np.random.PCG64(7))
    numbers = draw_scenes(pairs, 20, rng, 0)
    assert sorted(numbers) == list(range(20))
    words = pairs.words[numbers].astype(np.int64)
    shown, asked = mask_words_at_random(words, len(prepared.vocabulary), rng)
    others = np.where(rng.random(20) < 0.5, rng.permutation(20), np.arange(20))
    surprise, match, fitting = [], [], []
    for row, number in enumerate(numbers):
        seen = learner.see(pairs, np.array([number]))
        length = int((words[row] > 0).sum())
        hidden = learner.encode(torch.tensor(shown[row : row + 1, :length]), seen)
        logits = learner.words(hidden)[0].log_softmax(-1)
        surprise += [-logits[at, words[row, at]] for at in np.flatnonzero(asked[row])]
        text = words[others[row]]
        odds = learner.match(learner.encode(torch.tensor(text[None, : int((text > 0).sum())]), seen))[0]
        fitting.append(tuple(text) == tuple(words[row]))
        match.append(-nn.functional.logsigmoid(odds if fitting[-1] else -odds))
    assert 4 < sum(fitting) < 18
    torch.testing.assert_close(found["words"], torch.stack(surprise).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["match"], torch.stack(match).mean(), rtol=1e-5, atol=1e-5)


def test_regions_are_crossed_in_half_of_the_layers() -> None:
    """As many of each kind as the carried model has at its sizes, and at least one."""
    found = {
        layers: tuple(
            getattr(lxmert_config(Sizes(layers=layers, text_layers=3)), f"{kind}_layers") for kind in ("l", "r", "x")
        )
        for layers in (1, 4, 9)
    }
    assert found == {1: (3, 1, 1), 4: (3, 1, 2), 9: (3, 3, 5)}


def test_a_mapper_writes_captions_behind_a_clip_of_the_same_samples(photographs: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "mapper"
    making.prepare(str(photographs), str(data), recipe("clip", photographs).shape)
    # What is prepared has decided on these, and for the mapper its encoders on the rest.
    short = {name: SHORT[name] for name in ("batch", "steps", "decay", "examine_every")} | {"samples": str(data)}
    sizes = {name: SIZES[name] for name in SIZES if name not in ("side", "length")}
    making.train(recipe_of("clip", short | sizes), 0, str(tmp_path / "clip"))
    chosen = recipe_of("mapper", short | {"encoders": str(tmp_path / "clip")})
    assert {name: getattr(chosen, name) for name in SIZES} == SIZES
    notes = making.train(chosen, 0, str(out))["notes"]
    assert "without the loss of answers (it needs questions with answers), units" in notes[-1]  # type: ignore[index]
    making.examine(chosen, 0, str(out))
    card = json.loads((out / "card.json").read_text())
    assert card["figures"]["test"].keys() == {"captions_tokens", "captions_bits", "captions_exact"}
    assert f"those of the encoders in {tmp_path / 'clip'}" in (out / "README.md").read_text()

    read, report = MapperForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert card["parameters"] == sum(parameter.numel() for parameter in read.parameters())
    learner, pairs = read_learner("mapper", out), open_prepared(data).split("test")
    assert isinstance(learner, Mapper)
    image, words = learner.look(pairs, np.arange(2)), torch.from_numpy(pairs.words[:].astype(np.int64))
    pixels = learner.see(pairs, np.arange(2)).pixels
    torch.testing.assert_close(read(words, pixels, (words > 0).long()).logits, learner.tell(words, image))

    # A caption ends by itself, has as many tokens as were asked for, or fills the 12 positions that there are.
    images = [Sample(str(row), Image.fromarray(pairs.pixels[row : row + 1][0])) for row in range(2)]
    vocabulary = open_prepared(data).vocabulary
    for most, length in ((8, 9), (20, 12)):
        run = extract(str(out), images, spec=ExtractSpec(quantities=frozenset({"attention", "score"}), generate=most))
        tokens = run.tokens("text").load()
        for sample, ids in enumerate(write_captions(learner, image, length)):
            said = [str(token) for token in tokens["token_text"].values[sample] if str(token) not in ("", "[PAD]")]
            assert said == [vocabulary[number] for number in ids if number > 0]
    full = torch.full((1, 12), 9)
    assert torch.equal(read.generate(input_ids=full, pixel_values=pixels[:1], max_new_tokens=3), full)


def test_captions_are_learned_from_images_and_the_encoders_stay(photographs: Path, clip: Path, tmp_path: Path) -> None:
    changes = {"batch": 20, "steps": 160, "decay": 60, "warm_up": 20, "examine_every": 20, "peak_rate": 5e-3}
    chosen = recipe("mapper", photographs, encoders=str(clip), **changes)
    told: list[TrainingProgress] = []
    making.train(chosen, 0, str(tmp_path / "out"), told.append)
    losses = [p.losses["captions"] for p in told if p.stage == "training"]
    # A batch has all twenty texts, of eight words each: who sees no image can't be below log(20) / 8. Who sees the
    # colour and no more has log(20 / 3) / 8, which is 0.24.
    assert losses[0] > 1.5 and losses[-1] < 0.3 < np.log(20) / 8
    before, after = encoders_of(clip), encoders_of(tmp_path / "out")
    assert before.keys() == after.keys() and len(before) > 20
    assert all(np.array_equal(before[name], after[name]) for name in before)
    kept = load_file(tmp_path / "out" / "training" / "checkpoint.safetensors")
    moved = [name.removeprefix("exp_avg/") for name in kept if name.startswith("exp_avg/")]
    assert any(name.startswith("model.mapper.") for name in moved)
    assert not any(name.startswith(("model.text_model.", "model.vision_model.", "classifier.")) for name in moved)


def test_a_mapper_is_asked_for_every_word_behind_the_true_ones(photographs: Path, clip: Path, tmp_path: Path) -> None:
    """Against the losses of single pairs, added up."""
    # Texts of different lengths.
    lines = [json.loads(line) for line in (photographs / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["text"] = " ".join(line["text"].split()[: 2 + number % 4])
    (photographs / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = recipe("mapper", photographs, encoders=str(clip))
    pairs = making.prepare_samples(chosen, tmp_path / "other" / "training").split("train")
    torch.manual_seed(0)
    learner = Mapper.behind(clip)
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad and "norm" not in name:
            nn.init.normal_(parameter, 0, 0.3)
    found = mapper_losses(learner, pairs, np.random.Generator(np.random.PCG64(7)), batch=20)
    assert found.keys() == {"captions"}
    surprise = []
    for number in range(20):
        text = torch.tensor([[word for word in pairs.words[number].tolist() if word]])
        image = learner.look(pairs, np.array([number]))
        for end in range(1, text.shape[1]):
            surprise.append(-learner.tell(text[:, :end], image)[0, -1].log_softmax(-1)[text[0, end]])
    assert len(surprise) < 20 * 8
    torch.testing.assert_close(found["captions"], torch.stack(surprise).mean(), rtol=1e-5, atol=1e-5)
    # Another image, other words.
    assert (learner.look(pairs, np.array([0])) - learner.look(pairs, np.array([1]))).abs().max() > 1e-2


def test_a_mapper_learns_behind_a_clip_of_its_own_samples_alone(photographs: Path, clip: Path, tmp_path: Path) -> None:
    chosen = recipe("mapper", photographs, encoders=str(clip))
    with pytest.raises(ReferenceError, match=r"'width' of the encoders in .*clip' is 16, not 32; mapper takes theirs"):
        recipe("mapper", photographs, encoders=str(clip), width=32)
    with pytest.raises(ReferenceError, match=r"'side' of the encoders in .*clip' is 16, not 24"):
        recipe("mapper", photographs, encoders=str(clip), side=24)
    with pytest.raises(ReferenceError, match=r"'encoders' .*photographs' is no folder of a trained clip"):
        recipe("mapper", photographs, encoders=str(photographs))
    making.train(recipe("text", photographs), 0, str(tmp_path / "text"))
    with pytest.raises(ReferenceError, match=r"'encoders' .*text' is no folder of a trained clip"):
        recipe("mapper", photographs, encoders=str(tmp_path / "text"))
    # Other held-out pairs are another vocabulary: their numbers are unknown.
    with pytest.raises(ReferenceError, match=r"learned another vocabulary than that of samples '.*photographs'"):
        making.train(recipe("mapper", photographs, encoders=str(clip), validation_scenes=1), 0, str(tmp_path / "b"))
    making.train(chosen, 0, str(tmp_path / "out"))
    assert making.train(chosen, 0, str(tmp_path / "out"))["resumed"] is True
    making.train(recipe("clip", photographs), 1, str(tmp_path / "again"))
    (tmp_path / "again" / "model.safetensors").replace(clip / "model.safetensors")
    with pytest.raises(ReferenceError, match="holds a training of another recipe, seed or data"):
        making.train(chosen, 0, str(tmp_path / "out"))


def test_losses_that_samples_do_not_tell_are_left_out_and_named(photographs: Path, tmp_path: Path) -> None:
    (photographs / "p3.png").write_bytes(b"no image")
    notes = making.train(recipe("clip", photographs), 0, str(tmp_path / "out"))["notes"]
    assert len(notes) == 2  # type: ignore[arg-type]
    assert notes[0].startswith("1 of 24 samples were left out, first 'p3.png': image can't be decoded")  # type: ignore
    assert (
        notes[1] == "without the loss of units (it needs the class of each patch or region), which samples don't tell"
    )  # type: ignore
    assert "patch_classifier.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_training_on_samples_goes_on_to_the_same_weights(photographs: Path, tmp_path: Path) -> None:
    chosen = recipe("clip", photographs)
    making.train(chosen, 1, str(tmp_path / "whole"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "data").rename(tmp_path / "cut" / "data")
    cut = Training(chosen, 1, tmp_path / "cut" / "training")
    cut.advance(5)
    receipt = making.train(chosen, 1, str(tmp_path / "cut"))
    assert receipt["resumed"] is True
    assert weights_digest(tmp_path / "cut") == weights_digest(tmp_path / "whole")


def test_another_training_in_the_folder_is_not_overwritten(photographs: Path, tmp_path: Path) -> None:
    making.train(recipe("text", photographs), 0, str(tmp_path / "out"))
    before = weights_digest(tmp_path / "out")
    for other, seed in ((recipe("text", photographs, steps=5), 0), (recipe("text", photographs), 1)):
        with pytest.raises(ReferenceError, match="holds a training of another recipe, seed or data"):
            making.train(other, seed, str(tmp_path / "out"))
    assert weights_digest(tmp_path / "out") == before


def test_prepared_samples_serve_many_trainings(photographs: Path, tmp_path: Path) -> None:
    chosen = recipe("clip", photographs)
    making.prepare(str(photographs), str(tmp_path / "data"), chosen.shape)
    # The folder has decided these.
    rest = {name: value for name, value in SHORT.items() if name not in ("side", "length", "validation_scenes")}
    making.train(recipe_of("clip", rest | {"samples": str(tmp_path / "data")}), 0, str(tmp_path / "a"))
    making.train(chosen, 0, str(tmp_path / "b"))
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")
    assert not (tmp_path / "a" / "data").exists()
    with pytest.raises(SampleError, match="prepared otherwise"):
        making.train(recipe("clip", tmp_path / "data", length=8), 0, str(tmp_path / "c"))
    # Images are in no one's way.
    making.train(recipe("text", tmp_path / "data"), 0, str(tmp_path / "d"))


@pytest.mark.parametrize("model", ["clip", "mapper"])
def test_most_of_a_bfloat16_step_is_in_bfloat16_and_weights_are_not(
    model: str, photographs: Path, clip: Path, tmp_path: Path
) -> None:
    gradients = {}
    encoders = str(clip) if model == "mapper" else ""
    for dtype in ("float32", "bfloat16"):
        chosen = recipe(model, photographs, dtype=dtype, steps=0, decay=1, encoders=encoders)
        kinds: set[torch.dtype] = set()

        def note(module: nn.Module, inputs: object, output: torch.Tensor, kinds: set[torch.dtype] = kinds) -> None:
            if module.training:
                kinds.add(output.dtype)

        making.prepare(str(photographs), str(tmp_path / dtype / "data"), chosen.shape)
        training = Training(chosen, 0, tmp_path / dtype / "training")
        linear = next(m for m in training.learner.modules() if isinstance(m, nn.Linear))
        linear.register_forward_hook(note)
        training.advance(1)
        assert kinds == {getattr(torch, dtype)}
        assert {p.dtype for p in training.learner.parameters()} == {torch.float32}
        gradients[dtype] = gradient_of(tmp_path / dtype)
    assert not np.array_equal(gradients["bfloat16"], gradients["float32"])
    # bfloat16 has eight bits; the whole gradient keeps its direction.
    cosine = gradients["bfloat16"] @ gradients["float32"]
    cosine /= np.linalg.norm(gradients["bfloat16"]) * np.linalg.norm(gradients["float32"])
    assert cosine > 0.99


def gradient_of(out: Path) -> np.ndarray:
    """The first step's gradient, from the checkpoint's first moments."""
    kept = load_file(out / "training" / "checkpoint.safetensors")
    return np.concatenate([kept[name].ravel() for name in sorted(kept) if name.startswith("exp_avg/")]) / 0.1


RANKS = """
import json, sys, torch
from pathlib import Path
from attnscope.reference.making import recipe_of
from attnscope.reference.sharing import Share
from attnscope.reference.training import Training

number, out = int(sys.argv[1]), Path(sys.argv[2])
meeting = f"file://{out / 'meet'}"
torch.distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=2)
for place in sorted(out.glob("*-*")):
    changes = json.loads((place / "changes.json").read_text())
    training = Training(recipe_of(place.name.partition("-")[0], changes), 0, place / "training", None, Share(number, 2))
    training.advance()
    # All that it keeps is the same in both.
    for name, value in training.learner.state_dict().items():
        parts = [torch.empty_like(value) for _ in range(2)]
        torch.distributed.all_gather(parts, value.contiguous())
        assert torch.equal(*parts), (place.name, name)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(photographs: Path, clip: Path, tmp_path: Path) -> None:
    one_step = {"steps": 0, "decay": 1, "validation_scenes": 8, "batch": 16}
    world = one_step | {"scenes": 40}
    own = one_step | SIZES | {"samples": str(photographs), "validation_scenes": 2}
    # Of SIMLA's losses, the others draw their partners and masks in each share by itself.
    shared = own | {"without": ["itm", "mlm", "mim"]}
    cases = {
        "clip-world": world,
        "text-world": world,
        "clip-own": own,
        "text-own": own,
        "simla-own": shared,
        "vilt-own": own,
        "lxmert-own": own,
        "mapper-own": own | {"encoders": str(clip)},
    }
    for name, changes in cases.items():
        model = name.partition("-")[0]
        for folder in (tmp_path / "one" / name, tmp_path / "two" / name):
            folder.mkdir(parents=True)
            if "samples" in changes:
                making.prepare(str(photographs), str(folder / "data"), recipe_of(model, changes).shape)
        Training(recipe_of(model, changes), 0, tmp_path / "one" / name / "training").advance()
        (tmp_path / "two" / name / "changes.json").write_text(json.dumps(changes))
    command = [sys.executable, "-c", RANKS]
    ranks = [subprocess.Popen([*command, str(number), str(tmp_path / "two")]) for number in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    for name in cases:
        one, two = gradient_of(tmp_path / "one" / name), gradient_of(tmp_path / "two" / name)
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5 * np.abs(one).max(), err_msg=name)


@pytest.mark.slow
def test_several_processes_that_were_killed_go_on_to_the_same_weights(photographs: Path, tmp_path: Path) -> None:
    chosen = recipe("clip", photographs, processes=2, steps=60)
    making.prepare(str(photographs), str(tmp_path / "data"), chosen.shape)
    options = SHORT | {"steps": 60}
    command = [sys.executable, "-m", "attnscope.cli", "reference", "train", "clip", "--engine", "inline"]
    command += ["--samples", str(tmp_path / "data"), "--processes", "2", "--out", str(tmp_path / "cut")]
    command += [f"--recipe={field}={value}" for field, value in options.items()]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "cut" / "training" / "checkpoint.safetensors").is_file():
            assert first.poll() is None
            time.sleep(0.01)
        others = psutil.Process(first.pid).children(recursive=True)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    # Those that it started end by themselves.
    _, alive = psutil.wait_procs(others, timeout=60)
    assert not alive

    chosen = dataclasses.replace(chosen, samples=str(tmp_path / "data"))
    receipt = making.train(chosen, 0, str(tmp_path / "cut"))
    assert receipt["resumed"] is True
    making.train(chosen, 0, str(tmp_path / "whole"))
    assert weights_digest(tmp_path / "cut") == weights_digest(tmp_path / "whole")


def test_one_process_that_is_killed_is_named_and_ends_the_others() -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    targets = ((time.sleep, (600,)), (signal.raise_signal, (signal.SIGKILL,)))
    with ExitStack() as ending:
        started = [context.Process(target=target, args=arguments) for target, arguments in targets]
        for process in started:
            process.start()
            ending.callback(process.kill)
        # As when both pipes are the processes' own.
        started[1].join()
        pipes[1][1].close()
        with pytest.raises(ProcessDied, match="process 1 of 2 ended with code -9; train again to go on"):
            spreading._listen(started, [receiver for receiver, _ in pipes], None)


def test_a_training_goes_on_over_another_number_of_processes(photographs: Path, tmp_path: Path) -> None:
    chosen = recipe("text", photographs)
    assert dataclasses.replace(chosen, processes=4, device="cuda").key == chosen.key
    assert dataclasses.replace(chosen, dtype="bfloat16").key != chosen.key
    # What was begun before recipes had these fields goes on.
    assert RECIPES["text"].key == (
        "Recipe(model='text', scenes=16000, hard_from=0, steps=400, decay=200, warm_up=100, peak_rate=0.0015,"
        " weight_decay=0.02, clip=1.0, examine_every=200, validation_scenes=256, goals={}, without=())"
    )


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("scan", {"samples": "x"}, "scan learns from generated scenes alone.*vilt, lxmert, clip.* take 'samples'"),
        ("lxmert", {"dtype": "bfloat16"}, "lxmert learns from generated scenes at its own batch.*for another 'dtype'"),
        ("vilt", {"processes": 2}, "vilt learns from generated scenes at its own batch.*for another 'processes'"),
        ("vilt", {"batch": 64}, "vilt learns from generated scenes at its own batch.*for another 'batch'"),
        ("mapper", {"batch": 64}, "mapper learns from generated scenes at its own batch.*for another 'batch'"),
        ("mapper", {"width": 32}, "mapper has the 'width' of its encoders; name samples for other ones"),
        ("mapper", {"samples": "x"}, "mapper learns from samples behind a clip .*; name its folder as 'encoders'"),
        ("mapper", {"encoders": "x"}, "mapper learns from generated scenes behind reference:clip; name samples"),
        ("mapper", {"samples": "x", "encoders": "y"}, "'encoders' 'y' is no folder of a trained clip"),
        ("mapper", {"samples": "x", "encoders": 5}, "the recipe's 'encoders' is 5, not a str"),
        ("clip", {"samples": "x", "encoders": "y"}, "clip has encoders of its own; mapper takes 'encoders'"),
        ("clip", {"side": 64}, "'side' of generated scenes is 48; name samples for another value"),
        ("clip", {"samples": "x", "side": 50, "patch": 16}, "a side of 50 pixels isn't made of patches of 16"),
        ("clip", {"width": 66}, "a width of 66 can't be shared by 4 heads"),
        ("clip", {"width": 62, "heads": 2}, "a width of 62 isn't a multiple of 4"),
        ("clip", {"processes": 3}, "a batch of 128 can't be shared equally by 3 processes"),
        ("clip", {"width": "wide"}, "the recipe's 'width' is 'wide', not a int"),
        ("clip", {"layers": 0}, "the recipe's 'layers' is 0, below 1"),
        ("clip", {"dtype": "float16"}, "the recipe's 'dtype' is 'float16'; it can be float32, bfloat16"),
        ("text", {"without": ["words"], "samples": "x"}, "text has no loss left to learn from"),
        ("clip", {"without": ["images", "texts"], "samples": "x"}, "clip has no loss left to learn from"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(model: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ReferenceError, match=message):
        recipe_of(model, changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ReferenceError, match=r"1 process\(es\) on cuda need a device each, and there are 0"):
        recipe_of("clip", {"device": "cuda"})


def test_a_goal_that_is_no_figure_is_refused(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ReferenceError, match="goal 'accuracy' is no figure of clip; its figures are image_to_text_r1"):
        making.train(recipe("clip", photographs, goals={"accuracy": 0.5}), 0, str(tmp_path))


def test_the_rate_falls_when_goals_on_samples_are_reached(photographs: Path, tmp_path: Path) -> None:
    receipt = making.train(recipe("clip", photographs, steps=90, goals={"image_to_text_r5": 0.5}), 0, str(tmp_path))
    # Among two, each is within the first five: reached at the first examination.
    assert receipt["steps"] == 3 + 4


def test_fewer_samples_than_a_batch_are_refused(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="leave 20 to learn from, fewer than a batch of 128"):
        making.train(recipe("clip", photographs, batch=0), 0, str(tmp_path))


def test_the_command_trains_on_samples_and_says_what_was_left_out(photographs: Path, tmp_path: Path) -> None:
    (photographs / "p3.png").write_bytes(b"no image")
    recipes = [f"--recipe={field}={value}" for field, value in SHORT.items()]
    command = ["reference", "train", "clip", "--engine", "inline", *recipes, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*command, "--samples", str(photographs), "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert "note:    1 of 24 samples were left out, first 'p3.png': image can't be decoded" in result.output
    assert "in bfloat16 on cpu" in (tmp_path / "out" / "README.md").read_text()
    command = ["reference", "prepare", str(photographs), "--out", str(tmp_path / "data"), "--side", "16"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and f"samples: {tmp_path / 'data'} (23 usable)" in result.output
    empty = CliRunner().invoke(main, ["reference", "prepare", str(tmp_path / "none"), "--out", str(tmp_path / "e")])
    assert empty.exit_code != 0
