"""How far an extraction is, and when its time is over."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from attnscope.run import LEFT_OUT, MISSING


class DeadlineReached(RuntimeError):
    """The time that was given is over; the run can be resumed."""


@dataclass(frozen=True)
class Progress:
    """How far an extraction is: samples done of all, left out, bytes encoded, seconds since the start."""

    stage: str
    done: int
    total: int
    left_out: int
    bytes_written: int
    seconds: float
    message: str = ""


@dataclass(frozen=True)
class BlockDone:
    """A block that was committed: how many samples were left out, and the bytes of its site quantities."""

    block: range
    left_out: int
    nbytes: int


class Reporter:
    """Counts what is done and tells the caller."""

    def __init__(
        self, tell: Callable[[Progress], None] | None, started: float, total: int, deadline: float | None = None
    ) -> None:
        self.tell = tell
        self._started = started
        self._deadline = deadline
        self.total = total
        self.done = 0
        self.left_out = 0
        self.bytes = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def already(self, status: np.ndarray) -> None:
        self.done, self.left_out = int((status != MISSING).sum()), int((status == LEFT_OUT).sum())

    def check(self) -> None:
        if self._deadline is not None and self.seconds > self._deadline:
            raise DeadlineReached(
                f"stopped at the deadline with {self.done} of {self.total} samples done; repeat the command"
            )

    def add(self, committed: deque[BlockDone]) -> Iterator[range]:
        """Tell of the blocks that were committed since the last time, and give each; the writer adds to the queue."""
        while committed:
            done = committed.popleft()
            self.add_block(done.block, done.left_out, done.nbytes)
            yield done.block

    def add_block(self, block: range, left_out: int, nbytes: int) -> None:
        """Tell of one block."""
        self.done += len(block)
        self.left_out += left_out
        self.bytes += nbytes
        self("extract")

    def __call__(self, stage: str, message: str = "") -> None:
        if self.tell is not None:
            self.tell(Progress(stage, self.done, self.total, self.left_out, self.bytes, self.seconds, message))
