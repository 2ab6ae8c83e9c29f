"""The function tap: attention that a model writes out itself, or asks of torch directly.

A torch function mode follows tensors from the product of query and key through scaling, bias and mask into a softmax,
and from there into the product with the value. Where that trail is whole and reproduces the probabilities, the call is
recorded with its recipe; where it is not, with the probabilities themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnscope.recording import provenance
from attnscope.recording.bystanders import hands_on
from attnscope.recording.calls import quietly
from attnscope.recording.equations import Equation, Mixing, arranged, mixing, parse, query_and_key
from attnscope.recording.finishing import Probabilities, finish, kernel_of, record, record_alone
from attnscope.recording.layouts import layout_of
from attnscope.recording.provenance import Scores
from attnscope.recording.state import Frame, Recording, Softmax, observing

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Normaliser:
    """The log-sum-exp of scores over their keys, or (`taken`) the scores after it was taken away from them."""

    scores: Tensor
    taken: bool = False


Tag = Scores | Probabilities | Normaliser
Rule = Callable[[Scores, Args, Kwargs, Tensor], Scores | None]


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

    def follows(self, tensor: Tensor) -> bool:
        return bool(self._tags) and self.get(tensor) is not None

    def clear(self) -> None:
        self._tags.clear()

    def __bool__(self) -> bool:
        return bool(self._tags)


class FunctionTap(TorchFunctionMode):
    """Records attention of one recording that does not go through the transformers interface."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.tags = _Tags()
        recording.followers.append(self.tags.follows)

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        # Where nothing is followed yet, all but a beginning would be passed over.
        handler = (HANDLERS if self.tags else BEGINNINGS).get(func)
        if handler is None and not kwargs:
            if hands_on(func, args, self.recording):
                with torch._C._DisableTorchDispatch():
                    return func(*args)
            return func(*args)
        kwargs = kwargs or {}
        if handler is None or self.recording.is_inside or not observing():
            return func(*args, **kwargs)
        return handler(self, func, args, kwargs)


def settle(recording: Recording, frame: Frame) -> None:
    """A module is done: record the softmaxes in it that no product consumed, as far as they are attention.

    They are where the audit saw a product whose operand the trail had lost, or where the module is named so and has not
    left its attention to the interface: SAM 2 also makes a softmax that it has no use for.
    """
    is_attention = "Attention" in type(frame.module).__name__ and not frame.attended
    for origin in tuple(frame.softmaxes):
        if not origin.done and (is_attention or recording.is_missed(origin.tensor)):
            record_alone(recording, origin)


# -- what the tap does at each function --------------------------------------------------------------------------------


