"""What a learner is asked in one step, and the losses of its answers.

Image and text together: masked words, whether a caption fits, the class of hidden units, and answers, in one batch.
The class of every unit that isn't hidden is asked as well: without this the masked words stay on a plateau for minutes.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from attnscope.reference.captions import QUESTIONS
from attnscope.reference.corpus import CLASSES, CLS, GROUND, MASK, NEGATIVES, PAD, ROLES, SEP, SPECIAL, Corpus
from attnscope.reference.learners import Clip, Hidden, JointLearner, Lxmert, Mapper, Text, Vilt
from attnscope.reference.pairs import Learnable, Pairs
from attnscope.reference.scenes import Generator

# How many scenes of a batch are asked what.
_WORDS, _MATCH, _UNITS, _ANSWERS = 80, 16, 8, 24
HARD_SHARE = 0.25
_PHRASE_SHARE = 0.2
_ATTRIBUTE_ROLES = (ROLES.index("colour"), ROLES.index("shape"))
_ROLE_WEIGHTS = dict(zip(ROLES, (0.0, 1.0, 1.0, 0.5, 1.5, 1.0, 0.5), strict=True))
_NEGATIVE_WEIGHTS = dict(zip((*NEGATIVES, "other"), (0.4, 0.2, 0.2, 0.1, 0.1), strict=True))
_QUESTION_WEIGHTS = dict(zip(QUESTIONS, (0.25, 0.25, 0.25, 0.1, 0.075, 0.075), strict=True))
UNIT_WEIGHT, _GROUND_WEIGHT = 0.5, 0.05
_CONTRAST = 128
# How many scenes of a batch the mapper is asked about, and how many it describes.
_ASKED, _DESCRIBED = 64, 64
_WORD_SHARE, _MASKED, _OTHER_WORD = 0.15, 0.8, 0.1
# Of the pairs that are asked whether they fit, those that are given another's text.
_WRONG_SHARE = 0.5

WORLD_LOSSES = {
    "units": "the class of each patch or region",
    "hidden_units": "the class of each patch or region",
    "answers": "questions with answers",
}
"""Losses that need what the generated world alone tells, and what that is."""


@dataclass(frozen=True)
class Texts:
    """Captions, or phrases cut out of them, each array (row, token) as in a corpus."""

    words: np.ndarray
    roles: np.ndarray
    determined: np.ndarray
    phrases: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, scenes: np.ndarray) -> "Texts":
        """The captions of scenes."""
        return cls(corpus.words[scenes], corpus.roles[scenes], corpus.determined[scenes], corpus.phrases[scenes])

    def cut(self, things: np.ndarray) -> "Texts":
        """Of each row nothing but the phrase that mentions a thing (row,)."""
        return Texts(**{n: cut_phrases(getattr(self, n), self.phrases, things) for n in vars(self)}).closed()

    def closed(self) -> "Texts":
        """The same with CLS before and SEP behind each phrase."""
        words = self.words.copy()
        words[:, 0] = CLS
        words[np.arange(len(words)), (words > 0).sum(1)] = SEP
        return replace(self, words=words)


def cut_phrases(values: np.ndarray, phrases: np.ndarray, things: np.ndarray) -> np.ndarray:
    """The values (row, token) at each row's phrase of a thing (row,), moved behind an empty first token.

    For thing -1 what belongs to no phrase is left.
    """
    empty = -1 if values is phrases else 0
    cut = np.full_like(values, empty)
    for row, of_phrase in enumerate(phrases == things[:, None]):
        chosen = values[row, of_phrase]
        cut[row, 1 : len(chosen) + 1] = chosen
    return cut


@dataclass(frozen=True)
class Asked:
    """Texts with masks, (row, token): the words as shown, and the true ids where one is asked for (-100 elsewhere)."""

    shown: np.ndarray
    wanted: np.ndarray


def mask_words(texts: Texts, rng: Generator) -> Asked:
    """One to three determined words of each text masked, or all words of one phrase."""
    words, roles, phrases = texts.words.astype(np.int64), texts.roles, texts.phrases
    weights = np.array([_ROLE_WEIGHTS[role] for role in ROLES])[roles] * texts.determined
    chosen = _strongest(weights, rng.integers(1, 4, len(words)), rng)
    phrase = _one_of(phrases, phrases >= 0, rng)
    whole = (rng.random(len(words)) < _PHRASE_SHARE) & (phrase >= 0)
    masked = np.where(whole[:, None], phrases == phrase[:, None], chosen)
    return Asked(np.where(masked, MASK, words), np.where(masked, words, -100))


def mask_in_phrases(texts: Texts, rng: Generator) -> Asked:
    """One determined word masked of one phrase of each caption, which stands alone.

    In a whole caption a masked word can often be told without the object: what the picture shows and no other phrase
    names. A phrase alone leaves no other way than to find its object.
    """
    things = _one_of(texts.phrases, (texts.phrases >= 0) & texts.determined, rng)
    alone = texts.cut(things)
    weights = np.isin(alone.roles, _ATTRIBUTE_ROLES) * alone.determined * 1.0
    masked = _strongest(weights, np.ones(len(weights), int), rng)
    words = alone.words.astype(np.int64)
    return Asked(np.where(masked, MASK, words), np.where(masked, words, -100))


def mask_words_at_random(words: np.ndarray, classes: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Texts (sample, token) as shown, and where words are asked for (sample, token) bool; one of each text at least.

    Of the chosen 15 % four fifths are masked, a tenth is another word, a tenth stays (Devlin et al., NAACL 2019).
    """
    plain = words >= len(SPECIAL)
    keys = np.where(plain, rng.random(words.shape), 2.0)
    asked = (keys < _WORD_SHARE) | ((keys == keys.min(1, keepdims=True)) & plain)
    fate = rng.random(words.shape)
    others = rng.integers(len(SPECIAL), classes, words.shape)
    shown = np.where(fate < _MASKED, MASK, np.where(fate < _MASKED + _OTHER_WORD, others, words))
    return np.where(asked, shown, words), asked


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


