"""Alignment scores inside a model's attention, in the place of its scaled dot product, with parameters that train.

After Cao et al., COLING 2022. In ViLT and LXMERT the score is swapped inside every attention head; its matrix and bias
are as wide as a head, one of each per attention module, shared by its heads, as in the change of M4C that the paper's
authors published. Other models hold a `Score` of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.lxmert.modeling_lxmert import LxmertAttention
from transformers.models.vilt.modeling_vilt import ViltSelfAttention

CONFIG_KEY = "attention_alignment"
"""What a model folder's config.json calls the score that its attention was trained with."""
OWN = "scaled_dot"
"""The score of a model whose recipe names none."""


@dataclass(frozen=True)
class Alignment:
    """One score of a query q and a key k.

    A learned matrix W (and bias b) stands on the `side` of the key, q . (W k + b), or of the query, k . (W q + b);
    where there is none, `form` says how the two are multiplied. `activation` is applied to the score.
    """

    form: Literal["dot", "scaled", "cosine"] = "dot"
    side: Literal["", "key", "query"] = ""
    bias: bool = False
    activation: Literal["", "relu", "sigmoid", "tanh"] = ""


ALIGNMENTS = {
    "dot": Alignment(),
    "scaled_dot": Alignment("scaled"),
    "cosine": Alignment("cosine"),
    "general_qwk": Alignment(side="key"),
    "general_kwq": Alignment(side="query"),
    "biased_general_qwk": Alignment(side="key", bias=True),
    "biased_general_kwq": Alignment(side="query", bias=True),
    "relu_qwk": Alignment(side="key", bias=True, activation="relu"),
    "relu_kwq": Alignment(side="query", bias=True, activation="relu"),
    "sigmoid_qwk": Alignment(side="key", bias=True, activation="sigmoid"),
    "sigmoid_kwq": Alignment(side="query", bias=True, activation="sigmoid"),
    "tanh_qwk": Alignment(side="key", bias=True, activation="tanh"),
    "tanh_kwq": Alignment(side="query", bias=True, activation="tanh"),
}
"""By the names that analyser `alignment_scores` gives them. A cosine has no temperature: it is at most 1."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda scores: scores,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    # Written as a softcap of 1, as which a recording knows it, so that it keeps query and key.
    "tanh": lambda scores: torch.tanh(scores) * 1.0,
}


class Score(nn.Module):
    """Scores (..., query_token, key_token) of queries (..., query_token, channel) and keys (..., key_token, channel).

    Learned scores begin as the scaled dot product: W = I / sqrt(channel), b = 0. So they draw no random numbers, and
    models of one seed differ by their score alone.
    """

    def __init__(self, alignment: str, channels: int) -> None:
        super().__init__()
        self.alignment = ALIGNMENTS[alignment]
        self.channels = channels
        if self.alignment.side:
            self.weight = nn.Parameter(torch.eye(channels) * channels**-0.5)
        if self.alignment.bias:
            self.bias = nn.Parameter(torch.zeros(channels))

    def transform(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors whose products the scores are, before scale and activation."""
        if self.alignment.form == "cosine":
            return nn.functional.normalize(query, dim=-1), nn.functional.normalize(key, dim=-1)
        if self.alignment.side == "key":
            return query, self._shifted(key)
        return (self._shifted(query), key) if self.alignment.side == "query" else (query, key)

    def fold(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Projections of query and key by head (see `families.weights`) with W and b in them, as they are recorded."""
        side = self.alignment.side
        if not side:
            return arrays
        weight = self.weight.detach().float().cpu().numpy()
        shift = self.bias.detach().float().cpu().numpy() if self.alignment.bias else np.zeros(self.channels, np.float32)
        folded = {side: weight @ arrays[side], f"{side}_bias": arrays[f"{side}_bias"] @ weight.T + shift}
        return {**arrays, **folded}

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = self.transform(query, key)
        scores = query @ key.transpose(-1, -2)
        if self.alignment.form == "scaled":
            scores = scores / self.channels**0.5
        return _ACTIVATIONS[self.alignment.activation](scores)

    def _shifted(self, vectors: Tensor) -> Tensor:
        return nn.functional.linear(vectors, self.weight, self.bias if self.alignment.bias else None)


class ScoredViltAttention(ViltSelfAttention):
    """ViLT's self-attention with another score."""

    score: Score

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        mixed, attention = _attend(self, hidden_states, hidden_states, attention_mask)
        return (mixed, attention) if output_attentions else (mixed,)


class ScoredLxmertAttention(LxmertAttention):
    """LXMERT's attention, to itself or across, with another score."""

    score: Score

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        mixed, attention = _attend(self, hidden_states, context, attention_mask)
        return (mixed, attention) if output_attentions else (mixed,)


def _attend(
    module: ScoredViltAttention | ScoredLxmertAttention, hidden: Tensor, context: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the module gives (sample, query_token, channel), and its attention by head."""
    size = module.attention_head_size
    query, key, value = (
        linear(states).unflatten(-1, (-1, size)).transpose(1, 2)
        for linear, states in ((module.query, hidden), (module.key, context), (module.value, context))
    )
    scores = module.score(query, key)
    if mask is not None:
        scores = scores + mask
    attention = nn.functional.softmax(scores, dim=-1)
    mixed = torch.matmul(module.dropout(attention), value)
    return mixed.transpose(1, 2).flatten(2), attention


_SCORED: dict[type, type[ScoredViltAttention] | type[ScoredLxmertAttention]] = {
    ViltSelfAttention: ScoredViltAttention,
    LxmertAttention: ScoredLxmertAttention,
}


def swap_scores(model: nn.Module, alignment: str) -> None:
    """Give every attention of a model this score; its other weights stay.

    Raises
    ------
    ValueError
        When there is no such score, or the model has no attention whose score can be another.
    """
    check_alignment(alignment)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in (Score, *_SCORED)
    ]
    if not places:
        raise ValueError(f"{type(model).__name__} has no attention whose score can be another")
    for parent, name, child in places:
        setattr(parent, name, _swapped(child, alignment))


def check_alignment(alignment: str) -> None:
    """Raise ValueError for a score that there is not."""
    if alignment not in list(ALIGNMENTS):
        raise ValueError(f"no attention is trained with score {alignment!r}; the scores are {', '.join(ALIGNMENTS)}")


def _swapped(child: nn.Module, alignment: str) -> nn.Module:
    if isinstance(child, Score):
        return Score(alignment, child.channels)
    assert isinstance(child, ViltSelfAttention | LxmertAttention)
    heads, size = child.num_attention_heads, child.attention_head_size
    config = PreTrainedConfig(hidden_size=heads * size, num_attention_heads=heads, **_PLAIN)
    with torch.device("meta"):
        scored = _SCORED[type(child)](config)
    # Its own linear layers, under their names.
    scored.query, scored.key, scored.value, scored.dropout = child.query, child.key, child.value, child.dropout
    scored.score = Score(alignment, size)
    return scored


_PLAIN = {"qkv_bias": True, "attention_probs_dropout_prob": 0.0}
