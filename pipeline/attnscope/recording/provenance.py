"""Where attention probabilities came from: what own attention code did between query, key and softmax.

A `Scores` says that a tensor equals scale * query key^T, perhaps squashed, plus terms, with some entries masked.
Each rule below follows one operation and gives the new `Scores`, or None where the operation leads out of this form.
Leading axes (all but the last two) are only regrouped when somebody asks for a layout, so that nothing large is copied
on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from attnscope.recording.calls import MASKED_BELOW

Axes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Term:
    """A tensor broadcastable to (*lead, query_token, key_token)."""

    tensor: Tensor
    lead: Axes
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Scores:
    """scale * query key^T (softcap * tanh(. / softcap) where set) + terms, masked where a `keeps` is False.

    `query` (*product_lead, query_token, channel) and `key` (*product_lead or broadcastable, key_token, channel) as they
    entered the product; `lead` is the leading shape of the tensor described. `split` is its whole shape while query and
    key tokens are spread over several axes each (rows and columns of a grid). `floor` is what masked
    entries were set to.
    """

    query: Tensor
    key: Tensor
    product_lead: Axes
    lead: Axes
    scale: float = 1.0
    softcap: float | None = None
    squashed: bool = False
    terms: tuple[Term, ...] = ()
    keeps: tuple[Term, ...] = ()
    weighted: bool = False
    split: Axes | None = None
    floor: object = None

    @property
    def plain_size(self) -> Axes:
        return (*self.lead, self.query.shape[-2], self.key.shape[-2])

    @property
    def size(self) -> Axes:
        return self.plain_size if self.split is None else self.split


def product(query: Tensor, key: Tensor, shape: torch.Size, scale: float = 1.0) -> Scores:
    """Scores of query (..., query_token, channel) with key (..., key_token, channel)."""
    weighted = isinstance(query, nn.Parameter) or isinstance(key, nn.Parameter)
    lead = tuple(shape[:-2])
    return Scores(query, key, lead, lead, scale=scale, weighted=weighted)


# -- rules -------------------------------------------------------------------------------------------------------------


def times(scores: Scores, factor: float | Tensor) -> Scores | None:
    """Multiplication by a number, by a factor per head or row, or by a 0/1 mask over keys."""
    if isinstance(factor, Tensor):
        if factor.numel() == 1 and factor.device.type == "cpu":
            return times(scores, float(factor))
        return _times_tensor(scores, factor)
    terms = tuple(replace(term, factor=term.factor * factor) for term in scores.terms)
    if scores.squashed:
        return replace(scores, scale=scores.scale * factor, softcap=factor, squashed=False)
    softcap = None if scores.softcap is None else scores.softcap * factor
    return replace(scores, scale=scores.scale * factor, softcap=softcap, terms=terms)


def _times_tensor(scores: Scores, factor: Tensor) -> Scores | None:
    if scores.softcap is not None or scores.squashed or scores.split is not None:
        return None
    if factor.dim() and factor.shape[-1] != 1:
        # Only a 0/1 mask makes sense here (openai-gpt: w * b - 1e4 * (1 - b)); anything else fails the later proof.
        return replace(scores, keeps=(*scores.keeps, Term(factor != 0, scores.lead)))
    scores = _at(scores, scores.lead)
    terms = tuple(Term(term.tensor * factor * term.factor, scores.lead) for term in scores.terms)
    return replace(scores, query=scores.query * factor, terms=terms)


def plus(scores: Scores, term: float | Tensor, factor: float = 1.0) -> Scores | None:
    """Addition of a bias or mask; what is constant over keys leaves the softmax as it is."""
    if scores.squashed:
        return None
    if not isinstance(term, Tensor) or term.dim() == 0:
        return scores
    if term.dim() > len(scores.size):
        return None
    if scores.split is None and term.shape[-1] == 1 < scores.size[-1]:
        return scores
    return replace(scores, terms=(*scores.terms, Term(_joined(scores, term), scores.lead, factor)))


def _joined(scores: Scores, term: Tensor) -> Tensor:
    """A term over several query and key axes, with one axis each."""
    return term if scores.split is None else term.expand(scores.split).reshape(scores.plain_size)


def squash(scores: Scores) -> Scores | None:
    """Hyperbolic tangent, the first half of a softcap."""
    untouched = not scores.terms and not scores.keeps and scores.softcap is None
    return replace(scores, squashed=True) if untouched and not scores.squashed else None


def keep(scores: Scores, where: Tensor, floor: object) -> Scores | None:
    """Masking: the entries where the boolean tensor is False become `floor`, too small to matter.

    Two different floors aren't followed: a row with nothing above them attends to the higher one (Reformer).
    """
    if scores.squashed or where.dtype != torch.bool or where.dim() > len(scores.size):
        return None
    if scores.keeps and not _is_same(scores.floor, floor):
        return None
    return replace(scores, keeps=(*scores.keeps, Term(_joined(scores, where), scores.lead)), floor=floor)


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return one == other


def regroup(scores: Scores, shape: torch.Size) -> Scores | None:
    """Reshape that regroups leading axes, or spreads query and key tokens over several axes each."""
    if tuple(shape[-2:]) == scores.plain_size[-2:]:
        return replace(scores, lead=tuple(shape[:-2]), split=None)
    *lead, queries, keys = scores.plain_size
    for middle in range(1, len(shape)):
        for start in range(middle):
            sizes = prod(shape[:start]), prod(shape[start:middle]), prod(shape[middle:])
            if sizes == (prod(lead), queries, keys):
                return replace(scores, split=tuple(shape))
    return None


def permute(scores: Scores, order: Axes) -> Scores | None:
    """Permutation of leading axes, with or without swapping the roles of query and key."""
    last = len(order) - 2
    if scores.split is not None or set(order[last:]) != {last, last + 1}:
        return None
    scores = _at(scores, scores.lead)
    swapped = order[last] == last + 1
    inner = (*order[:last], last, last + 1)
    lead = tuple(scores.lead[axis] for axis in order[:last])
    query, key = (_expanded(tensor, scores.lead).permute(inner) for tensor in (scores.query, scores.key))

    def moved(term: Term) -> Term:
        padded = term.tensor.view((1,) * (len(order) - term.tensor.dim()) + tuple(term.tensor.shape))
        return Term(padded.permute(order), lead, term.factor)

    return replace(
        scores,
        query=key if swapped else query,
        key=query if swapped else key,
        product_lead=lead,
        lead=lead,
        terms=tuple(map(moved, scores.terms)),
        keeps=tuple(map(moved, scores.keeps)),
    )


# -- layouts -----------------------------------------------------------------------------------------------------------


def regroup_lead(tensor: Tensor, old: Axes, new: Axes) -> Tensor:
    """A tensor broadcastable to (*old, a, b), with its leading axes regrouped to `new` and kept broadcast if it can be.

    Examples
    --------
    >>> regroup_lead(torch.ones(6, 2, 3), (6,), (2, 3)).shape
    torch.Size([2, 3, 2, 3])
    >>> regroup_lead(torch.ones(1, 1, 1, 3), (2, 3), (6,)).shape
    torch.Size([1, 1, 3])
    """
    tail = (1, 1, *tensor.shape)[-2:]
    if tensor.dim() <= 2 or old == new:
        return tensor
    tensor = tensor.reshape((1,) * (len(old) + 2 - tensor.dim()) + tuple(tensor.shape))
    have = tuple(tensor.shape[:-2])
    expanded: list[int] = []
    shape: list[int] = []
    for first, second in _groups(old, new):
        sizes = have[first]
        if all(size == 1 for size in sizes):
            expanded += sizes
            shape += [1] * len(new[second])
        elif old[first] == new[second]:
            expanded += sizes
            shape += sizes
        else:
            expanded += old[first]
            shape += new[second]
    return tensor.expand(*expanded, *tail).reshape(*shape, *tail)


def _groups(old: Axes, new: Axes) -> list[tuple[slice, slice]]:
    """Smallest runs of axes of `old` and `new` with equal products, in order."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while prod(old[start_i:i]) != prod(new[start_j:j]):
            if (prod(old[start_i:i]) < prod(new[start_j:j]) and i < len(old)) or j == len(new):
                i += 1
            else:
                j += 1
        groups.append((slice(start_i, i), slice(start_j, j)))
    return groups


