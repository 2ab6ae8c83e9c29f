"""How well a learner does on scenes that it never saw, with intervals over scenes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnscope.reference.captions import ATTRIBUTE_QUESTIONS, QUESTIONS
from attnscope.reference.corpus import CLASSES, CLS, LENGTH, MASK, NEGATIVES, PAD, ROLES, SEP, VOCABULARY, Corpus
from attnscope.reference.learners import JointLearner, Mapper, Retriever, Seen
from attnscope.reference.lessons import trimmed, units_of, units_showing

_BATCH = 256
GALLERY = 256
_RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Figure:
    """A mean over items with its 95 % bootstrap interval over scenes."""

    value: float
    low: float
    high: float
    items: int


@dataclass(frozen=True)
class Items:
    """One value per item, and the scene that each item is about."""

    values: np.ndarray
    scenes: np.ndarray

    def figure(self, draws: int = 1000, seed: int = 0) -> Figure:
        """The mean, and what it would be for other scenes."""
        count = int(self.scenes.max()) + 1
        sums = np.bincount(self.scenes, self.values, count)
        items = np.bincount(self.scenes, minlength=count)
        present = items > 0
        sums, items = sums[present], items[present]
        drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
        means = sums[drawn].sum(1) / items[drawn].sum(1)
        low, high = np.quantile(means, [0.025, 0.975]).tolist()
        return Figure(float(self.values.mean()), low, high, len(self.values))


def hide_thing(learner: JointLearner, corpus: Corpus, seen: Seen, scenes: np.ndarray, things: np.ndarray) -> Seen:
    """Hide the units of one thing of each scene; where there is none (a relation's word), nothing."""
    return learner.hide(seen, torch.from_numpy(units_showing(learner, corpus, scenes, things)))


def hide_everything(learner: JointLearner, corpus: Corpus, seen: Seen, scenes: np.ndarray, things: np.ndarray) -> Seen:
    """Hide all units."""
    classes, _ = units_of(learner, corpus)
    return learner.hide(seen, torch.ones(classes[scenes].shape, dtype=torch.bool))


@torch.no_grad()
def examine_words(
    learner: JointLearner, corpus: Corpus, change: Callable[[Seen, np.ndarray, np.ndarray], Seen] | None = None
) -> dict[str, dict[str, Items]]:
    """For each role, of each determined word masked by itself: whether it is found, and its surprise in bits.

    `change` may alter what is seen, given the scenes and the thing that the masked word is about.
    """
    scenes, tokens = np.nonzero((corpus.roles > 0) & corpus.determined)
    shown = corpus.words[scenes].astype(np.int64)
    rows = np.arange(len(scenes))
    wanted = shown[rows, tokens]
    shown[rows, tokens] = MASK
    found, bits = np.zeros(len(rows)), np.zeros(len(rows))
    for at in batches(len(rows)):
        seen = learner.see(corpus, scenes[at])
        if change is not None:
            seen = change(seen, scenes[at], corpus.phrases[scenes[at], tokens[at]])
        hidden = learner.encode(trimmed(shown[at]), seen)
        logits = learner.words(hidden)[np.arange(len(shown[at])), tokens[at]].double()
        found[at] = logits.argmax(-1).numpy() == wanted[at]
        chosen = torch.from_numpy(wanted[at])[:, None]
        bits[at] = -logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy() / np.log(2)
    roles = corpus.roles[scenes, tokens]
    of = {role: roles == number for number, role in enumerate(ROLES) if number and (roles == number).any()}
    return {
        role: {"accuracy": Items(found[chosen], scenes[chosen]), "bits": Items(bits[chosen], scenes[chosen])}
        for role, chosen in of.items()
    }


@torch.no_grad()
def examine_matching(learner: JointLearner, corpus: Corpus) -> dict[str, Items]:
    """Whether true captions are accepted, and wrong ones refused, by what is wrong; 'balanced' is both alike.

    Of a scene's wrong captions, the balanced figure takes one: another scene's, or one changed in an attribute or in
    order, by turns.
    """
    scores = {"true": _match(learner, corpus, corpus.words)}
    others = np.roll(corpus.words, 1, axis=0)
    texts = {"other": others, **{kind: corpus.negatives[:, i] for i, kind in enumerate(NEGATIVES)}}
    result = {"true": Items((scores["true"] > 0).astype(float), np.arange(len(corpus)))}
    for kind, words in texts.items():
        there = np.flatnonzero(words.any(1))
        if len(there):
            refused = _match(learner, corpus, words[there], there) <= 0
            result[kind] = Items(refused.astype(float), there)
    turns = ("other", "attribute", "order")
    chosen = [
        Items(
            result[k].values[result[k].scenes % len(turns) == i], result[k].scenes[result[k].scenes % len(turns) == i]
        )
        for i, k in enumerate(turns)
        if k in result
    ]
    refused = np.concatenate([c.values for c in chosen])
    where = np.concatenate([c.scenes for c in chosen])
    result["balanced"] = Items(np.concatenate([result["true"].values[where], refused]), np.concatenate([where, where]))
    return result


def _match(learner: JointLearner, corpus: Corpus, words: np.ndarray, scenes: np.ndarray | None = None) -> np.ndarray:
    chosen = np.arange(len(corpus)) if scenes is None else scenes
    scores = [
        learner.match(learner.encode(trimmed(words[at]), learner.see(corpus, chosen[at])))
        for at in batches(len(chosen))
    ]
    return torch.cat(scores).numpy()


@torch.no_grad()
def examine_answers(learner: JointLearner, corpus: Corpus) -> dict[str, Items]:
    """Whether each question is answered rightly, by kind; 'attributes' are the kinds that ask for one object's."""
    scenes, kinds = np.nonzero(corpus.answers >= 0)
    right = np.zeros(len(scenes))
    for at in batches(len(scenes)):
        words = trimmed(corpus.questions[scenes[at], kinds[at]])
        logits = learner.answer(learner.encode(words, learner.see(corpus, scenes[at])))
        right[at] = logits.argmax(-1).numpy() == corpus.answers[scenes[at], kinds[at]]
    of = {kind: kinds == number for number, kind in enumerate(QUESTIONS)}
    of["attributes"] = np.isin(kinds, [QUESTIONS.index(kind) for kind in ATTRIBUTE_QUESTIONS])
    return {kind: Items(right[chosen], scenes[chosen]) for kind, chosen in of.items() if chosen.any()}


@torch.no_grad()
def examine_units(learner: JointLearner, corpus: Corpus, *, words_masked: bool = False) -> dict[str, Items]:
    """Of each mentioned thing with all of its units hidden: whether a unit's class, and its surprise in bits."""
    classes, things = units_of(learner, corpus)
    numbers = np.arange(corpus.patch_shows.shape[1])
    mentioned = (corpus.phrases[..., None] == numbers).any(1) & (things[..., None] == numbers).any(1)
    rows, wanted = mentioned.nonzero()
    hides = units_showing(learner, corpus, rows, wanted)
    asks = things[rows] == wanted[:, None]
    right, bits, where = [], [], []
    for at in batches(len(rows)):
        words = corpus.words[rows[at]].astype(np.int64)
        if words_masked:
            words = np.where((words > MASK), MASK, words)
        seen = learner.hide(learner.see(corpus, rows[at]), torch.from_numpy(hides[at]))
        logits = learner.classify(learner.encode(trimmed(words), seen)).double()
        row, unit = asks[at].nonzero()
        truth = torch.from_numpy(classes[rows[at]][row, unit].astype(np.int64))
        chosen = logits[row, unit]
        right.append((chosen.argmax(-1) == truth).double().numpy())
        bits.append(-chosen.log_softmax(-1).gather(1, truth[:, None])[:, 0].numpy() / np.log(2))
        where.append(rows[at][row])
    scene = np.concatenate(where)
    return {"accuracy": Items(np.concatenate(right), scene), "bits": Items(np.concatenate(bits), scene)}


def recalls(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Whether each partner is among the best 1, 5, 10, both ways, by scores (image, text) of pairs in order."""
    found: dict[str, np.ndarray] = {}
    for way, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        # Of equals, the partner comes last.
        ranks = (table >= np.diag(table)[:, None]).sum(1)
        found |= {f"{way}_r{rank}": (ranks <= rank).astype(float) for rank in _RANKS}
    return found


def rank_pairs(match_all: Callable[[np.ndarray], np.ndarray], count: int, gallery: int) -> dict[str, Items]:
    """R@1, 5, 10 both ways among galleries of so many scenes (or all, if fewer), every pair scored.

    `match_all` gives the scores of all images of some scenes with all of their texts (image, text).
    """
    size = min(gallery, count)
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, count - size + 1, size):
        for name, hits in recalls(match_all(np.arange(start, start + size))).items():
            found.setdefault(name, []).append(hits)
    return {name: Items(np.concatenate(hits), np.arange(sum(map(len, hits)))) for name, hits in found.items()}


@torch.no_grad()
def examine_joint_ranking(learner: JointLearner, corpus: Corpus, gallery: int) -> dict[str, Items]:
    """R@1, 5, 10 both ways by the matching score, which a joint stream has of no text and image by itself."""

    def match_all(scenes: np.ndarray) -> np.ndarray:
        words, seen = trimmed(corpus.words[scenes]), learner.see(corpus, scenes)
        rows = [learner.match(learner.encode(words, seen.repeated(row, len(words)))) for row in range(len(scenes))]
        return torch.stack(rows).numpy()

    return rank_pairs(match_all, len(corpus), gallery)


@torch.no_grad()
def examine_retrieval(learner: Retriever, corpus: Corpus) -> dict[str, Items]:
    """R@1 both ways, whether each true caption beats its wrong ones, and the classes of patches.

    R@1 is among 256 scenes, or among all if there are fewer.
    """
    images, texts, logits = [], [], []
    for at in batches(len(corpus)):
        vectors, unit_logits = learner.embed_images(corpus, np.arange(len(corpus))[at])
        images.append(vectors)
        logits.append(unit_logits)
        texts.append(learner.embed_texts(trimmed(corpus.words[at])))
    image, text = torch.cat(images), torch.cat(texts)
    found: dict[str, list[np.ndarray]] = {"image_to_text": [], "text_to_image": []}
    size = min(GALLERY, len(corpus))
    truth = torch.arange(size)
    for start in range(0, len(corpus) - size + 1, size):
        block = slice(start, start + size)
        similarity = image[block] @ text[block].T
        found["image_to_text"].append((similarity.argmax(1) == truth).double().numpy())
        found["text_to_image"].append((similarity.argmax(0) == truth).double().numpy())
    result = {name: Items(np.concatenate(values), np.arange(sum(map(len, values)))) for name, values in found.items()}
    own = (image * text).sum(-1)
    for number, kind in enumerate(NEGATIVES):
        there = np.flatnonzero(corpus.negatives[:, number].any(1))
        if len(there):
            wrong = _embedded(learner, corpus.negatives[there, number])
            better = own[there] > (image[there] * wrong).sum(-1)
            result[f"beats_{kind}"] = Items(better.double().numpy(), there)
    classes = corpus.patches.astype(np.int64)
    scene, patch = np.nonzero(classes != classes.max())
    right = torch.cat(logits)[scene, patch].argmax(-1).numpy() == classes[scene, patch]
    result["patches"] = Items(right.astype(float), scene)
    return result


@torch.no_grad()
def examine_captions(learner: Mapper, corpus: Corpus) -> dict[str, Items]:
    """Of words behind the true ones, whether each is told, and its surprise; and what greedy captions say.

    'true' is whether a caption has phrases and all of them are true of the scene: a thing has their colour and shape,
    and their size where they name one. 'phrases' counts each phrase by itself.
    """
    found: dict[str, list[np.ndarray]] = {"tokens": [], "bits": []}
    where, greedy = [], []
    for at in batches(len(corpus)):
        captions = trimmed(corpus.words[at])
        image = learner.look(corpus, np.arange(len(corpus))[at])
        told = told_words(learner, captions, image)
        found["tokens"].append(told.found)
        found["bits"].append(told.bits)
        where.append(told.rows + at.start)
        greedy.append(write_captions(learner, image))
    judged = [_phrases_true(words, corpus, scene) for scene, words in enumerate(np.concatenate(greedy))]
    scenes = np.arange(len(corpus))
    phrases = Items(np.concatenate(judged).astype(float), np.repeat(scenes, [len(one) for one in judged]))
    return {
        **{name: Items(np.concatenate(values), np.concatenate(where)) for name, values in found.items()},
        "true": Items(np.array([bool(one) and all(one) for one in judged], float), scenes),
        **({"phrases": phrases} if len(phrases.values) else {}),
    }


@dataclass(frozen=True)
class Told:
    """Of each word of some captions behind the true ones: whether it is found, its surprise in bits, and whose it is.

    Each (word,); `rows` are numbers of captions.
    """

    found: np.ndarray
    bits: np.ndarray
    rows: np.ndarray


@torch.no_grad()
def told_words(learner: Mapper, captions: Tensor, image: Tensor) -> Told:
    """What is told of captions (sample, token) word by word, for images mapped with the prompt."""
    logits = learner.tell(captions[:, :-1], image)
    row, token = (captions[:, 1:] != PAD).nonzero(as_tuple=True)
    wanted, said = captions[row, token + 1], logits[row.to(logits.device), token.to(logits.device)].cpu().double()
    bits = -said.log_softmax(-1).gather(1, wanted[:, None])[:, 0].numpy() / np.log(2)
    return Told((said.argmax(-1) == wanted).double().numpy(), bits, row.numpy())


@torch.no_grad()
def write_captions(learner: Mapper, image: Tensor, most: int = LENGTH) -> np.ndarray:
    """The likeliest word behind the others again and again, (sample, token) ids, for images mapped with the prompt."""
    words = torch.full((len(image), 1), CLS, device=image.device)
    while words.shape[1] < most and not (words == SEP).any(1).all():
        following = learner.decoder(words, image, None)[:, -1].argmax(-1)
        words = torch.cat([words, following.where(~(words == SEP).any(1), PAD)[:, None]], 1)
    return np.pad(words.cpu().numpy(), ((0, 0), (0, most - words.shape[1])))


def _phrases_true(ids: np.ndarray, corpus: Corpus, scene: int) -> list[bool]:
    """Of each colour and shape that stand together in a caption (token,), whether a thing of the scene is so."""
    words = [VOCABULARY[i] for i in ids if i not in (PAD, CLS, SEP)]
    judged = []
    for at in range(1, len(words)):
        pair = f"{words[at - 1]} {words[at]}"
        if pair in CLASSES:
            fits = corpus.things[scene] == CLASSES.index(pair)
            size = words[at - 2] if at > 1 else ""
            if size in ("small", "large"):
                fits &= corpus.large[scene] == (size == "large")
            judged.append(bool(fits.any()))
    return judged


def _embedded(learner: Retriever, words: np.ndarray) -> Tensor:
    parts = [learner.embed_texts(trimmed(words[at])) for at in batches(len(words))]
    return torch.cat(parts)


def batches(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH))
