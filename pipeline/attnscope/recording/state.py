"""What a recording knows while it is open: whose modules, where in the model the forward stands, what was recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnscope.recording.calls import QUIET, AttentionCall, unseen

ACTIVE: ContextVar[tuple[Recording, ...]] = ContextVar("attnscope_recordings", default=())


class UnrecordedAttention(RuntimeError):
    """Attention ran in the recorded model that no tap saw, so what was recorded is not all of it."""


@dataclass
class AuditCount:
    """What the audit counted: attention kernels that ran, those inside a recorded call, and the others by name.

    `unrecorded` counts (module, kernel); `plain_softmaxes` counts softmaxes in modules named like attention that no
    product consumed. `ran` is None when the recording was opened without the audit.
    """

    ran: int | None = 0
    recorded: int = 0
    unrecorded: Counter[tuple[str, str]] = field(default_factory=Counter)
    plain_softmaxes: int = 0

    def __str__(self) -> str:
        return f"{self.recorded} of {self.ran} attention kernels recorded"


@dataclass(eq=False)
class Frame:
    """A module whose forward is under way. `name` is None outside the recorded model.

    `attended` once the module has asked the transformers interface for its attention.
    """

    module: nn.Module
    name: str | None
    attended: bool = False
    softmaxes: list[Softmax] = field(default_factory=list)


@dataclass(eq=False)
class Softmax:
    """A softmax that own code ran: its result, its `Scores` if they are known, and whether a call has it (`done`).

    `flipped` where it ran over the axis before the last.
    """

    tensor: Tensor
    scores: object
    frame: Frame | None
    flipped: bool = False
    done: bool = False

    def finish(self) -> None:
        """A call has it now; the module under way need not hold it any longer."""
        self.done = True
        if self.frame is not None:
            self.frame.softmaxes[:] = [each for each in self.frame.softmaxes if each is not self]


class Recording:
    """The attention calls of one model, in call order; see `recording`."""

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[int, str],
        on_call: Callable[[AttentionCall], None] | None,
    ) -> None:
        self.model = model
        self.calls: list[AttentionCall] = []
        self.audit = AuditCount()
        self.frames: list[Frame] = []
        self.lost: set[str] = set()
        self.entered: set[str] = set()
        self._names = names
        self._on_call = on_call
        self.total = 0
        self._numbers: Counter[str] = Counter()
        self.padded_shape: torch.Size | None = None
        self.origin_of: Callable[[Tensor], int | None] = lambda _: None
        # Each tells whether a tap or the audit follows a tensor, so that what is done with it matters.
        self.followers: list[Callable[[Tensor], bool]] = []
        self._counted: set[int] = set()
        self._missed: dict[int, tuple[str, str]] = {}
        self._inside = 0
        self.log_sum_exps: list[Tensor | None] = []

    def __iter__(self) -> Iterator[AttentionCall]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> AttentionCall:
        return self.calls[index]

    def follows(self, tensor: Tensor) -> bool:
        """Whether a tap or the audit follows a tensor."""
        for follower in self.followers:  # noqa: SIM110 - a generator takes twice as long
            if follower(tensor):
                return True
        return False

    # -- where the forward stands --------------------------------------------------------------------------------------

    def owns(self, module: nn.Module) -> bool:
        return id(module) in self._names

    def name_of(self, module: nn.Module) -> str | None:
        """Qualified name; of the nearest registered ancestor for a module that the model does not register."""
        return self._names.get(id(module), self.where() if self.frames else None)

    def where(self) -> str | None:
        """Name of the innermost module under way; '' outside any module, None inside a foreign one."""
        return self.frames[-1].name if self.frames else ""

    def frame(self) -> Frame | None:
        """The innermost module under way that is more than one torch function."""
        for frame in reversed(self.frames):
            if not isinstance(frame.module, nn.Softmax | nn.Dropout | nn.Identity):
                return frame
        return None

    def enter(self, module: nn.Module) -> None:
        name = self.name_of(module)
        self.frames.append(Frame(module, name))
        if name is not None and "Attention" in type(module).__name__:
            self.entered.add(name)

    def leave(self) -> Frame:
        return self.frames.pop()

    # -- what is recorded ----------------------------------------------------------------------------------------------

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Kernels that run here belong to a call which a tap records."""
        self._inside += 1
        self.log_sum_exps.clear()
        try:
            yield
        finally:
            self._inside -= 1

    def kernel_log_sum_exp(self) -> Tensor | None:
        """What the one fused kernel of the call just recorded gave as the log-sum-exp of its rows, if it gave any."""
        return self.log_sum_exps[0] if len(self.log_sum_exps) == 1 else None

    @property
    def is_inside(self) -> bool:
        return self._inside > 0

    @property
    def kernels_seen(self) -> int:
        """How many attention kernels were counted so far."""
        return len(self._counted)

    def count(self, kernel: str, origin: int | None = None) -> None:
        """An attention kernel ran in the module under way; `origin` names its softmax, which counts once."""
        name = self.where()
        if name is None or origin in self._counted:
            return
        origin = -1 - len(self._counted) if origin is None else origin
        self._counted.add(origin)
        if not self.is_inside:
            self._missed[origin] = (name, kernel)

    def cover(self, probabilities: Tensor) -> None:
        """A tap has recorded the softmax that gave these probabilities."""
        origin = self.origin_of(probabilities)
        if origin is not None:
            self._missed.pop(origin, None)

    def is_missed(self, probabilities: Tensor) -> bool:
        """Whether the audit saw these probabilities consumed where no tap did."""
        return self.origin_of(probabilities) in self._missed

    @contextmanager
    def undecided(self) -> Iterator[Callable[[], None]]:
        """Gives what declares every kernel that ran here recorded after all."""
        before = set(self._missed)

        def settle() -> None:
            for origin in set(self._missed) - before:
                del self._missed[origin]

        yield settle

    def close(self) -> None:
        self.audit.unrecorded = Counter(self._missed.values())
        if self.audit.ran is not None:
            self.audit.ran = len(self._counted)
            self.audit.recorded = len(self._counted) - len(self._missed)

    def add(self, name: str, make: Callable[[str, int, int], AttentionCall]) -> None:
        """Record the call that `make` builds from its module name, its number and its index."""
        call = make(name, self._numbers[name], self.total)
        self._numbers[name] += 1
        self.total += 1
        if self._on_call is None:
            self.calls.append(_keepable(call))
        else:
            with unseen():
                self._on_call(call)


def observing() -> tuple[Recording, ...]:
    """Recordings of this thread that may see what runs now: not our own operations, not a backward pass.

    What runs while gradients are computed is the recomputation of a checkpointed forward, recorded once already.
    """
    active = ACTIVE.get()
    if not active or QUIET.get() or torch._C._current_graph_task_id() != -1:
        return ()
    return active


def _keepable(call: AttentionCall) -> AttentionCall:
    """The call with its own copy of a key and a value that live in a cache, which later steps overwrite."""
    call.key, call.value = (_copy_of_cached(tensor, call) for tensor in (call.key, call.value))
    call.__post_init__()
    return call


def _copy_of_cached(tensor: Tensor | None, call: AttentionCall) -> Tensor | None:
    if tensor is None or call.query is None:
        return tensor
    # An inference tensor has no version: there, a key longer than the query is what a cache returns.
    cached = tensor.shape[-2] != call.query.shape[-2] if tensor.is_inference() else tensor._version > 0
    return tensor.detach().clone() if cached else tensor