def draw_scenes(corpus: Learnable, count: int, rng: Generator, hard_share: float) -> np.ndarray:
    """Numbers of scenes that are all hard or all normal, so that the texts of a batch are of like length.

    No pair comes twice in a batch; generated scenes may.
    """
    if isinstance(corpus, Pairs):
        return rng.choice(len(corpus), count, replace=False)
    hard = rng.random() < hard_share
    kind = np.flatnonzero(corpus.hard == hard)
    return kind[rng.integers(0, len(kind), count)] if len(kind) else rng.integers(0, len(corpus), count)


def word_losses(
    learner: Text, corpus: Learnable, rng: Generator, hard_share: float = HARD_SHARE, batch: int = 2 * _WORDS
) -> dict[str, Tensor]:
    """Masked words alone, for a model that sees no image."""
    scenes = draw_scenes(corpus, batch, rng, hard_share)
    if isinstance(corpus, Corpus):
        asked = mask_words(Texts.of(corpus, scenes), rng)
    else:
        words = corpus.words[scenes].astype(np.int64)
        shown, at = mask_words_at_random(words, learner.config.vocab_size, rng)
        asked = Asked(shown, np.where(at, words, -100))
    own = learner.share.part
    hidden = learner.encode(trimmed(own(asked.shown)), learner.see(corpus, own(scenes)))
    return {"words": _word_loss(learner, hidden, asked)}


def joint_losses(
    learner: JointLearner,
    corpus: Learnable,
    rng: Generator,
    hard_share: float = HARD_SHARE,
    batch: int = _WORDS + _MATCH + _UNITS + _ANSWERS,
) -> dict[str, Tensor]:
    """Everything that is asked of a model that sees image and text, in one batch.

    Samples tell less than generated scenes, of which it always takes as many.
    """
    if not isinstance(corpus, Corpus):
        assert isinstance(learner, Vilt | Lxmert)
        return _pair_losses(learner, corpus, rng, batch)
    scenes = draw_scenes(corpus, _WORDS + _MATCH + _UNITS + _ANSWERS, rng, hard_share)
    said, matched, looked, questioned = np.split(scenes, np.cumsum([_WORDS, _MATCH, _UNITS]))
    asked = _mask_both_ways(Texts.of(corpus, said), rng)
    right, wrong = match_texts(corpus, matched, rng)
    kinds = question_kinds(corpus, questioned, rng)
    texts = [
        asked.shown,
        right,
        wrong,
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
        "hidden_units": UNIT_WEIGHT * nn.functional.cross_entropy(unit_logits[asks], truth[asks]),
        "units": UNIT_WEIGHT * unit_loss(unit_logits[~hides], truth[~hides]),
    }


