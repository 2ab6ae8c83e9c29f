"""Opening and closing a recording: what is patched meanwhile, and that it is all put back."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from attnscope.recording import functions, interface, multihead
from attnscope.recording.audit import Audit
from attnscope.recording.bystanders import stands_by
from attnscope.recording.calls import AttentionCall
from attnscope.recording.state import ACTIVE, AuditCount, Recording, UnrecordedAttention, observing


@contextmanager
def recording(
    model: nn.Module, on_call: Callable[[AttentionCall], None] | None = None, audit: bool = True
) -> Iterator[Recording]:
    """Record every attention call of a model that runs inside the context.

    Outputs of the model are what they are without it, bit for bit, and nothing stays patched after it. Recordings of
    other models may be open at the same time, in this thread and in others; none sees another's calls.

    Parameters
    ----------
    on_call
        Called with each call as soon as its attention ran, while the forward goes on; the recording then keeps none of
        them, so that memory does not grow with the number of layers.
    audit
        Count, below autograd, the attention kernels that ran, and raise where one of them was not recorded.

    Notes
    -----
    - `generate` records the prompt and every step as further calls of the same modules.
    - A compiled model runs eagerly inside the context, as the compiled code has no attention calls left to record.
    - Gradient checkpointing: the forward is recorded, its recomputation in the backward pass is not. With
      `use_reentrant=True` torch runs the forward without a graph, so that `output` has none either.

    Raises
    ------
    UnrecordedAttention
        On exit, when attention ran that was not recorded, or modules named attention ran and nothing was recorded
        at all; names the modules and the kernels.
    TypeError
        When the model is scripted, exported, or replicated over devices: its attention cannot be seen.
    """
    rec = Recording(model, _KEPT.get(id(model)) or _names(model), on_call)
    token = None
    with ExitStack() as stack:
        stack.enter_context(_patched())
        if audit:
            stack.enter_context(Audit(rec))
        else:
            rec.audit = AuditCount(ran=None)
        tap = stack.enter_context(functions.FunctionTap(rec))
        token = ACTIVE.set((*ACTIVE.get(), rec))
        OPEN.append(rec)
        try:
            yield rec
        finally:
            OPEN.remove(rec)
            ACTIVE.reset(token)
            tap.tags.clear()
            rec.close()
    _raise_unrecorded(rec)


@contextmanager
def taps_kept(model: nn.Module) -> Iterator[None]:
    """Keep the taps in place, and the names of the modules, for all recordings of a model that are opened inside.

    Putting them in place takes a millisecond, and as every class of modules then forgets where its methods are, the
    next forward another. The model must keep its modules meanwhile.
    """
    _KEPT[id(model)] = _names(model)
    try:
        with _patched():
            yield
    finally:
        _KEPT.pop(id(model), None)


def _names(model: nn.Module) -> dict[int, str]:
    """The qualified name of each module, by its identity."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"recording needs a torch.nn.Module, got {type(model).__name__!r}")
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"module {name!r} is a ScriptModule, whose attention cannot be seen; record its source")
        if isinstance(module, nn.DataParallel):
            raise TypeError(f"module {name!r} runs replicas in other threads; record its `module` instead")
        names[id(module)] = _plain_name(name)
    return names


def _plain_name(name: str) -> str:
    """The name without the wrapper that `torch.compile` puts around a module."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name


def _raise_unrecorded(rec: Recording) -> None:
    missed = [f"{name!r}: {kernel} x{times}" for (name, kernel), times in sorted(rec.audit.unrecorded.items())]
    missed += [f"{name!r}: ran in another thread" for name in sorted(rec.lost)]
    if not missed and not rec.total and rec.audit.ran is not None:
        missed = [f"{name!r}: no softmax and no known kernel" for name in sorted(rec.entered)]
    if missed:
        raise UnrecordedAttention(f"attention ran that was not recorded, in {'; '.join(missed)}")


# -- patches -----------------------------------------------------------------------------------------------------------

OPEN: list[Recording] = []
_KEPT: dict[int, dict[int, str]] = {}
_LOCK = threading.Lock()
_depth = 0
_originals: list[tuple[type, str, Any]] = []
_THREAD = threading.local()
_stance: list[AbstractContextManager[Any]] = []


@contextmanager
def _patched() -> Iterator[None]:
    """Put the taps in place while at least one recording of the process is open."""
    global _depth  # noqa: PLW0603 - counts what is patched for the whole process
    with _LOCK:
        if _depth == 0:
            _install()
        _run_eagerly()
        _depth += 1
    try:
        yield
    finally:
        with _LOCK:
            _depth -= 1
            if _depth == 0:
                _restore()


def _run_eagerly() -> None:
    """Keep compiled models from their compiled code; without dynamo, which may come later, nothing is compiled."""
    # The stance belongs to the whole process, so it goes with the patches.
    if not _stance and "torch._dynamo" in sys.modules:
        _stance.append(torch.compiler.set_stance("force_eager"))
        _stance[0].__enter__()


def _install() -> None:
    for owner, name, wrap in (
        (AttentionInterface, "get_interface", _tapped_lookup),
        (AttentionInterface, "__getitem__", _tapped_item),
        (nn.Module, "__call__", _traced_call),
        (nn.MultiheadAttention, "forward", multihead.tapped_attention),
        (nn.TransformerEncoderLayer, "forward", multihead.tapped_layer),
        (nn.TransformerEncoder, "forward", multihead.tapped_encoder),
    ):
        _originals.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, wrap(getattr(owner, name)))


def _restore() -> None:
    while _stance:
        _stance.pop().__exit__(None, None, None)
    while _originals:
        owner, name, original = _originals.pop()
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _tapped_lookup(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
        function = original(self, attn_implementation, default)
        return interface.tap(function, attn_implementation or "eager") if observing() else function

    return get_interface


def _tapped_item(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __getitem__(self: AttentionInterface, key: str) -> Any:
        function = original(self, key)
        return interface.tap(function, key) if observing() else function

    return __getitem__


def _traced_call(original: Callable[..., Any]) -> Callable[..., Any]:
    # Who else has changed the call may do anything in it.
    is_torchs_own = original is nn.Module._wrapped_call_impl

    @functools.wraps(original)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recordings = observing()
        if not recordings:
            return original(self, *args, **kwargs) if ACTIVE.get() else _other_call(original, self, args, kwargs)
        if is_torchs_own and len(recordings) == 1 and stands_by(self, args, kwargs, recordings[0]):
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                return self.forward(*args)
        for each in recordings:
            each.enter(self)
        try:
            result = original(self, *args, **kwargs)
        except BaseException:
            for each in recordings:
                each.leave()
            raise
        for each in recordings:
            frame = each.leave()
            if frame.softmaxes:
                functions.settle(each, frame)
        return result

    return __call__


def _other_call(original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call in a thread without a recording; what it does first tells whether it is part of a recorded forward.

    A part of a recorded model while that model's forward is under way is lost to the recording. The whole model is
    somebody else's forward, and none of the recording's business.
    """
    if getattr(_THREAD, "under_way", False) or torch._C._current_graph_task_id() != -1:
        return original(module, *args, **kwargs)
    for each in tuple(OPEN):
        if module is not each.model and each.owns(module) and each.frames:
            each.lost.add(each.name_of(module) or "")
    _THREAD.under_way = True
    try:
        return original(module, *args, **kwargs)
    finally:
        _THREAD.under_way = False
