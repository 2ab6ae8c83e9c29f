"""Prefect flows over the plain functions of attnscope: when, where, and with what retries they are called.

Nothing here computes anything, and importing this package doesn't import Prefect: `embedded` first sets what Prefect
reads when it is imported.
"""

import os
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnscope.extraction import Progress

Listener = Callable[["Progress"], None]

listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
"""Who hears of the progress of an extraction that runs in this process."""

# What a user may have set to say where Prefect lives; any of these leaves Prefect's home alone.
_PLACES = (
    "PREFECT_HOME",
    "PREFECT_API_URL",
    "PREFECT_PROFILE",
    "PREFECT_PROFILES_PATH",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
)
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # What Prefect logs as errors, with tracebacks, is raised as well, and told by the command in one sentence.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # The first start makes the database: half a minute on a busy machine, beyond Prefect's own limit of 20 seconds.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
}


@contextmanager
def embedded(progress: Listener | None = None) -> Iterator[None]:
    """Run flows as part of one command: quietly, without waiting, and with a server of its own if the user has none.

    A server that the user has named, by the environment or a Prefect profile, is used; otherwise Prefect starts one
    for the time of the command, and keeps its database in attnscope's cache folder, where it meets no other version
    of Prefect. Nothing that is set in the environment is overridden.
    """
    _set_environment()
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    token = listener.set(progress)
    try:
        # A flow with a heartbeat waits up to a second for it in the end.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
    finally:
        listener.reset(token)


def _set_environment() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if use_own_home():
        os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_ENABLED", "true")


def use_own_home() -> bool:
    """Keep Prefect's home in attnscope's cache, unless the user has said where Prefect lives; whether that is so."""
    if any(os.environ.get(name) for name in _PLACES) or _profile_names_server(Path.home() / ".prefect"):
        return False
    home = _cache_folder() / f"prefect-{version('prefect')}"
    # Prefect makes the folder itself, but not the ones above it.
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str(home)
    return True


def _profile_names_server(home: Path) -> bool:
    """Whether the active profile of Prefect says where its server or database is."""
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text(encoding="utf-8"))
        return bool(set(_PLACES) & set(profiles["profiles"][profiles["active"]]))
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError):
        return False


def _cache_folder() -> Path:
    if chosen := os.environ.get("ATTNSCOPE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnscope"
