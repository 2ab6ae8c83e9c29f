"""Scheduled studies on a real server and worker, both run from the installed wheel by `attnscope serve`."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import xarray as xr
from click.testing import CliRunner, Result

from attnscope.checking import check_run
from attnscope.cli import main
from attnscope.run import MISSING, open_run
from attnscope.study import ExtractOptions, extract_run
from attnscope_flows import _PLACES, _QUIET, server

from .conftest import Served, make_images

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

PATIENCE = 300.0
# Enough that a run is still under way when it is cancelled, on a machine that does nothing else too.
SLOW_SAMPLES = 2000


@pytest.fixture
def client(prefect: None) -> "Iterator[SyncPrefectClient]":
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as found:
        yield found


@pytest.fixture
def command(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command of attnscope in this process, against the served server."""
    for name in (*_PLACES, *_QUIET, *server._SERVED):
        # Remembered, so that what a command sets is forgotten after the test.
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not os.environ[name]:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_API_URL", served.url)

    def run(*arguments: object) -> Result:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done

    return run


def wait_for(what: Callable[[], object], patience: float = PATIENCE) -> None:
    until = time.monotonic() + patience
    while not what():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.3)


def runs_of(client: "SyncPrefectClient", deployment: str, state: str | None = None) -> "list[FlowRun]":
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    found = client.read_deployment_by_name(deployment)
    runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[found.id])))
    return [run for run in runs if run.state is not None and (state is None or run.state.name == state)]


def written(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_an_interval_fires_twice_and_only_what_is_new_is_done(
    command: Callable[..., Result], client: "SyncPrefectClient", model: Path, tmp_path: Path
) -> None:
    images, out = make_images(tmp_path / "images", 3), tmp_path / "study"
    told = command(
        "schedule", "study", model, images, "--out", out, "--analyser", "qk_svd", "--option", "null_draws=2",
        "--interval", "15s", "--name", "often",
    )  # fmt: skip
    assert "scheduled study/often on the work pool 'attnscope'" in told.stdout
    # Smoke: the server makes runs of an interval deployment at all, see the cap on SQLAlchemy.
    wait_for(lambda: runs_of(client, "study/often", "Scheduled"), 60)
    wait_for(lambda: runs_of(client, "study/often", "Completed"))
    first = written(out)
    assert open_run(out / "run.zarr").sample_ids == ["0-0000.png", "0-0001.png", "0-0002.png"]
    wait_for(lambda: len(runs_of(client, "study/often", "Completed")) >= 2)
    assert written(out) == first
    make_images(images, 2, seed=1)
    wait_for(lambda: "5 used" in (out / "report.html").read_text())
    client.delete_deployment(client.read_deployment_by_name("study/often").id)
    wait_for(lambda: not engines())
    run = open_run(out / "run.zarr")
    assert run.sample_ids == ["0-0000.png", "0-0001.png", "0-0002.png", "1-0000.png", "1-0001.png"]
    assert run.missing() == []
    assert run.analysis("qk_svd").attrs["samples_used"] == 5
    # The block of the first three was added to; nothing of the weights was written again.
    assert {p: t for p, t in written(out).items() if "/weights/" in p} == {
        p: t for p, t in first.items() if "/weights/" in p
    }


def begin(client: "SyncPrefectClient", deployment: str, out: Path) -> "UUID":
    """A run of a deployment that has extracted something, and is not done."""
    before = marked(out)
    run = client.create_flow_run_from_deployment(client.read_deployment_by_name(deployment).id)
    wait_for(lambda: marked(out) > before)
    return run.id


def marked(out: Path) -> int:
    """Samples that have their marks; the run may not be there yet."""
    try:
        return int((open_run(out).status != MISSING).sum())
    except ValueError:
        return 0


def state_of(client: "SyncPrefectClient", run: "UUID") -> str:
    state = client.read_flow_run(run).state
    return "" if state is None else str(state.name)


def engines() -> list[psutil.Process]:
    """Processes that run flows."""
    found = []
    for process in psutil.Process().children(recursive=True):
        # It may end while it is looked at.
        with contextlib.suppress(psutil.Error):
            if "prefect.engine" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_killed_and_a_cancelled_run_are_resumed_by_the_next(
    command: Callable[..., Result], client: "SyncPrefectClient", model: Path, tmp_path: Path
) -> None:
    from prefect.client.schemas.objects import StateType
    from prefect.states import State

    images, out = make_images(tmp_path / "images", SLOW_SAMPLES), tmp_path / "run.zarr"
    command("schedule", "extract", model, images, "--out", out, "--for", "relevance", "--batch-size", "1",
            "--encoding", "exact", "--interval", "1d", "--name", "slow")  # fmt: skip
    killed = begin(client, "extract/slow", out)
    for process in engines():
        os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: state_of(client, killed) == "Crashed")
    after_kill = marked(out)
    assert 0 < after_kill < SLOW_SAMPLES
    cancelled = begin(client, "extract/slow", out)
    client.set_flow_run_state(cancelled, State(type=StateType.CANCELLING))
    wait_for(lambda: state_of(client, cancelled) == "Cancelled")
    assert after_kill < marked(out) < SLOW_SAMPLES
    last = client.create_flow_run_from_deployment(client.read_deployment_by_name("extract/slow").id)
    wait_for(lambda: state_of(client, last.id) in ("Completed", "Failed", "Crashed"))
    assert state_of(client, last.id) == "Completed"
    client.delete_deployment(client.read_deployment_by_name("extract/slow").id)
    run = open_run(out)
    assert check_run(run).faults == ()
    whole = tmp_path / "whole.zarr"
    from attnscope.study import AnalyserChoice

    extract_run(str(model), str(images), str(whole), [AnalyserChoice(name="relevance")],
                ExtractOptions(batch_size=1, encoding="exact"))  # fmt: skip
    undisturbed = open_run(whole)
    assert run.sample_ids == undisturbed.sample_ids
    for name in undisturbed.quantities("vision.self"):
        mine, theirs = (found.array("vision.self", name) for found in (run, undisturbed))
        xr.testing.assert_equal(mine.load(), theirs.load())
    xr.testing.assert_equal(run.outputs.load(), undisturbed.outputs.load())
    np.testing.assert_array_equal(run.status, undisturbed.status)


