"""One recorded attention call, and the attention that follows from it in closed form.

    attention[i, j] = exp(score[i, j] - log_sum_exp[i])
    score = softcap * tanh(scale * query . key / softcap) + bias + mask

Queries and keys are what the kernel received, so nothing here depends on which kernel ran. Everything is computed in
float32, without a graph, and block by block where the result is smaller than the attention itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

Index: TypeAlias = "slice | int | Sequence[int] | Tensor"

ALL = slice(None)

# Additive masks hold finfo.min, -inf, -1e9 or -1e4, by family. exp(-9e3) is zero in every floating type, so that
# reading such an entry as "masked" changes nothing but rows that are masked as a whole.
MASKED_BELOW = -9e3

# By how much a row of attention that a kernel's log-sum-exp has normalised may miss the sum of one.
_NORMALISED = 4e-6

# Axes that a tensor of a call has when its first are the samples; a mask or sinks of fewer belong to all of them.
_AXES_WITH_SAMPLES = {
    **dict.fromkeys(("query", "key", "value", "output", "probabilities", "mask", "bias", "sinks"), 4),
    **{"kernel_log_sum_exp": 3, "rows_computed": 2},
}

# Elements of the causal rule that is kept for the next call of as many tokens.
_RULE_KEPT = 2**24

QUIET: ContextVar[bool] = ContextVar("attnscope_quiet", default=False)
"""Whether the operations that run now are ours, so that no tap may record them and no audit count them."""


class unseen:
    """Run operations that no recording sees."""

    def __enter__(self) -> None:
        self._token = QUIET.set(True)

    def __exit__(self, *_: object) -> None:
        QUIET.reset(self._token)


class quietly(unseen):
    """Run operations that no recording sees, without a graph."""

    def __enter__(self) -> None:
        super().__enter__()
        self._graph = torch.is_grad_enabled()
        if self._graph:
            torch._C._set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        if self._graph:
            torch._C._set_grad_enabled(True)
        super().__exit__()


@dataclass(eq=False)
class AttentionCall:
    """What one attention kernel received and returned.

    Tensors are the model's own, not copies: `query` (batch, head, query_token, channel), `key` (batch, kv_head,
    key_token, channel) and `value` (batch, kv_head, key_token, value_channel) as the kernel got them (after rotary
    embedding and normalisation, not repeated under grouped heads); `output` (batch, query_token, head, value_channel)
    is in the autograd graph of the model where there is one, for dL/d(output).

    `mask` is broadcastable to (batch, head, query_token, key_token): True where a query may attend, or additive.
    `causal` and `window` are rules which the kernel applied on top; query i stands at key position i + `causal_offset`
    (0: aligned top left, as in sdpa; key_token - query_token: bottom right, as in flash attention).
    `sinks` are one more score in each softmax, which no value belongs to: (head,), or (batch, head, query_token, 1).
    `rows_computed` (batch, query_token) is False where the kernel left a padded query out; None: it left none out.
    `kernel_log_sum_exp` (batch, head, query_token) is what the kernel gave as such, of the few that give one.

    `probabilities` (batch, head, query_token, key_token) is kept only where no recipe reproduces the attention; `query`
    and `key` are then None where they are not known either, and so are `value` and `output` where nothing consumed the
    probabilities.
    """

    module: str
    number: int
    index: int
    kernel: str
    tier: str
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    output: Tensor | None
    mask: Tensor | None = None
    causal: bool = False
    window: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    probabilities: Tensor | None = None
    causal_offset: int = 0
    rows_computed: Tensor | None = None
    kernel_log_sum_exp: Tensor | None = None
    _versions: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self._versions = self._current_versions()

    def __repr__(self) -> str:
        shape = tuple(self.shape) if self.query is not None or self.probabilities is not None else None
        return f"AttentionCall({self.module!r}, number={self.number}, kernel={self.kernel!r}, shape={shape})"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Size of the attention: (batch, head, query_token, key_token)."""
        if self.probabilities is not None:
            return _four(self.probabilities.shape)
        query, key = self._query_key()
        batch = max(query.shape[0], key.shape[0])
        return batch, query.shape[1], query.shape[2], key.shape[2]

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return (self._query_key()[0] if self.probabilities is None else self.probabilities).device

    def scores(self, rows: Index = ALL, heads: Index = ALL) -> Tensor:
        """What the softmax saw, float32 (batch, head, rows, key_token), dimensionless; -inf where masked.

        After scale, softcap, bias and mask. Raises ValueError where only the probabilities are known.
        """
        if self.probabilities is not None:
            raise ValueError(f"{self!r} has no scores: its attention code leaves only probabilities, see attention()")
        with quietly():
            return self._scores(_selection(rows), _selection(heads))

    def log_sum_exp(self) -> Tensor:
        """Logarithm of each row's normaliser, the sink included: float32 (batch, head, query_token), nats.

        -inf for a row without a valid key and without a sink.
        """
        if self.probabilities is not None:
            raise ValueError(f"{self!r} has no log_sum_exp: its attention code leaves only probabilities")
        given = self.kernel_log_sum_exp
        with quietly():
            if given is not None and given.shape == self.shape[:3] and self.sinks is None:
                empty = self._empty_rows(ALL, ALL)
                # Torch's CPU kernel gives zero for a row without a valid key.
                return given.float() if empty is None else given.float().masked_fill(empty, float("-inf"))
            blocks = [self._log_normaliser(self._scores(rows, ALL), rows) for rows in self._row_blocks()]
            return torch.cat(blocks, dim=2).squeeze(3)

    def attention(self, rows: Index = ALL, heads: Index = ALL) -> Tensor:
        """Attention, float32 (batch, head, rows, key_token), in [0, 1]; zeros in a row without a valid key.

        Rows sum to one, or to less where there is a sink. For a float32 model this equals the softmax that the model
        would compute eagerly to 2e-6. For a bfloat16 or float16 model it is the softmax of the exact products of the
        half-precision queries and keys; eager code rounds the products first, so that its own weights differ by about
        eps times the largest score (measured: up to 7e-3 and 7e-4).
        """
        rows, heads = _selection(rows), _selection(heads)
        with quietly():
            if self.probabilities is not None:
                self._check_unchanged()
                return self.probabilities[:, heads][:, :, rows].float()
            scores = self._scores(rows, heads)
            if self.sinks is not None:
                sinks = self._sink_scores(self.sinks, rows, heads).expand(*scores.shape[:-1], 1)
                return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
            attention = torch.softmax(scores, dim=-1)
            empty = self._empty_rows(rows, heads)
            return attention if empty is None else attention.masked_fill_(empty[..., None], 0.0)

    def attention_by_kernel(self, heads: Index = ALL) -> Tensor | None:
        """Attention of all rows, as `attention` gives it, by the log-sum-exp of the kernel; None where that won't do.

        It takes fewer passes through memory. Of the softmax, a row is the same times its sum; where a sum is not one to
        4e-6, as scores of some dozens have it, or those that the log-sum-exp doesn't belong to, there is no result.
        """
        given, query = self.kernel_log_sum_exp, self.query
        if given is None or query is None or self.sinks is not None or self.probabilities is not None:
            return None
        # On a GPU one softmax takes less time than two passes.
        if query.dtype != torch.float32 or query.device.type != "cpu" or given.shape != self.shape[:3]:
            return None
        heads = _selection(heads)
        with quietly():
            attention = self._normalised_scores(given, heads).exp_()
            empty = self._empty_rows(ALL, heads)
            sums = attention.sum(dim=-1)
            if empty is not None:
                attention.masked_fill_(empty[..., None], 0.0)
                sums.masked_fill_(empty, 1.0)
            if not sums.numel():
                return attention
            low, high = sums.aminmax()
            # Not so where a number isn't finite, either.
            return attention if max(1 - float(low), float(high) - 1) <= _NORMALISED else None

    def of_samples(self, samples: slice) -> AttentionCall:
        """The same call for some samples of its batch; views, nothing is copied."""
        batch = self.shape[0]
        if samples.indices(batch) == (0, batch, 1):
            return self
        self._check_unchanged()
        part = copy.copy(self)
        for name, tensor in vars(self).items():
            # A mask of fewer axes is that of every sample, and so is one of a single sample.
            if isinstance(tensor, Tensor) and len(tensor) == batch > 1 and tensor.dim() >= _AXES_WITH_SAMPLES[name]:
                setattr(part, name, tensor[samples])
        part.__post_init__()
        return part

    def row_valid(self) -> Tensor:
        """Which query rows have a valid key and were computed: bool, broadcastable to (batch, head, query_token)."""
        with quietly():
            if self.probabilities is not None:
                return (self.probabilities > 0).any(dim=-1)
            if self._has_rules:
                blocks = [self._any_allowed(rows) for rows in self._row_blocks()]
                valid = blocks[0] if blocks[0].shape[2] == 1 else torch.cat(blocks, dim=2)
            else:
                valid = _all_valid(self.device)
            return valid if self.rows_computed is None else valid & self.rows_computed[:, None]

    def attention_gradient(self, output_gradient: Tensor, rows: Index = ALL, heads: Index = ALL) -> Tensor:
        """Gradient with respect to the attention, float32 (batch, head, rows, key_token).

        output = attention value, so dL/d(attention) = dL/d(output) value^T, exactly; no attention matrix is needed
        in the graph.

        Parameters
        ----------
        output_gradient
            dL/d(output), shaped as `output`: (batch, query_token, head, value_channel).
        """
        if self.value is None:
            raise ValueError(f"{self!r} has no attention gradient: no value was multiplied with its probabilities")
        rows, heads = _selection(rows), _selection(heads)
        with quietly(), _full_precision(output_gradient):
            gradient = output_gradient[:, rows][:, :, heads].transpose(1, 2).float()
            return _grouped_product(gradient, self.value, heads, output_gradient.shape[2])

    def output_error(self, rows: Index = ALL) -> float:
        """Largest absolute difference between attention times value and the recorded output, over the valid rows.

        Proof that the recipe is what the kernel did. Not meaningful where dropout ran, nor after the forward where
        the model changes its output in place: compare in `on_call` then.
        """
        if self.value is None or self.output is None:
            raise ValueError(f"{self!r} has no output to compare with")
        rows = _selection(rows)
        valid = self.row_valid().expand(*self.shape[:3])
        # All rows of a long text at once would take more room than the model itself.
        blocks = self._row_blocks() if rows is ALL else [rows]
        # As a tensor, of which the largest is NaN where one is.
        return float(torch.tensor([self._output_error(block, valid[:, :, block]) for block in blocks]).max())

    def _output_error(self, rows: Index, valid: Tensor) -> float:
        assert self.value is not None and self.output is not None
        attention = self.attention(rows)
        with quietly(), _full_precision(attention):
            groups = attention.shape[1] // self.value.shape[1]
            value = self.value.float().repeat_interleave(groups, dim=1)
            difference = (attention @ value).transpose(1, 2) - self.output[:, rows].float()
            difference = difference.abs().amax(dim=-1)[valid.transpose(1, 2).expand(difference.shape[:-1])]
            return float(difference.max()) if difference.numel() else 0.0

    # -- pieces of the recipe ------------------------------------------------------------------------------------------

    def _query_key(self) -> tuple[Tensor, Tensor]:
        if self.query is None or self.key is None:
            raise ValueError(f"{self!r} has neither query and key nor probabilities")
        return self.query, self.key

    def _tensors(self) -> list[Tensor]:
        kept = (self.query, self.key, self.value, self.mask, self.bias, self.sinks, self.probabilities)
        return [tensor for tensor in kept if tensor is not None and not tensor.is_inference()]

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in self._tensors())

    def _check_unchanged(self) -> None:
        if self._current_versions() != self._versions:
            raise RuntimeError(f"{self!r} was changed in place after its attention ran; read it with on_call instead")

    def _row_blocks(self) -> list[slice]:
        """Slices of query rows whose scores take about 16 MiB."""
        batch, head, queries, keys = self.shape
        size = max(1, 2**22 // max(1, batch * head * keys))
        return [slice(start, min(start + size, queries)) for start in range(0, queries, size)] or [slice(0, 0)]

    def _scores(self, rows: Index, heads: Index) -> Tensor:
        self._check_unchanged()
        query, key = self._query_key()
        with _full_precision(query):
            # Scaling the query costs a hundredth of scaling the scores.
            scaled = query[:, heads][:, :, rows].float() * self.scale
            scores = _grouped_product(scaled, key, heads, query.shape[1])
            if self.softcap is not None:
                scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
            return self._ruled(scores, rows, heads)

    def _normalised_scores(self, log_sum_exp: Tensor, heads: Index) -> Tensor:
        """Scores less their log-sum-exp (batch, head, query_token), the product and the difference in one pass."""
        query, key = self._query_key()
        normaliser = log_sum_exp[:, heads, :, None]
        if self.softcap is not None or query.shape[:2] != key.shape[:2]:
            return self._scores(ALL, heads).sub_(normaliser)
        self._check_unchanged()
        with _full_precision(query):
            query, key = query[:, heads], key[:, heads]
            scores = query.new_empty(*query.shape[:3], key.shape[2])
            # Sample by sample, as the views by head of more can't be taken for one batch without a copy.
            for out, *given in zip(scores, normaliser, query, key.mT, strict=True):
                torch.baddbmm(*given, beta=-1, alpha=self.scale, out=out)
            return self._ruled(scores, ALL, heads)

    def _ruled(self, scores: Tensor, rows: Index, heads: Index) -> Tensor:
        """The scores with bias and mask, -inf where a rule masks; in place where the shape stays."""
        for term in (self.bias, self.mask):
            scores = _add_term(scores, term, rows, heads)
        positions = self._position_rule(rows)
        return scores if positions is None else scores.masked_fill_(~positions, float("-inf"))

    def _position_rule(self, rows: Index) -> Tensor | None:
        """Which keys the causal rule and the window leave to a query, bool (rows, key_token); None: all."""
        if not self.causal and self.window is None:
            return None
        _, _, queries, keys = self.shape
        device = self._query_key()[0].device
        if rows is ALL and device.type == "cpu" and queries * keys <= _RULE_KEPT:
            # Asked for again by the next heads, and by the next layer.
            return _kept_rule(queries, keys, self.causal, self.causal_offset, self.window)
        return _rule(self._positions(rows), keys, self.causal, self.window)

    def _positions(self, rows: Index) -> Tensor:
        """At which key positions queries stand (rows,)."""
        return torch.arange(self.shape[2], device=self._query_key()[0].device)[rows] + self.causal_offset

    def _log_normaliser(self, scores: Tensor, rows: Index) -> Tensor:
        total = torch.logsumexp(scores, dim=-1, keepdim=True)
        return total if self.sinks is None else torch.logaddexp(total, self._sink_scores(self.sinks, rows, ALL))

    @staticmethod
    def _sink_scores(sinks: Tensor, rows: Index, heads: Index) -> Tensor:
        """The sinks, float32, broadcastable to (batch, head, rows, 1)."""
        return (sinks.view(1, -1, 1, 1)[:, heads] if sinks.dim() == 1 else _take(sinks, rows, heads)).float()

    def _empty_rows(self, rows: Index, heads: Index) -> Tensor | None:
        """Which rows have no valid key, bool, broadcastable to (batch, head, rows); None: no rule masks anything."""
        if not self._has_rules:
            return None
        empty = ~self._any_allowed(rows)
        return empty if empty.shape[1] == 1 else empty[:, heads]

    @property
    def _has_rules(self) -> bool:
        """Whether anything may keep a query from a key."""
        return self.mask is not None or self.bias is not None or self.causal or self.window is not None

    def _any_allowed(self, rows: Index) -> Tensor:
        """Which rows have a key that no rule masks: bool, broadcastable to (batch, head, rows)."""
        if self.mask is None and self.bias is None and (self.causal or self.window is not None):
            return _leaves_a_key(self._positions(rows), self.shape[3], self.causal, self.window)[None, None]
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._query_key()[0].device)
        positions = self._position_rule(rows)
        for rule in (_allowed(self.bias, rows), _allowed(self.mask, rows), positions):
            allowed = allowed if rule is None else allowed & rule
        return allowed.any(dim=-1)


