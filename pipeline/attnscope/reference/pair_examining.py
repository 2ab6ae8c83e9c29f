"""How well a learner does on a user's own pairs that it never saw: retrieval, matching, masked words, captions."""

from collections.abc import Iterator

import numpy as np
import torch

from attnscope.reference.examining import Items, recalls, told_words, write_captions
from attnscope.reference.learners import Lxmert, Mapper, Retriever, Text, Vilt
from attnscope.reference.lessons import mask_words_at_random, trimmed
from attnscope.reference.pairs import Pairs

_BATCH = 64
_MASK_SEED = 0


@torch.no_grad()
def examine_pair_retrieval(learner: Retriever, pairs: Pairs) -> dict[str, Items]:
    """Whether each image's own text is among the first 1, 5 and 10 of all texts, and each text's image likewise."""
    images, texts = [], []
    for at in _batches(len(pairs)):
        images.append(learner.embed_images(pairs, at)[0].cpu())
        texts.append(learner.embed_texts(trimmed(pairs.words[at])).cpu())
    found = recalls((torch.cat(images) @ torch.cat(texts).T).numpy())
    return {name: Items(hits, np.arange(len(pairs))) for name, hits in found.items()}


def examine_joint_pairs(learner: Vilt | Lxmert, pairs: Pairs) -> dict[str, Items]:
    """Masked words as `examine_pair_words`, and whether a text fits its image."""
    return examine_pair_words(learner, pairs) | _examine_pair_matching(learner, pairs)


@torch.no_grad()
def _examine_pair_matching(learner: Vilt | Lxmert, pairs: Pairs) -> dict[str, Items]:
    """Of each image, whether its own text is said to fit ('true'), the next pair's not to ('other'), and their mean.

    Where the next pair has the same text, nothing is asked of the two; no figures where that is so of all.
    """
    words = pairs.words[:].astype(np.int64)
    others = np.roll(words, -1, 0)
    asked = np.flatnonzero((words != others).any(1))
    if not len(asked):
        return {}
    told = []
    for texts in (words, others):
        parts = [
            learner.match(learner.encode(trimmed(texts[at]), learner.see(pairs, at))).cpu().numpy()
            for at in np.split(asked, range(_BATCH, len(asked), _BATCH))
        ]
        told.append(np.concatenate(parts) > 0)
    true, other = told[0].astype(np.float64), 1.0 - told[1]
    found = {"true": true, "other": other, "balanced": (true + other) / 2}
    return {f"matching_{name}": Items(values, asked) for name, values in found.items()}


@torch.no_grad()
def examine_pair_words(learner: Text | Vilt | Lxmert, pairs: Pairs) -> dict[str, Items]:
    """Of each masked word, 15 % of all, whether it is found, and its surprise in bits."""
    words = pairs.words[:].astype(np.int64)
    rng = np.random.Generator(np.random.PCG64(_MASK_SEED))
    shown, asked = mask_words_at_random(words, learner.config.vocab_size, rng)
    found, bits, rows = [], [], []
    for at in _batches(len(pairs)):
        logits = learner.words(learner.encode(trimmed(shown[at]), learner.see(pairs, at)))
        row, token = np.nonzero(asked[at][:, : logits.shape[1]])
        truth = torch.from_numpy(words[at][row, token])
        # The vocabulary is large: the logits of all tokens aren't copied.
        chosen = logits[row, token].cpu().double()
        found.append((chosen.argmax(-1) == truth).double().numpy())
        bits.append(-chosen.log_softmax(-1).gather(1, truth[:, None])[:, 0].numpy() / np.log(2))
        rows.append(at[row])
    where = np.concatenate(rows)
    return {"words": Items(np.concatenate(found), where), "words_bits": Items(np.concatenate(bits), where)}


@torch.no_grad()
def examine_pair_captions(learner: Mapper, pairs: Pairs) -> dict[str, Items]:
    """Of each word behind the true ones, whether it is told, and its surprise; and whose text is written to the word.

    Texts are written by the likeliest word behind the others.
    """
    found, bits, rows, exact = [], [], [], []
    for at in _batches(len(pairs)):
        words = pairs.words[at]
        image = learner.look(pairs, at)
        told = told_words(learner, trimmed(words), image)
        found.append(told.found)
        bits.append(told.bits)
        rows.append(at[told.rows])
        exact.append((write_captions(learner, image, words.shape[1]) == words).all(1))
    where = np.concatenate(rows)
    return {
        "captions_tokens": Items(np.concatenate(found), where),
        "captions_bits": Items(np.concatenate(bits), where),
        "captions_exact": Items(np.concatenate(exact).astype(np.float64), np.arange(len(pairs))),
    }


def _batches(count: int) -> Iterator[np.ndarray]:
    return iter(np.split(np.arange(count), range(_BATCH, count, _BATCH)))
