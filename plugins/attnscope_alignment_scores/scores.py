"""Alignment scores of queries and keys: pure functions, and the table of those that are compared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

Parameters = Mapping[str, np.ndarray]
ADDITIVE_WIDTH = 8
"""Hidden units of the additive score."""


@dataclass(frozen=True)
class Alignment:
    """One score function.

    `form`: 'dot', 'scaled', 'cosine', 'general', 'additive', or one that only ranks: 'model' (the model's own
    attention) and 'random'. In a general score the learned matrix stands on the `side` of the key (q . (W k), "QWK") or
    of the query (k . (W q), "KWQ"), with or without `bias`; `activation` is applied to the score.
    """

    form: Literal["dot", "scaled", "cosine", "general", "additive", "model", "random"]
    meaning: str
    side: Literal["key", "query"] = "key"
    bias: bool = False
    activation: Literal["", "relu", "sigmoid", "tanh"] = ""

    @property
    def is_learned(self) -> bool:
        """Whether it has parameters."""
        return self.form in ("general", "additive")


ALIGNMENTS = {
    "model": Alignment("model", "the model's own attention"),
    "dot": Alignment("dot", "q . k"),
    "scaled_dot": Alignment("scaled", "q . k / sqrt(d)"),
    "cosine": Alignment("cosine", "q . k / (|q| |k|)"),
    "general_qwk": Alignment("general", "q . (W k)"),
    "general_kwq": Alignment("general", "k . (W q)", "query"),
    "biased_general_qwk": Alignment("general", "q . (W k + b)", bias=True),
    "biased_general_kwq": Alignment("general", "k . (W q + b)", "query", bias=True),
    "relu_qwk": Alignment("general", "relu(q . (W k + b))", bias=True, activation="relu"),
    "relu_kwq": Alignment("general", "relu(k . (W q + b))", "query", bias=True, activation="relu"),
    "sigmoid_qwk": Alignment("general", "sigmoid(q . (W k + b))", bias=True, activation="sigmoid"),
    "sigmoid_kwq": Alignment("general", "sigmoid(k . (W q + b))", "query", bias=True, activation="sigmoid"),
    "tanh_qwk": Alignment("general", "tanh(q . (W k + b))", bias=True, activation="tanh"),
    "tanh_kwq": Alignment("general", "tanh(k . (W q + b))", "query", bias=True, activation="tanh"),
    "additive": Alignment("additive", "v . tanh(W1 q + W2 k), the same functions as v . tanh(W [q; k]) (concat)"),
    "random": Alignment("random", "a random ranking, the floor"),
}
"""After Cao et al., COLING 2022; 'model' and 'random' are the references beside them."""


def align(alignment: Alignment, query: np.ndarray, key: np.ndarray, parameters: Parameters | None = None) -> np.ndarray:
    """Scores (..., query_token, key_token) of queries (..., query_token, channel) and keys (..., key_token, channel).

    Parameters of a general score: `weight` (..., channel, channel) and `bias` (..., channel); of the additive one
    `query_weight`, `key_weight` (..., hidden, channel) and `vector` (..., hidden).
    """
    given = parameters or {}
    if alignment.form == "additive":
        asked = _rows(query, given["query_weight"])[..., :, None, :]
        hidden = np.tanh(asked + _rows(key, given["key_weight"])[..., None, :, :])
        return (hidden * given["vector"][..., None, None, :]).sum(-1)
    if alignment.form == "general":
        sides = {"query": query, "key": key}
        sides[alignment.side] = _rows(sides[alignment.side], given["weight"])
        if alignment.bias:
            sides[alignment.side] = sides[alignment.side] + given["bias"][..., None, :]
        return _ACTIVATIONS[alignment.activation](_dot(sides["query"], sides["key"]))
    if alignment.form == "cosine":
        return _dot(_unit(query), _unit(key))
    if alignment.form in ("dot", "scaled"):
        return _dot(query, key) / (np.sqrt(query.shape[-1]) if alignment.form == "scaled" else 1)
    raise ValueError(f"a score of form {alignment.form!r} is not one of queries and keys")


def concat_scores(query: np.ndarray, key: np.ndarray, weight: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """v . tanh(W [q; k]), (..., query_token, key_token), with `weight` (..., hidden, 2 channel).

    It is the additive score with the two halves of W, so that no result of its own is given for it.
    """
    half = weight.shape[-1] // 2
    parameters = {"query_weight": weight[..., :half], "key_weight": weight[..., half:], "vector": vector}
    return align(ALIGNMENTS["additive"], query, key, parameters)


def attend(scores: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Softmax of scores (..., query_token, key_token) over the keys that are allowed; 0 elsewhere, and in dead rows."""
    masked = np.where(allowed, scores, -np.inf)
    most = masked.max(-1, keepdims=True)
    powers = np.exp(masked - np.where(np.isfinite(most), most, 0))
    total = powers.sum(-1, keepdims=True)
    return np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * values))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda values: values,
    "relu": lambda values: np.maximum(values, 0),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}


def _dot(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    return query @ np.swapaxes(key, -1, -2)


def _rows(vectors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """W x for every row x."""
    return vectors @ np.swapaxes(weight, -1, -2)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