def _multiply(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """matmul, bmm: finishes a call where an operand holds probabilities, else begins scores."""
    left, right = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return func(*args, **kwargs)
    for operand, second in ((left, False), (right, True)):
        found = tap.tags.get(operand)
        if isinstance(found, Probabilities) and found.flipped == second and _is_mixing(found, left, right):
            with tap.recording.inside():
                result = func(*args, **kwargs)
            if not second:
                return finish(tap.recording, found, left, right, result)
            # value^T @ probabilities^T
            return finish(tap.recording, found, right.mT, left.mT, result.mT).mT
    result = func(*args, **kwargs)
    if left.dim() >= 2 and right.dim() >= 2 and isinstance(result, Tensor):
        tap.tags.set(result, provenance.product(left, right.transpose(-1, -2), result.shape))
    return result


def _is_mixing(found: Probabilities, left: Tensor, right: Tensor) -> bool:
    """Whether the product mixes values, not features: its other side is not a plain matrix of weights."""
    if left.dim() > 2 and right.dim() > 2:
        return True
    scores = found.origin.scores
    return isinstance(scores, Scores) and not scores.weighted


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
    equation = parse(args[0], operands) if isinstance(args[0], str) and len(operands) == 2 else None
    if equation is None:
        return func(*args, **kwargs)
    for sides, pair in ((equation, operands), (equation.swapped, operands[::-1])):
        found = tap.tags.get(pair[0])
        roles = mixing(sides, found.flipped) if isinstance(found, Probabilities) else None
        if isinstance(found, Probabilities) and roles is not None:
            with tap.recording.inside():
                result = func(*args, **kwargs)
            return _finish_einsum(tap, found, pair, sides, roles, result)
    result = func(*args, **kwargs)
    with quietly():
        sides_of_scores = query_and_key(equation, operands)
    if sides_of_scores is not None:
        tap.tags.set(result, provenance.product(*sides_of_scores, result.shape))
    return result


def _finish_einsum(
    tap: FunctionTap,
    found: Probabilities,
    operands: Sequence[Tensor],
    equation: Equation,
    roles: Mixing,
    result: Tensor,
) -> Tensor:
    order = [equation.out.index(label) for label in (*roles.lead, roles.query, *roles.channel)]
    moved = result.permute(order)
    lead = len(roles.lead)
    with quietly():
        actual = operands[0].permute([equation.left.index(label) for label in (*roles.lead, roles.query, roles.key)])
        value = arranged(operands[1], equation.right, roles.lead, roles.key, roles.channel)
    try:
        flat = moved.view(*moved.shape[: lead + 1], -1)
    except RuntimeError:
        finish(tap.recording, found, actual, value, moved.flatten(lead + 1).detach())
        return result
    routed = finish(tap.recording, found, actual, value, flat)
    if routed is flat:
        return result
    return routed.view(moved.shape).permute([order.index(axis) for axis in range(len(order))])


def _softmax(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    result = func(*args, **kwargs)
    scores = args[0] if args else kwargs.get("input")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(scores, Tensor) or not isinstance(result, Tensor) or not result.is_floating_point():
        return result
    _probable(tap, scores, result, over_keys=dim in (-1, scores.dim() - 1), flipped=dim in (-2, scores.dim() - 2))
    return result


def _probable(tap: FunctionTap, scores: Tensor, result: Tensor, over_keys: bool, flipped: bool) -> None:
    """Follow the softmax of scores from here on."""
    tag = tap.tags.get(scores)
    trail = tag if isinstance(tag, Scores) and over_keys and not tag.squashed and tag.split is None else None
    frame = tap.recording.frame()
    origin = Softmax(result, trail, frame, flipped)
    if frame is not None:
        frame.softmaxes.append(origin)
    tap.tags.set(result, Probabilities(origin, flipped))


def _log_sum_exp(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """logsumexp over keys: exp(scores - it) is a softmax that is written out."""
    result = func(*args, **kwargs)
    scores = args[0] if args else kwargs.get("input")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(scores, Tensor) and dim in (-1, scores.dim() - 1):
        tap.tags.set(result, Normaliser(scores))
    return result


def _subtract(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    normaliser = tap.tags.get(args[1]) if len(args) > 1 and not kwargs else None
    if not isinstance(normaliser, Normaliser) or normaliser.scores is not args[0] or func is Tensor.sub_:
        return _MINUS(tap, func, args, kwargs)
    result = func(*args, **kwargs)
    tap.tags.set(result, Normaliser(args[0], taken=True))
    return result


def _exponential(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    result = func(*args, **kwargs)
    found = tap.tags.get(args[0]) if args else None
    if isinstance(found, Normaliser) and found.taken:
        _probable(tap, found.scores, result, over_keys=True, flipped=False)
    return result


def _fused(tap: FunctionTap, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """torch.nn.functional.scaled_dot_product_attention, called by the model's own code."""
    with tap.recording.inside():
        output = func(*args, **kwargs)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    frame = tap.recording.frame()
    name = "" if frame is None else frame.name
    if name is None:
        return output
    layout = layout_of(tuple(output.shape[:-2]), None if frame is None else frame.module)
    routed, shown = layout.route(output)
    scale = given.get("scale")
    mask = given.get("attn_mask")
    with quietly():
        fields = {
            "query": layout.canonical(query),
            "key": layout.canonical(key),
            "value": layout.canonical(value),
            "output": shown,
            "mask": None if mask is None else layout.canonical(mask),
            "causal": bool(given.get("is_causal", False)),
            "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
        }
    record(tap.recording, name, kernel_of(frame, "sdpa"), fields)
    return routed


def _follow(rule: Rule, alters: str = "") -> Callable[..., Any]:
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
            tap.tags.set(result, _ruled(rule, tag, others, kwargs | {"_position": position}, result))
        elif isinstance(tag, Probabilities):
            tap.tags.set(result, _carried(tag, args[position], args, kwargs, result, alters))
        return result

    return handler


def _ruled(rule: Rule, scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    try:
        with quietly():
            return rule(scores, others, kwargs, result)
    except (RuntimeError, LookupError, TypeError, ValueError):
        # A way of calling that no rule foresaw must not end the model's forward: the trail breaks here, and the call
        # is recorded with its probabilities.
        return None


def _carried(tag: Probabilities, source: Tensor, args: Args, kwargs: Kwargs, result: Tensor, alters: str) -> Tag:
    if alters == "values":
        return replace(tag, altered=True)
    if alters == "masked" and not (len(args) > 2 and args[2] == 0):
        return replace(tag, altered=True)
    if alters == "dropout":
        given = {"p": 0.5, "training": True} | dict(zip(("p", "training"), args[1:], strict=False)) | kwargs
        return replace(tag, dropped=tag.dropped or bool(given["training"] and given["p"] > 0))
    if alters == "axes":
        return _permuted_probabilities(tag, source, result)
    if alters == "part" and result.shape != source.shape:
        # A sink's column may be cut off; less than that is a part of the keys.
        return replace(tag, altered=True, cut=tag.cut or source.shape[-1] - result.shape[-1] > 1)
    return tag


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
    return provenance.keep(scores, ~mask.bool(), value)


def _rule_where(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    """where(condition, scores, small) keeps where the condition holds; where(condition, small, scores) elsewhere."""
    if len(others) != 2 or kwargs["_position"] == 0 or not _same_size(scores, result):
        return None
    condition, value = others
    if not isinstance(condition, Tensor) or not provenance.is_masking(value):
        return None
    return provenance.keep(scores, condition.bool() if kwargs["_position"] == 1 else ~condition.bool(), value)


def _rule_tanh(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    return provenance.squash(scores)


def _rule_regroup(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    return provenance.regroup(scores, result.shape)


def _rule_transpose(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    given = dict(zip(("dim0", "dim1"), others, strict=False)) | kwargs
    first, second = given["dim0"], given["dim1"]
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


def _rule_larger(scores: Scores, others: Args, kwargs: Kwargs, result: Tensor) -> Scores | None:
    """max(scores, finfo.min), as XGLM writes it."""
    return scores if len(others) == 1 and isinstance(others[0], Tensor) and others[0].numel() == 1 else None


def _same_size(scores: Scores, result: Tensor) -> bool:
    return tuple(result.shape) == scores.size


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

_LARGER = _follow(_rule_larger, alters="values")

T = Tensor
Handler = Callable[[FunctionTap, Any, Args, Kwargs], Any]
BEGINNINGS: dict[Any, Handler] = {
    **dict.fromkeys((torch.matmul, T.matmul, T.__matmul__, torch.bmm, T.bmm, torch.mm, T.mm), _multiply),
    **dict.fromkeys((torch.baddbmm, T.baddbmm, torch.addmm, T.addmm), _multiply_add),
    torch.functional.einsum: _einsum,
    **dict.fromkeys((torch.softmax, T.softmax, F.softmax, torch.special.softmax), _softmax),
    F.scaled_dot_product_attention: _fused,
    F.multi_head_attention_forward: _multihead,
}
HANDLERS: dict[Any, Handler] = {
    **BEGINNINGS,
    **dict.fromkeys((torch.mul, T.mul, T.mul_, torch.multiply, T.multiply, T.__rmul__), _TIMES),
    **dict.fromkeys((torch.div, T.div, T.div_, torch.true_divide, T.true_divide), _DIVIDE),
    **dict.fromkeys((torch.add, T.add, T.add_, T.__radd__), _PLUS),
    **dict.fromkeys((torch.sub, T.sub, T.sub_), _subtract),
    **dict.fromkeys((torch.logsumexp, T.logsumexp), _log_sum_exp),
    **dict.fromkeys((torch.exp, T.exp), _exponential),
    **dict.fromkeys((torch.masked_fill, T.masked_fill, T.masked_fill_), _MASKED),
    **dict.fromkeys((torch.where, T.where), _follow(_rule_where, alters="values")),
    **dict.fromkeys((torch.tanh, T.tanh, T.tanh_), _follow(_rule_tanh, alters="values")),
    **dict.fromkeys((F.dropout, torch.dropout), _follow(_rule_same, alters="dropout")),
    **dict.fromkeys((T.view, T.reshape, torch.reshape, T.flatten, torch.flatten, T.unflatten, T.view_as), _REGROUP),
    **dict.fromkeys((T.squeeze, torch.squeeze, T.unsqueeze, torch.unsqueeze, T.reshape_as), _REGROUP),
    **dict.fromkeys((T.transpose, torch.transpose, T.swapaxes, T.swapdims, torch.swapaxes), _TRANSPOSE),
    **dict.fromkeys((T.permute, torch.permute), _follow(_rule_permute, alters="axes")),
    T.mT.__get__: _follow(_rule_swap, alters="axes"),  # type: ignore[attr-defined]
    **dict.fromkeys((T.to, T.float, T.half, T.bfloat16, T.double, T.type, T.type_as, T.contiguous, T.clone), _SAME),
    **dict.fromkeys((torch.clone, T.clamp, torch.clamp, T.clip, T.detach, T.requires_grad_, T.cpu, T.cuda), _SAME),
    **dict.fromkeys((T.nan_to_num, torch.nan_to_num), _SAME),
    **dict.fromkeys((torch.max, T.max, torch.maximum, T.maximum), _LARGER),
    T.__getitem__: _follow(_rule_same, alters="part"),
    **dict.fromkeys((T.expand, T.expand_as), _follow(_rule_same, alters="part")),
}
