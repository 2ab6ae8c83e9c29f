"""SIMLA's losses are what the paper's equations say, and teach what they should and nothing else."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from attnscope.reference.corpus import PAD, Corpus, build_corpus
from attnscope.reference.examining import recalls
from attnscope.reference.lessons import draw_scenes, trimmed
from attnscope.reference.making import recipe_of
from attnscope.reference.simla import CODES, QUEUE, Simla, fit_codes, shrunk_patches
from attnscope.reference.simla_examining import box_scores, grad_cam, overlaps
from attnscope.reference.simla_lessons import (
    LOSSES,
    contrast,
    cross_entropy,
    hard_negatives,
    keyword_loss,
    keywords,
    mask_blocks,
    mixed,
    simla_losses,
)
from attnscope.reference.training import Training

SHORT = {"scenes": 60, "steps": 3, "decay": 3, "examine_every": 4, "validation_scenes": 8}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus("train", range(64))


def learner_of(corpus: Corpus, *, std: float = 0.3) -> Simla:
    """A learner with wide weights, so that attention isn't uniform."""
    torch.manual_seed(0)
    learner = Simla()
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if parameter.ndim >= 2 and "embeddings" not in name:
                parameter.normal_(std=std)
        own = dict(learner.named_parameters())
        for name, kept in learner.momentum.named_buffers():
            kept.copy_(own.get(name, kept))
    learner.prepare(corpus)
    return learner


