"""Modules that cannot attend: torch's own linear layers, norms and activations, inside which nobody has to look.

Looking costs Python at every operation, and most operations of a transformer are inside of these modules. What is left
out there is what would have been seen and passed over: an operation on an input that no tap follows and no mark of the
audit is on, by code that is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations
from transformers.pytorch_utils import Conv1D

from attnscope.recording.state import Recording

# By their very type: a subclass may do anything in its forward.
_TYPES = frozenset({
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Identity),
    *(nn.Dropout, nn.GELU, nn.SiLU, nn.ReLU, nn.Sigmoid, nn.Tanh, Conv1D, activations.GELUActivation),
    *(activations.NewGELUActivation, activations.QuickGELUActivation, activations.FastGELUActivation),
})  # fmt: skip


def stands_by(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], recording: Recording) -> bool:
    """Whether a call can be left alone by the modes of this recording, and by no other mode, as there is none."""
    if type(module) not in _TYPES or len(args) != 1 or kwargs or type(args[0]) is not Tensor or not _is_plain(module):
        return False
    audits = 0 if recording.audit.ran is None else 1
    if torch._C._len_torch_function_stack() != 1 or torch._C._len_torch_dispatch_stack() != audits:
        return False
    return not any(follows(args[0]) for follows in recording.followers)


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing but torch's own forward runs, on parameters that are plain tensors."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooked or "forward" in module.__dict__ or _has_any_global_hook():
        return False
    # Quantised weights are tensors of another type, whose operations are code of their own.
    return all(each is None or type(each) is nn.Parameter for each in module._parameters.values())
