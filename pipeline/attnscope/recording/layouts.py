"""How own attention code lays out batch and heads, and the same as (batch, head, query_token, ...)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from attnscope.recording.provenance import Axes, regroup_lead

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_head")


@dataclass(frozen=True)
class Layout:
    """How leading axes `lead` become (batch, head): axis `head_axis` is moved last, the others merge into the batch.

    `head_axis` None: the leading axes together hold batch * `heads`, heads innermost.
    """

    lead: Axes
    head_axis: int | None
    heads: int

    @property
    def batch_head(self) -> Axes:
        return prod(self.lead) // self.heads, self.heads

    @property
    def order(self) -> tuple[int, ...] | None:
        """Permutation of (*lead, a, b) that puts the heads last among the leading axes; None when they are."""
        last = len(self.lead)
        if self.head_axis is None or self.head_axis == last - 1:
            return None
        others = [axis for axis in range(last) if axis != self.head_axis]
        return (*others, self.head_axis, last, last + 1)

    def canonical(self, tensor: Tensor) -> Tensor:
        """A tensor broadcastable to (*lead, a, b), as one broadcastable to (batch, head, a, b)."""
        lead = self.lead
        if self.order is not None:
            tensor = as_dimensions(tensor, len(self.order)).permute(self.order)
            lead = tuple(lead[axis] for axis in self.order[:-2])
        return as_dimensions(regroup_lead(tensor, lead, self.batch_head), 4)

    def route(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The output for the model, and the same as (batch, query_token, head, value_channel) on its way in the graph.

        Views where they exist, so that what the model goes on with has the same values, strides and storage, and
        depends on what is recorded. Where none exists, a copy stands in the graph between the two.
        """
        moved = output if self.order is None else output.permute(self.order)
        shown = moved.reshape(*self.batch_head, *output.shape[-2:]).transpose(1, 2)
        if not output.requires_grad:
            return output, shown
        back = shown.transpose(1, 2).view(moved.shape)
        if self.order is not None:
            back = back.permute(tuple(self.order.index(axis) for axis in range(len(self.order))))
        if back.stride() != output.stride():
            back = torch.empty_like(output).copy_(back)
        return back, shown


def layout_of(lead: Axes, module: nn.Module | None) -> Layout:
    """The layout of attention with leading axes `lead` in a module, which may tell its number of heads."""
    heads = head_count(module)
    if len(lead) >= 2:
        axis = 1 if len(lead) > 2 and lead[-1] != heads and lead[1] == heads else len(lead) - 1
        return Layout(lead, axis, lead[axis])
    if len(lead) == 1 and heads and lead[0] % heads == 0:
        return Layout(lead, None, heads)
    return Layout(lead, None, 1)


def head_count(module: nn.Module | None) -> int | None:
    for name in HEAD_COUNTS:
        count = getattr(module, name, None)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            return count
    return None


def as_dimensions(tensor: Tensor, count: int) -> Tensor:
    """The tensor with leading axes of length one until it has `count`."""
    return tensor.reshape((1,) * (count - tensor.dim()) + tuple(tensor.shape))


def four_axes(tensor: Tensor, module: nn.Module | None) -> Tensor:
    """Probabilities of unknown origin as (batch, head, query_token, key_token), as far as their shape tells."""
    if tensor.dim() in (2, 4):
        tensor = as_dimensions(tensor, 4)
    else:
        tensor = layout_of(tuple(tensor.shape[:-2]), module).canonical(tensor)
    heads = head_count(module)
    # Longformer and its kin keep (batch, query_token, head, key_token).
    return tensor.transpose(1, 2) if tensor.shape[1] != heads == tensor.shape[2] else tensor
