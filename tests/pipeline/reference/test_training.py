"""A recipe and a seed give the same weights each time, cut short or not, and lessons ask what they say they ask."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from attnscope.cli import main
from attnscope.reference import making
from attnscope.reference.corpus import (
    CLASSES,
    GROUND,
    MASK,
    NEGATIVES,
    PAD,
    ROLES,
    VOCABULARY,
    Corpus,
    build_corpus,
)
from attnscope.reference.examining import Items, examine_joint_ranking, examine_words, hide_everything, hide_thing
from attnscope.reference.kinds import LEARNERS
from attnscope.reference.learners import Clip, Lxmert, Vilt
from attnscope.reference.lessons import (
    Texts,
    contrastive_losses,
    joint_losses,
    mask_in_phrases,
    mask_words,
    match_texts,
    word_losses,
    wrong_captions,
)
from attnscope.reference.making import ReferenceError, recipe_of
from attnscope.reference.scenes import draw_scene
from attnscope.reference.training import RECIPES, Training
from attnscope.reference.weights import read_learner, weights_digest

SHORT = {"scenes": 60, "steps": 6, "decay": 4, "examine_every": 4, "validation_scenes": 8}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus("train", range(160))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vilt", "clip", "lxmert"])
def test_two_trainings_with_one_seed_give_the_same_weights(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name, SHORT | {"steps": 2, "decay": 2, "scenes": 30})
    for folder in ("a", "b"):
        making.train(recipe, 0, str(tmp_path / folder))
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        making.train(recipe_of("text", SHORT), seed, str(tmp_path / str(seed)))
    assert weights_digest(tmp_path / "0") != weights_digest(tmp_path / "1")


def test_a_training_that_was_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = recipe_of("text", SHORT)
    making.train(recipe, 3, str(tmp_path / "whole"))
    cut = Training(recipe, 3, tmp_path / "cut" / "training")
    # Two steps behind the checkpoint of step 4 are lost, as when the process dies.
    cut.advance(6)
    assert cut.step == 6
    receipt = making.train(recipe, 3, str(tmp_path / "cut"))
    assert receipt["resumed"] is True
    assert receipt["steps"] == 10
    assert weights_digest(tmp_path / "cut") == weights_digest(tmp_path / "whole")
    again = making.train(recipe, 3, str(tmp_path / "cut"))
    assert again["steps"] == 10


def test_a_head_whose_loss_is_left_out_learns_nothing(tmp_path: Path) -> None:
    moved = {}
    for folder, without in (("with", ()), ("without", ("answers",))):
        changes = SHORT | {"steps": 1, "decay": 1, "without": without}
        training = Training(recipe_of("vilt", changes), 0, tmp_path / folder)
        training.advance()
        # It begins at zero.
        moved[folder] = training.learner.classifier[0].bias.any().item()  # type: ignore[index, union-attr]
    assert moved == {"with": True, "without": False}


def test_another_recipe_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    making.train(recipe_of("text", SHORT), 0, str(tmp_path))
    other = Training(recipe_of("text", SHORT | {"peak_rate": 1e-4}), 0, tmp_path / "training")
    assert not other.resume()
    assert not Training(recipe_of("text", SHORT), 1, tmp_path / "training").resume()


def test_the_rate_falls_when_the_goals_are_reached(tmp_path: Path) -> None:
    reached = Training(recipe_of("text", SHORT | {"steps": 100, "goals": {"words_colour": 0.0}}), 0, tmp_path)
    reached.advance()
    assert (reached.decay_from, reached.step) == (4, 8)
    never = Training(recipe_of("text", SHORT | {"goals": {"words_colour": 1.1}}), 0, tmp_path / "never")
    never.advance()
    assert (never.decay_from, never.step) == (6, 10)


def test_what_is_written_is_what_was_trained(tmp_path: Path) -> None:
    training = Training(recipe_of("clip", SHORT), 0, tmp_path / "training")
    training.advance()
    making.train(recipe_of("clip", SHORT), 0, str(tmp_path))
    read = read_learner("clip", tmp_path)
    assert isinstance(read, Clip) and isinstance(training.learner, Clip)
    named = dict(read.named_parameters())
    for name, parameter in training.learner.named_parameters():
        assert name.startswith("patch_classifier") or torch.equal(parameter, named[name]), name
    # The classes of patches are written as one linear layer.
    hidden = torch.randn(5, 64)
    torch.testing.assert_close(read.patch_classifier(hidden), training.learner.patch_classifier(hidden))


def test_the_command_trains_examines_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "text"
    changes = [part for field, value in SHORT.items() for part in ("--recipe", f"{field}={value}")]
    command = ["reference", "train", "text", "--out", str(out), "--scenes", "24", "--engine", "inline", *changes]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    card = json.loads((out / "card.json").read_text())
    assert f"digest:  {card['digest']}" in result.stdout
    assert card["digest"] == weights_digest(out)
    assert card["recipe"] == {**dataclasses.asdict(RECIPES["text"]), **SHORT, "without": []}
    assert set(card["figures"]) == {"test", "hard"}
    figure = card["figures"]["test"]["words_colour_accuracy"]
    assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert "step 10 of at most 10" in result.stderr
    assert card["digest"] in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody"], "unknown reference model 'nobody'; known: vilt, clip, lxmert, text, simla, mapper"),
        (["text", "--recipe", "colour=1"], "a recipe has no 'colour'; it has alignment, batch, clip, decay,"),
        (
            ["vilt", "--ablate-loss", "words", "--ablate-loss", "psl"],
            "vilt has no loss 'psl'; its losses are words, match",
        ),
        (["text", "--recipe", "steps"], "--recipe 'steps' is not FIELD=VALUE"),
    ],
)
def test_a_training_that_cannot_be_is_refused_in_one_sentence(arguments: list[str], told: str, tmp_path: Path) -> None:
    command = ["reference", "train", *arguments, "--out", str(tmp_path / "x"), "--engine", "inline"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_card_needs_a_finished_training(tmp_path: Path) -> None:
    with pytest.raises(ReferenceError, match="holds no finished training"):
        making.examine(recipe_of("text", SHORT), 0, str(tmp_path))


def test_the_corpus_is_what_the_scenes_are(corpus: Corpus) -> None:
    for number in range(40):
        scene = draw_scene("train", number)
        words = [VOCABULARY[i] for i in corpus.words[number] if i != PAD]
        assert words[0] == "[CLS]" and words[-1] == "[SEP]"
        for token, role in enumerate(corpus.roles[number]):
            if ROLES[role] in ("colour", "shape", "size"):
                thing = scene.things[corpus.phrases[number, token]]
                assert getattr(thing, ROLES[role]) == words[token]
        for classes, things in (
            (corpus.patches[number], corpus.patch_things[number]),
            (corpus.regions[number], corpus.region_things[number]),
        ):
            for which, thing in zip(classes, things, strict=True):
                assert CLASSES[which] == ("ground" if thing < 0 else " ".join(scene.things[thing].pair))
        for number_of, box in zip(corpus.region_things[number], corpus.boxes[number], strict=True):
            if number_of >= 0 and not scene.hard:
                thing = scene.things[number_of]
                assert box == pytest.approx(
                    [
                        max(0, thing.x - thing.radius),
                        max(0, thing.y - thing.radius),
                        min(1, thing.x + thing.radius),
                        min(1, thing.y + thing.radius),
                    ],
                    abs=0.04,
                )


def test_masked_words_are_those_that_are_asked_for(corpus: Corpus) -> None:
    scenes = np.arange(len(corpus))
    asked = mask_words(Texts.of(corpus, scenes), np.random.default_rng(0))
    masked = asked.shown == MASK
    assert (asked.shown == np.where(masked, MASK, corpus.words)).all()
    wanted = asked.wanted >= 0
    assert (asked.wanted[wanted] == corpus.words[wanted]).all()
    assert (masked == wanted).all()
    whole = (wanted & (corpus.roles == 0)).any(1)
    assert 0.1 < whole.mean() < 0.35
    phrase = np.where(wanted, corpus.phrases, -1).max(1)
    assert (wanted == (corpus.phrases == phrase[:, None]))[whole].all()
    assert wanted[~whole].sum(1).min() == 1 and wanted[~whole].sum(1).max() == 3
    assert {ROLES[r] for r in corpus.roles[~whole][wanted[~whole]]} == set(ROLES) - {""}


def test_phrases_alone_are_asked_for_an_attribute(corpus: Corpus) -> None:
    scenes = np.arange(len(corpus))
    asked = mask_in_phrases(Texts.of(corpus, scenes), np.random.default_rng(0))
    assert (asked.wanted >= 0).sum(1).max() == 1
    # Of a phrase whose size alone is determined, nothing is asked.
    assert (asked.wanted >= 0).sum() > 0.9 * len(corpus)
    for scene, (shown, wanted) in enumerate(zip(asked.shown, asked.wanted, strict=True)):
        assert (shown[wanted >= 0] == MASK).all()
        full = np.where(wanted >= 0, wanted, shown)
        words = [VOCABULARY[i] for i in full if i != PAD]
        assert words[:2] == ["[CLS]", "a"] and words[-1] == "[SEP]" and len(words) in (5, 6)
        assert any({*words[2:-1]} <= {t.colour, t.shape, t.size} for t in draw_scene("train", scene).things)


def test_half_of_the_pairs_are_phrases_of_which_one_is_false(corpus: Corpus) -> None:
    scenes = np.arange(len(corpus))
    right, wrong = match_texts(corpus, scenes, np.random.default_rng(0))
    for scene in scenes[: len(scenes) // 2]:
        pairs = [{VOCABULARY[i] for i in text if i != PAD} for text in (right[scene], wrong[scene])]
        there = [{t.colour, t.shape} for t in draw_scene("train", scene).things]
        assert any(pair <= pairs[0] for pair in there)
        assert not any(pair <= pairs[1] for pair in there)
    assert (right[len(scenes) // 2 :] == corpus.words[len(scenes) // 2 :]).all()


def test_wrong_captions_differ_from_the_true_ones(corpus: Corpus) -> None:
    scenes = np.arange(len(corpus))
    wrong = wrong_captions(corpus, scenes, np.random.default_rng(0))
    differs = (wrong != corpus.words).any(1)
    assert differs.mean() > 0.99
    known = [(wrong == corpus.negatives[:, kind]).all(1).mean() for kind in range(len(NEGATIVES))]
    assert all(share > 0.02 for share in known), known


@pytest.mark.parametrize("name", ["vilt", "lxmert"])
def test_every_part_of_a_joint_model_learns(name: str, corpus: Corpus) -> None:
    learner = LEARNERS[name]()
    losses = joint_losses(learner, corpus, np.random.default_rng(0))  # type: ignore[arg-type]
    assert set(losses) == {"words", "match", "answers", "hidden_units", "units"}
    sum(losses.values(), torch.zeros(())).backward()
    untouched = {n for n, p in learner.named_parameters() if p.grad is None or not p.grad.any()}
    # Text is of type 0, which transformers takes for padding here and leaves as it is.
    assert untouched <= {"lxmert.embeddings.token_type_embeddings.weight"}


def test_losses_before_learning_are_those_of_chance(corpus: Corpus) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    joint = joint_losses(Vilt(), corpus, rng)
    assert joint["words"].item() == pytest.approx(np.log(len(VOCABULARY)), rel=0.1)
    assert joint["match"].item() == pytest.approx(np.log(2), rel=0.05)
    clip = contrastive_losses(LEARNERS["clip"](), corpus, rng)  # type: ignore[arg-type]
    assert clip["texts"].item() * 2 == pytest.approx(np.log(128), rel=0.25)
    assert clip["images"].item() * 2 == pytest.approx(np.log(192), rel=0.25)
    assert word_losses(LEARNERS["text"](), corpus, rng)["words"].item() > 3  # type: ignore[arg-type]


def test_hiding_takes_away_the_thing_and_nothing_else(corpus: Corpus) -> None:
    learner = Vilt()
    scenes = np.arange(30)
    seen = learner.see(corpus, scenes)
    things = np.zeros(30, int)
    hidden = hide_thing(learner, corpus, seen, scenes, things).pixels.numpy()
    for scene in scenes:
        shows = corpus.patch_shows[scene, 0].reshape(4, 4).repeat(12, 0).repeat(12, 1)
        assert (hidden[scene][:, shows] == 0).all()
        assert (hidden[scene][:, ~shows] == seen.pixels[scene].numpy()[:, ~shows]).all()
        assert (shows.sum() > 0) or GROUND in corpus.patches[scene]
    assert (hide_everything(learner, corpus, seen, scenes, things).pixels == 0).all()
    assert torch.equal(hide_thing(learner, corpus, seen, scenes, things - 1).pixels, seen.pixels)


def test_an_untrained_model_is_surprised_as_chance_is(corpus: Corpus) -> None:
    torch.manual_seed(0)
    found = examine_words(Vilt().eval(), corpus)
    assert set(found) == set(ROLES) - {""}
    assert found["colour"]["bits"].values.mean() == pytest.approx(np.log2(len(VOCABULARY)), rel=0.1)


@pytest.mark.parametrize("name", ["vilt", "lxmert"])
def test_recalls_of_a_joint_stream_are_those_of_pairs_scored_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    learner = LEARNERS[name]().eval().requires_grad_(False)
    assert isinstance(learner, Vilt | Lxmert)
    for parameter in learner.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    scenes = build_corpus("test", range(24))
    found = examine_joint_ranking(learner, scenes, 12)

    def score(image: int, text: int) -> float:
        words = scenes.words[text]
        seen = learner.see(scenes, np.array([image]))
        return float(learner.match(learner.encode(torch.tensor(words[None, words > 0].astype(np.int64)), seen)))

    hits: dict[str, list[bool]] = {}
    for gallery in (range(12), range(12, 24)):
        scores = {(image, text): score(image, text) for image in gallery for text in gallery}
        for own in gallery:
            rivals = {
                "image_to_text": [scores[own, other] for other in gallery if other != own],
                "text_to_image": [scores[other, own] for other in gallery if other != own],
            }
            for way, others in rivals.items():
                better = sum(other > scores[own, own] - 1e-6 for other in others)
                for most in (1, 5, 10):
                    hits.setdefault(f"{way}_r{most}", []).append(better < most)
    assert {key: items.values.astype(bool).tolist() for key, items in found.items()} == hits
    assert 0 < np.mean(hits["image_to_text_r5"]) < 1


def test_an_interval_is_that_of_scenes_not_of_items() -> None:
    # Ten equal items a scene say no more than one.
    rng = np.random.default_rng(0)
    values = (rng.random(200) < 0.7).astype(float)
    one = Items(values, np.arange(200)).figure()
    ten = Items(values.repeat(10), np.arange(200).repeat(10)).figure()
    assert (one.value, one.low, one.high) == pytest.approx((ten.value, ten.low, ten.high))
    half = 1.96 * np.sqrt(values.var() / 200)
    assert (one.low, one.high) == pytest.approx((one.value - half, one.value + half), abs=0.01)
