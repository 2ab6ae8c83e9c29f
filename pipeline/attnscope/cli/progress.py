"""How far an extraction is, on stderr: one line that renews itself on a terminal, else a line now and then."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnscope.extraction import Progress

_LINE_EVERY = 10.0
_RENEW_EVERY = 0.1
_BAR = 20


class ProgressLine:
    """Listens to an extraction and tells stderr: a bar on a terminal, samples, samples a second, bytes, time left."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._renews = self._stream.isatty()
        self._told = time.monotonic() if not self._renews else 0.0
        self._begun: Progress | None = None
        self._shown = False

    def __call__(self, progress: "Progress") -> None:
        """Tell about the progress, unless that was done a moment ago."""
        if self._begun is None and progress.stage == "extract":
            self._begun = progress
        now = time.monotonic()
        last = progress.done == progress.total
        if now - self._told < (_RENEW_EVERY if self._renews else _LINE_EVERY) and not (self._renews and last):
            return
        self._told = now
        words = progress_words(progress, self._begun)
        self._write(f"{bar(progress)} {words}" if self._renews and progress.stage != "plan" else words)

    def close(self) -> None:
        """Leave the terminal's line to what comes next."""
        if self._renews and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _write(self, words: str) -> None:
        self._shown = True
        self._stream.write(f"\r\x1b[K{words}" if self._renews else f"{words}\n")
        self._stream.flush()


@contextmanager
def progress_line(model: str) -> Iterator[ProgressLine]:
    """A progress line that clears itself in the end, and the only one: the hub's own bars show downloads alone."""
    line = ProgressLine()
    if not sys.stderr.isatty() or model.startswith(("embedded:", "reference:")) or Path(model).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield line
    finally:
        line.close()


def progress_words(progress: "Progress", begun: "Progress | None" = None) -> str:
    """One line: what is done, how fast since `begun`, and how long it still takes."""
    if progress.stage == "plan":
        return progress.message or "planning"
    parts = [f"{progress.done:,} of {progress.total:,} samples"]
    if progress.left_out:
        parts.append(f"{progress.left_out:,} left out")
    parts.append(size_words(progress.bytes_written))
    done = progress.done - begun.done if begun is not None else 0
    seconds = progress.seconds - begun.seconds if begun is not None else 0.0
    if done > 0 and seconds > 0:
        rate = done / seconds
        parts.append(f"{rate:.3g} samples/s")
        if progress.done < progress.total:
            parts.append(f"{time_words((progress.total - progress.done) / rate)} left")
    return ", ".join(parts)


def bar(progress: "Progress") -> str:
    """What is done as a bar."""
    full = progress.done * _BAR // max(progress.total, 1)
    return f"[{'#' * full}{'.' * (_BAR - full)}]"


def size_words(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def time_words(seconds: float) -> str:
    """A duration in the two units that suit it."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
