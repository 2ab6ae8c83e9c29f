"""The audit: counts, below autograd, the attention kernels that ran, independently of what the taps saw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from attnscope.recording.state import Recording, observing

FUSED_PARTS = (
    "scaled_dot_product",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "flash_attn",
    "flash_attention",
    "efficient_attention",
    "memory_efficient",
    "flex_attention",
    "xformers",
)
NOT_KERNELS = ("_fused_sdp_choice", "backward")
SOFTMAXES = {"aten::_softmax", "aten::_safe_softmax", "aten::softmax"}
PRODUCTS = {"aten::bmm", "aten::matmul", "aten::mm", "aten::baddbmm", "aten::einsum"}
# What leaves probabilities probabilities: casts, copies, dropout, head masks, renormalisation, parts.
FOLLOWED = {
    *("aten::_to_copy", "aten::clone", "aten::native_dropout", "aten::mul", "aten::div", "aten::slice"),
    *("aten::to", "aten::contiguous", "aten::dropout", "aten::reshape", "aten::masked_fill", "aten::where"),
    *("aten::nan_to_num", "aten::index_select", "aten::select", "aten::cat", "aten::expand", "aten::squeeze"),
    *("aten::bernoulli", "aten::_unsafe_view", "aten::unsafe_split", "aten::split", "aten::constant_pad_nd"),
}
# What keeps scores scores on their way from a product of two activations into a softmax.
SCORES_FOLLOWED = FOLLOWED | {"aten::add", "aten::sub", "aten::tanh", "aten::clamp", "aten::baddbmm"}


class _Marks:
    """A set of storages, by identity; a weak reference keeps an address from being used again."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> None:
        if tensor.is_nested or tensor.layout != torch.strided:
            return
        reference = StorageWeakRef(tensor.untyped_storage())
        self._held[reference.cdata] = reference
        if len(self._held) > 4096:
            self._held = {key: held for key, held in self._held.items() if not held.expired()}

    def __contains__(self, value: object) -> bool:
        if not self._held or not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
            return False
        return value.untyped_storage()._cdata in self._held


class Audit(TorchDispatchMode):
    """Counts attention kernels of one recording's thread and which of them a tap had in hand."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self._probabilities, self._scores = _Marks(), _Marks()
        weights = (*recording.model.parameters(), *recording.model.buffers())
        self._weights = {weight.untyped_storage()._cdata for weight in weights if weight.layout == torch.strided}
        self._kinds: dict[Any, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind and observing():
            self._see(kind, func, args, result)
        return result

    def _see(self, kind: str, func: Any, args: tuple[Any, ...], result: Any) -> None:
        first = args[0] if args else None
        if kind == "fused":
            self._recording.count(str(func))
        elif kind == "softmax":
            self._softmax(first, result)
        elif kind == "product":
            self._product(func, args, result)
        elif isinstance(result, Tensor | tuple | list):
            self._follow(kind, args, result if isinstance(result, Tensor) else result[0])

    def _softmax(self, scores: Any, result: Any) -> None:
        self._probabilities.add(result)
        if scores in self._scores:
            self._scores.add(result)
        frame = self._recording.frames[-1] if self._recording.frames else None
        if frame is not None and frame.name is not None and "Attention" in type(frame.module).__name__:
            self._recording.audit.plain_softmaxes += 1

    def _product(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if func._schema.name == "aten::einsum":
            left, right = (args[1][0], args[1][1]) if len(args[1]) == 2 else (None, None)
        else:
            left, right = args[1:3] if func._schema.name == "aten::baddbmm" else args[:2]
        if left is None:
            return
        flat = right.dim() == 2
        mixed = left if left in self._probabilities else right
        if mixed in self._probabilities and (not flat or mixed in self._scores):
            self._recording.count("softmax and product")
        elif not self._is_weight(left) and not self._is_weight(right):
            self._scores.add(result)

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._weights

    def _follow(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
        if not isinstance(result, Tensor):
            return
        sources = [each for each in _flat(args[:3]) if isinstance(each, Tensor)]
        if kind == "both" and any(source in self._probabilities for source in sources):
            self._probabilities.add(result)
        if any(source in self._scores for source in sources):
            self._scores.add(result)


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list | tuple) else (value,))]


def _kind(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    name = schema.name if schema is not None else str(func)
    base = name.removesuffix("_")
    if name in SOFTMAXES:
        return "softmax"
    if base in PRODUCTS:
        return "product"
    if any(part in name for part in FUSED_PARTS) and not any(part in name for part in NOT_KERNELS):
        return "fused"
    if base in FOLLOWED:
        return "both"
    return "scores" if base in SCORES_FOLLOWED else ""
