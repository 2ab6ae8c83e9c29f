"""Where runs live: a folder, memory, or an object store, all as zarr stores."""

import re
from pathlib import Path

import zarr
from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore

_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class StoreError(OSError):
    """A place that can't be read or written; the message is one sentence."""


def is_url(location: str | Path) -> bool:
    """Whether a location names an object store rather than a folder."""
    return bool(_URL.match(str(location)))


def open_store(location: str | Path | Store | None, read_only: bool = True) -> Store:
    """The zarr store at a folder, a URL (`s3://`, `gs://`, `az://`, `http(s)://`), or in memory (None).

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
        return _object_store(str(location), read_only)
    path = Path(location)
    if path.is_file():
        raise StoreError(f"{str(location)!r} is a file, not a run folder")
    if not read_only:
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StoreError(f"{str(location)!r} can't be written ({error.strerror})") from None
    return LocalStore(path, read_only=read_only)


def _object_store(url: str, read_only: bool) -> Store:
    try:
        import obstore.store
    except ModuleNotFoundError:
        raise StoreError(f"opening {url!r} needs obstore; run: pip install 'attnscope[cloud]'") from None
    from zarr.storage import ObjectStore

    return ObjectStore(obstore.store.from_url(url), read_only=read_only)


def remove_partial_files(store: Store) -> int:
    """Delete what a killed writer left half written in a local store; the number of files deleted."""
    if not isinstance(store, LocalStore):
        return 0
    leftovers = list(Path(store.root).rglob("*.partial"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def open_group(store: Store, path: str = "", mode: str = "r") -> zarr.Group:
    """The zarr group at a path of the store."""
    return zarr.open_group(store, path=path, mode=mode, zarr_format=3, use_consolidated=False)  # type: ignore[arg-type]
