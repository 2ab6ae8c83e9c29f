"""Extraction and analyses on a Dask cluster: one process drives it, and each worker keeps a model of its own.

A unit of work is one block of the run, which its worker writes itself; what comes back is a few numbers. What counts as
done is the block's mark in the run: neither Dask's state nor this process is asked. Few units are on their way at once,
so that the scheduler holds as little for a billion samples as for a hundred.
"""

import importlib
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import dask
import xarray as xr
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed, get_worker
from distributed.deploy.cluster import Cluster

from attnscope import __version__
from attnscope.analysis import Analyser
from attnscope.claims import Claims
from attnscope.run import Run, RunError, open_run
from attnscope.samples import Sample
from attnscope.stores import can_pass, is_url

if TYPE_CHECKING:
    from attnscope.extraction import Extraction
    from attnscope.loading import LoadedModel

Part = TypeVar("Part", bound=tuple[Any, ...])

_ON_THEIR_WAY = 2
_TRIES = 4
_WAIT_FOR_WORKERS = 600.0
_LOOK_EVERY = 5.0
_PARTS_OF_ANALYSIS = 4
_LOCAL: dict[str, Any] = {"threads_per_worker": 1, "host": "127.0.0.1", "memory_limit": 0}
# Dask opens these on all interfaces unless told otherwise.
_LOCAL |= {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}

_clients: dict[str, Client] = {}
_one_at_a_time = threading.Lock()


class ClusterError(ValueError):
    """A cluster that isn't there or can't be made; the message is one sentence."""


@contextmanager
def cluster_client(at: str, options: Mapping[str, object]) -> Iterator[Client]:
    """A client of a cluster: the address of a scheduler, a number of local processes, or the class of a site's cluster.

    One that is open already in this process is used again; else it is closed in the end, and so is a cluster made here.
    """
    if at in _clients:
        yield _clients[at]
        return
    # A unit that kills two workers is tried alone before it is given up.
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), _opened(at, options) as client:
        try:
            client.wait_for_workers(1, timeout=_WAIT_FOR_WORKERS)
        except TimeoutError:
            raise ClusterError(f"cluster {at!r} has had no worker for {_WAIT_FOR_WORKERS:.0f} seconds") from None
        _clients[at] = client
        try:
            yield client
        finally:
            del _clients[at]


@contextmanager
def _opened(at: str, options: Mapping[str, object]) -> Iterator[Client]:
    if "://" in at:
        try:
            client = Client(at, timeout="10s")
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(f"no Dask scheduler answers at {at!r} ({_one_line(error)})") from None
        with client:
            yield client
        return
    with _made(at, options) as cluster, Client(cluster) as client:
        yield client