def _rule(position: Tensor, keys: int, causal: bool, window: int | None) -> Tensor:
    """Which keys the causal rule and the window leave to queries at these positions (row,): bool (row, key_token)."""
    distance = position[:, None] - torch.arange(keys, device=position.device)[None, :]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= distance.abs() < window
    return allowed


@lru_cache(maxsize=16)
def _all_valid(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1, 1, 1, dtype=torch.bool, device=device)


@lru_cache(maxsize=1)
def _kept_rule(queries: int, keys: int, causal: bool, offset: int, window: int | None) -> Tensor:
    return _rule(torch.arange(queries, device="cpu") + offset, keys, causal, window)


def _leaves_a_key(position: Tensor, keys: int, causal: bool, window: int | None) -> Tensor:
    """Whether the two leave any key at all to queries at these positions (row,)."""
    last = position if causal else torch.full_like(position, keys - 1)
    first = torch.zeros_like(position)
    if window is not None:
        first, last = position - (window - 1), torch.minimum(last, position + (window - 1))
    return first.clamp_min(0) <= last.clamp_max(keys - 1)


def _four(shape: Sequence[int]) -> tuple[int, int, int, int]:
    batch, head, query_token, key_token = shape
    return batch, head, query_token, key_token


def _selection(index: Index) -> Index:
    """The same selection, keeping its axis."""
    return slice(index, index + 1 or None) if isinstance(index, int) else index


