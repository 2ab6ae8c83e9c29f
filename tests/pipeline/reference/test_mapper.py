"""The mapper behind CLIP: its wiring, what learns and what stays, and what the carried one does."""

import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from attnscope.compatibility.examples import numbers, widened
from attnscope.compatibility.witness import call_error, forward, own_softmaxes
from attnscope.extraction import extract
from attnscope.loading import load_model
from attnscope.quantities import ExtractSpec
from attnscope.recording import recording
from attnscope.reference import carrying, lessons, read_reference
from attnscope.reference.captions import ANSWERS
from attnscope.reference.corpus import CLASSES, CLS, PAD, SEP, VOCABULARY, Corpus, build_corpus
from attnscope.reference.examining import examine_answers, examine_captions, write_captions
from attnscope.reference.learners import Mapper, mapper_config
from attnscope.reference.lessons import mapper_losses, trimmed
from attnscope.reference.making import recipe_of
from attnscope.reference.mapper import MapperForConditionalGeneration, MapperForQuestionAnswering
from attnscope.reference.training import Training
from attnscope.reference.weights import read_learner
from attnscope.samples import Sample
from attnscope.testing import check_family

HEADS = {"answers": MapperForQuestionAnswering, "captions": MapperForConditionalGeneration}
SITES = {
    "answers": {"text.self": 4, "vision.self": 6, "text.vision": 2, "vision.text": 2},
    "captions": {
        **{"prompt.self": 4, "vision.self": 6, "prompt.vision": 2, "vision.prompt": 2},
        **{"text.self": 2, "text.vision": 2},
    },
}


def wide(head: str, kernel: str = "sdpa") -> torch.nn.Module:
    """The model with random weights, wide enough for attention that is far from even."""
    return widened(HEADS[head]._from_config(mapper_config(), attn_implementation=kernel))


