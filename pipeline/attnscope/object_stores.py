"""Stores outside of folders: buckets (`s3://`, `gs://`, `az://`), memory, and for reading alone what else has a URL.

Credentials and endpoints come from the environment, as obstore reads it: AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
AWS_ALLOW_HTTP, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME and others. Whatever fails is a StoreError.
"""

import json
import os
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, MemoryStore, ObjectStore

if TYPE_CHECKING:
    from obstore import ObjectMeta

BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "adl", "azure", "abfs", "abfss")
# A place that can't be reached is told soon; one that could be reached gets obstore's own patience.
_AT_FIRST: dict[str, Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_TIMES = {"connect_timeout": "5s", "timeout": "60s"}
_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")
# With the space before them, since the number of a port may hold them, too.
_REFUSED = (" 403", " 401", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_NO_BUCKET = ("NoSuchBucket", "bucket does not exist", "ContainerNotFound")
_NETWORK = ("error sending request", "timed out", "dns error", "credential", "retries", "connect")


class StoreError(OSError):
    """A place that can't be read or written; the message is one sentence."""


class Unreachable(StoreError):
    """A place that could not be reached now, and may be later."""


def object_store(url: str, read_only: bool) -> Store:
    """The store at a URL, which has been reached once.

    Raises
    ------
    StoreError
        When the scheme is unknown, the package that serves it is missing, or there is no bucket or permission.
    Unreachable
        When nothing answers within some seconds.
    """
    scheme = url.partition("://")[0].lower()
    if scheme == "memory":
        return _memory(url.rstrip("/")).with_read_only(read_only)
    if scheme not in BUCKETS and not read_only:
        raise StoreError(f"{url!r} can only be read; a run is written to a folder or a bucket (s3, gs, az)")
    if scheme not in (*BUCKETS, "http", "https"):
        return _elsewhere(url)
    try:
        import obstore.store
    except ModuleNotFoundError:
        return fsspec_store(url, read_only)
    kind = Web if scheme in ("http", "https") else Bucket
    connect: Any = obstore.store.from_url
    # What is given here replaces what obstore would read from the environment.
    plain = scheme == "http" or any(os.environ.get(name, "").lower() in ("1", "true") for name in _ALLOW_HTTP)
    options: dict[str, Any] = {"client_options": _TIMES | {"allow_http": plain}}
    with told(url):
        first = kind(connect(url, retry_config=_AT_FIRST, **options), read_only=True, url=url)
        first.greet()
        return kind(connect(url, **options), read_only=read_only, url=url)


@cache
def _memory(url: str) -> MemoryStore:
    # The same name is the same store for as long as the process lives.
    return MemoryStore()


def _elsewhere(url: str) -> Store:
    """The store at a URL of any other scheme that fsspec opens, for reading.

    Runs are not written there: not all that fsspec reaches writes an object as a whole, or makes one once.
    """
    try:
        store = FsspecStore.from_url(url, read_only=True)
        sync(store.exists("zarr.json"))
        return store
    except ImportError as error:
        raise StoreError(f"opening {url!r} needs another package ({_first_line(error)})") from None
    except Exception as error:
        scheme = url.partition("://")[0]
        known = "s3, gs, az, http, https and memory, and for reading those of fsspec"
        if "Protocol not known" in str(error):
            raise StoreError(f"{url!r} has the scheme {scheme!r}; known are {known}") from None
        raise StoreError(f"{url!r} can't be opened ({_first_line(error)})") from None


def fsspec_store(url: str, read_only: bool) -> Store:
    """The store at a URL by way of fsspec, where obstore isn't installed.

    Claims are not safe here: only one process at a time may write.
    """
    try:
        return FsspecStore.from_url(url, read_only=read_only)
    except ImportError as error:
        raise StoreError(
            f"opening {url!r} needs obstore ({_first_line(error)}); run: pip install 'attnscope[cloud]'"
        ) from None


class Bucket(ObjectStore):
    """A bucket, or a part of one, whose every failure is one sentence."""

    def __init__(self, store: Any, *, read_only: bool = False, url: str = "") -> None:
        super().__init__(store, read_only=read_only)
        self._url = url

    def __str__(self) -> str:
        # obstore panics where it is to describe an Azure store whose account comes from the environment.
        return self._url

    def with_read_only(self, read_only: bool = False) -> Self:
        """The same place, for reading only or not."""
        return type(self)(self.store, read_only=read_only, url=self._url)

    def greet(self) -> None:
        """Raise StoreError unless the bucket answers."""
        import obstore

        # Looking at one object alone doesn't tell a bucket that isn't there from an object that isn't.
        obstore.list_with_delimiter(self.store)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of an object."""
        with told(self._url):
            return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        """Whether there is an object."""
        with told(self._url):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object."""
        with told(self._url):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object that isn't there."""
        with told(self._url):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        """Delete an object."""
        with told(self._url):
            await super().delete(key)

    async def _list(self, prefix: str | None = None) -> "AsyncGenerator[ObjectMeta, None]":
        with told(self._url):
            async for found in super()._list(prefix):
                yield found

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """What lies directly below a prefix."""
        with told(self._url):
            async for name in super().list_dir(prefix):
                yield name


class Web(Bucket):
    """A folder that a web server shows, which can't be listed: groups say themselves what they hold."""

    def greet(self) -> None:
        """Raise StoreError unless the server answers."""
        import obstore

        with suppress(FileNotFoundError):
            obstore.head(self.store, "zarr.json")

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """The members of a group."""
        found = await self.get(f"{prefix}/zarr.json".lstrip("/"), default_buffer_prototype())
        attributes = {} if found is None else json.loads(found.to_bytes()).get("attributes", {})
        for name in attributes.get("members", ()):
            yield name

    async def _list(self, prefix: str | None = None) -> "AsyncGenerator[ObjectMeta, None]":
        raise StoreError(f"{self._url!r} can't be listed; check a copy of it in a folder or bucket")
        yield


@contextmanager
def told(url: str) -> Iterator[None]:
    """Turn what obstore raises into a StoreError of one sentence."""
    try:
        yield
    except (FileNotFoundError, StoreError) as error:
        if _says(error, _NO_BUCKET):
            raise StoreError(f"the bucket of {url!r} does not exist") from None
        raise
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        raise _sentence(url, error) from None


def _sentence(url: str, error: Exception) -> StoreError:
    if _says(error, _NO_BUCKET):
        return StoreError(f"the bucket of {url!r} does not exist")
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError") or _says(error, _REFUSED):
        return StoreError(f"{url!r} refuses access; the credentials in the environment don't allow it")
    kind = Unreachable if _says(error, _NETWORK) else StoreError
    return kind(f"{url!r} can't be reached ({_first_line(error)})")


def _says(error: Exception, words: tuple[str, ...]) -> bool:
    text = str(error)
    return any(word in text for word in words)


def _first_line(error: Exception) -> str:
    """What happened, without obstore's account of its own structures."""
    text = str(error).partition("\n\nDebug source")[0]
    return re.sub(r" in [\d.]+\w+s, after .*? - ", ": ", " ".join(text.split())) or type(error).__name__