def _full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Keep an enclosing autocast from narrowing float32 products."""
    kind = tensor.device.type
    return torch.autocast(device_type=kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _grouped_product(left: Tensor, right: Tensor, heads: Index, head_count: int) -> Tensor:
    """left (batch, selected head, row, channel) times right (batch, kv_head, key_token, channel)^T, kv heads shared."""
    groups = head_count // right.shape[1]
    if groups == 1:
        # Models hand over views by head; torch would copy the transposed one, which takes longer.
        return left @ right[:, heads].float().contiguous().transpose(-1, -2)
    if isinstance(heads, slice) and heads == ALL:
        batch, _, row, channel = left.shape
        packed = left.reshape(batch, right.shape[1], groups * row, channel)
        return (packed @ right.float().transpose(-1, -2)).view(-1, head_count, row, right.shape[2])
    shared = torch.arange(head_count, device=right.device)[heads] // groups
    return left @ right[:, shared].float().transpose(-1, -2)


def _take(term: Tensor, rows: Index, heads: Index) -> Tensor:
    """Rows and heads of a term that is broadcastable to (batch, head, query_token, key_token)."""
    if term.dim() >= 3 and term.shape[-3] > 1:
        term = term[..., heads, :, :]
    if term.dim() >= 2 and term.shape[-2] > 1:
        term = term[..., rows, :]
    return term


def _add_term(scores: Tensor, term: Tensor | None, rows: Index, heads: Index) -> Tensor:
    if term is None:
        return scores
    term = _take(term, rows, heads)
    if torch.broadcast_shapes(scores.shape, term.shape) != scores.shape:
        scores = scores.expand(torch.broadcast_shapes(scores.shape, term.shape)).clone()
    if term.dtype == torch.bool:
        return scores.masked_fill_(~term, float("-inf"))
    return scores.add_(term.float()).masked_fill_(term <= MASKED_BELOW, float("-inf"))


def _allowed(term: Tensor | None, rows: Index) -> Tensor | None:
    if term is None:
        return None
    term = _take(term, rows, ALL)
    return term if term.dtype == torch.bool else term > MASKED_BELOW
