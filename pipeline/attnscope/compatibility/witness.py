"""A model's own attention, seen by other means than the taps, and how far recorded calls are from it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnscope.compatibility.examples import Inputs
from attnscope.recording import AttentionCall


class SoftmaxSpy(TorchFunctionMode):
    """What every softmax returned, in order."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.multi_head_attention_forward:
            wanted = kwargs.get("need_weights", True)
            output, weights = func(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))
            assert weights is not None
            self.seen.append(weights.detach().clone())
            return output, weights if wanted else None
        result = func(*args, **kwargs)
        if func in (torch.softmax, Tensor.softmax, nn.functional.softmax):
            self.seen.append(result.detach().clone())
        return result


def forward(model: nn.Module, inputs: Inputs, *, seed: int = 0, **options: bool) -> Any:
    """The model's outputs, under a fixed random state, as some models draw positions in every forward."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return model(**inputs, **options)


def own_softmaxes(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every softmax that a model's forward runs."""
    spy = SoftmaxSpy()
    with spy:
        forward(model, inputs)
    return spy.seen


def first_tensor(outputs: Any) -> Tensor:
    """The first floating tensor of a model's outputs."""
    values = outputs.values() if isinstance(outputs, Mapping) else [outputs]
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


def call_error(call: AttentionCall, own: Tensor) -> float:
    """Largest difference between a call's attention and the model's own softmax, over valid rows; inf if none fits."""
    attention = call.attention()
    if own.shape[-1] == attention.shape[-1] + 1:
        own = own[..., :-1]
    if own.dim() == 5 and own.shape[2] * own.shape[0] == attention.shape[0]:
        own = own.transpose(1, 2)  # Hiera: (batch, head, window, ...)
    if own.dim() == 4 and own.shape != attention.shape == own.transpose(1, 2).shape:
        own = own.transpose(1, 2)  # Longformer: (batch, query_token, head, ...)
    if own.dim() >= 2 and own.shape[-2:] == attention.shape[:1:-1] != attention.shape[2:]:
        own = own.mT  # GroupViT: a softmax over the axis before the last
    if own.numel() != attention.numel():
        return math.inf
    difference = (attention - own.reshape(attention.shape).float()).abs().amax(dim=-1)
    valid = call.row_valid().expand(difference.shape)
    return float(difference[valid].max()) if valid.any() else math.inf


def matched_errors(calls: Sequence[AttentionCall], own: Sequence[Tensor]) -> list[float]:
    """Error of each call against the first of the model's softmaxes that no other call is closest to."""
    left, errors = list(own), []
    for call in calls:
        found = [call_error(call, each) for each in left]
        best = min(range(len(found)), key=found.__getitem__, default=None)
        errors.append(math.inf if best is None else found[best])
        if best is not None:
            del left[best]
    return errors


def exposed(model: nn.Module, inputs: Inputs, calls: Sequence[AttentionCall]) -> tuple[int, int]:
    """How many tensors `output_attentions=True` gives, and how many of them are a recorded call's attention."""
    try:
        given = _attentions(forward(model, inputs, output_attentions=True))
    except (TypeError, ValueError):
        return 0, 0
    left, right = list(calls), 0
    for tensor in given:
        for call in left:
            if call_error(call, tensor) <= 1e-4:
                left.remove(call)
                right += 1
                break
    return len(given), right


def _attentions(outputs: Any) -> list[Tensor]:
    """Every tensor under a name with `attentions` in a model's outputs, whatever holds it."""
    if not hasattr(outputs, "items"):
        return []
    found: list[Tensor] = []
    for name, value in outputs.items():
        found += _tensors(value) if "attentions" in name else _attentions(value)
    return found


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, list | tuple) else []
