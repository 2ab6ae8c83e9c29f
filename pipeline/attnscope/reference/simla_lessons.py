"""What SIMLA is asked in one step (Khan et al., ECCV 2022, equations 1 to 10), as functions of arrays and as a lesson.

ITC: images and texts of a pair are near each other, others and those of earlier batches are not. ITM: whether text
and image belong together, for each pair beside its hardest wrong image and text of the batch. MLM and MIM: masked words
from the image, the codes of masked patches from the words. PSL: the words that the momentum copy attends to most are
told from the image alone. ITC, MLM, MIM and PSL take part of their targets from the momentum copy.
"""

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from attnscope.reference.corpus import GRID, SPECIAL, Corpus
from attnscope.reference.learners import Seen
from attnscope.reference.lessons import HARD_SHARE, draw_scenes, mask_words_at_random, patch_loss, trimmed
from attnscope.reference.pairs import Learnable
from attnscope.reference.scenes import Generator
from attnscope.reference.simla import Simla

LOSSES = ("itm", "itc", "mlm", "mim", "psl", "units")
_BATCH = 40
_PATCH_SHARE = 0.3
# A block's sides are at most this part of the grid's.
_LARGEST_BLOCK = 0.5
KEYWORDS = 4


def mixed(hard: Tensor, soft: Tensor, alpha: Tensor | float) -> Tensor:
    """Targets of which a share `alpha` is soft (the loss is linear in them: equations 4, 7 and 9)."""
    return (1 - alpha) * hard + alpha * soft


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats of logits (..., class) under distributions (..., class)."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def contrast(
    own: Tensor, others: Tensor, momentum_own: Tensor, temperature: Tensor | float, alpha: Tensor | float
) -> Tensor:
    """One direction of ITC in nats (equations 1 to 4): vectors (sample, channel) against others (other, channel).

    The first others are the samples' own partners, in order. `momentum_own` are the momentum copy's vectors of the
    samples, from which the soft targets come.
    """
    hard = torch.eye(len(own), len(others), dtype=own.dtype, device=own.device)
    with torch.no_grad():
        soft = (momentum_own @ others.T / temperature).softmax(-1)
    return cross_entropy(own @ others.T / temperature, mixed(hard, soft, alpha))


def hard_negatives(similarity: Tensor, allowed: np.ndarray, rng: Generator) -> np.ndarray:
    """For each row (sample,) one allowed column, drawn by the softmax of its similarity (sample, sample).

    After ALBEF (Li et al., NeurIPS 2021), whose rule SIMLA takes over.
    """
    weights = np.where(allowed, similarity.log_softmax(-1).double().cpu().numpy(), -np.inf)
    return (weights + rng.gumbel(size=weights.shape)).argmax(1)


def keywords(attention: Tensor, words: Tensor, classes: int, count: int = KEYWORDS) -> Tensor:
    """Which words of the vocabulary are keywords of each text (sample, class), 0 or 1.

    They are those of the `count` tokens that CLS attends to most, by the head mean of the last self-attention (sample,
    head, token, token) of the text that has seen the image (section 3.4; special tokens are left out, which the
    authors' code does for CLS alone).
    """
    row = attention.mean(1)[:, 0].masked_fill(words < len(SPECIAL), -1)
    strongest = row.topk(min(count, row.shape[1]), dim=-1)
    found = torch.zeros(len(words), classes, dtype=row.dtype, device=row.device)
    return found.scatter(1, words.gather(1, strongest.indices), (strongest.values >= 0).to(row.dtype))


def keyword_loss(logits: Tensor, hard: Tensor, soft: Tensor, alpha: Tensor | float) -> Tensor:
    """Mean binary cross entropy in nats over texts and vocabulary (equations 8 and 9); `soft` are probabilities."""
    return nn.functional.binary_cross_entropy_with_logits(logits, mixed(hard, soft, alpha))


def mask_blocks(count: int, rng: Generator, grid: int = GRID, share: float = _PATCH_SHARE) -> np.ndarray:
    """Patches to mask (sample, patch) bool: blocks until a share of the grid is masked (BEiT, Bao et al., 2022)."""
    masked = np.zeros((count, grid, grid), bool)
    for sample in masked:
        while sample.sum() < share * sample.size:
            rows, columns = rng.integers(1, max(1, int(_LARGEST_BLOCK * grid)) + 1, 2)
            top, left = rng.integers(0, grid - rows + 1), rng.integers(0, grid - columns + 1)
            sample[top : top + rows, left : left + columns] = True
    return masked.reshape(count, -1)


def simla_losses(
    learner: Simla, corpus: Learnable, rng: Generator, hard_share: float = HARD_SHARE, batch: int = _BATCH
) -> dict[str, Tensor]:
    """The losses of one batch of pairs, those that the learner is taught without left out.

    Of several processes each takes its share; ITC contrasts all of the batch, ITM's wrong partners are of the share.
    """
    lesson = _Lesson(learner, corpus, draw_scenes(corpus, batch, rng, hard_share), rng)
    taught = (name for name in LOSSES if name not in learner.without)
    losses = {name: getattr(lesson, name)() for name in taught}
    lesson.remember()
    return losses


