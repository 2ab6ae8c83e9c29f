"""Claims: which process has which part of a run in its hands, so that no two do the same work.

A claim is a small object that can be made once. Its owner renews it while it lives; where the owner is dead, or has
renewed nothing for a minute, another process makes the next one of that name (`0.0`, `0.1`, ...): exactly one can.
"""

import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from zarr.abc.store import Store
from zarr.storage import LocalStore

from attnscope.stores import delete, keys, read, write, write_once

# Inside the folder of an array: whoever lists the hierarchy doesn't take it for a part of it.
FOLDER = "samples/status/claims"
RENEW_EVERY = 10.0
STALE_AFTER = 60.0
POLL = 0.2


class Claims:
    """What this owner has claimed in one store; a context that releases it all in the end."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owner = {"owner": uuid.uuid4().hex, "machine": _machine(), "process": os.getpid()}
        self._owner["born"] = _birth(os.getpid())
        self._held: dict[str, int] = {}
        self._renewed: dict[str, float] = {}
        self._watched: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._held):
            self._forget(name, kind)

    def take(self, name: str) -> bool:
        """Whether the part of this name is now ours; False while another, who seems to live, has it."""
        begun = _clock()
        for number in itertools.count():
            key = _key(name, number)
            found = write_once(self._store, key, self._content())
            if found is None:
                return False
            if self._is_mine(found):
                break
            if not self._is_abandoned(key, found):
                return False
        with self._lock:
            self._held[name], self._renewed[name] = number, begun
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="attnscope-claims", daemon=True)
            self._thread.start()
        return True

    def holds(self, name: str) -> bool:
        """Whether a part is still ours, as the store says now: nobody has taken it over."""
        number = self._held.get(name)
        mine = None if number is None else read(self._store, _key(name, number))
        if number is None or mine is None or not self._is_mine(mine):
            return False
        return read(self._store, _key(name, number + 1)) is None

    def may_hold(self, name: str) -> bool:
        """The same, without looking where this process has renewed its claims lately, so that none can be lost."""
        return _clock() - self._renewed.get(name, -STALE_AFTER) < STALE_AFTER / 2 or self.holds(name)

    def give_up(self, name: str) -> None:
        """Forget a part that another has taken over; the claims on it are the other's to delete."""
        with self._lock:
            self._held.pop(name, None)
            self._renewed.pop(name, None)

    def release(self, name: str) -> None:
        """Give back a part that is done, with the claims that others abandoned."""
        with self._lock:
            for number in range(self._held.pop(name), -1, -1):
                delete(self._store, _key(name, number))

    def alone(self) -> bool:
        """Whether nobody else who seems to live has claimed anything."""
        return all(self._is_abandoned(key, content) for key, content in self._others())

    def clear(self) -> None:
        """Delete what others have abandoned; for when nothing is left to do, so that nobody succeeds them."""
        for key, content in self._others():
            if self._is_abandoned(key, content):
                delete(self._store, key)

    def remove_partial_files(self) -> int:
        """Delete what killed writers left half written in a local store, but nothing that a living one may be writing.

        The number of files deleted.
        """
        if not isinstance(self._store, LocalStore):
            return 0
        root = Path(self._store.root)
        # Files first, claims after: who writes a block has claimed it before.
        found = list(root.rglob("*.partial"))
        alone = bool(found) and self.alone()
        # Analyses are written without a claim.
        deleted = [p for p in found if (alone and root / "analyses" not in p.parents) or _is_old(p)]
        for path in deleted:
            path.unlink(missing_ok=True)
        return len(deleted)

    def _others(self) -> Iterator[tuple[str, bytes]]:
        for key in keys(self._store, FOLDER):
            content = None if key.endswith(".partial") else read(self._store, key)
            if content is not None and not self._is_mine(content):
                yield key, content

    def _content(self) -> bytes:
        return json.dumps(self._owner | {"renewed": datetime.now(UTC).isoformat()}).encode()

    def _is_mine(self, content: bytes) -> bool:
        return _parsed(content).get("owner") == self._owner["owner"]

    def _is_abandoned(self, key: str, content: bytes) -> bool:
        """Whether the owner is a dead process of this machine, or was not seen to renew the claim for a minute.

        That is measured by this process's own clock, since clocks of machines differ.
        """
        owner = _parsed(content)
        if owner.get("machine") == self._owner["machine"] and owner.get("born") != _birth(owner.get("process")):
            return True
        now = time.monotonic()
        seen, since = self._watched.get(key, (b"", now))
        if seen != content:
            since = now
        self._watched[key] = (content, since)
        return now - since >= STALE_AFTER

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_EVERY):
            with self._lock:
                for name, number in self._held.items():
                    try:
                        begun = _clock()
                        # A process that was suspended must not revive a claim that another has succeeded.
                        if not self.may_hold(name):
                            continue
                        write(self._store, _key(name, number), self._content())
                    except OSError:
                        # What writes the block meets the same trouble, and tells.
                        break
                    self._renewed[name] = begun

    def _forget(self, name: str, kind: type[BaseException] | None) -> None:
        # On a failure the claims that were taken over stay: they are known to be abandoned.
        try:
            delete(self._store, _key(name, self._held.pop(name)))
        except Exception:
            # The first failure is the one to tell; a claim that stays grows stale.
            if kind is None:
                raise


def _clock() -> float:
    """Seconds that also pass while the process, or the machine, is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.time()


def _key(name: str, number: int) -> str:
    return f"{FOLDER}/{name}.{number}"


def _parsed(content: bytes) -> dict[str, object]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime >= STALE_AFTER
    except FileNotFoundError:
        return False


@cache
def _machine() -> str:
    """What tells process numbers apart: this boot of the machine, and the namespace of the processes."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return uuid.uuid4().hex


def _birth(process: object) -> str:
    """When a process of this machine started, in ticks of its kernel; '' where there is none that lives."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
