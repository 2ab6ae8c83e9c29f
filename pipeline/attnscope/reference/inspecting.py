"""Where a learner's attention falls, and what falls with it: agreement with the truth, deletion and insertion.

For each item (a word, question or thing) attention over units (regions, patches or words) is compared with the units
that show or say what the item is about; then units are taken from the model's input in the order of the attention, most
attended first, and the model is run again:

- `pointing` is whether the most attended unit is one of those, `mass` their share of the attention, `overlap` the
  intersection over union of them and as many most attended ones; `chance` is their share of the units.
- `deletion` is how much lower the model's score is without the first units (more is better), `insertion` how much lower
  with only them (less is better), the mean over FRACTIONS. `..._over_random` is the difference from a random order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from attnscope.recording import recording
from attnscope.reference.answering import Answering
from attnscope.reference.captions import QUESTIONS
from attnscope.reference.corpus import CLASSES, MASK, PAD, ROLES, SIDE, VOCABULARY, Corpus
from attnscope.reference.examining import Items
from attnscope.reference.judging import judge, judged_things, thing_classes
from attnscope.reference.learners import JointLearner, Vilt
from attnscope.reference.lessons import trimmed, units_of, units_showing
from attnscope.reference.painter import Layout, Painter, draw_all, every_pixel, mentioned
from attnscope.reference.scan import Scan
from attnscope.reference.scenes import SHAPES

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9)
_MOST_ITEMS = 256


@dataclass(frozen=True)
class Inspected:
    """What attention over units says of items, and the model that can be asked again.

    `attention`, `truth` (what the item is about) and `there` (units that the model has) are (item, unit), `scenes`
    (item,). `score` gives what the model makes of the items (item,) without the units that are gone (item, unit).
    """

    attention: np.ndarray
    truth: np.ndarray
    there: np.ndarray
    scenes: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


@torch.no_grad()
def examine_attention(learner: nn.Module, corpus: Corpus) -> dict[str, Items]:
    """All that is said above of a learner, named `attention_...`."""
    kind = next(k for k in _INSPECTIONS if isinstance(learner, k))
    return {f"attention_{name}": items for name, items in measure(_INSPECTIONS[kind](learner, corpus)).items()}


def measure(inspected: Inspected, seed: int = 0) -> dict[str, Items]:
    """The figures of what was inspected, item by item."""
    random = np.random.default_rng(seed).random(inspected.attention.shape)
    ranks, random_ranks = (_ranks(values, inspected.there, random) for values in (inspected.attention, random))
    truth, attention = inspected.truth & inspected.there, np.where(inspected.there, inspected.attention, 0)
    size = truth.sum(1)
    common = ((ranks < size[:, None]) & truth).sum(1)
    found = {
        "pointing": (truth & (ranks == 0)).any(1).astype(float),
        "mass": (attention * truth).sum(1) / attention.sum(1),
        "overlap": common / (2 * size - common),
        "chance": size / inspected.there.sum(1),
    }
    intact = inspected.score(np.zeros_like(truth))
    deletion, insertion = _changes(inspected, ranks, intact)
    by_chance = _changes(inspected, random_ranks, intact)
    found |= {"deletion": deletion, "insertion": insertion}
    found |= {"deletion_over_random": deletion - by_chance[0], "insertion_over_random": insertion - by_chance[1]}
    return {name: Items(values, inspected.scenes) for name, values in found.items()}


def _ranks(values: np.ndarray, there: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Place of each unit (item, unit), 0 for the largest value; equal ones by chance, what isn't there last."""
    order = np.lexsort((random, -np.where(there, values, -np.inf)), axis=1)
    return np.argsort(order, 1)


