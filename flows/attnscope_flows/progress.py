"""How far an extraction is, as a progress artifact of its flow run."""

import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from attnscope.cli.progress import progress_words
from attnscope_flows import Listener, listener

if TYPE_CHECKING:
    from attnscope.extraction import Progress

_log = logging.getLogger(__name__)

UPDATE_EVERY = 5.0


class ProgressArtifact:
    """Listens to an extraction and keeps an artifact up to date, every few seconds; and tells whoever else listens.

    A thread of its own talks to the server, so that extraction waits for no answer.
    """

    def __init__(self, out: str, other: Listener | None) -> None:
        self._key = artifact_key("progress", out)
        self._other = other
        self._artifact: UUID | None = None
        self._begun: Progress | None = None
        self._updated = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="attnscope-progress")
        self._sent: Future[None] | None = None

    def __call__(self, progress: "Progress") -> None:
        """Hear of the progress."""
        if self._other is not None:
            self._other(progress)
        if self._begun is None and progress.stage == "extract":
            self._begun = progress
        now = time.monotonic()
        is_busy = self._sent is not None and not self._sent.done()
        if progress.stage == "plan" or (progress.stage != "done" and (is_busy or now - self._updated < UPDATE_EVERY)):
            return
        self._updated = now
        percent, words = 100 * progress.done / max(progress.total, 1), progress_words(progress, self._begun)
        # The context says which flow run the artifact belongs to.
        self._sent = self._thread.submit(copy_context().run, self._tell, percent, words)

    def close(self) -> None:
        """Wait until the last that was heard is shown."""
        self._thread.shutdown(wait=True)

    def _tell(self, percent: float, words: str) -> None:
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(percent, self._key, words)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._artifact, percent, words)
        except Exception as error:
            # A server that doesn't answer must not end the work.
            _log.warning("the progress can't be shown: %s", error)


@contextmanager
def progress_artifact(out: str) -> Iterator[None]:
    """Show the progress of what is extracted inside, besides telling the one who listens already."""
    artifact = ProgressArtifact(out, listener.get())
    token = listener.set(artifact)
    try:
        yield
    finally:
        listener.reset(token)
        artifact.close()


def artifact_key(kind: str, place: str) -> str:
    """The key of an artifact about a place: lower-case letters, digits and dashes, the end of a long one."""
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', place.lower()).strip('-')[-100:].strip('-')}"
