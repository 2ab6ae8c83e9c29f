"""The function tap: attention that a model writes out itself, or asks of torch directly.

A torch function mode follows tensors from the product of query and key through scaling, bias and mask into a softmax,
and from there into the product with the value. Where that trail is whole and reproduces the probabilities, the call is
recorded with its recipe; where it is not, with the probabilities themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnscope.recording import provenance
from attnscope.recording.calls import AttentionCall, quietly
from attnscope.recording.provenance import Axes, Scores, regroup_lead
from attnscope.recording.state import Frame, Recording, observing

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(eq=False)
class Probabilities:
    """A softmax over keys on its way to the value: (*lead, query_token, key_token), or swapped where `flipped`.

    `scores` is None where the trail is broken; `altered` where the probabilities were multiplied or cut, `dropped`
    where dropout ran on them.
    """

    tensor: Tensor
    scores: Scores | None
    frame: Frame | None
    flipped: bool = False
    altered: bool = False
    dropped: bool = False


Tag = Scores | Probabilities


class _Tags:
    """What is known about tensors, for as long as they live."""

    def __init__(self) -> None:
        self._tags: dict[int, tuple[weakref.ref[Tensor], Tag]] = {}

    def get(self, tensor: Any) -> Tag | None:
        held = self._tags.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else None

    def set(self, tensor: Tensor, tag: Tag | None) -> None:
        key = id(tensor)
        if tag is None:
            self._tags.pop(key, None)
            return

        def forget(reference: weakref.ref[Tensor]) -> None:
            if key in self._tags and self._tags[key][0] is reference:
                del self._tags[key]

        self._tags[key] = (weakref.ref(tensor, forget), tag)

    def clear(self) -> None:
        self._tags.clear()


class FunctionTap(TorchFunctionMode):
    """Records attention of one recording that does not go through the transformers interface."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.tags = _Tags()

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is None or self.recording.is_inside or not observing():
            return func(*args, **kwargs)
        return handler(self, func, args, kwargs)

    def frame(self) -> Frame | None:
        """The innermost module of the model that is more than one torch function."""
        for frame in reversed(self.recording.frames):
            if not isinstance(frame.module, nn.Softmax | nn.Dropout):
                return frame
        return None


def flush(recording: Recording, frame: Frame) -> None:
    """Record the softmaxes of an attention module which no product consumed, as probabilities alone."""
    for pending in frame.unconsumed:
        assert isinstance(pending, Probabilities)
        if frame.name is None:
            continue
        with quietly():
            shown = _four(pending.tensor)

        def make(name: str, number: int, index: int, shown: Tensor = shown) -> AttentionCall:
            nothing = (None, None, None, None)
            return AttentionCall(name, number, index, "own code", "function", *nothing, probabilities=shown.detach())

        recording.add(frame.name, make)


# -- what the tap does at each function --------------------------------------------------------------------------------


