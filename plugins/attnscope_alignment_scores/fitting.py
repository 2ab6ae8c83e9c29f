"""Parameters of the learned scores, fitted on a training split of the run by gradient descent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnscope_alignment_scores.scores import ADDITIVE_WIDTH, Alignment, align, attend

_CLOSE = 1e-6
_MOMENTS = (0.9, 0.99)


@dataclass(frozen=True, eq=False)
class Lesson:
    """Rows of one sample to learn from: query (head, row, channel), key (head, key_token, channel), allowed and target.

    `target` (head, row, key_token) is a distribution to come near to, or, where `is_set`, true for the keys among which
    the attention should fall.
    """

    query: np.ndarray
    key: np.ndarray
    allowed: np.ndarray
    target: np.ndarray
    is_set: bool


def first_parameters(alignment: Alignment, heads: int, channels: int, scale: float, seed: int) -> dict[str, np.ndarray]:
    """Where fitting starts: the model's own score for the general forms, small random numbers for the additive one."""
    if alignment.form == "general":
        weight = np.broadcast_to(scale * np.eye(channels, dtype=np.float32), (heads, channels, channels)).copy()
        return {"weight": weight, **({"bias": np.zeros((heads, channels), np.float32)} if alignment.bias else {})}
    generator = np.random.default_rng(seed)
    shapes = {
        "query_weight": (heads, ADDITIVE_WIDTH, channels),
        "key_weight": (heads, ADDITIVE_WIDTH, channels),
        "vector": (heads, ADDITIVE_WIDTH),
    }
    return {n: (generator.normal(size=s) / np.sqrt(s[-1])).astype(np.float32) for n, s in shapes.items()}


def loss_and_slopes(
    alignment: Alignment, parameters: dict[str, np.ndarray], lesson: Lesson
) -> tuple[float, dict[str, np.ndarray]]:
    """Mean over rows and heads of the loss in nats, and its derivative by every parameter.

    The loss of a row is the cross entropy of its target, -sum_j t_j log a_j; of a set of keys, -log sum_{j in set} a_j.
    Either way its derivative by the scores is a - t, with t the attention inside the set, made to sum to 1.
    """
    scores = align(alignment, lesson.query, lesson.key, parameters)
    attention = attend(scores, lesson.allowed)
    if lesson.is_set:
        inside = attention * lesson.target
        mass = np.maximum(inside.sum(-1, keepdims=True), 1e-30)
        target, losses = inside / mass, -np.log(mass[..., 0])
    else:
        target = lesson.target
        losses = -(target * np.log(np.maximum(attention, 1e-30))).sum(-1)
    slope = (attention - target) / losses.size
    return float(losses.mean()), _slopes(alignment, parameters, lesson, scores, slope)


def fit(
    alignment: Alignment, parameters: dict[str, np.ndarray], lessons: Sequence[Lesson], *, steps: int
) -> tuple[dict[str, np.ndarray], float, float]:
    """The fitted parameters (those of the lowest loss that was met), and the loss before and after, in nats.

    Full-batch gradient descent with Adam's step sizes; it ends early where nothing is left to gain.
    """
    rates = {n: 0.05 * max(float(np.abs(p).max()), 0.02) for n, p in parameters.items()}
    if "bias" in rates:
        rates["bias"] = rates["weight"]
    current = {n: p.copy() for n, p in parameters.items()}
    first = {n: np.zeros_like(p) for n, p in current.items()}
    second = {n: np.zeros_like(p) for n, p in current.items()}
    best, lowest, before = current, np.inf, np.nan
    for step in range(1, steps + 2):
        found = [loss_and_slopes(alignment, current, lesson) for lesson in lessons]
        loss = float(np.mean([value for value, _ in found]))
        before = loss if step == 1 else before
        if loss < lowest:
            best, lowest = {n: p.copy() for n, p in current.items()}, loss
        slopes = {n: sum(s[n] for _, s in found) / len(found) for n in current}
        if step > steps or max(float(np.abs(s).max()) for s in slopes.values()) < _CLOSE:
            break
        for name, slope in slopes.items():
            first[name] = _MOMENTS[0] * first[name] + (1 - _MOMENTS[0]) * slope
            second[name] = _MOMENTS[1] * second[name] + (1 - _MOMENTS[1]) * slope**2
            mean, spread = first[name] / (1 - _MOMENTS[0] ** step), second[name] / (1 - _MOMENTS[1] ** step)
            current[name] = current[name] - (rates[name] * mean / (np.sqrt(spread) + 1e-12)).astype(np.float32)
    return best, before, lowest


def _slopes(
    alignment: Alignment, parameters: dict[str, np.ndarray], lesson: Lesson, scores: np.ndarray, slope: np.ndarray
) -> dict[str, np.ndarray]:
    if alignment.form == "additive":
        return _additive_slopes(parameters, lesson, slope)
    slope = slope * _derivative(alignment.activation, scores)
    if alignment.side == "key":
        # s = q . (W k + b): dW = sum q_i g_ij k_j^T, db = sum g_ij q_i.
        weight = np.swapaxes(lesson.query, -1, -2) @ (slope @ lesson.key)
        bias = (slope.sum(-1)[..., None] * lesson.query).sum(-2)
    else:
        weight = np.swapaxes(lesson.key, -1, -2) @ (np.swapaxes(slope, -1, -2) @ lesson.query)
        bias = (slope.sum(-2)[..., None] * lesson.key).sum(-2)
    return {"weight": weight, **({"bias": bias} if alignment.bias else {})}


def _derivative(activation: str, scores: np.ndarray) -> np.ndarray | float:
    """Derivative of the activation, from its value."""
    if activation == "relu":
        return (scores > 0).astype(scores.dtype)
    if activation == "sigmoid":
        return scores * (1 - scores)
    return 1 - scores**2 if activation == "tanh" else 1.0


def _additive_slopes(parameters: dict[str, np.ndarray], lesson: Lesson, slope: np.ndarray) -> dict[str, np.ndarray]:
    asked = lesson.query @ np.swapaxes(parameters["query_weight"], -1, -2)
    given = lesson.key @ np.swapaxes(parameters["key_weight"], -1, -2)
    hidden = np.tanh(asked[:, :, None] + given[:, None])  # (head, row, key_token, hidden)
    vector = np.einsum("hij,hijn->hn", slope, hidden)
    inner = slope[..., None] * (1 - hidden**2) * parameters["vector"][:, None, None]
    return {
        "vector": vector,
        "query_weight": np.einsum("hin,hic->hnc", inner.sum(2), lesson.query),
        "key_weight": np.einsum("hjn,hjc->hnc", inner.sum(1), lesson.key),
    }