def _pair_losses(learner: Vilt | Lxmert, corpus: Learnable, rng: Generator, batch: int) -> dict[str, Tensor]:
    """Masked words of every pair, and whether a text fits its image, which about half of the texts don't."""
    pairs = draw_scenes(corpus, batch, rng, 0)
    words = corpus.words[pairs].astype(np.int64)
    shown, at = mask_words_at_random(words, learner.config.vocab_size, rng)
    asked = Asked(shown, np.where(at, words, -100))
    others = np.where(rng.random(batch) < _WRONG_SHARE, rng.permutation(batch), np.arange(batch))
    fits = (words[others] == words).all(1)
    own = learner.share.part
    count = len(own(pairs))
    texts = trimmed(np.concatenate([own(shown), own(words[others])]))
    hidden = learner.encode(texts, learner.see(corpus, own(pairs)).twice())
    told = Hidden(hidden.text[:count], None, None)
    truth = torch.from_numpy(own(fits)).to(learner.device)
    with torch.autocast(learner.device.type, enabled=False):
        match = nn.functional.binary_cross_entropy_with_logits(learner.match(hidden)[count:].float(), truth.float())
    return {"words": _word_loss(learner, told, asked), "match": match}


def _mask_both_ways(texts: Texts, rng: Generator) -> Asked:
    """Half of the rows as phrases alone, the others as whole captions."""
    half = len(texts.words) // 2
    first, second = (Texts(**{n: v[part] for n, v in vars(texts).items()}) for part in (slice(half), slice(half, None)))
    phrases, captions = mask_in_phrases(first, rng), mask_words(second, rng)
    return Asked(np.concatenate([phrases.shown, captions.shown]), np.concatenate([phrases.wanted, captions.wanted]))