def _expanded(tensor: Tensor, lead: Axes) -> Tensor:
    return tensor.expand(*lead, *tensor.shape[-2:])


def _at(scores: Scores, lead: Axes) -> Scores:
    """The same scores with query, key and every term laid out for leading axes `lead`."""
    query, key = (regroup_lead(tensor, scores.product_lead, lead) for tensor in (scores.query, scores.key))

    def moved(term: Term) -> Term:
        return Term(regroup_lead(term.tensor, term.lead, lead), lead, term.factor)

    return replace(
        scores,
        query=query,
        key=key,
        product_lead=lead,
        lead=lead,
        terms=tuple(map(moved, scores.terms)),
        keeps=tuple(map(moved, scores.keeps)),
    )


def recipe(scores: Scores, lead: Axes) -> dict[str, object]:
    """Fields of an AttentionCall at leading axes (batch, head)."""
    scores = _at(scores, lead)
    mask, bias = None, None
    for term in scores.keeps:
        mask = term.tensor if mask is None else mask & term.tensor
    # finfo.min times a factor above one overflows to -inf, which masks as well.
    values = [term.tensor if term.factor == 1.0 else term.tensor * term.factor for term in scores.terms]
    if mask is None and values:
        # Where nothing else masks, the last term is the layer's mask and what came before it a bias.
        mask = values.pop()
    for value in values:
        bias = value if bias is None else bias + value
    query, key = (_four(tensor) for tensor in (scores.query, scores.key))
    return {
        "query": query.expand(lead[0], lead[1], *query.shape[2:]),
        "key": key.expand(lead[0], *key.shape[1:]),
        "mask": mask,
        "bias": bias,
        "scale": scores.scale,
        "softcap": scores.softcap,
    }


def _four(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape))


def is_masking(value: object) -> bool:
    """Whether an entry that is set to this value gets no attention; a tensor is believed, the proof comes later."""
    return isinstance(value, Tensor) or (isinstance(value, int | float) and value <= MASKED_BELOW)
