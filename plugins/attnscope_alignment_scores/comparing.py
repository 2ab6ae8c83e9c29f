"""How two ways to attend differ, and what it costs to take away the keys that one of them ranks first."""

from collections.abc import Sequence

import numpy as np


def divergence(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence over the last axis, (...) in nats, between 0 and log 2."""
    middle = (one + other) / 2
    return (_divergence_from(one, middle) + _divergence_from(other, middle)) / 2


def entropy(attention: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, (...) in nats."""
    logarithms = np.log(attention, out=np.zeros_like(attention), where=attention > 0)
    return -(attention * logarithms).sum(-1)


def draw_pairs(keys: int, count: int, seed: int) -> np.ndarray:
    """Pairs of keys to compare, (2, pair): all of them, or as many as `count` drawn at random without repetition."""
    every = np.stack(np.triu_indices(keys, 1))
    if every.shape[1] <= count:
        return every
    return every[:, np.random.default_rng(seed).choice(every.shape[1], count, replace=False)]


def rank_agreement(one: np.ndarray, other: np.ndarray, allowed: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Kendall's tau-b over the last axis, (...) in [-1, 1], from these pairs of keys; NaN where one side is all ties.

    With all pairs it is exact; with a random part of them numerator and tie counts are unbiased estimates. Pairs with a
    key that is not allowed are left out. (Kendall, Biometrika 1945.)
    """
    first, second = pairs
    counted = allowed[..., first] & allowed[..., second]
    signs = [np.where(counted, np.sign(side[..., first] - side[..., second]), 0) for side in (one, other)]
    agreeing = (signs[0] * signs[1]).sum(-1)
    untied = np.sqrt(np.abs(signs[0]).sum(-1) * np.abs(signs[1]).sum(-1))
    return np.divide(agreeing, untied, out=np.full(agreeing.shape, np.nan), where=untied > 0)


def rank_keys(scores: np.ndarray, allowed: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Place of every key, 0 for the highest score, (..., key_token); keys that aren't allowed come last.

    Equal scores are put in the given random `order` of the keys, so that no place in the sequence is preferred.
    """
    shuffled = np.where(allowed, scores, -np.inf)[..., order]
    sorted_ = np.argsort(-shuffled, axis=-1, kind="stable")
    ranks = np.empty(sorted_.shape, int)
    np.put_along_axis(ranks, order[sorted_], np.broadcast_to(np.arange(sorted_.shape[-1]), sorted_.shape), -1)
    return ranks


def overlap(one: np.ndarray, other: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """The share of the first `count` keys of one ranking among those of another, (...) in [0, 1]."""
    most = np.minimum(count, allowed.sum(-1))
    both = ((one < most[..., None]) & (other < most[..., None]) & allowed).sum(-1)
    return np.divide(both, most, out=np.full(both.shape, np.nan), where=most > 0)


def output_change(
    attention: np.ndarray, value: np.ndarray, ranks: np.ndarray, allowed: np.ndarray, fractions: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """How a head's output changes when keys are taken away: deletion and insertion, (fraction, head, row) each.

    The output is sum_j a_ij v_j, with the model's own attention made to sum to 1 over the keys that are left. Deletion
    takes the fraction of the keys that is ranked first away, insertion leaves only that; at least one key is taken and
    one is left. The change is the length of the difference over that of the whole output. NaN for rows of one key.
    """
    number = allowed.sum(-1)
    whole = attention @ value
    length = np.linalg.norm(whole, axis=-1)
    changes: list[list[np.ndarray]] = [[], []]
    for fraction in fractions:
        taken = np.clip(np.floor(fraction * number + 0.5), 1, np.maximum(number - 1, 1))[..., None]
        first = (ranks < taken) & allowed
        for found, kept in zip(changes, (allowed & ~first, first), strict=True):
            weights = attention * kept
            total = weights.sum(-1, keepdims=True)
            weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
            distance = np.linalg.norm(weights @ value - whole, axis=-1)
            enough = (number > 1) & (length > 0)
            found.append(np.divide(distance, length, out=np.full(distance.shape, np.nan), where=enough))
    return np.stack(changes[0]), np.stack(changes[1])


def grounding(scores: np.ndarray, inside: np.ndarray, order: np.ndarray) -> dict[str, np.ndarray]:
    """Agreement of attention weights (..., row, key_token) with a region's keys `inside` (row, key_token): (..., row).

    `pointing`: whether the largest weight lies inside (the share of the largest, where several are equal); `mass`: the
    part of the weights inside; `overlap`: intersection over union of the region and as many keys with the most weight.
    """
    most = scores == scores.max(-1, keepdims=True)
    total = scores.sum(-1)
    ranks = rank_keys(scores, np.broadcast_to(True, scores.shape), order)
    size = inside.sum(-1)
    common = ((ranks < size[:, None]) & inside).sum(-1)
    held = (scores * inside).sum(-1)
    return {
        "pointing": (most & inside).sum(-1) / most.sum(-1),
        "mass": np.divide(held, total, out=np.full(total.shape, np.nan), where=total > 0),
        "overlap": common / (2 * size - common),
    }


def _divergence_from(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    ratio = np.divide(one, other, out=np.ones_like(one), where=(one > 0) & (other > 0))
    return (one * np.log(ratio)).sum(-1)
