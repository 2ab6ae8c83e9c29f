"""Where runs live: a folder, memory, or an object store, all as zarr stores."""

import errno
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from attnscope.object_stores import StoreError, Unreachable, object_store

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# What waiting does not mend: the same call fails in the same way.
_LASTING = (StoreError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_LASTING_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EPIPE}
# As many as Linux and macOS take in one call.
_PARTS_AT_ONCE = 1024
_APPENDING = os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def is_url(location: str | Path) -> bool:
    """Whether a location names an object store rather than a folder."""
    return bool(_URL.match(str(location)))


def open_store(location: str | Path | Store | None, read_only: bool = True) -> Store:
    """The zarr store at a folder, a URL (`s3://`, `gs://`, `az://`, `memory://`), or in memory (None).

    For reading, a URL of any scheme that obstore or fsspec opens (`https://`, `hf://`, `sftp://`, `zip://`).

    Raises
    ------
    StoreError
        When the folder can't be made or read, or the package that serves the URL is missing.
    """
    if location is None:
        return MemoryStore()
    if isinstance(location, Store):
        return location
    if is_url(location):
        return object_store(str(location), read_only)
    path = Path(location)
    if path.is_file():
        raise StoreError(f"{str(location)!r} is a file, not a run folder")
    if not read_only:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{str(location)!r} can't be written ({error.strerror})") from None
        if not os.access(path, os.W_OK):
            raise StoreError(f"{str(location)!r} can't be written (no permission, or the file system is read-only)")
    return LocalStore(path, read_only=read_only)


def can_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later: trouble of network, store or memory, none of the call itself."""
    if isinstance(error, Unreachable) or type(error).__name__ == "OutOfMemoryError":
        # Another process may give memory back.
        return True
    if isinstance(error, _LASTING) or getattr(error, "errno", None) in _LASTING_NUMBERS:
        return False
    return isinstance(error, OSError)


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Turn the operating system's word for a full disk into a StoreError of one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError("the disk is full; make room and repeat the command: it goes on where it stopped") from None


def read(store: Store, key: str) -> bytes | None:
    """The bytes of an object; None where there is none."""
    found = sync(store.get(key, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def write(store: Store, key: str, *parts: bytes) -> None:
    """Write an object as a whole, from parts that lie one behind the other."""
    unfinished = UnfinishedObject(store, key)
    try:
        unfinished.append(parts)
        unfinished.finish()
    except BaseException:
        unfinished.abandon()
        raise


class UnfinishedObject:
    """An object that grows part by part, and is there under its key when it is finished.

    In a folder it grows as a file beside the one that it becomes, as zarr writes a file, but here and now: zarr's hops
    between threads take as long as compression. Elsewhere it grows in memory.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self._path = Path(store.root) / key if isinstance(store, LocalStore) else None
        self._partial: Path | None = None
        self._parts: list[bytes] = []

    def append(self, parts: Sequence[bytes]) -> None:
        """Add parts behind the others."""
        if self._path is None:
            self._parts += parts
            return
        # Opened anew each time: a block may have more objects under way than a process may have files open.
        descriptor = self._begin(self._path) if self._partial is None else os.open(self._partial, _APPENDING)
        try:
            for start in range(0, len(parts), _PARTS_AT_ONCE):
                _write_parts(descriptor, parts[start : start + _PARTS_AT_ONCE])
        finally:
            os.close(descriptor)

    def _begin(self, path: Path) -> int:
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        flags = _APPENDING | os.O_CREAT | os.O_EXCL
        try:
            descriptor = os.open(partial, flags, 0o666)
        except FileNotFoundError:
            # Not asked for each time: of a shard's folders most are there.
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, flags, 0o666)
        self._partial = partial
        return descriptor

    def finish(self) -> None:
        """Put the object under its key."""
        if self._path is None:
            sync(self._store.set(self._key, default_buffer_prototype().buffer.from_bytes(b"".join(self._parts))))
        else:
            assert self._partial is not None
            self._partial.replace(self._path)

    def abandon(self) -> None:
        """Give up what is there so far."""
        self._parts.clear()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)


def _write_parts(descriptor: int, parts: Sequence[bytes]) -> None:
    """Many parts in one call: a call for each takes as long as the copying itself."""
    written = os.writev(descriptor, parts) if hasattr(os, "writev") else 0
    if written < sum(map(len, parts)):
        rest = memoryview(b"".join(parts))[written:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def write_once(store: Store, key: str, content: bytes) -> bytes | None:
    """Write an object unless there is one; what stands there then: of several writers' contents, one writer's.

    None when it was deleted meanwhile.
    """
    buffer = default_buffer_prototype().buffer.from_bytes(content)
    try:
        sync(store.set_if_not_exists(key, buffer))
    except FileNotFoundError:
        # Whoever tidies up may take the half-written file for a leftover.
        sync(store.set_if_not_exists(key, buffer))
    except OSError as error:
        if not isinstance(store, LocalStore) or error.errno not in _NO_LINKS:
            raise
        # The file system has no hard links: a new file is made once as well, though not at once as a whole.
        with suppress(FileExistsError), (Path(store.root) / key).open("xb") as file:
            file.write(content)
    return read(store, key)


def delete(store: Store, key: str) -> None:
    """Delete an object, if it is there."""
    sync(store.delete(key))


def delete_below(store: Store, prefix: str) -> None:
    """Delete all objects of a folder, and the folder where stores have such."""
    sync(store.delete_dir(prefix))


def keys(store: Store, prefix: str) -> Iterator[str]:
    """Names of the objects below a prefix ('' for all)."""

    async def listed() -> list[str]:
        return [key async for key in store.list_prefix(prefix)]

    return iter(sync(listed()))


def open_group(store: Store, path: str = "", mode: str = "r") -> zarr.Group:
    """The zarr group at a path of the store."""
    return zarr.open_group(store, path=path, mode=mode, zarr_format=3, use_consolidated=False)  # type: ignore[arg-type]


__all__ = [
    "StoreError",
    "UnfinishedObject",
    "Unreachable",
    "can_pass",
    "delete",
    "delete_below",
    "full_disk_told",
    "is_url",
    "keys",
    "open_group",
    "open_store",
    "read",
    "write",
    "write_once",
]