def unit_vectors(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_contrast_is_the_sum_over_pairs_that_its_equations_write() -> None:
    torch.manual_seed(1)
    own, others, slow = unit_vectors(4, 5), unit_vectors(9, 5), unit_vectors(4, 5)
    temperature, alpha = 0.2, 0.3
    total = 0.0
    for i in range(4):
        scores = [math.exp(float(own[i] @ other) / temperature) for other in others]
        slow_scores = [math.exp(float(slow[i] @ other) / temperature) for other in others]
        for j in range(9):
            target = (1 - alpha) * (i == j) + alpha * slow_scores[j] / sum(slow_scores)
            total -= target * math.log(scores[j] / sum(scores))
    found = contrast(own, others, slow, temperature, alpha).item()
    assert found == pytest.approx(total / 4, abs=1e-12)


def test_contrast_of_equal_vectors_is_the_logarithm_of_their_number() -> None:
    same = unit_vectors(1, 6).expand(7, -1)
    for alpha in (0.0, 0.4, 1.0):
        assert contrast(same, same, same, 0.07, alpha).item() == pytest.approx(math.log(7), abs=1e-12)


def test_contrast_with_itself_for_a_teacher_is_the_entropy_of_its_answer() -> None:
    torch.manual_seed(2)
    own, others = unit_vectors(5, 4), unit_vectors(8, 4)
    answers = torch.distributions.Categorical(logits=own @ others.T / 0.1)
    assert contrast(own, others, own, 0.1, 1.0).item() == pytest.approx(answers.entropy().mean().item(), abs=1e-12)
    # Without trust in the teacher, it does not matter what that says.
    assert contrast(own, others, own, 0.1, 0.0) == contrast(own, others, -own, 0.1, 0.0)


def test_keyword_loss_of_zero_logits_is_the_logarithm_of_two_whatever_the_keywords() -> None:
    torch.manual_seed(3)
    for alpha in (0.0, 0.5, 1.0):
        hard, soft = torch.randint(0, 2, (3, 20)).double(), torch.rand(3, 20).double()
        loss = keyword_loss(torch.zeros(3, 20).double(), hard, soft, alpha)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


def test_keyword_loss_is_the_sum_that_equations_8_and_9_write() -> None:
    torch.manual_seed(4)
    logits, hard, soft = torch.randn(2, 6).double(), torch.randint(0, 2, (2, 6)).double(), torch.rand(2, 6).double()
    alpha, total = 0.4, 0.0
    for i, v in itertools.product(range(2), range(6)):
        p = 1 / (1 + math.exp(-float(logits[i, v])))
        for weight, target in ((1 - alpha, float(hard[i, v])), (alpha, float(soft[i, v]))):
            total -= weight * (target * math.log(p) + (1 - target) * math.log(1 - p)) / 6
    assert keyword_loss(logits, hard, soft, alpha).item() == pytest.approx(total / 2, abs=1e-12)


def test_cross_entropy_with_mixed_targets_is_the_mixture_of_two_losses() -> None:
    torch.manual_seed(5)
    logits, soft = torch.randn(6, 9).double(), torch.rand(6, 9).double().softmax(-1)
    truth = torch.randint(0, 9, (6,))
    hard = torch.nn.functional.one_hot(truth, 9).double()
    parts = [torch.nn.functional.cross_entropy(logits, t) for t in (truth, soft)]
    found = cross_entropy(logits, mixed(hard, soft, 0.4))
    torch.testing.assert_close(found, 0.6 * parts[0] + 0.4 * parts[1], rtol=0, atol=1e-12)


def test_keywords_are_the_words_that_cls_attends_to_most() -> None:
    words = torch.tensor([[2, 10, 11, 12, 13, 14, 3], [2, 20, 21, 3, 0, 0, 0]])
    attention = torch.zeros(2, 2, 7, 7)
    # Of the first text, heads disagree; the mean decides. CLS and SEP have most and never count.
    attention[0, 0, 0] = torch.tensor([9, 0.9, 0.1, 0.3, 0.0, 0.4, 9])
    attention[0, 1, 0] = torch.tensor([9, 0.1, 0.2, 0.3, 0.7, 0.0, 9])
    attention[1, :, 0] = torch.tensor([9, 0.1, 0.2, 9, 9, 9, 9])
    attention[:, :, 1:] = 5
    found = keywords(attention, words, 30, count=3)
    assert found[0].nonzero().flatten().tolist() == [10, 12, 13]
    # A text of two words has two.
    assert found[1].nonzero().flatten().tolist() == [20, 21]


def test_negatives_are_drawn_by_their_similarity_and_never_from_what_is_not_allowed() -> None:
    similarity = torch.tensor([[9.0, 1.0, 2.0, 0.0]] * 4)
    allowed = ~np.eye(4, dtype=bool)
    allowed[0, 3] = False
    rng = np.random.default_rng(0)
    drawn = np.stack([hard_negatives(similarity, allowed, rng) for _ in range(4000)])
    assert not (drawn == np.arange(4)).any()
    share = math.e / (math.e + math.e**2)
    assert (drawn[:, 0] == 1).mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    assert (drawn[:, 1] == 0).mean() > 0.98


def test_masked_patches_are_blocks_of_about_the_share_that_is_wanted() -> None:
    masked = mask_blocks(500, np.random.default_rng(0))
    counts = masked.sum(1)
    assert masked.shape == (500, 16) and counts.min() >= 5 and counts.max() <= 8
    # Blocks reach the middle more often than the corners, by symmetry each corner alike.
    corners = masked.mean(0)[[0, 3, 12, 15]]
    assert corners == pytest.approx(np.full(4, corners.mean()), abs=0.06) and corners.mean() < masked.mean()


def test_codes_tell_colours_of_patches(corpus: Corpus) -> None:
    codes = fit_codes(corpus.pixels)
    assert codes.shape == (CODES, 108) and torch.equal(codes, fit_codes(corpus.pixels))
    learner = Simla()
    learner.prepare(corpus)
    pixels = learner.see(corpus, np.arange(64)).pixels
    found, patches = learner.code(pixels).numpy(), shrunk_patches(pixels)
    # Each patch has the nearest code, searched for one by one.
    for scene, patch in itertools.product(range(3), range(16)):
        distances = [(patches[scene, patch] - code).square().sum().item() for code in learner.codes]
        assert distances[found[scene, patch]] == pytest.approx(min(distances), abs=1e-4)
    assert len(np.unique(found)) > CODES / 2


def test_gradients_flow_where_they_should_and_only_there(corpus: Corpus) -> None:
    reached = {}
    for loss in LOSSES:
        learner = learner_of(corpus)
        learner.without = frozenset(LOSSES) - {loss}
        (found,) = simla_losses(learner, corpus, np.random.default_rng(0), batch=12).values()
        found.backward()
        reached[loss] = {n for n, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
        assert not any(p.requires_grad or p.grad is not None for p in learner.momentum.buffers())
        assert not list(learner.momentum.parameters()) and learner.codes.grad is None

    def touches(loss: str, part: str) -> bool:
        return any(part in name for name in reached[loss])

    heads = {
        "itm": "itm_head",
        "itc": "text_proj",
        "mlm": "cls.",
        "mim": "code_classifier",
        "psl": "keyword_classifier",
        "units": "patch_classifier",
    }
    for loss, head in itertools.product(LOSSES, heads):
        assert touches(loss, heads[head]) == (loss == head), (loss, head)
        assert touches(loss, "vision_model.encoder")
        assert touches(loss, "text_encoder") == (loss not in ("psl", "units"))
        # Text alone doesn't look at the image; the others do.
        assert touches(loss, "crossattention") == (loss in ("itm", "mlm", "mim"))


def test_the_momentum_copy_follows_slowly_and_the_queue_forgets_the_oldest(corpus: Corpus) -> None:
    learner = learner_of(corpus)
    name = "text_encoder.encoder.layer.0.crossattention.self.query.weight"
    own = dict(learner.named_parameters())[name]
    kept = dict(learner.momentum.named_buffers())[name]
    before = kept.clone()
    with torch.no_grad():
        own += 1
    learner.follow(1)
    torch.testing.assert_close(kept, 0.995 * before + 0.005 * own)
    assert learner.alpha.item() == pytest.approx(0.4 / 250)
    learner.follow(10_000)
    assert learner.alpha.item() == pytest.approx(0.4)
    for value in (1.0, 2.0):
        learner.keep(torch.full((QUEUE // 2 + 1, 64), value), torch.full((QUEUE // 2 + 1, 64), value))
    assert (learner.image_queue[:, 0] == 2).sum() == QUEUE // 2 + 1
    assert (learner.image_queue[:2, 0] == 2).all() and (learner.image_queue[2 : QUEUE // 2 + 1, 0] == 1).all()
    # Of a batch that is larger than the queue, the last are kept.
    learner.keep(torch.arange(QUEUE + 3.0)[:, None].expand(-1, 64), torch.zeros(QUEUE + 3, 64))
    assert sorted(learner.image_queue[:, 0].tolist()) == [*range(3, QUEUE + 3)]


def test_temperature_stays_in_its_bounds(corpus: Corpus) -> None:
    learner = Simla()
    assert learner.temperature.item() == pytest.approx(0.07)
    for value, bound in ((3.0, 0.5), (-100.0, 0.001)):
        with torch.no_grad():
            learner.log_temperature.fill_(value)
        learner.follow(1)
        assert learner.temperature.item() == pytest.approx(bound)


@pytest.mark.slow
def test_a_few_samples_are_learned_by_heart_in_every_loss() -> None:
    torch.manual_seed(0)
    few = build_corpus("train", [n for n in range(12) if n % 4 != 3][:8])
    learner = Simla()
    learner.prepare(few)
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.98))
    told: list[dict[str, float]] = []
    for step in range(110):
        rng = np.random.Generator(np.random.PCG64([0, step]))
        # The momentum copy stays where it is, so that all targets are hard and the same each time. Random vectors in
        # the queue: else it holds each scene many times.
        learner.keep(unit_vectors(QUEUE, 64).float(), unit_vectors(QUEUE, 64).float())
        losses = simla_losses(learner, few, rng, hard_share=0, batch=8)
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        told.append({name: loss.item() for name, loss in losses.items()})
    # A scene that is drawn twice into a batch has two partners: the logarithm of how often is what can't be learned.
    floors = []
    for step in range(100, 110):
        drawn = np.random.Generator(np.random.PCG64([0, step]))
        scenes = draw_scenes(few, 8, drawn, 0)
        floors.append(np.log([(scenes == scene).sum() for scene in scenes]).mean())
    for name in LOSSES:
        floor = np.mean(floors) if name == "itc" else 0.0
        first, last = np.mean([t[name] for t in told[:5]]), np.mean([t[name] for t in told[100:]])
        assert last - floor < 0.3 * (first - floor), (name, first, last, floor)


def test_a_training_that_was_cut_short_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = recipe_of("simla", SHORT | {"without": ["mlm"]})
    whole = Training(recipe, 0, tmp_path / "whole")
    whole.advance()
    cut = Training(recipe, 0, tmp_path / "cut")
    cut.advance(5)
    again = Training(recipe, 0, tmp_path / "cut")
    assert again.resume() and again.step == 4
    again.advance()
    state = again.learner.state_dict()
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_recalls_count_partners_among_the_best() -> None:
    scores = np.full((12, 12), 0.0)
    np.fill_diagonal(scores, 1.0)
    scores[0, 1:5] = 2  # the first image has four better texts
    scores[11, :] = 1  # for the last image all texts are alike, so that its own counts as the last
    found = recalls(scores)
    assert found["image_to_text_r1"].tolist() == [0] + [1] * 10 + [0]
    assert found["image_to_text_r5"].tolist() == [1] * 11 + [0]
    assert found["text_to_image_r1"].tolist() == [0] * 11 + [1]
    assert found["text_to_image_r5"].all()


def test_of_a_uniform_map_the_largest_box_wins() -> None:
    boxes = np.array([[0, 0, 0.5, 0.5], [0.25, 0, 1, 1], [0, 0, 0.25, 1]])
    scores = box_scores(np.ones((1, 48, 48)), boxes)[0]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) * 48**2
    assert scores == pytest.approx(np.sqrt(areas))
    assert overlaps(boxes, boxes[1]).tolist() == pytest.approx([0.125 / 0.875, 1, 0])


def test_grad_cam_is_what_a_loop_makes_of_attention_and_its_gradient(corpus: Corpus) -> None:
    learner = learner_of(corpus).eval()
    scenes = np.arange(3)
    words, seen = trimmed(corpus.words[scenes]), learner.see(corpus, scenes)
    maps = grad_cam(learner, words, seen)
    assert maps.shape == (3, 3, 16) and (maps >= 0).all() and maps.any()
    image = learner.look(seen.pixels)
    for sample in range(3):
        # One sample by itself, without padding.
        own = words[sample : sample + 1, : int((words[sample] != PAD).sum())]
        joined = learner.join_with_attention(own, image[sample : sample + 1].detach())
        match = learner.itm_head(joined.states[:, 0])[0, 1]
        for layer, attention in enumerate(joined.cross):
            (gradient,) = torch.autograd.grad(match, attention, retain_graph=True)
            attention = attention.detach()
            expected = np.zeros(16)
            heads, tokens = attention.shape[1:3]
            for head, token, patch in itertools.product(range(heads), range(tokens), range(16)):
                product = float(attention[0, head, token, patch + 1]) * max(
                    0.0, float(gradient[0, head, token, patch + 1])
                )
                expected[patch] += product / heads / tokens
            assert maps[layer, sample].numpy() == pytest.approx(expected, abs=1e-6)