def _multiply(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """matmul, bmm: finishes a call where an operand holds probabilities, else begins scores."""
    left, right = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return func(*args, **kwargs)
    for probabilities, value, second in ((left, right, False), (right, left, True)):
        tag = tap.tags.get(probabilities)
        if isinstance(tag, Probabilities) and tag.flipped == second and _is_mixing(tag, left, right):
            return _finish_product(tap, tag, probabilities, value, second, lambda: func(*args, **kwargs))
    result = func(*args, **kwargs)
    if left.dim() >= 2 and right.dim() >= 2 and isinstance(result, Tensor):
        tap.tags.set(result, provenance.product(left, right.transpose(-1, -2), result.shape))
    return result


def _is_mixing(tag: Probabilities, left: Tensor, right: Tensor) -> bool:
    """Whether the product mixes values, not features: its other side is not a plain matrix of weights."""
    if left.dim() > 2 and right.dim() > 2:
        return True
    return tag.scores is not None and not tag.scores.weighted


def _multiply_add(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """baddbmm, addmm: scores = beta * input + alpha * (query @ key^T)."""
    result = func(*args, **kwargs)
    names = ("input", "batch1", "batch2")
    given = dict(zip(names, args, strict=False)) | kwargs
    if not all(isinstance(given.get(name), Tensor) for name in names):
        return result
    query, key, beta = given["batch1"], given["batch2"], float(given.get("beta", 1))
    scores: Scores | None
    scores = provenance.product(query, key.transpose(-1, -2), result.shape, scale=float(given.get("alpha", 1)))
    if beta:
        scores = provenance.plus(scores, given["input"], beta)
    tap.tags.set(result, scores)
    return result


def _einsum(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2:
        return func(*args, **kwargs)
    labels = _labels(args[0], operands)
    for probabilities, value, order in ((operands[0], operands[1], (0, 1)), (operands[1], operands[0], (1, 0))):
        tag = tap.tags.get(probabilities)
        if isinstance(tag, Probabilities) and labels is not None:
            sides = labels[order[0]], labels[order[1]], labels[2]
            if (axes := _mixing_axes(*sides, tag)) is not None:
                return _finish_einsum(tap, tag, (probabilities, value), sides, axes, lambda: func(*args, **kwargs))
    result = func(*args, **kwargs)
    if labels is not None:
        tap.tags.set(result, _einsum_scores(operands[0], operands[1], *labels, shape=result.shape))
    return result


def _softmax(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    result = func(*args, **kwargs)
    scores = args[0] if args else kwargs.get("input")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(scores, Tensor) or not isinstance(result, Tensor) or not result.is_floating_point():
        return result
    tag = tap.tags.get(scores)
    over_keys = dim in (-1, scores.dim() - 1)
    trail = tag if isinstance(tag, Scores) and over_keys and not tag.squashed else None
    frame = tap.frame()
    pending = Probabilities(result, trail, frame, flipped=dim in (-2, scores.dim() - 2))
    tap.tags.set(result, pending)
    if frame is not None and frame.name is not None and "Attention" in type(frame.module).__name__:
        frame.unconsumed.append(pending)
    return result


def _fused(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """torch.nn.functional.scaled_dot_product_attention, called by the model's own code."""
    with tap.recording.inside():
        output = func(*args, **kwargs)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    frame = tap.frame()
    name = "" if frame is None else frame.name
    if name is None:
        return output
    lead = tuple(output.shape[:-2])
    layout = _layout(lead, frame)
    scale = given.get("scale")
    mask = given.get("attn_mask")
    with quietly():
        fields = {
            "query": _canonical(query, lead, layout),
            "key": _canonical(key, lead, layout),
            "value": _canonical(value, lead, layout),
            "mask": None if mask is None else _canonical(mask, lead, layout),
            "causal": bool(given.get("is_causal", False)),
            "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
        }
    routed, shown = _route(output, lead, layout)
    _record(tap, name, _kernel(frame, "sdpa"), shown, fields)
    return routed


def _follow(rule: Callable[[Scores, Args, Kwargs, Tensor], Scores | None], alters: str = "") -> Callable[..., Any]:
    """A handler that carries a tag from the first tensor operand to the result, through `rule` for scores."""

    def handler(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
        tags = [tap.tags.get(arg) for arg in args]
        result = func(*args, **kwargs)
        position = next((place for place, tag in enumerate(tags) if tag is not None), None)
        if position is None or not isinstance(result, Tensor):
            return result
        tag = tags[position]
        if isinstance(tag, Scores):
            others = args[:position] + args[position + 1 :]
            with quietly():
                tap.tags.set(result, rule(tag, others, kwargs | {"_position": position}, result))
        elif isinstance(tag, Probabilities):
            tap.tags.set(result, _carried(tag, args[position], args, kwargs, result, alters))
        return result

    return handler


def _carried(tag: Probabilities, source: Tensor, args: Args, kwargs: Kwargs, result: Tensor, alters: str) -> Tag:
    if alters == "values":
        return replace(tag, altered=True)
    if alters == "masked" and not (len(args) > 2 and args[2] == 0):
        return replace(tag, altered=True)
    if alters == "dropout":
        training = bool(kwargs.get("training", args[2] if len(args) > 2 else True))
        chance = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
        return replace(tag, dropped=tag.dropped or (training and chance > 0))
    if alters == "axes":
        return _permuted_probabilities(tag, source, result)
    if alters == "part" and result.shape != source.shape:
        return replace(tag, altered=True)
    return replace(tag)


def _permuted_probabilities(tag: Probabilities, source: Tensor, result: Tensor) -> Probabilities:
    swapped = result.stride()[-2:] == source.stride()[-2:][::-1] and result.shape[-2:] == source.shape[-2:][::-1]
    same_lead = result.shape[:-2] == source.shape[:-2] and result.stride()[:-2] == source.stride()[:-2]
    return replace(tag, flipped=tag.flipped ^ swapped, altered=tag.altered or not same_lead)


# -- rules for scores, by function -------------------------------------------------------------------------------------


def _number_or_tensor(others: Args) -> Any:
    return others[0] if others and isinstance(others[0], int | float | Tensor) else None


def _rule_times(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    factor = _number_or_tensor(others)
    return None if factor is None or not _same_size(scores, result) else provenance.times(scores, factor)


def _rule_divide(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    divisor = _number_or_tensor(others)
    if divisor is None or kwargs["_position"] != 0 or kwargs.get("rounding_mode") or not _same_size(scores, result):
        return None
    return provenance.times(scores, 1.0 / divisor)


def _rule_plus(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    term = _number_or_tensor(others)
    if term is None or not _same_size(scores, result):
        return None
    return provenance.plus(scores, term, float(kwargs.get("alpha", 1)))


def _rule_minus(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    term = _number_or_tensor(others)
    if term is None or kwargs["_position"] != 0 or not _same_size(scores, result):
        return None
    return provenance.plus(scores, term, -float(kwargs.get("alpha", 1)))


def _rule_masked_fill(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    mask, value = kwargs.get("mask", others[0] if others else None), kwargs.get("value", others[-1] if others else None)
    if not isinstance(mask, Tensor) or not provenance.is_masking(value) or not _same_size(scores, result):
        return None
    return provenance.keep(scores, ~mask.bool())


def _rule_where(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    """where(condition, scores, small) keeps where the condition holds; where(condition, small, scores) elsewhere."""
    if len(others) != 2 or kwargs["_position"] == 0 or not _same_size(scores, result):
        return None
    condition, value = others
    if not isinstance(condition, Tensor) or not provenance.is_masking(value):
        return None
    return provenance.keep(scores, condition.bool() if kwargs["_position"] == 1 else ~condition.bool())


def _rule_tanh(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    return provenance.squash(scores)


def _rule_regroup(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    return provenance.regroup(scores, result.shape)


def _rule_transpose(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    first, second = (kwargs.get(name, others[place]) for place, name in enumerate(("dim0", "dim1")))
    order = list(range(result.dim()))
    order[first], order[second] = order[second], order[first]
    return provenance.permute(scores, tuple(order))


def _rule_permute(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    order = kwargs.get("dims", others[0] if others and isinstance(others[0], Sequence) else others)
    return provenance.permute(scores, tuple(axis % result.dim() for axis in order))


def _rule_swap(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    last = result.dim() - 2
    return provenance.permute(scores, (*range(last), last + 1, last))


def _rule_same(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    return scores if _same_size(scores, result) and result.is_floating_point() else None


def _same_size(scores: Scores, result: Tensor) -> bool:
    return tuple(result.shape) == scores.size


# -- finishing a call --------------------------------------------------------------------------------------------------


def _finish_product(
    tap: FunctionTap, tag: Probabilities, probabilities: Tensor, value: Tensor, second: bool, run: Callable[[], Tensor]
) -> Any:
    """Record probabilities @ value, or value^T @ probabilities^T where the probabilities came `second`."""
    with tap.recording.inside():
        result = run()
    shown = probabilities.mT if tag.flipped else probabilities
    value = value.mT if second else value
    lead = tuple(result.shape[:-2])
    back = (lambda out: out.mT) if second else None
    return _finish(tap, tag, shown, value, result, lead, back)


def _finish(
    tap: FunctionTap,
    tag: Probabilities,
    probabilities: Tensor,
    value: Tensor,
    result: Tensor,
    lead: Axes,
    flip: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    _consume(tag)
    name = "" if tag.frame is None else tag.frame.name
    if name is None:
        return result
    layout = _layout(lead, tag.frame)
    routed, shown = _route(result if flip is None else flip(result), lead, layout)
    with quietly():
        fields: Kwargs = {"value": _canonical(value, lead, layout)}
        fields |= _explained(tag, _canonical(probabilities, lead, layout), lead, layout)
    _record(tap, name, _kernel(tag.frame, "own code"), shown, fields)
    return routed if flip is None else flip(routed)


def _consume(tag: Probabilities) -> None:
    """Forget the softmax that `tag` was carried from in its module's list of unconsumed ones."""
    if tag.frame is not None:
        waiting = tag.frame.unconsumed
        waiting[:] = [each for each in waiting if isinstance(each, Probabilities) and each.tensor is not tag.tensor]


def _record(tap: FunctionTap, name: str, kernel: str, output: Tensor, fields: Kwargs) -> None:
    tier = "multihead" if kernel == "MultiheadAttention" else "function"
    query, key = fields.pop("query", None), fields.pop("key", None)
    value = fields.pop("value")

    def make(name: str, number: int, index: int) -> AttentionCall:
        return AttentionCall(name, number, index, kernel, tier, query, key, value, output, **fields)

    tap.recording.add(name, make)


def _kernel(frame: Frame | None, kernel: str) -> str:
    return "MultiheadAttention" if frame is not None and isinstance(frame.module, nn.MultiheadAttention) else kernel


# The product of half-precision queries and keys is rounded before the softmax in eager code: an error of eps |score|.
BASE_ERROR = {torch.float64: 2e-6, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ROWS_PROVEN = 16


def _explained(tag: Probabilities, actual: Tensor, lead: Axes, layout: _Layout) -> Kwargs:
    """Recipe fields where they reproduce the probabilities, otherwise the probabilities (and query and key if known)."""
    if tag.scores is None:
        return {"probabilities": actual.detach()}
    try:
        fields = provenance.recipe(_laid_out(tag.scores, lead, layout), layout.canonical(lead))
    except RuntimeError:
        return {"probabilities": actual.detach()}
    compared = _canonical(_unflipped(tag), lead, layout) if tag.dropped else actual
    if not (tag.altered and tag.dropped) and _reproduces(fields, compared):
        return fields
    return {"query": fields["query"], "key": fields["key"], "probabilities": actual.detach()}


def _unflipped(tag: Probabilities) -> Tensor:
    return tag.tensor.mT if tag.flipped else tag.tensor


def _reproduces(fields: Kwargs, actual: Tensor) -> bool:
    """Whether the recipe gives the actual probabilities on rows spread evenly, those without a valid key left out."""
    tensors = {"value": None, "output": None} | fields
    call = AttentionCall("", 0, 0, "", "", **tensors)
    if tuple(actual.shape) != call.shape:
        return False
    queries = actual.shape[2]
    rows = torch.linspace(0, queries - 1, min(queries, ROWS_PROVEN)).round().long().to(actual.device)
    scores = call.scores(rows)
    difference = (call.attention(rows) - actual[:, :, rows].float()).abs()
    valid = (scores > float("-inf")).any(dim=-1, keepdim=True)
    largest = scores.masked_fill(scores == float("-inf"), 0.0).abs().max()
    # Sums may have been rounded in the narrower of the types on the way.
    dtype = min((actual.dtype, call.query.dtype), key=lambda dtype: -torch.finfo(dtype).eps)  # type: ignore[union-attr]
    limit = BASE_ERROR.get(dtype, 8e-3) + 4 * torch.finfo(dtype).eps * largest
    return not bool((difference.masked_fill(~valid, 0.0).amax() > limit).item())


# -- layouts -----------------------------------------------------------------------------------------------------------

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_head")


@dataclass(frozen=True)
class _Layout:
    """How leading axes become (batch, head): the axis `head_axis` is moved last, the others merge into the batch.

    `head_axis` None: one leading axis holds batch * `heads`.
    """

    head_axis: int | None
    heads: int

    def canonical(self, lead: Axes) -> Axes:
        return prod(lead) // self.heads, self.heads


def _layout(lead: Axes, frame: Frame | None) -> _Layout:
    heads = _head_count(frame)
    if len(lead) >= 2:
        axis = 1 if len(lead) > 2 and lead[-1] != heads and lead[1] == heads else len(lead) - 1
        return _Layout(axis, lead[axis])
    if len(lead) == 1 and heads and lead[0] % heads == 0:
        return _Layout(None, heads)
    return _Layout(None, 1)


def _head_count(frame: Frame | None) -> int | None:
    module = None if frame is None else frame.module
    for name in HEAD_COUNTS:
        count = getattr(module, name, None)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            return count
    return None


def _order(lead: Axes, layout: _Layout) -> tuple[int, ...] | None:
    """Permutation of (*lead, a, b) that puts the heads last among the leading axes; None when they are."""
    if layout.head_axis is None or layout.head_axis == len(lead) - 1:
        return None
    others = [axis for axis in range(len(lead)) if axis != layout.head_axis]
    return (*others, layout.head_axis, len(lead), len(lead) + 1)


def _laid_out(scores: Scores, lead: Axes, layout: _Layout) -> Scores:
    order = _order(lead, layout)
    regrouped = replace(scores, lead=lead)
    if order is None:
        return regrouped
    permuted = provenance.permute(regrouped, order)
    assert permuted is not None
    return permuted


def _canonical(tensor: Tensor, lead: Axes, layout: _Layout) -> Tensor:
    """A tensor broadcastable to (*lead, a, b), as (batch, head, a, b) or broadcastable to it."""
    order = _order(lead, layout)
    if order is not None:
        tensor = tensor.reshape((1,) * (len(order) - tensor.dim()) + tuple(tensor.shape)).permute(order)
        lead = tuple(lead[axis] for axis in order[:-2])
    return _four(regroup_lead(tensor, lead, layout.canonical(lead)))


def _four(tensor: Tensor) -> Tensor:
    return tensor.reshape((*(1,) * (4 - tensor.dim()), *tensor.shape)) if tensor.dim() <= 4 else tensor.flatten(0, -4)


def _route(output: Tensor, lead: Axes, layout: _Layout) -> tuple[Tensor, Tensor]:
    """The output for the model, and the same as (batch, query_token, head, value_channel) on its way in the graph.

    Views only, so that what the model goes on with has the same values, strides and storage, and depends on what is
    recorded. Where no view exists, what is recorded is a copy outside the graph.
    """
    order = _order(lead, layout)
    try:
        moved = output if order is None else output.permute(order)
        shown = moved.view(*layout.canonical(lead), *output.shape[-2:]).transpose(1, 2)
    except RuntimeError:
        with quietly():
            return output, _canonical(output, lead, layout).transpose(1, 2)
    back = shown.transpose(1, 2).view(moved.shape)
    if order is not None:
        back = back.permute(tuple(order.index(axis) for axis in range(len(order))))
    return (back if output.requires_grad else output), shown


# -- einsum ------------------------------------------------------------------------------------------------------------


def _labels(equation: str, operands: Sequence[Tensor]) -> tuple[str, str, str] | None:
    """Labels of both operands and of the result, an ellipsis written out; None where the equation is not of that kind."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2:
        return None
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    counts = [operand.dim() - len(part.replace("...", "")) for part, operand in zip(parts, operands, strict=True)]
    widest = max((count for part, count in zip(parts, counts, strict=True) if "..." in part), default=0)
    letters = "".join(spare[:widest])
    left, right = (
        part.replace("...", letters[widest - count :] if count else "")
        for part, count in zip(parts, counts, strict=True)
    )
    output = output.replace("...", letters)
    return None if any(len(set(part)) < len(part) for part in (left, right, output)) else (left, right, output)


def _einsum_scores(left: Tensor, right: Tensor, first: str, second: str, out: str, shape: torch.Size) -> Scores | None:
    """Scores where the result ends in one axis of each operand: (batch axes, query_token, key_token)."""
    if len(out) < 2 or len(shape) != len(out):
        return None
    lead, last = out[:-2], out[-2:]
    if last[0] in second and last[1] in first and last[0] not in first and last[1] not in second:
        left, right, first, second = right, left, second, first
    if last[0] not in first or last[0] in second or last[1] not in second or last[1] in first:
        return None
    channel = "".join(label for label in first if label in second and label not in out)
    if set(first) - set(lead + last + channel) or set(second) - set(lead + last + channel) or not channel:
        return None
    with quietly():
        query = _arranged(left, first, lead, last[0], channel)
        key = _arranged(right, second, lead, last[1], channel)
    return provenance.product(query, key, shape)


def _arranged(tensor: Tensor, labels: str, lead: str, token: str, channel: str) -> Tensor:
    """Axes in the order (lead, token, channel), length one where the operand lacks a leading axis."""
    present = [label for label in lead if label in labels]
    tensor = tensor.permute([labels.index(label) for label in (*present, token, *channel)])
    for place, label in enumerate(lead):
        if label not in labels:
            tensor = tensor.unsqueeze(place)
    return tensor.flatten(len(lead) + 1)


def _mixing_axes(first: str, second: str, out: str, tag: Probabilities) -> tuple[str, str, str, str] | None:
    """(leading, query_token, key_token, value_channel) labels where the einsum mixes values by the probabilities."""
    if len(first) < 2:
        return None
    query, key = (first[-1], first[-2]) if tag.flipped else (first[-2], first[-1])
    lead = first[:-2]
    channel = "".join(label for label in out if label in second and label not in first)
    if key in out or key not in second or query not in out or query in second or any(each not in out for each in lead):
        return None
    return (lead, query, key, channel) if channel and set(out) == set(lead + query + channel) else None


def _finish_einsum(
    tap: FunctionTap,
    tag: Probabilities,
    operands: tuple[Tensor, Tensor],
    labels: tuple[str, str, str],
    axes: tuple[str, str, str, str],
    run: Callable[[], Tensor],
) -> Any:
    lead, query, key, channel = axes
    first, second, out = labels
    with tap.recording.inside():
        result = run()
    order = [out.index(label) for label in (*lead, query, *channel)]
    arranged = result.permute(order)
    sizes = arranged.shape[len(lead) + 1 :]
    with quietly():
        probabilities = operands[0].permute([first.index(label) for label in (*lead, query, key)])
        value = _arranged(operands[1], second, lead, key, channel)
    flat = arranged.flatten(len(lead) + 1) if len(channel) > 1 else arranged
    routed = _finish(tap, tag, probabilities, value, flat, tuple(flat.shape[: len(lead)]))
    if routed is flat or (len(channel) > 1 and not flat._is_view()):
        return result
    routed = routed.unflatten(len(lead) + 1, sizes) if len(channel) > 1 else routed
    return routed.permute([order.index(axis) for axis in range(len(order))])


# -- torch.nn.functional.multi_head_attention_forward -----------------------------------------------------------------

# The same code, which no longer hands itself to a function mode as a whole, so that the products inside are seen.
_OPENED = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    F.multi_head_attention_forward.__name__,
    F.multi_head_attention_forward.__defaults__,
)


def _multihead(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    with tap:
        return _OPENED(*args, **kwargs)


_REGROUP = _follow(_rule_regroup, alters="part")
_SAME = _follow(_rule_same)
_TIMES, _PLUS = _follow(_rule_times, alters="values"), _follow(_rule_plus, alters="values")
_DIVIDE, _MINUS = _follow(_rule_divide, alters="values"), _follow(_rule_minus, alters="values")
_MASKED = _follow(_rule_masked_fill, alters="masked")
_TRANSPOSE = _follow(_rule_transpose, alters="axes")

T = Tensor
HANDLERS: dict[Any, Callable[[FunctionTap, Any, Args, Kwargs], Any]] = {
    **dict.fromkeys((torch.matmul, T.matmul, T.__matmul__, torch.bmm, T.bmm, torch.mm, T.mm), _multiply),
    **dict.fromkeys((torch.baddbmm, T.baddbmm, torch.addmm, T.addmm), _multiply_add),
    torch.functional.einsum: _einsum,
    **dict.fromkeys((torch.softmax, T.softmax, F.softmax, torch.special.softmax), _softmax),
    F.scaled_dot_product_attention: _fused,
    F.multi_head_attention_forward: _multihead,
    **dict.fromkeys((torch.mul, T.mul, T.mul_, torch.multiply, T.multiply, T.__rmul__), _TIMES),
    **dict.fromkeys((torch.div, T.div, T.div_, torch.true_divide, T.true_divide), _DIVIDE),
    **dict.fromkeys((torch.add, T.add, T.add_, T.__radd__), _PLUS),
    **dict.fromkeys((torch.sub, T.sub, T.sub_), _MINUS),
    **dict.fromkeys((torch.masked_fill, T.masked_fill, T.masked_fill_), _MASKED),
    **dict.fromkeys((torch.where, T.where), _follow(_rule_where, alters="values")),
    **dict.fromkeys((torch.tanh, T.tanh, T.tanh_), _follow(_rule_tanh, alters="values")),
    **dict.fromkeys((F.dropout, torch.dropout), _follow(_rule_same, alters="dropout")),
    **dict.fromkeys((T.view, T.reshape, torch.reshape, T.flatten, torch.flatten, T.unflatten, T.view_as), _REGROUP),
    **dict.fromkeys((T.squeeze, torch.squeeze, T.unsqueeze, torch.unsqueeze, T.reshape_as), _REGROUP),
    **dict.fromkeys((T.transpose, torch.transpose, T.swapaxes, T.swapdims, torch.swapaxes), _TRANSPOSE),
    **dict.fromkeys((T.permute, torch.permute), _follow(_rule_permute, alters="axes")),
    T.mT.__get__: _follow(_rule_swap, alters="axes"),
    **dict.fromkeys((T.to, T.float, T.half, T.bfloat16, T.double, T.type, T.type_as, T.contiguous, T.clone), _SAME),
    **dict.fromkeys((torch.clone, T.clamp, torch.clamp, T.clip, T.detach, T.requires_grad_, T.cpu, T.cuda), _SAME),
    **dict.fromkeys((T.nan_to_num, torch.nan_to_num), _SAME),
    T.__getitem__: _follow(_rule_same, alters="part"),
    **dict.fromkeys((T.expand, T.expand_as), _follow(_rule_same, alters="part")),
}
