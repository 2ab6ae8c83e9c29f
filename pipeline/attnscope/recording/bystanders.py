"""What cannot attend: torch's own linear layers, norms and activations, views and sums; nobody has to look inside.

Looking costs Python at every operation, and most operations of a transformer are among these. What is left out there
is what would have been seen and passed over: an operation on an input that no tap follows and no mark of the audit is
on, by code that is torch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    """Whether a call can be left alone by the modes of this recording, and by no other mode, as there is none.

    It is then nothing but the forward of one of torch's own layers, on a plain tensor and plain parameters.
    """
    if type(module) not in _TYPES or kwargs or len(args) != 1 or type(args[0]) is not Tensor or _is_hooked(module):
        return False
    # Loops and no generators, here and below, and nothing asked that need not be: this runs some hundred times a
    # forward, each time with cold caches. Quantised weights are tensors of another type, with operations of their own.
    for each in module._parameters.values():
        if each is not None and type(each) is not nn.Parameter:
            return False
    audits = 0 if recording.audit.ran is None else 1
    if torch._C._len_torch_function_stack() != 1 or torch._C._len_torch_dispatch_stack() != audits or _transforms():
        return False
    return not recording.follows(args[0])


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward."""
    fields = module.__dict__
    hooked = fields["_forward_hooks"] or fields["_forward_pre_hooks"]
    hooked = hooked or fields["_backward_hooks"] or fields["_backward_pre_hooks"] or _has_any_global_hook()
    changed = "forward" in fields or module._compiled_call_impl is not None
    return bool(hooked) or changed or torch._C._get_tracing_state() is not None


def hands_on(func: Any, args: tuple[Any, ...], recording: Recording) -> bool:
    """Whether the audit of this recording, and no other mode of dispatch, would pass over all that a function does."""
    if (
        func not in _FUNCTIONS
        or recording.audit.ran is None
        or torch._C._len_torch_dispatch_stack() != 1
        or _transforms()
    ):
        return False
    for each in args:
        if type(each) is Tensor or type(each) is nn.Parameter:
            if recording.follows(each):
                return False
        elif isinstance(each, Tensor):
            return False
    return True


def _transforms() -> bool:
    """Whether tensors may be such as `vmap` has wrapped, of which nobody can ask whether the one inside is followed."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def functions_aside(*tensors: Tensor) -> AbstractContextManager[Any]:
    """Read sizes and versions of tensors past the recordings' function taps; what is no plain tensor has ways its own.

    Only for what computes nothing: other modes, and the audit, don't see it either.
    """
    plain = all(type(each) in (Tensor, nn.Parameter) for each in tensors)
    return torch._C.DisableTorchFunction() if plain else nullcontext()


@contextmanager
def modes_aside(call: AttentionCall) -> Iterator[None]:
    """Run what is computed from a call without the recordings' own modes, which would pass over it piece by piece.

    Other modes stay, and so does everything where a tensor of the call is of another type than torch's own.
    """
    active = ACTIVE.get()
    audits = sum(each.audit.ran is not None for each in active)
    plain = all(type(each) in (Tensor, nn.Parameter) for each in vars(call).values() if isinstance(each, Tensor))
    others = torch._C._len_torch_function_stack() - len(active), torch._C._len_torch_dispatch_stack() - audits
    if active and plain and others == (0, 0):
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            yield
    else:
        yield