def _changes(inspected: Inspected, ranks: np.ndarray, intact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much lower the score is without the first units, and with only them (item,): the mean over FRACTIONS."""
    number = inspected.there.sum(1)
    without, only = [], []
    for fraction in FRACTIONS:
        # At least one is taken, and one is left.
        first = ranks < np.clip(np.round(fraction * number), 1, number - 1)[:, None]
        without.append(intact - inspected.score(first & inspected.there))
        only.append(intact - inspected.score(~first & inspected.there))
    return np.mean(without, 0), np.mean(only, 0)


# -- what is inspected of each kind of learner -------------------------------------------------------------------------


def _inspect_scan(learner: Scan, corpus: Corpus) -> Inspected:
    """Each mentioned thing: the mean attention of its phrase's words to regions, and the mean of their cosines."""
    scenes, things = _few(*_mentions(corpus))
    truth = corpus.region_things[scenes] == things[:, None]
    words = trimmed(corpus.words[scenes])
    phrase = torch.from_numpy(corpus.phrases[scenes, : words.shape[1]] == things[:, None]).float()
    texts, images = learner.embed_texts(words), learner.embed_images(corpus, scenes)[0]

    def score(gone: np.ndarray) -> np.ndarray:
        cosines = learner.meet_own(words, texts, images, torch.from_numpy(gone)).cosines[:, 0]
        return _within(cosines, phrase).numpy()

    attention = _within(learner.meet_own(words, texts, images).attention[:, 0], phrase[..., None]).numpy()
    return Inspected(attention, truth, np.ones_like(truth), scenes, score)


def _mentions(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Scene and thing (item,) of every mentioned thing that has a region."""
    pairs = [(s, t) for s in range(len(corpus)) for t in mentioned(corpus, s) if (corpus.region_things[s] == t).any()]
    scenes, things = np.array(pairs).T
    return scenes, things


def _few(*of_items: np.ndarray) -> tuple[np.ndarray, ...]:
    """No more items than are needed, the first ones."""
    return tuple(values[:_MOST_ITEMS] for values in of_items)


def _within(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The mean over chosen tokens, the second axis."""
    return (values * chosen).sum(1) / chosen.sum(1)


def _inspect_answering(learner: Answering, corpus: Corpus) -> Inspected:
    """Each question for a colour or shape: attention of the word that names the thing, chance of the right answer."""
    scenes, kinds = np.nonzero((corpus.answers >= 0) & np.isin(np.arange(len(QUESTIONS)), list(_NAMED_BY)))
    questions = corpus.questions[scenes, kinds]
    names = np.stack([np.isin(questions, _NAMED_BY[kind]) for kind in sorted(_NAMED_BY)])
    naming = names[np.searchsorted(sorted(_NAMED_BY), kinds), np.arange(len(kinds))]
    word = questions[np.arange(len(questions)), naming.argmax(1)]
    truth = _CLASS_SAYS[word][np.arange(len(word))[:, None], corpus.regions[scenes]] & (
        corpus.region_things[scenes] >= 0
    )
    usable = truth.any(1)
    scenes, kinds, truth, naming, questions = _few(*(v[usable] for v in (scenes, kinds, truth, naming, questions)))
    words, seen = trimmed(questions), learner.see(corpus, scenes)
    answers = corpus.answers[scenes, kinds].astype(int)

    def score(gone: np.ndarray) -> np.ndarray:
        logits = learner.answer(learner.encode(words, learner.hide(seen, torch.from_numpy(gone))))
        return _chance(logits, answers)

    attention = learner.attend(words, seen)[0].numpy()[np.arange(len(words)), naming.argmax(1)]
    return Inspected(attention, truth, np.ones_like(truth), scenes, score)


def _class_says() -> np.ndarray:
    """Whether a word is a name of a class of regions: (word, class)."""
    return np.array([[word in name.split() for name in CLASSES] for word in VOCABULARY])


_CLASS_SAYS = _class_says()
# A colour is asked for by the shape, and a shape by the colour.
_NAMED_BY = {
    QUESTIONS.index(asked): [
        n for n, word in enumerate(VOCABULARY) if any(word == c.split()[part] for c in CLASSES[:-1])
    ]
    for asked, part in (("colour", 1), ("shape", 0))
}


def _chance(logits: torch.Tensor, right: np.ndarray) -> np.ndarray:
    """The chance of the right class (item,)."""
    return logits.double().softmax(-1).numpy()[np.arange(len(right)), right]


def _inspect_joint(learner: JointLearner, corpus: Corpus) -> Inspected:
    """Each masked colour or shape: its attention in the last layer in which words see the image, mean of heads."""
    asked = np.isin(corpus.roles, [ROLES.index(role) for role in ("colour", "shape")]) & corpus.determined
    scenes, tokens = np.nonzero(asked)
    things = corpus.phrases[scenes, tokens].astype(int)
    truth = units_showing(learner, corpus, scenes, things)
    if learner.units == "regions":
        truth = units_of(learner, corpus)[1][scenes] == things[:, None]
    usable = truth.any(1) & (things >= 0)
    scenes, tokens, truth = _few(*(values[usable] for values in (scenes, tokens, truth)))
    texts = corpus.words[scenes].astype(np.int64)
    rows = np.arange(len(scenes))
    wanted = texts[rows, tokens]
    texts[rows, tokens] = MASK
    words, seen = trimmed(texts), learner.see(corpus, scenes)

    def score(gone: np.ndarray) -> np.ndarray:
        hidden = learner.encode(words, learner.hide(seen, torch.from_numpy(gone)))
        return _chance(learner.words(hidden)[rows, tokens], wanted)

    with recording(learner) as calls:
        learner.encode(words, seen)
    if isinstance(learner, Vilt):
        # The image's CLS token stands between words and patches.
        attention = calls[-1].attention().mean(1)[rows, tokens, words.shape[1] + 1 :]
    else:
        across = [call for call in calls if "visual_attention" in call.module and call.number == 0]
        attention = across[-1].attention().mean(1)[rows, tokens]
    return Inspected(attention.numpy(), truth, np.ones_like(truth), scenes, score)


def _inspect_painter(learner: Painter, corpus: Corpus) -> Inspected:
    """Each thing: attention of its pixels to words, and the judge's chance for its colour and shape as drawn."""
    scenes, things = _few(*judged_things(corpus))
    scenes, things = scenes[: _MOST_ITEMS // 2], things[: _MOST_ITEMS // 2]
    words = trimmed(corpus.words[scenes])
    truth = corpus.phrases[scenes, : words.shape[1]] == things[:, None]
    layout = Layout.of(corpus, scenes)
    places, owner = layout.place(every_pixel().expand(len(scenes), -1, -1))
    mention = [mentioned(corpus, scene).index(thing) for scene, thing in zip(scenes, things, strict=True)]
    own = owner == torch.tensor(mention)[:, None]
    # As many pixels of each as the largest thing has, its own first.
    chosen = (~own).int().argsort(dim=1, stable=True)[:, : int(own.sum(1).max())]
    near, is_own = places.gather(1, chosen[..., None].expand(-1, -1, places.shape[-1])), own.gather(1, chosen)
    classes = thing_classes(corpus, scenes, things)
    drawn = draw_all(learner, corpus)[scenes].reshape(len(scenes), SIDE * SIDE, 3)

    def score(gone: np.ndarray) -> np.ndarray:
        colours = learner(words, near, torch.from_numpy(gone))
        changed = torch.from_numpy(drawn).clone()
        pixels = ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        row, at = is_own.nonzero().T
        changed[row, chosen[row, at]] = pixels[row, at]
        chances = judge(changed.view(-1, SIDE, SIDE, 3).numpy(), corpus, scenes, things)
        return chances[np.arange(len(scenes)), classes // len(SHAPES), classes % len(SHAPES)].astype(float)

    attention, _ = learner.attend(words, near)
    mean = _within(attention, is_own[..., None].float()).numpy()
    return Inspected(mean, truth, (words != PAD).numpy(), scenes, score)


_INSPECTIONS: dict[type[nn.Module], Callable[..., Inspected]] = {
    Scan: _inspect_scan,
    Answering: _inspect_answering,
    Painter: _inspect_painter,
    JointLearner: _inspect_joint,
}
