"""What cannot attend: torch's own linear layers, norms and activations, views and sums; nobody has to look inside.

Looking costs Python at every operation, and most operations of a transformer are among these. What is left out there
is what would have been seen and passed over: an operation on an input that no tap follows and no mark of the audit is
on, by code that is torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations
from transformers.pytorch_utils import Conv1D

from attnscope.recording.calls import AttentionCall
from attnscope.recording.state import ACTIVE, Recording

# By their very type: a subclass may do anything in its forward.
_TYPES = frozenset({
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Identity),
    *(nn.Dropout, nn.GELU, nn.SiLU, nn.ReLU, nn.Sigmoid, nn.Tanh, Conv1D, activations.GELUActivation),
    *(activations.NewGELUActivation, activations.QuickGELUActivation, activations.FastGELUActivation),
})  # fmt: skip
_T = torch.Tensor
# Of the audit's kinds none, or one that hands on a mark which an operand has.
_FUNCTIONS = frozenset({
    *(_T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten, _T.transpose, torch.transpose, _T.permute),
    *(_T.contiguous, _T.unsqueeze, _T.squeeze, _T.expand, _T.neg, _T.__neg__, _T.pow, _T.__pow__, _T.mean, torch.rsqrt),
    *(_T.add, _T.__add__, _T.__radd__, torch.add, _T.mul, _T.__mul__, _T.__rmul__, torch.mul),
})  # fmt: skip


def stands_by(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], recording: Recording) -> bool:
    """Whether a call can be left alone by the modes of this recording, and by no other mode, as there is none."""
    if type(module) not in _TYPES or len(args) != 1 or kwargs or type(args[0]) is not Tensor or not _is_plain(module):
        return False
    audits = 0 if recording.audit.ran is None else 1
    if not _no_other_modes(1, audits) or _transforms():
        return False
    return not any(follows(args[0]) for follows in recording.followers)


def hands_on(func: Any, args: tuple[Any, ...], recording: Recording) -> bool:
    """Whether the audit of this recording, and no other mode of dispatch, would pass over all that a function does."""
    if (
        func not in _FUNCTIONS
        or recording.audit.ran is None
        or torch._C._len_torch_dispatch_stack() != 1
        or _transforms()
    ):
        return False
    tensors = [each for each in args if isinstance(each, Tensor)]
    if any(type(each) is not Tensor and type(each) is not nn.Parameter for each in tensors):
        return False
    return not any(follows(each) for follows in recording.followers for each in tensors)


def _transforms() -> bool:
    """Whether tensors may be such as `vmap` has wrapped, of which nobody can ask whether the one inside is followed."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _no_other_modes(taps: int, audits: int) -> bool:
    return torch._C._len_torch_function_stack() == taps and torch._C._len_torch_dispatch_stack() == audits


@contextmanager
def modes_aside(call: AttentionCall) -> Iterator[None]:
    """Run what is computed from a call without the recordings' own modes, which would pass over it piece by piece.

    Other modes stay, and so does everything where a tensor of the call is of another type than torch's own.
    """
    active = ACTIVE.get()
    audits = sum(each.audit.ran is not None for each in active)
    plain = all(type(each) in (Tensor, nn.Parameter) for each in vars(call).values() if isinstance(each, Tensor))
    if active and plain and _no_other_modes(len(active), audits):
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            yield
    else:
        yield


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing but torch's own forward runs, on parameters that are plain tensors."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooked or "forward" in module.__dict__ or _has_any_global_hook():
        return False
    # Quantised weights are tensors of another type, whose operations are code of their own.
    return all(each is None or type(each) is nn.Parameter for each in module._parameters.values())