class _Lesson:
    """One batch of pairs, and what several losses need of it; what is drawn does not depend on which are asked for."""

    def __init__(self, learner: Simla, corpus: Learnable, scenes: np.ndarray, rng: Generator) -> None:
        self.learner, self.corpus, self.scenes = learner, corpus, learner.share.part(scenes)
        self.draws = rng.spawn(4 * (learner.share.number + 1))[-4:]
        scenes = self.scenes
        self.words = trimmed(corpus.words[scenes]).to(learner.device)
        self.pixels = learner.see(corpus, scenes).pixels
        self.alpha = learner.alpha
        self.image = learner.look(self.pixels)
        self.vector = learner.project(self.image)
        with torch.no_grad():
            self.slow_image = learner.momentum.look(self.pixels)
            self.slow_vector = learner.momentum.project(self.slow_image).float()
            self.slow_text = learner.momentum.read(self.words).float()

    @cached_property
    def text(self) -> Tensor:
        """Vectors of the texts (sample, channel)."""
        return self.learner.read(self.words)

    def itc(self) -> Tensor:
        learner, gather = self.learner, self.learner.share.gather
        # Similarities over a small temperature are large, and in bfloat16 coarse.
        with torch.autocast(self.vector.device.type, enabled=False):
            vector, text = gather(self.vector.float()), gather(self.text.float())
            slow_vector, slow_text = gather(self.slow_vector), gather(self.slow_text)
            texts = torch.cat([slow_text, learner.text_queue])
            images = torch.cat([slow_vector, learner.image_queue])
            settings = learner.temperature, self.alpha
            to_texts = contrast(vector, texts, slow_vector, *settings)
            return (to_texts + contrast(text, images, slow_text, *settings)) / 2

    def itm(self) -> Tensor:
        texts, images = self._negatives()
        words = torch.cat([self.words, self.words[texts], self.words])
        image = torch.cat([self.image, self.image, self.image[images]])
        scores = self.learner.itm_head(self.learner.join(words, image)[:, 0])
        truth = torch.zeros(len(words), dtype=torch.long, device=words.device)
        truth[: len(self.words)] = 1
        return nn.functional.cross_entropy(scores, truth)

    def _negatives(self) -> tuple[np.ndarray, np.ndarray]:
        """A wrong text for each image, and a wrong image for each text; never one with the same words."""
        own = self.corpus.words[self.scenes]
        allowed = (own[:, None] != own).any(-1)
        similarity = torch.zeros(allowed.shape)
        if "itc" not in self.learner.without:
            similarity = (self.vector @ self.text.T / self.learner.temperature).detach()
        return hard_negatives(similarity, allowed, self.draws[0]), hard_negatives(similarity.T, allowed, self.draws[1])

    def mlm(self) -> Tensor:
        learner = self.learner
        classes = learner.cls.predictions.decoder.out_features
        shown, asked = mask_words_at_random(self.words.cpu().numpy(), classes, self.draws[2])
        masked, at = (torch.from_numpy(array).to(learner.device) for array in (shown, asked))
        logits = learner.cls(learner.join(masked, self.image)[at])
        with torch.no_grad():
            slow = learner.momentum.cls(learner.momentum.join(masked, self.slow_image)[at])
        hard = nn.functional.one_hot(self.words[at], classes).to(logits.dtype)
        return cross_entropy(logits, mixed(hard, slow.softmax(-1), self.alpha))

    def mim(self) -> Tensor:
        learner = self.learner
        grid = math.isqrt(self.image.shape[1] - 1)
        at = torch.from_numpy(mask_blocks(len(self.words), self.draws[3], grid)).to(learner.device)
        codes = learner.code(self.pixels)[at]
        hidden = learner.hide(Seen(self.pixels), at).pixels
        logits = learner.code_classifier(learner.join_image(learner.look(hidden), self.words)[at])
        with torch.no_grad():
            momentum = learner.momentum
            slow = momentum.code_classifier(momentum.join_image(momentum.look(hidden), self.words)[at])
        hard = nn.functional.one_hot(codes, logits.shape[-1]).to(logits.dtype)
        return cross_entropy(logits, mixed(hard, slow.softmax(-1), self.alpha))

    def psl(self) -> Tensor:
        logits = self.learner.keyword_classifier(self.image[:, 0])
        with torch.no_grad():
            momentum = self.learner.momentum
            attention = momentum.join_with_attention(self.words, self.slow_image).own
            hard = keywords(attention, self.words, logits.shape[-1])
            soft = momentum.keyword_classifier(self.slow_image[:, 0]).sigmoid()
        return keyword_loss(logits, hard, soft, self.alpha)

    def units(self) -> Tensor:
        assert isinstance(self.corpus, Corpus)
        return patch_loss(self.learner.patch_classifier(self.image[:, 1:]), self.corpus, self.scenes)

    def remember(self) -> None:
        """The batch's vectors become negatives of later ones."""
        gather = self.learner.share.gather
        self.learner.keep(gather(self.slow_vector), gather(self.slow_text))
