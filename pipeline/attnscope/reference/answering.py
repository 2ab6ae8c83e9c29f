"""Answers to questions about a picture, from words that attend to its regions with one of several scores.

A small setting between MAC's reading of a picture and M4C's, in which Cao et al. (COLING 2022) compare scores: every
word of the question attends to the regions, meets what it attended to by a product of both, and the mean over the
words gives the answer.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from attnscope.reference.alignments import OWN, Score
from attnscope.reference.captions import ANSWERS
from attnscope.reference.corpus import PAD, Corpus
from attnscope.reference.learners import Hidden, JointLearner, Seen, UnitClassifier
from attnscope.reference.lessons import HARD_SHARE, UNIT_WEIGHT, draw_scenes, question_kinds, trimmed, unit_loss
from attnscope.reference.readers import WIDTH, RegionReader, TextReader, see_regions
from attnscope.reference.scenes import Generator

_BATCH = 96


class Answering(JointLearner):
    """The setting, with a class for each region beside the answers."""

    units = "regions"

    def __init__(self) -> None:
        super().__init__()
        self.text, self.regions = TextReader(), RegionReader()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.score = Score(OWN, WIDTH)
        self.meeting = nn.Linear(3 * WIDTH, WIDTH)
        self.answers = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, len(ANSWERS)))
        self.region_classifier = UnitClassifier()

    def see(self, corpus: Corpus, scenes: np.ndarray) -> Seen:
        return see_regions(corpus, scenes)

    def hide(self, seen: Seen, units: Tensor) -> Seen:
        """Nothing attends to regions where `units` (sample, region) says so."""
        return replace(seen, gone=units)

    def encode(self, words: Tensor, seen: Seen) -> Hidden:
        attention, text, image = self.attend(words, seen)
        read = attention @ self.value(image)
        met = torch.relu(self.meeting(torch.cat([text, read, text * read], -1)))
        real = (words != PAD)[..., None]
        return Hidden(text, image, (met * real).sum(1) / real.sum(1))

    def attend(self, words: Tensor, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Attention (sample, token, region), and the words and regions that meet in it."""
        text, image = self.text(words), self.regions(seen)
        scores = self.score(self.query(text), self.key(image))
        if seen.gone is not None:
            scores = scores.masked_fill(seen.gone[:, None], -torch.inf)
        return scores.softmax(-1), text, image

    def answer(self, hidden: Hidden) -> Tensor:
        return self.answers(hidden.pooled)

    def classify(self, hidden: Hidden) -> Tensor:
        return self.region_classifier(hidden.image)


def answer_losses(
    learner: Answering, corpus: Corpus, rng: Generator, hard_share: float = HARD_SHARE
) -> dict[str, Tensor]:
    """A question about each scene, and the class of every region."""
    scenes = draw_scenes(corpus, _BATCH, rng, hard_share)
    kinds = question_kinds(corpus, scenes, rng)
    hidden = learner.encode(trimmed(corpus.questions[scenes, kinds]), learner.see(corpus, scenes))
    answers = torch.from_numpy(corpus.answers[scenes, kinds].astype(np.int64))
    classes = torch.from_numpy(corpus.regions[scenes].astype(np.int64))
    return {
        "answers": nn.functional.cross_entropy(learner.answer(hidden), answers),
        "units": UNIT_WEIGHT * unit_loss(learner.classify(hidden).flatten(0, 1), classes.flatten()),
    }
