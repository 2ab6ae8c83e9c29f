"""The audit: counts, below autograd, the attention kernels that ran, independently of what the taps saw."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property
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
# exp(x - logsumexp(x)), a softmax that is written out.
WRITTEN_OUT = {"aten::logsumexp": "logsumexp", "aten::sub": "sub", "aten::exp": "exp"}
PRODUCTS = {"aten::bmm", "aten::matmul", "aten::mm", "aten::baddbmm", "aten::einsum"}
# Composite products, which choose by `requires_grad` of an operand whether to fold batch axes.
FOLDING = {"aten::linear", "aten::matmul", "aten::einsum", "aten::inner", "aten::tensordot"}
# What leaves probabilities probabilities: casts, copies, dropout, head masks, renormalisation, parts.
FOLLOWED = {
    *("aten::_to_copy", "aten::clone", "aten::native_dropout", "aten::mul", "aten::div", "aten::slice"),
    *("aten::to", "aten::contiguous", "aten::dropout", "aten::reshape", "aten::masked_fill", "aten::where"),
    *("aten::nan_to_num", "aten::index_select", "aten::select", "aten::cat", "aten::expand", "aten::squeeze"),
    *("aten::bernoulli", "aten::_unsafe_view", "aten::unsafe_split", "aten::split", "aten::constant_pad_nd"),
}
# Kinds of operation that only hand on a mark.
_FOLLOWING = {"both", "scores", *WRITTEN_OUT.values()}
# What keeps scores scores on their way from a product of two activations into a softmax.
SCORES_FOLLOWED = FOLLOWED | {"aten::add", "aten::sub", "aten::tanh", "aten::clamp", "aten::baddbmm"}


class _Marks:
    """Storages and the softmax or product they come from, by identity.

    A weak reference keeps an address from being used again while it is held.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def add(self, tensor: Tensor, origin: int) -> None:
        if tensor.is_nested or tensor.layout != torch.strided:
            return
        reference = StorageWeakRef(tensor.untyped_storage())
        self._held[reference.cdata] = (reference, origin)
        if len(self._held) > 4096:
            self._held = {key: held for key, held in self._held.items() if not held[0].expired()}

    def __bool__(self) -> bool:
        return bool(self._held)

    def get(self, value: object) -> int | None:
        if not self._held or not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
            return None
        held = self._held.get(value.untyped_storage()._cdata)
        return None if held is None else held[1]