def match_texts(corpus: Corpus, scenes: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A right and a wrong text for each scene (row, token); for half of them a phrase with an attribute changed."""
    right, wrong = corpus.words[scenes].copy(), wrong_captions(corpus, scenes, rng)
    half = slice(len(scenes) // 2)
    texts = Texts.of(corpus, scenes[half])
    changed = corpus.negatives[scenes[half], NEGATIVES.index("attribute")]
    things = texts.phrases[np.arange(len(changed)), (changed != texts.words).argmax(1)]
    right[half] = texts.cut(things).words
    wrong[half] = replace(texts, words=changed).cut(things).words
    return right, wrong


def contrastive_losses(
    learner: Clip, corpus: Learnable, rng: Generator, hard_share: float = HARD_SHARE, batch: int = _CONTRAST
) -> dict[str, Tensor]:
    """Each image against all captions and wrong captions of the batch, each caption against all images.

    Of several processes each embeds its share, and contrasts all of the batch. Wrong captions, half as many as scenes,
    are known of generated scenes alone.
    """
    scenes = draw_scenes(corpus, batch, rng, hard_share)
    wrong = wrong_captions(corpus, scenes[: batch // 2], rng) if isinstance(corpus, Corpus) else corpus.words[:0]
    share, own = learner.share, learner.share.part(scenes)
    images, unit_logits = learner.embed_images(corpus, own)
    texts = learner.embed_texts(trimmed(np.concatenate([corpus.words[own], share.part(wrong)])))
    # The logits are large, and in bfloat16 no finer than a sixteenth.
    with torch.autocast(images.device.type, enabled=False):
        images, texts = images.float(), texts.float()
        captions = torch.cat([share.gather(texts[: len(own)]), share.gather(texts[len(own) :])])
        logits = learner.logit_scale.exp() * share.gather(images) @ captions.T
        truth = torch.arange(batch, device=logits.device)
        losses = {
            "images": nn.functional.cross_entropy(logits, truth) / 2,
            "texts": nn.functional.cross_entropy(logits[:, :batch].T, truth) / 2,
        }
        if isinstance(corpus, Corpus):
            losses["units"] = patch_loss(share.gather(unit_logits.float()), corpus, scenes)
    return losses


def mapper_losses(
    learner: Mapper,
    corpus: Learnable,
    rng: Generator,
    hard_share: float = HARD_SHARE,
    batch: int = _ASKED + _DESCRIBED,
) -> dict[str, Tensor]:
    """Answers to questions, captions of other scenes word by word behind the true words, and patch classes.

    Of samples captions alone; of generated scenes it always takes as many.
    """
    if not isinstance(corpus, Corpus):
        return _caption_losses(learner, corpus, rng, batch)
    scenes = draw_scenes(corpus, _ASKED + _DESCRIBED, rng, hard_share)
    asked, described = np.split(scenes, [_ASKED])
    kinds = question_kinds(corpus, asked, rng)
    prompts = learner.prompts(_DESCRIBED).numpy()
    prompts = np.pad(prompts, ((0, 0), (0, corpus.questions.shape[-1] - prompts.shape[1])))
    texts = trimmed(np.concatenate([corpus.questions[asked, kinds], prompts]))
    hidden = learner.encode(texts, learner.see(corpus, scenes))
    answers = torch.from_numpy(corpus.answers[asked, kinds].astype(np.int64))
    captions = trimmed(corpus.words[described])
    said = learner.tell(captions[:, :-1], hidden.image[_ASKED:])  # type: ignore[index]
    classes = torch.from_numpy(corpus.patches[scenes].astype(np.int64))
    return {
        "answers": nn.functional.cross_entropy(learner.answer(hidden)[:_ASKED], answers),
        "captions": nn.functional.cross_entropy(said.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=PAD),
        "units": UNIT_WEIGHT * unit_loss(learner.classify(hidden).flatten(0, 1), classes.flatten()),
    }


def _caption_losses(learner: Mapper, corpus: Learnable, rng: Generator, batch: int) -> dict[str, Tensor]:
    """The mean over all words of the batch's texts behind the true ones, or this process' share of it."""
    pairs = draw_scenes(corpus, batch, rng, 0)
    own = learner.share.part(pairs)
    captions = trimmed(corpus.words[own])
    said = learner.tell(captions[:, :-1], learner.look(corpus, own)).float()
    truth = captions[:, 1:].to(said.device)
    total = nn.functional.cross_entropy(said.flatten(0, 1), truth.flatten(), ignore_index=PAD, reduction="sum")
    return {"captions": learner.share.mean(total, int((corpus.words[pairs][:, 1:] != PAD).sum()))}


def units_of(learner: JointLearner, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Class and thing of each unit (scene, unit) that the learner sees: patches, or regions."""
    if learner.units == "regions":
        return corpus.regions, corpus.region_things
    return corpus.patches, corpus.patch_things


def units_showing(learner: JointLearner, corpus: Corpus, scenes: np.ndarray, things: np.ndarray) -> np.ndarray:
    """The units that show anything of a thing, or most of it where units are boxes (scene, unit); none for thing -1."""
    shows = corpus.region_shows if learner.units == "regions" else corpus.patch_shows
    return shows[scenes, things] & (things >= 0)[:, None]


def _thing_to_hide(corpus: Corpus, scenes: np.ndarray, things: np.ndarray, rng: Generator) -> np.ndarray:
    """A thing of each scene that the caption mentions and that has units."""
    phrases = corpus.phrases[scenes]
    return _one_of(phrases, (phrases[..., None] == things[:, None]).any(-1) & (phrases >= 0), rng)


def question_kinds(corpus: Corpus, scenes: np.ndarray, rng: Generator) -> np.ndarray:
    """A kind of question (in QUESTIONS) for each scene, among those that it has."""
    weights = (corpus.answers[scenes] >= 0) * np.array(list(_QUESTION_WEIGHTS.values()))
    return _strongest(weights, np.ones(len(scenes), int), rng).argmax(1)


def _word_loss(learner: JointLearner, hidden: Hidden, asked: Asked) -> Tensor:
    """The mean over all words that are asked for, or this process' share of it."""
    wanted = learner.share.part(asked.wanted)
    logits = learner.words(hidden)[: len(wanted)].float()
    truth = torch.from_numpy(wanted[:, : logits.shape[1]]).to(logits.device)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum")
    return learner.share.mean(total, int((asked.wanted >= 0).sum()))


def patch_loss(logits: Tensor, corpus: Corpus, scenes: np.ndarray) -> Tensor:
    """The weighted loss of the class of every patch from logits (scene, patch, class)."""
    classes = torch.from_numpy(corpus.patches[scenes].astype(np.int64)).to(logits.device)
    return UNIT_WEIGHT * unit_loss(logits.flatten(0, 1), classes.flatten())


def unit_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy of unit classes (unit, class); the ground counts little, as there is so much of it."""
    weights = torch.ones(len(CLASSES), device=logits.device)
    weights[GROUND] = _GROUND_WEIGHT
    return nn.functional.cross_entropy(logits, truth, weights)


def trimmed(texts: np.ndarray) -> Tensor:
    """Texts (row, token) without the padding that none of them needs."""
    return torch.from_numpy(texts[:, : int((texts > 0).sum(1).max())].astype(np.int64))
