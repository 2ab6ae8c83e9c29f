"""recording(): read the attention of any torch model while it runs, under the kernel that it runs with."""

import sys
from types import ModuleType

from attnscope.recording.calls import AttentionCall
from attnscope.recording.session import recording, taps_kept
from attnscope.recording.state import AuditCount, Recording, UnrecordedAttention

__all__ = ["AttentionCall", "AuditCount", "Recording", "UnrecordedAttention", "recording", "taps_kept"]


class _Callable(ModuleType):
    """`attnscope.recording` is this module once anything imported it, and must still be the public function."""

    __call__ = staticmethod(recording)


sys.modules[__name__].__class__ = _Callable
