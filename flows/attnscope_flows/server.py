"""A Prefect server for scheduled studies: finding one, starting one, and what it should have.

Nothing here imports Prefect before it is needed: `environment` sets first what Prefect reads then.
"""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from attnscope_flows import _QUIET, use_own_home

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

POOL = "attnscope"
OWN_URL = "http://127.0.0.1:4200/api"
ZOMBIES = "attnscope: a run without a heartbeat has crashed"
HEARTBEAT = 30
# Prefect's own advice: three missed heartbeats.
_SILENT_FOR = timedelta(seconds=3 * HEARTBEAT)
_STARTS_WITHIN = 180.0
_ENDS_WITHIN = 40.0
_SERVED = {
    "PREFECT_LOGGING_LEVEL": "INFO",
    "PREFECT_LOGGING_TO_API_ENABLED": "true",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "attnscope,attnscope_flows",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
    # A server that is started here deletes what is older than its retention period, runs as well as events.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
}


class ServerError(ValueError):
    """What a Prefect server refuses, or can't be asked; the message is one sentence."""


class NoServer(ServerError):
    """No Prefect server answers; the message says how to get one."""


@contextmanager
def told() -> Iterator[None]:
    """Turn what Prefect raises at a wrong schedule or a refused request into one sentence."""
    import httpx
    import pydantic

    try:
        yield
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ServerError(f"Prefect refuses {first['input']!r} ({first['msg']})") from None
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = "; set PREFECT_API_AUTH_STRING" if status in (401, 403) else ""
        raise ServerError(f"the Prefect server refuses the request (HTTP {status}){hint}") from None
    except httpx.HTTPError as error:
        raise ServerError(f"the Prefect server can't be asked ({error})") from None


@contextmanager
def environment() -> Iterator[str]:
    """What scheduled runs need, where it is not set yet; gives the address of the server: the user's, or ours."""
    for name, value in {**_QUIET, **_SERVED}.items():
        os.environ.setdefault(name, value)
    use_own_home()
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = PREFECT_API_URL.value() or OWN_URL
    # For processes that are started here, and for this one, which has read its environment by now.
    os.environ["PREFECT_API_URL"] = url
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


def answers(url: str) -> bool:
    """Whether a Prefect server answers at an address."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def check_answers(url: str) -> None:
    """Raise NoServer unless one answers."""
    if not answers(url):
        raise NoServer(f"no Prefect server answers at {url}; start one with: attnscope serve")


@contextmanager
def own_server(url: str) -> Iterator[None]:
    """A server at this address of this machine while the context lasts, unless one answers there already.

    Its database lies where that of our commands does. It listens on this machine alone.
    """
    if answers(url):
        yield
        return
    place = urlsplit(url)
    if place.hostname not in ("127.0.0.1", "localhost"):
        raise NoServer(f"no Prefect server answers at {url}")
    command = ["server", "start", "--host", "127.0.0.1", "--port", str(place.port or 4200)]
    server = _prefect(command, quiet=True)
    try:
        _wait_for(url, server)
        yield
    finally:
        _end(server)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a process to end, which the terminal may have done before; after some time, end it."""
    try:
        process.terminate()
        process.wait(timeout=_ENDS_WITHIN)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + _STARTS_WITHIN
    while not answers(url):
        if server.poll() is not None:
            raise NoServer(f"the Prefect server for {url} ended at once (exit code {server.returncode})")
        if time.monotonic() > until:
            raise NoServer(f"the Prefect server for {url} did not start within {_STARTS_WITHIN:.0f} seconds")
        time.sleep(0.5)


def work(pool: str, limit: int) -> int:
    """Run what is scheduled on a work pool, in processes of this machine, until interrupted; the exit code."""
    # Ended by a service manager as by a terminal: what was started here ends with it.
    signal.signal(signal.SIGTERM, _interrupted)
    command = ["worker", "start", "--pool", pool, "--type", "process", "--limit", str(limit)]
    worker = _prefect(command)
    try:
        return worker.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(worker)


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _prefect(arguments: Sequence[str], quiet: bool = False) -> "subprocess.Popen[bytes]":
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        # A shell has what it runs in the background ignore it, and all that starts; Prefect's worker ends itself by it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "prefect", *arguments]
    output = subprocess.DEVNULL if quiet else None
    return subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def prepare(pool: str = POOL, devices: Sequence[str] = ()) -> list[str]:
    """Give the server what scheduled studies need; what there is now, a sentence each. Again, it changes nothing."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return [
            _with_pool(client, pool),
            _with_zombie_automation(client),
            *(_with_limit(client, device) for device in devices),
            _vacuum_words(client),
        ]


def _with_pool(client: "SyncPrefectClient", pool: str) -> str:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    return f"work pool {pool!r} takes scheduled runs"


def _with_zombie_automation(client: "SyncPrefectClient") -> str:
    if not client.read_automations_by_name(ZOMBIES):
        client.create_automation(_zombie_automation())
    return f"a run that is silent for {_SILENT_FOR.seconds} seconds is marked as crashed"


def _zombie_automation() -> "AutomationCore":
    """Mark a run as crashed whose worker was killed with it: nothing else ever ends its state."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    beat = "prefect.flow-run.heartbeat"
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name=ZOMBIES,
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={beat},
            expect={beat, *ends},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=_SILENT_FOR,
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message=f"No heartbeat for {_SILENT_FOR.seconds} seconds; the run can be resumed.",
            )
        ],
    )


def _with_limit(client: "SyncPrefectClient", device: str) -> str:
    tag = f"{platform.node()}:{device}"
    client.create_concurrency_limit(tag=tag, concurrency_limit=1)
    return f"tasks tagged {tag!r} run one at a time"


def _vacuum_words(client: "SyncPrefectClient") -> str:
    settings = client._client.get("/admin/settings").json()
    enabled = settings.get("server", {}).get("services", {}).get("db_vacuum", {}).get("enabled") or ()
    listed = enabled if isinstance(enabled, list) else [str(enabled)]
    if "flow_runs" in listed:
        return "old runs and events are deleted from the database"
    return (
        "old runs are kept in the database for ever; start the server with"
        f" PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED={_SERVED['PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED']}"
    )