class Audit(TorchDispatchMode):
    """Counts attention kernels of one recording's thread and which of them a tap had in hand."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing compiles while a recording is open; torch's guard against it would double the cost of an operation.
        return False

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        self._probabilities, self._scores = _Marks(), _Marks()
        self._normalisers, self._normalised = _Marks(), _Marks()
        self._kinds: dict[int, str] = {}
        self._folding: set[int] = set()
        self._held: list[Any] = []
        self._plain: set[int] = set()
        self._origins = 0
        recording.origin_of = self._probabilities.get
        recording.followers.append(self._follows)

    @cached_property
    def _weights(self) -> set[int]:
        """Where the model's weights lie. Asked for at the first product, which a model with fused kernels never has."""
        model = self._recording.model
        weights = (*model.parameters(), *model.buffers())
        return {weight.untyped_storage()._cdata for weight in weights if weight.layout == torch.strided}

    def _follows(self, tensor: Tensor) -> bool:
        if not self._probabilities and not self._scores:
            return False
        return self._probabilities.get(tensor) is not None or self._scores.get(tensor) is not None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # By identity, as the hash of an operation is Python of its own; held, so that no other gets the identity.
        kind = self._kinds.get(id(func))
        if kind is None:
            kind = self._kinds[id(func)] = _kind(func)
            self._held.append(func)
            if _name(func) in FOLDING:
                self._folding.add(id(func))
        if self._folding and id(func) in self._folding and torch.is_inference_mode_enabled():
            with _inference_keys():
                result = func(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        if kind and (kind not in _FOLLOWING or self._probabilities or self._scores) and observing():
            self._see(kind, func, args, result)
        return result

    def _see(self, kind: str, func: Any, args: tuple[Any, ...], result: Any) -> None:
        first = args[0] if args else None
        if kind == "fused":
            self._recording.count(str(func))
            # The CPU kernel and flash attention hand back the log-sum-exp of every row: nobody has to compute it again.
            given = isinstance(result, tuple | list) and len(result) > 1 and "_scaled_dot_product_flash" in _name(func)
            self._recording.log_sum_exps.append(result[1] if given else None)
        elif kind == "softmax":
            self._softmax(first, result)
        elif kind == "product":
            self._product(func, args, result)
        elif kind in ("logsumexp", "exp"):
            self._written_out(kind, first, result)
        elif isinstance(result, Tensor | tuple | list):
            self._follow(kind, args, result if isinstance(result, Tensor) else result[0])

    def _written_out(self, kind: str, first: Any, result: Any) -> None:
        """The beginning and the end of exp(scores - logsumexp(scores))."""
        if kind == "exp" and self._normalised.get(first) is not None:
            self._softmax(first, result)
        elif kind == "logsumexp" and self._scores.get(first) is not None:
            self._origins += 1
            for tensor in (first, result):
                self._normalisers.add(tensor, self._origins)

    def _softmax(self, scores: Any, result: Any) -> None:
        self._origins += 1
        self._probabilities.add(result, self._origins)
        product = self._scores.get(scores)
        if product is not None:
            self._scores.add(result, product)
        frame = self._recording.frame()
        if frame is not None and frame.name is not None and "Attention" in type(frame.module).__name__:
            self._plain.add(self._origins)
            self._recording.audit.plain_softmaxes = len(self._plain)

    def _product(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        name = _name(func)
        operands = args[1] if name == "aten::einsum" else args[1:3] if name == "aten::baddbmm" else args[:2]
        if len(operands) != 2:
            return
        left, right = operands
        mixed = left if self._probabilities.get(left) is not None else right
        origin = self._probabilities.get(mixed)
        if origin is not None and (right.dim() > 2 or self._scores.get(mixed) is not None):
            self._recording.count("softmax and product", origin)
            self._plain.discard(origin)
            self._recording.audit.plain_softmaxes = len(self._plain)
        elif not self._is_weight(left) and not self._is_weight(right):
            self._origins += 1
            self._scores.add(result, self._origins)

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._weights

    def _follow(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
        if not isinstance(result, Tensor):
            return
        if kind == "sub":
            normaliser = self._normalisers.get(args[1])
            if normaliser is not None and normaliser == self._normalisers.get(args[0]):
                self._normalised.add(result, normaliser)
        for source in _flat(args[:3]):
            for marks in (self._probabilities, self._scores) if kind == "both" else (self._scores,):
                origin = marks.get(source)
                if origin is not None:
                    marks.add(result, origin)


with torch.inference_mode():
    _INCLUDED, _EXCLUDED = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def _inference_keys() -> AbstractContextManager[Any]:
    """Dispatch as inference mode does outside a dispatch mode.

    In inference mode composite operators reach a dispatch mode whole, with the autograd keys off; `linear` then reads
    another `requires_grad` from its weight and chooses another product, which differs in the last bit (torch 2.13).
    """
    return torch._C._ForceDispatchKeyGuard(_INCLUDED | torch._C._dispatch_tls_local_include_set(), _EXCLUDED)


def _flat(values: Any) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, list | tuple) else (value,))]


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return schema.name if schema is not None else str(func)


def _kind(func: Any) -> str:
    name = _name(func)
    base = name.removesuffix("_")
    if name in SOFTMAXES:
        return "softmax"
    if base in PRODUCTS:
        return "product"
    if any(part in name for part in FUSED_PARTS) and not any(part in name for part in NOT_KERNELS):
        return "fused"
    if name in WRITTEN_OUT:
        return WRITTEN_OUT[name]
    if base in FOLLOWED:
        return "both"
    return "scores" if base in SCORES_FOLLOWED else ""
