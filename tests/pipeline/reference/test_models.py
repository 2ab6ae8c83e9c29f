"""The carried models are transformers' own, load from their folders, and are used wherever a model is named."""

import dataclasses
import json
import runpy
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from attnscope.cli import main
from attnscope.extraction import extract
from attnscope.loading import ModelError, load_model
from attnscope.quantities import ExtractSpec
from attnscope.reference import COLOURS, SHAPES, carrying, read_reference
from attnscope.reference.cards import card_page
from attnscope.reference.corpus import LENGTH, VOCABULARY, Corpus, build_corpus
from attnscope.reference.examining import examine_retrieval, examine_words, hide_everything
from attnscope.reference.learners import Clip, JointLearner, Lxmert, Vilt
from attnscope.reference.scenes import WORLD_VERSION
from attnscope.reference.simla import Simla
from attnscope.reference.simla_examining import examine_grounding, examine_ranking
from attnscope.reference.training import RECIPES
from attnscope.reference.weights import read_learner, unit_classifier, weights_digest
from attnscope.samples import Sample
from attnscope.statistics import bootstrap_interval

NAMES = list(carrying.HEADS)
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus("test", range(12))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_reference("reference:12")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_small_and_its_card_is_that_of_its_weights(name: str) -> None:
    folder = carrying.path(name)
    assert (folder / "model.safetensors").stat().st_size < 3 * MEGABYTE
    card = carrying.card(name)
    assert card["digest"] == weights_digest(folder)
    # What the command makes today.
    assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(RECIPES[name])))
    assert (card["world_version"], card["threads"]) == (WORLD_VERSION, 1)
    assert card["licence"] == "Apache-2.0"
    assert card["processor_seconds"] <= 15 * 60  # type: ignore[operator]
    assert (folder / "README.md").read_text() == card_page(card)


def figure(name: str, split: str, key: str) -> dict[str, float]:
    return carrying.card(name)["figures"][split][key]  # type: ignore[index, no-any-return]


def test_clip_finds_what_its_card_says() -> None:
    learner = read_learner("clip")
    assert isinstance(learner, Clip)
    found = examine_retrieval(learner, build_corpus("test", range(512)))
    for way in ("image_to_text", "text_to_image"):
        # Another machine rounds otherwise, which may turn over a scene or two.
        assert found[way].values.mean() == pytest.approx(figure("clip", "test", way)["value"], abs=0.01)
        assert found[way].values.mean() >= 0.6


@pytest.mark.parametrize("name", ["vilt", "lxmert"])
def test_masked_words_need_the_image(name: str) -> None:
    learner = read_learner(name)
    assert isinstance(learner, JointLearner)
    scenes = build_corpus("test", range(48))
    seen, blind = (
        examine_words(learner, scenes, change) for change in (None, partial(hide_everything, learner, scenes))
    )
    for role in ("colour", "shape"):
        accuracy = seen[role]["accuracy"].values.mean()
        assert accuracy == pytest.approx(figure(name, "test", f"words_{role}_accuracy")["value"], abs=0.06)
        assert blind[role]["bits"].values.mean() - seen[role]["bits"].values.mean() >= 2
        assert figure(name, "test", f"words_without_image_{role}_bits")["low"] >= 2


def test_words_alone_say_nothing_of_colour_and_shape() -> None:
    # Eight colours and six shapes are equally frequent: the prior of the language is their logarithm.
    for role, values in (("colour", COLOURS), ("shape", SHAPES)):
        bits = figure("text", "test", f"words_{role}_bits")
        assert bits["value"] == pytest.approx(np.log2(len(values)), abs=0.05)