def test_a_prepared_server_has_what_schedules_need_and_once_is_enough(
    command: Callable[..., Result], client: "SyncPrefectClient"
) -> None:
    told = [command("prepare", "--device", "cuda:7").stdout for _ in range(2)]
    assert told[0] == told[1]
    assert "old runs and events are deleted from the database" in told[0]
    assert len(client.read_automations_by_name(server.ZOMBIES)) == 1
    (automation,) = client.read_automations_by_name(server.ZOMBIES)
    assert automation.enabled
    tag = next(line.split("'")[1] for line in told[0].splitlines() if "cuda:7" in line)
    assert client.read_concurrency_limit_by_tag(tag).concurrency_limit == 1


def test_a_task_holds_the_limit_of_its_device(
    client: "SyncPrefectClient", model: Path, images: Path, tmp_path: Path
) -> None:
    from attnscope_flows import listener
    from attnscope_flows.extract import device_tag, extract_flow

    tag = device_tag(None)
    server._with_limit(client, tag.partition(":")[2])
    held: list[int] = []

    def look(progress: object) -> None:
        held.append(len(client.read_concurrency_limit_by_tag(tag).active_slots))

    token = listener.set(look)
    extract_flow(str(model), str(images), str(tmp_path / "run.zarr"))
    listener.reset(token)
    assert held and set(held) == {1}
    assert client.read_concurrency_limit_by_tag(tag).active_slots == []
    client.delete_concurrency_limit_by_tag(tag)


def test_results_are_json_and_nothing_is_pickled(served: Served) -> None:
    storage = Path(served.environment["PREFECT_HOME"]) / "storage"
    assert [p for p in storage.rglob("*") if p.is_file() and p.read_bytes()[:1] not in (b"{", b"[")] == []


def test_the_server_listens_on_this_machine_alone(served: Served) -> None:
    processes = psutil.Process(served.process.pid).children(recursive=True)
    listening = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening and set(listening) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cron", "every night"], "every night"),
        (["--interval", "soon"], "is no interval such as 90s, 15m, 6h or 1d"),
        (["--interval", "5m", "--cron", "0 2 * * *"], "one of --cron, --interval, --rrule"),
        ([], "one of --cron, --interval, --rrule"),
        (["--cron", "0 2 * * *", "--analyser", "magic"], "unknown analyser 'magic'"),
        (["--cron", "0 2 * * *", "--timezone", "Mars/Base"], "Mars/Base"),
    ],
)
def test_a_schedule_that_is_none_is_told_in_one_sentence(
    served: Served, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", served.url)
    done = CliRunner().invoke(main, ["schedule", "study", "model", "samples", "--out", "out", *arguments])
    assert done.exit_code == 2
    assert told in done.stderr and "Traceback" not in done.stderr


def test_without_a_server_the_command_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    nowhere = "http://127.0.0.1:9/api"
    monkeypatch.setenv("PREFECT_API_URL", nowhere)
    started = time.monotonic()
    with temporary_settings({PREFECT_API_URL: nowhere}):
        done = CliRunner().invoke(main, ["schedule", "study", "m", "s", "--out", "o", "--interval", "1d"])
    assert done.exit_code == 2
    assert f"no Prefect server answers at {nowhere}; start one with: attnscope serve" in done.stderr
    assert time.monotonic() - started < 30
