"""What a learner is asked in one step, and the losses of its answers.

Image and text together: masked words, whether a caption fits, the class of hidden units, and answers, in one batch.
The class of every unit that isn't hidden is asked as well: without this the masked words stay on a plateau for minutes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attnscope.reference.captions import QUESTIONS
from attnscope.reference.corpus import CLASSES, GROUND, MASK, NEGATIVES, ROLES, Corpus
from attnscope.reference.learners import Clip, Hidden, JointLearner
from attnscope.reference.scenes import Generator

# How many scenes of a batch are asked what.
_WORDS, _MATCH, _UNITS, _ANSWERS = 80, 16, 8, 24
HARD_SHARE = 0.25
_PHRASE_SHARE = 0.2
_ROLE_WEIGHTS = dict(zip(ROLES, (0.0, 1.0, 1.0, 0.5, 1.5, 1.0, 0.5), strict=True))
_NEGATIVE_WEIGHTS = dict(zip((*NEGATIVES, "other"), (0.4, 0.2, 0.2, 0.1, 0.1), strict=True))
_QUESTION_WEIGHTS = dict(zip(QUESTIONS, (0.25, 0.25, 0.25, 0.1, 0.075, 0.075), strict=True))
_UNIT_WEIGHT, _GROUND_WEIGHT = 0.5, 0.05
_CONTRAST, _CONTRAST_NEGATIVES = 128, 64


@dataclass(frozen=True)
class Asked:
    """Texts with masks, (row, token): the words as shown, and the true ids where one is asked for (-100 elsewhere)."""

    shown: np.ndarray
    wanted: np.ndarray


def mask_words(corpus: Corpus, scenes: np.ndarray, rng: Generator) -> Asked:
    """One to three determined words of each caption masked, or all words of one phrase."""
    words, roles = corpus.words[scenes].astype(np.int64), corpus.roles[scenes]
    weights = np.array([_ROLE_WEIGHTS[role] for role in ROLES])[roles] * corpus.determined[scenes]
    chosen = _strongest(weights, rng.integers(1, 4, len(scenes)), rng)
    phrases = corpus.phrases[scenes]
    phrase = _one_of(phrases, phrases >= 0, rng)
    whole = (rng.random(len(scenes)) < _PHRASE_SHARE) & (phrase >= 0)
    masked = np.where(whole[:, None], phrases == phrase[:, None], chosen)
    return Asked(np.where(masked, MASK, words), np.where(masked, words, -100))


def _strongest(weights: np.ndarray, counts: np.ndarray, rng: Generator) -> np.ndarray:
    """As many positions of each row as `counts` says, drawn without replacement by weight: (row, token) bool."""
    with np.errstate(divide="ignore"):
        keys = np.log(weights) + rng.gumbel(size=weights.shape)
    order = np.argsort(np.argsort(-keys, axis=1, kind="stable"), axis=1)
    return (order < counts[:, None]) & (weights > 0)


def _one_of(values: np.ndarray, allowed: np.ndarray, rng: Generator) -> np.ndarray:
    """One allowed value of each row, -1 where none is."""
    keys = np.where(allowed, rng.random(values.shape), -1)
    at = keys.argmax(1)
    return np.where(allowed.any(1), values[np.arange(len(values)), at], -1)


def wrong_captions(corpus: Corpus, scenes: np.ndarray, rng: Generator) -> np.ndarray:
    """A caption for each scene that is false of it (scene, token): changed in one thing, or another scene's."""
    there = np.concatenate([corpus.negatives[scenes].any(-1), np.ones((len(scenes), 1), bool)], 1)
    kinds = _strongest(there * np.array(list(_NEGATIVE_WEIGHTS.values())), np.ones(len(scenes), int), rng).argmax(1)
    others = corpus.words[rng.permutation(scenes)]
    # A caption of one of these scenes may by chance fit another: a few wrong labels among thousands.
    changed = corpus.negatives[scenes, np.minimum(kinds, len(NEGATIVES) - 1)]
    return np.where((kinds == len(NEGATIVES))[:, None], others, changed).astype(np.int64)


def draw_scenes(corpus: Corpus, count: int, rng: Generator, hard_share: float) -> np.ndarray:
    """Numbers of scenes that are all hard or all normal, so that the texts of a batch are of like length."""
    hard = rng.random() < hard_share
    kind = np.flatnonzero(corpus.hard == hard)
    return kind[rng.integers(0, len(kind), count)] if len(kind) else rng.integers(0, len(corpus), count)


def word_losses(
    learner: JointLearner, corpus: Corpus, rng: Generator, hard_share: float = HARD_SHARE
) -> dict[str, Tensor]:
    """Masked words alone, for a model that sees no image."""
    scenes = draw_scenes(corpus, 2 * _WORDS, rng, hard_share)
    asked = mask_words(corpus, scenes, rng)
    hidden = learner.encode(trimmed(asked.shown), learner.see(corpus, scenes))
    return {"words": _word_loss(learner, hidden, asked)}