@pytest.mark.parametrize(("name", "head"), [(n, h) for n in NAMES for h in carrying.HEADS[n]])
def test_a_model_loads_with_no_missing_key(name: str, head: str) -> None:
    loaded = load_model(f"reference:{name}:{head}")
    architecture = carrying.HEADS[name][head]
    assert type(loaded.model).__name__ == architecture
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.mask_token_id == VOCABULARY.index("[MASK]")
    assert loaded.text_limit == LENGTH
    _, loading = type(loaded.model).from_pretrained(  # type: ignore[attr-defined]
        carrying.path(name), output_loading_info=True, local_files_only=True
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"]


def test_the_tokenizer_gives_each_word_its_own_token(samples: list[Sample], corpus: Corpus) -> None:
    for name in NAMES:
        tokenizer = transformers.AutoTokenizer.from_pretrained(carrying.path(name), local_files_only=True)
        ids = tokenizer([s.text for s in samples], padding="max_length")["input_ids"]
        assert (np.array(ids) == corpus.words).all()


@pytest.mark.parametrize("name", ["vilt", "clip"])
def test_the_processor_gives_the_pixels_that_the_model_learned(
    name: str, samples: list[Sample], corpus: Corpus
) -> None:
    learner = read_learner(name)
    processor = transformers.AutoProcessor.from_pretrained(carrying.path(name), local_files_only=True)
    images = [s.load_image() for s in samples]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    seen = learner.see(corpus, np.arange(12)).pixels if isinstance(learner, Vilt) else None
    if seen is not None:
        assert torch.equal(pixels, seen)
    assert pixels.shape == (12, 3, 48, 48)


def inputs_of(name: str, samples: list[Sample]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    loaded = load_model(name)
    return loaded.model, loaded.family.encode(samples, loaded)


@pytest.mark.parametrize("head", ["words", "matching", "answers"])
def test_vilt_gives_what_it_learned_to_give(head: str, samples: list[Sample], corpus: Corpus) -> None:
    learner = read_learner("vilt")
    assert isinstance(learner, Vilt)
    model, inputs = inputs_of(f"reference:vilt:{head}", samples)
    with torch.no_grad():
        hidden = learner.encode(inputs["input_ids"], learner.see(corpus, np.arange(12)))
        expected = {"words": learner.words, "matching": learner.match, "answers": learner.answer}[head](hidden)
        given = model(**inputs)
        torch.testing.assert_close(given.logits.squeeze(-1), expected, atol=1e-4, rtol=0)
        if head == "words":
            # The forward shuffles the patches, so that their classes are compared as sets.
            ours = learner.classify(hidden).logsumexp(-1).sort(-1).values
            torch.testing.assert_close(given.patch_logits.logsumexp(-1).sort(-1).values, ours, atol=1e-4, rtol=0)


def test_lxmert_gives_what_it_learned_to_give(samples: list[Sample], corpus: Corpus) -> None:
    learner = read_learner("lxmert")
    assert isinstance(learner, Lxmert)
    model, inputs = inputs_of("reference:lxmert", samples)
    seen = learner.see(corpus, np.arange(12))
    assert torch.equal(inputs["visual_feats"], seen.pixels)
    assert seen.boxes is not None
    torch.testing.assert_close(inputs["visual_pos"], seen.boxes)
    with torch.no_grad():
        hidden = learner.encode(inputs["input_ids"], seen)
        given = model(**inputs)
    torch.testing.assert_close(given.prediction_logits, learner.words(hidden))
    torch.testing.assert_close(given.question_answering_score, learner.answer(hidden))
    torch.testing.assert_close(given.object_logits, learner.classify(hidden))
    score = given.cross_relationship_score
    torch.testing.assert_close(score[:, 1] - score[:, 0], learner.match(hidden))


def test_clip_gives_what_it_learned_to_give(samples: list[Sample], corpus: Corpus) -> None:
    learner = read_learner("clip")
    assert isinstance(learner, Clip)
    model, inputs = inputs_of("reference:clip", samples)
    with torch.no_grad():
        given = model(**inputs)
        images, units = learner.embed_images(corpus, np.arange(12))
        texts = learner.embed_texts(inputs["input_ids"])
        head = unit_classifier("clip")
        classes = head(given.vision_model_output.last_hidden_state[:, 1:])
    torch.testing.assert_close(given.image_embeds, images)
    torch.testing.assert_close(given.text_embeds, texts)
    torch.testing.assert_close(classes, units, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["matching", "words"])
def test_simla_gives_what_it_learned_to_give(head: str, samples: list[Sample], corpus: Corpus) -> None:
    learner = read_learner("simla")
    assert isinstance(learner, Simla)
    model, inputs = inputs_of(f"reference:simla:{head}", samples)
    seen = learner.see(corpus, np.arange(12))
    torch.testing.assert_close(inputs["pixel_values"], seen.pixels)
    with torch.no_grad():
        hidden = learner.encode(inputs["input_ids"], seen)
        given = model(**inputs)
        if head == "matching":
            torch.testing.assert_close(given.itm_score[:, 1] - given.itm_score[:, 0], learner.match(hidden))
            near = model(**inputs, use_itm_head=False).itm_score
            own = learner.project(learner.look(seen.pixels)) @ learner.read(inputs["input_ids"]).T
            torch.testing.assert_close(near, own)
        else:
            torch.testing.assert_close(given.logits, learner.words(hidden))
            torch.testing.assert_close(given.patch_logits, learner.classify(hidden), atol=1e-4, rtol=1e-4)


def test_simla_ranks_as_well_as_clip_and_grounds_phrases() -> None:
    for way in ("image_to_text", "text_to_image"):
        own, others = figure("simla", "test", f"matching_{way}_r1"), figure("clip", "test", way)
        assert own["value"] >= others["value"]
    # The second of three layers, as the paper takes the ninth of twelve.
    card = figure("simla", "test", "grounding_box_layer2")
    assert card["low"] > 3 * figure("simla", "test", "grounding_box_chance")["high"]
    learner, scenes = read_learner("simla"), build_corpus("test", range(64))
    assert isinstance(learner, Simla)
    found = examine_grounding(learner, scenes)["box_layer2"].values.mean()
    assert found == pytest.approx(card["value"], abs=0.1)
    # Among fewer, more are the first.
    ranked = examine_ranking(learner, scenes)
    assert ranked["image_to_text_r1"].values.mean() > figure("simla", "test", "matching_image_to_text_r1")["value"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "reference:nobody",
            "unknown model 'reference:nobody'; the reference models are reference:vilt, reference:clip",
        ),
        ("reference:clip:words", "reference:clip has no head 'words'; its heads are similarity"),
    ],
)
def test_a_model_that_there_is_not_is_refused(name: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        load_model(name)


@pytest.mark.parametrize(
    ("model", "sites"),
    [
        ("reference:vilt", {"joint.self"}),
        ("reference:clip", {"vision.self", "text.self"}),
        ("reference:lxmert", {"vision.self", "text.self", "text.vision", "vision.text"}),
        ("reference:simla", {"vision.self", "text.self", "text.vision"}),
        ("reference:mapper", {"vision.self", "text.self", "text.vision", "vision.text"}),
    ],
)
def test_models_are_extracted_on_scenes(model: str, sites: set[str]) -> None:
    run = extract(model, "reference:hard:3", spec=ExtractSpec(quantities=frozenset({"attention", "score"})))
    assert set(run.sites) == sites
    assert (run.status == 1).all()
    assert run.attrs["model"] == model


def test_the_command_prints_a_card() -> None:
    text = CliRunner().invoke(main, ["reference", "card", "clip"])
    assert text.exit_code == 0, text.output
    assert text.stdout.startswith("# reference:clip\n")
    found = CliRunner().invoke(main, ["reference", "card", "clip", "--format", "json"])
    assert json.loads(found.stdout) == carrying.card("clip")
    missing = CliRunner().invoke(main, ["reference", "card", "nobody"])
    assert missing.exit_code == 2
    assert "unknown reference model 'nobody'; known: vilt, clip, lxmert, text, simla, mapper" in missing.stderr


@pytest.mark.slow
def test_the_hard_split_tells_methods_apart() -> None:
    found = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "hard_split.py"))["hits"]("hard", 60)
    chance, methods = found.pop("chance"), list(found)
    assert all(0 < values.mean() < 1 for values in found.values())
    assert found["relevance"].mean() > 2 * chance.mean()
    apart = []
    for first, second in combinations(methods, 2):
        low, high = bootstrap_interval(found[first] - found[second])
        apart += [(first, second)] if low > 0 or high < 0 else []
    assert apart


def test_folders_hold_no_pickle() -> None:
    for name in NAMES:
        kinds = {Path(p).suffix for p in carrying.path(name).iterdir()}
        assert kinds <= {".json", ".md", ".safetensors"}


def test_joint_learners_are_read_in_evaluation_mode() -> None:
    learner = read_learner("vilt")
    assert isinstance(learner, JointLearner) and not learner.training
    assert not any(p.requires_grad for p in learner.parameters())