def padded() -> dict[str, torch.Tensor]:
    """Two texts, the second three tokens shorter, with noise for images."""
    ids = torch.tensor([[CLS, 9, 8, 30, 31, 12, SEP], [CLS, 9, 20, SEP, PAD, PAD, PAD]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": numbers(2, 3, 48, 48)}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus("train", range(64))


@pytest.fixture(scope="module")
def unseen() -> Corpus:
    return build_corpus("test", range(48))


@pytest.fixture(scope="module")
def carried() -> Mapper:
    learner = read_learner("mapper")
    assert isinstance(learner, Mapper)
    return learner


@pytest.mark.parametrize("head", HEADS)
def test_every_kernel_is_recorded_as_the_model_computes_it(head: str) -> None:
    model, inputs = wide(head), padded()
    bare = forward(model, inputs).logits
    with recording(model) as recorded:
        logits = forward(model, inputs).logits
    assert torch.equal(bare, logits)
    own = own_softmaxes(wide(head, "eager"), inputs)
    assert len(recorded) == len(own) == sum(SITES[head].values())
    for call, softmax in zip(recorded, own, strict=True):
        assert call_error(call, softmax) <= 2e-6, call
    # Far from even, so that a wrong scale or a wrong mask would show.
    assert np.mean([float(softmax.amax(-1).mean()) for softmax in own]) > 0.25


@pytest.mark.parametrize("head", HEADS)
def test_every_call_has_its_role(head: str) -> None:
    check_family("clip_mapper", wide(head), padded())
    run = extract(wide(head), [padded()], spec=ExtractSpec(quantities=frozenset({"attention", "score"})))
    assert {name: len(site.layers) for name, site in run.plan.sites.items()} == SITES[head]
    assert all(site.layers == tuple(range(len(site.layers))) for site in run.plan.sites.values())
    assert not any(site.guessed for site in run.plan.sites.values())
    turns = [(turn, name) for name, site in run.plan.sites.items() for turn in site.turns]
    order = [name for _, name in sorted(turns)]
    prompt = "text" if head == "answers" else "prompt"
    layer = [f"{prompt}.self", "vision.self", f"{prompt}.vision", f"vision.{prompt}"]
    decoder = ["text.self", "text.vision"] if head == "captions" else []
    assert order == [f"{prompt}.self"] * 2 + ["vision.self"] * 4 + 2 * layer + 2 * decoder


def test_an_answer_depends_on_no_padding() -> None:
    model, inputs = wide("answers"), padded()
    short = {**inputs, "input_ids": inputs["input_ids"][1:, :4], "attention_mask": inputs["attention_mask"][1:, :4]}
    short["pixel_values"] = inputs["pixel_values"][1:]
    torch.testing.assert_close(forward(model, inputs).logits[1:], forward(model, short).logits, atol=1e-5, rtol=0)


def test_a_later_word_changes_no_earlier_logit() -> None:
    model, inputs = wide("captions"), padded()
    before = forward(model, inputs).logits
    changed = copy.deepcopy(inputs)
    changed["input_ids"][0, 4] = 40
    after = forward(model, changed).logits
    assert torch.equal(before[0, :4], after[0, :4])
    assert (before[0, 4:] - after[0, 4:]).abs().amax(-1).min() > 1e-3
    assert torch.equal(before[1], after[1])


def test_captions_that_are_written_are_those_of_one_forward() -> None:
    model, inputs = wide("captions"), padded()
    start = {"input_ids": inputs["input_ids"][:, :1], "pixel_values": inputs["pixel_values"]}
    written = model.generate(**start, max_new_tokens=6, do_sample=False)
    logits = forward(model, {**start, "input_ids": written}).logits
    for row, ids in enumerate(written):
        ends = (ids == SEP).nonzero()[:, 0].tolist() or [len(ids) - 1]
        assert torch.equal(logits[row, : ends[0]].argmax(-1), ids[1 : ends[0] + 1])


def test_clip_learns_nothing_and_everything_else_does(corpus: Corpus, tmp_path: Path) -> None:
    learner = Mapper()
    losses = mapper_losses(learner, corpus, np.random.default_rng(0))
    assert set(losses) == {"answers", "captions", "units"}
    sum(losses.values(), torch.zeros(())).backward()
    clip = ("model.text_model.", "model.vision_model.")
    for name, parameter in learner.named_parameters():
        assert (parameter.grad is None) == name.startswith(clip), name
        assert name.startswith(clip) or parameter.grad.any(), name
    changes = {"scenes": 40, "steps": 2, "decay": 1, "examine_every": 3, "validation_scenes": 4}
    training = Training(recipe_of("mapper", changes), 0, tmp_path)
    training.advance(2)
    training.save()
    again = Training(recipe_of("mapper", changes), 0, tmp_path)
    assert again.resume()
    for one in (training, again):
        one.advance()
    frozen = load_file(carrying.path("clip") / "model.safetensors")
    fresh = dict(Mapper().named_parameters())
    state = dict(again.learner.named_parameters())
    for name, parameter in training.learner.named_parameters():
        assert torch.equal(parameter, state[name]), name
        if name.startswith(clip):
            assert torch.equal(parameter, frozen[name.removeprefix("model.")]), name
    moved = "model.mapper.layers.0.text_image_attention.q_proj.weight"
    assert not torch.equal(state[moved], fresh[moved])


def test_eight_scenes_are_learned_by_heart(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_ASKED", "_DESCRIBED"):
        monkeypatch.setattr(lessons, name, 8)
    torch.manual_seed(0)
    learner = Mapper()
    few = Corpus(**{name: values[:8].copy() for name, values in vars(corpus).items()})
    # One question to each.
    for answers in few.answers:
        answers[np.flatnonzero(answers >= 0)[1:]] = -1
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(120):
        losses = mapper_losses(learner, few, rng)
        optimizer.zero_grad()
        (losses["answers"] + losses["captions"]).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
    assert losses["captions"].item() < 0.05
    assert losses["answers"].item() < 0.1


def test_an_untrained_mapper_says_what_chance_says(corpus: Corpus) -> None:
    torch.manual_seed(0)
    losses = mapper_losses(Mapper(), corpus, np.random.default_rng(0))
    assert losses["answers"].item() == pytest.approx(np.log(len(ANSWERS)), rel=0.15)
    assert losses["captions"].item() == pytest.approx(np.log(len(VOCABULARY)), rel=0.15)


def test_captions_are_judged_by_what_is_there(carried: Mapper, unseen: Corpus) -> None:
    # True captions are all true; with one attribute changed none is.
    learner = copy.copy(carried)
    for words, share in ((unseen.words, 1.0), (unseen.negatives[:, 0], 0.0)):

        def write(*_: object, words: np.ndarray = words) -> np.ndarray:
            return words

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("attnscope.reference.examining.write_captions", write)
            found = examine_captions(learner, unseen)
        assert found["true"].values.mean() == share
        assert found["phrases"].values.mean() >= share
        mentioned = np.array([len(set(row[row >= 0])) for row in unseen.phrases])
        assert (np.bincount(found["phrases"].scenes) == mentioned).all()


def test_the_carried_mapper_does_what_its_card_says(carried: Mapper, unseen: Corpus) -> None:
    figures = carrying.card("mapper")["figures"]["test"]  # type: ignore[index]
    found = {f"answers_{k}": v for k, v in examine_answers(carried, unseen).items()}
    found |= {f"captions_{k}": v for k, v in examine_captions(carried, unseen).items()}
    for name in ("answers_attributes", "captions_true", "captions_tokens"):
        assert found[name].values.mean() == pytest.approx(figures[name]["value"], abs=0.06), name
    # Guessing among the answers of these kinds is right in a quarter of the cases at most.
    assert figures["answers_attributes"]["low"] > 0.9
    assert figures["captions_true"]["low"] > 0.9


@pytest.mark.parametrize("head", HEADS)
def test_a_carried_head_gives_what_it_learned_to_give(head: str, carried: Mapper, unseen: Corpus) -> None:
    samples = read_reference("reference:12")
    loaded = load_model(f"reference:mapper:{head}")
    inputs = loaded.family.encode(samples, loaded)
    scenes = np.arange(12)
    with torch.no_grad():
        given = loaded.model(**inputs).logits
        if head == "answers":
            expected = carried.answer(carried.encode(trimmed(unseen.words[scenes]), carried.see(unseen, scenes)))
        else:
            expected = carried.tell(inputs["input_ids"], carried.look(unseen, scenes))
            # A caption's end is for the model to say.
            assert not (inputs["input_ids"] == SEP).any()
            assert torch.equal(inputs["input_ids"], trimmed(unseen.words[scenes])[:, :-1].where(
                trimmed(unseen.words[scenes])[:, :-1] != SEP, PAD
            ))  # fmt: skip
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_a_caption_without_a_beginning_is_written_whole(carried: Mapper, unseen: Corpus) -> None:
    samples = [Sample(s.id, s.load_image(), regions=s.regions) for s in read_reference("reference:4")]
    spec = ExtractSpec(quantities=frozenset({"attention", "score"}), generate=30)
    run = extract("reference:mapper:captions", samples, spec=spec)
    written = write_captions(carried, carried.look(unseen, np.arange(4)))
    tokens = run.tokens("text").load()
    for sample, ids in enumerate(written):
        told = [str(t) for t in tokens["token_text"].values[sample] if str(t) not in ("", "[PAD]")]
        assert told == [VOCABULARY[i] for i in ids if i != PAD]
        assert any(f"{a} {b}" in CLASSES for a, b in pairwise(told))