def joint_losses(
    learner: JointLearner, corpus: Corpus, rng: Generator, hard_share: float = HARD_SHARE
) -> dict[str, Tensor]:
    """Everything that is asked of a model that sees image and text, in one batch."""
    scenes = draw_scenes(corpus, _WORDS + _MATCH + _UNITS + _ANSWERS, rng, hard_share)
    said, matched, looked, questioned = np.split(scenes, np.cumsum([_WORDS, _MATCH, _UNITS]))
    asked = mask_words(corpus, said, rng)
    kinds = _question_kinds(corpus, questioned, rng)
    texts = [
        asked.shown,
        corpus.words[matched],
        wrong_captions(corpus, matched, rng),
        corpus.words[looked],
        corpus.questions[questioned, kinds],
    ]
    order = np.concatenate([said, matched, matched, looked, questioned])
    classes, things = units_of(learner, corpus)
    start = _WORDS + 2 * _MATCH
    hidden_units = np.zeros(classes[order].shape, bool)
    thing = _thing_to_hide(corpus, looked, things[looked], rng)
    hidden_units[start : start + _UNITS] = units_showing(learner, corpus, looked, thing)
    asked_units = np.zeros_like(hidden_units)
    asked_units[start : start + _UNITS] = things[looked] == thing[:, None]
    seen = learner.hide(learner.see(corpus, order), torch.from_numpy(hidden_units))
    hidden = learner.encode(trimmed(np.concatenate(texts)), seen)
    unit_logits, truth = learner.classify(hidden), torch.from_numpy(classes[order].astype(np.int64))
    hides, asks = torch.from_numpy(hidden_units), torch.from_numpy(asked_units)
    fits = torch.cat([torch.ones(_MATCH), torch.zeros(_MATCH)])
    answers = torch.from_numpy(corpus.answers[questioned, kinds].astype(np.int64))
    return {
        "words": _word_loss(learner, hidden, asked),
        "match": nn.functional.binary_cross_entropy_with_logits(
            learner.match(hidden)[_WORDS : _WORDS + 2 * _MATCH], fits
        ),
        "answers": nn.functional.cross_entropy(learner.answer(hidden)[-_ANSWERS:], answers),
        "hidden_units": _UNIT_WEIGHT * nn.functional.cross_entropy(unit_logits[asks], truth[asks]),
        "units": _UNIT_WEIGHT * _unit_loss(unit_logits[~hides], truth[~hides]),
    }


def contrastive_losses(
    learner: Clip, corpus: Corpus, rng: Generator, hard_share: float = HARD_SHARE
) -> dict[str, Tensor]:
    """Each image against all captions and wrong captions of the batch, each caption against all images."""
    scenes = draw_scenes(corpus, _CONTRAST, rng, hard_share)
    wrong = wrong_captions(corpus, scenes[:_CONTRAST_NEGATIVES], rng)
    images, unit_logits = learner.embed_images(corpus, scenes)
    texts = learner.embed_texts(trimmed(np.concatenate([corpus.words[scenes], wrong])))
    logits = learner.logit_scale.exp() * images @ texts.T
    truth = torch.arange(_CONTRAST)
    classes = torch.from_numpy(corpus.patches[scenes].astype(np.int64))
    return {
        "images": nn.functional.cross_entropy(logits, truth) / 2,
        "texts": nn.functional.cross_entropy(logits[:, :_CONTRAST].T, truth) / 2,
        "units": _UNIT_WEIGHT * _unit_loss(unit_logits.flatten(0, 1), classes.flatten()),
    }


def units_of(learner: JointLearner, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Class and thing of each unit (scene, unit) that the learner sees: patches, or regions."""
    if hasattr(learner, "lxmert"):
        return corpus.regions, corpus.region_things
    return corpus.patches, corpus.patch_things


def units_showing(learner: JointLearner, corpus: Corpus, scenes: np.ndarray, things: np.ndarray) -> np.ndarray:
    """The units that show anything of a thing, or most of it where units are boxes (scene, unit); none for thing -1."""
    shows = corpus.region_shows if hasattr(learner, "lxmert") else corpus.patch_shows
    return shows[scenes, things] & (things >= 0)[:, None]


def _thing_to_hide(corpus: Corpus, scenes: np.ndarray, things: np.ndarray, rng: Generator) -> np.ndarray:
    """A thing of each scene that the caption mentions and that has units."""
    phrases = corpus.phrases[scenes]
    return _one_of(phrases, (phrases[..., None] == things[:, None]).any(-1) & (phrases >= 0), rng)


def _question_kinds(corpus: Corpus, scenes: np.ndarray, rng: Generator) -> np.ndarray:
    weights = (corpus.answers[scenes] >= 0) * np.array(list(_QUESTION_WEIGHTS.values()))
    return _strongest(weights, np.ones(len(scenes), int), rng).argmax(1)


def _word_loss(learner: JointLearner, hidden: Hidden, asked: Asked) -> Tensor:
    logits = learner.words(hidden)[: len(asked.wanted)]
    wanted = torch.from_numpy(asked.wanted[:, : logits.shape[1]])
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def _unit_loss(logits: Tensor, truth: Tensor) -> Tensor:
    weights = torch.ones(len(CLASSES))
    weights[GROUND] = _GROUND_WEIGHT
    return nn.functional.cross_entropy(logits, truth, weights)


def trimmed(texts: np.ndarray) -> Tensor:
    """Texts (row, token) without the padding that none of them needs."""
    return torch.from_numpy(texts[:, : int((texts > 0).sum(1).max())].astype(np.int64))