def _made(at: str, options: Mapping[str, object]) -> Cluster:
    if at.isdecimal() and int(at):
        count = int(at)
        threads = str(max(1, (os.cpu_count() or 1) // count))
        return LocalCluster(n_workers=count, env={"OMP_NUM_THREADS": threads}, **{**_LOCAL, **options})
    module, _, name = at.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ClusterError(f"cluster {at!r} can't be made ({_one_line(error)})") from None
    if not (isinstance(found, type) and issubclass(found, Cluster)):
        raise ClusterError(
            f"cluster {at!r} is neither a number of processes, nor the address of a scheduler (tcp://host:port), nor a"
            " class of cluster such as dask_jobqueue.SLURMCluster"
        )
    try:
        return found(**options)
    except (TypeError, ValueError, OSError) as error:
        raise ClusterError(f"cluster {at!r} can't be made ({_one_line(error)})") from None


# -- extraction --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a worker must know to extract a block: the run, and how its model is loaded."""

    run: str
    model: str
    device: str | None
    dtype: str | None
    attn_implementation: str | None
    revision: str | None
    trust_remote_code: bool
    batch_size: int | None
    samples: int
    version: str = __version__


def extract_on(client: Client, begun: "Extraction", job: Job) -> Run:
    """Finish an extraction that this process has begun, block by block on the cluster.

    A worker that dies costs the block in its hands, which another takes. A block that kills its workers even when it
    alone is under way is left out, with the reason.
    """
    run, report = begun.run, begun.report
    report.already(run.status)
    blocks = ((job, block, [begun.prepared.sample(at) for at in block]) for block in run.missing())
    for (_, block, _), outcome in on_cluster(client, extract_block, blocks, report.check):
        if isinstance(outcome, KilledWorker):
            begun.leave_out(block, _told(outcome))
            report.add_block(block, len(block), 0)
        else:
            report.add_block(block, *outcome)
    with Claims(run.store) as claims:
        claims.remove_partial_files()
        claims.clear()
    report.already(run.status)
    report("done")
    begun.run_conditions()
    return run


def extract_block(job: Job, block: range, samples: Sequence[Sample]) -> tuple[int, int]:
    """Extract one block in this worker: the number of samples left out, and bytes written."""
    with _one_at_a_time:
        return _joined(job).part(block, samples)


@lru_cache(maxsize=1)
def _joined(job: Job) -> "Extraction":
    from attnscope.extraction import join_extraction

    if job.version != __version__:
        raise RunError(
            f"a worker of the cluster has attnscope {__version__}, and the run is extracted by {job.version}"
        )
    source = (job.model, job.device, job.dtype, job.attn_implementation, job.revision, job.trust_remote_code)
    return join_extraction(_model(*source), open_run(job.run, read_only=False), job.batch_size)


@lru_cache(maxsize=1)
def _model(
    name: str, device: str | None, dtype: str | None, kernel: str | None, revision: str | None, trust: bool
) -> "LoadedModel":
    from attnscope.loading import load_model

    return load_model(
        name,
        device=device or _own_device(),
        dtype=dtype,
        attn_implementation=kernel,
        revision=revision,
        trust_remote_code=trust,
    )


def _own_device() -> str | None:
    """One of several GPUs by the number of this worker; None where there is no choice, or the site has made it."""
    from attnscope.loading import gpus

    name, count = str(get_worker().name), len(gpus())
    return f"cuda:{int(name) % count}" if count > 1 and name.isdecimal() else None


def _told(error: KilledWorker) -> str:
    return f"its block killed every worker that took it, the last one {error.last_worker.address}"


# -- analyses ----------------------------------------------------------------------------------------------------------


def analyse_on(client: Client, run: Run, analyser: Analyser) -> xr.Dataset:
    """What an analyser gives, from parts of the run on the cluster if it can combine them, else from this process."""
    combine = getattr(analyser, "combine", None)
    if combine is None:
        return analyser.analyse(run)
    place = run.location if is_url(run.location) else str(Path(run.location).resolve())
    spans = list(_spans(run, _PARTS_OF_ANALYSIS * _threads(client)))
    found: dict[int, xr.Dataset] = {}
    parts = ((place, analyser, span, run.sample_count) for span in spans)
    for (_, _, span, _), outcome in on_cluster(client, analyse_part, parts):
        if isinstance(outcome, KilledWorker):
            raise RunError(
                f"analyser {analyser.name!r} killed every worker that took samples {span.start} to {span.stop - 1}"
            )
        found[span.start] = outcome
    return combine([found[span.start] for span in spans])


def analyse_part(place: str, analyser: Analyser, span: range, count: int) -> xr.Dataset:
    """What an analyser gives for some samples of a run of `count` samples, in this worker."""
    return analyser.analyse(_opened_run(place, count).part(span)).load()


@lru_cache(maxsize=1)
def _opened_run(place: str, count: int) -> Run:
    return open_run(place)


def _spans(run: Run, wanted: int) -> Iterator[range]:
    """Whole blocks, put together into about so many parts of like size."""
    blocks = run.blocks()
    count = min(wanted, len(blocks))
    for part in range(count):
        mine = blocks[part * len(blocks) // count : (part + 1) * len(blocks) // count]
        yield range(mine[0].start, mine[-1].stop)


# -- driving -----------------------------------------------------------------------------------------------------------


def on_cluster(
    client: Client, function: Callable[..., Any], parts: Iterable[Part], check: Callable[[], None] = lambda: None
) -> Iterator[tuple[Part, Any]]:
    """Call a function for each of the parts (its arguments) on the cluster, as they finish: part and result.

    Trouble of a network or store is tried again. Dask blames a dead worker's death on all that it had taken: whatever
    is blamed is tried once more when nothing else is under way, and if it kills again its result is the KilledWorker.
    """
    driver = _Driver(client, function, iter(parts))
    try:
        for part, outcome in driver.results():
            yield part, outcome
            check()
        for part in driver.blamed:
            yield part, driver.alone(part)
            check()
    finally:
        driver.cancel()


class _Driver:
    """Keeps a few calls under way on the cluster, and holds nothing of those that have come back."""

    def __init__(self, client: Client, function: Callable[..., Any], parts: Iterator[Any]) -> None:
        self.blamed: list[Any] = []
        self._client = client
        self._function = function
        self._parts = parts
        self._under_way: dict[object, tuple[Future, Any, int]] = {}
        self._completed = as_completed()
        self._name = f"attnscope-{function.__name__}-{uuid.uuid4().hex[:8]}"
        self._number = 0
        self._room = 0
        self._looked = 0.0

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Part and result of each call that didn't kill its worker."""
        self._fill()
        for future in self._completed:
            _, part, tries = self._under_way.pop(future.key)
            result, error = _outcome(future)
            future.release()
            if isinstance(error, KilledWorker):
                self.blamed.append(part)
            elif error is not None:
                self._again(part, tries, error)
            self._fill()
            if error is None:
                yield part, result

    def alone(self, part: Any) -> Any:
        """The result of a part that nothing else is under way with; or KilledWorker."""
        (future,) = as_completed([self._submit(part, 1)])
        result, error = _outcome(future)
        self._under_way.clear()
        if error is not None and not isinstance(error, KilledWorker):
            raise error
        return result if error is None else error

    def cancel(self) -> None:
        """Take back what is still under way."""
        if self._under_way:
            self._client.cancel([future for future, _, _ in self._under_way.values()], force=True)

    def _fill(self) -> None:
        now = time.monotonic()
        if now - self._looked > _LOOK_EVERY:
            self._looked, self._room = now, _ON_THEIR_WAY * _threads(self._client)
        while len(self._under_way) < self._room and (part := next(self._parts, None)) is not None:
            self._completed.add(self._submit(part, 1))

    def _submit(self, part: Any, tries: int) -> Future:
        self._number += 1
        future = self._client.submit(_caught, self._function, *part, key=f"{self._name}-{self._number}", pure=False)
        self._under_way[future.key] = (future, part, tries)
        return future

    def _again(self, part: Any, tries: int, error: BaseException) -> None:
        if tries == _TRIES or not can_pass(error):
            raise error
        time.sleep(tries)
        self._completed.add(self._submit(part, tries + 1))


def _caught(function: Callable[..., Any], *arguments: Any) -> tuple[Any, BaseException | None]:
    """The result of a call, or what it raised: Dask's client stops hearing of anything after some tracebacks."""
    try:
        return function(*arguments), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error.with_traceback(None)


def _outcome(future: Future) -> tuple[Any, BaseException | None]:
    error = future.exception()
    return (None, error) if error is not None else future.result()


def _threads(client: Client) -> int:
    return max(1, sum(client.nthreads().values()))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
