"""Extraction as a flow: tasks of about half a minute, each over whole blocks of the run."""

import logging
import platform

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from attnscope.stores import can_pass
from attnscope.study import AnalyserChoice, ClusterChoice, ExtractOptions, Receipt, extract_part, extract_run
from attnscope_flows import listener
from attnscope_flows.progress import progress_artifact

_log = logging.getLogger(__name__)

RETRY_AFTER = [5.0, 30.0, 120.0]
"""Seconds before each further try."""
SECONDS_OF_TASK = 30.0


def may_pass(task: Task, run: TaskRun, state: State) -> bool:
    """Whether to try again: after trouble of a network or store, but not where the call itself is wrong."""
    try:
        state.result(raise_on_failure=True)
    except Exception as error:
        passing = can_pass(error)
        if passing:
            _log.warning("%s failed and is tried again: %s", run.name, error)
        return passing
    return False


@task(
    name="extract",
    task_run_name="extract {model} into {out}, part {part}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
def extract_task(
    model: str, samples: str, out: str, analysers: list[AnalyserChoice], options: ExtractOptions, part: int
) -> Receipt:
    """Extract for about half a minute, whole blocks; a retry goes on from the last block that was finished."""
    return extract_part(model, samples, out, analysers, options, seconds=SECONDS_OF_TASK, listener=listener.get())


@task(
    name="extract on a cluster",
    task_run_name="extract {model} into {out} on {cluster.at}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
def extract_on_cluster_task(
    model: str,
    samples: str,
    out: str,
    analysers: list[AnalyserChoice],
    options: ExtractOptions,
    cluster: ClusterChoice,
) -> Receipt:
    """Drive a Dask cluster until the run is finished; the cluster's own tasks are blocks."""
    return extract_run(model, samples, out, analysers, options, cluster, listener=listener.get())


def extract_stage(
    model: str,
    samples: str,
    out: str,
    analysers: list[AnalyserChoice],
    options: ExtractOptions,
    cluster: ClusterChoice | None,
) -> Receipt:
    """Extract in tasks, one after the other; the model stays loaded between them, and a device serves one at a time."""
    with progress_artifact(out):
        if cluster is not None:
            return extract_on_cluster_task(model, samples, out, analysers, options, cluster)
        tagged = extract_task.with_options(tags=[device_tag(options.device)])
        part = 1
        while not (receipt := tagged(model, samples, out, analysers, options, part)).pop("finished"):
            part += 1
        return receipt


def device_tag(device: str | None) -> str:
    """The tag of tasks that use a device of this machine, such as `node7:cuda:0`; a limit on it keeps others off."""
    from attnscope.loading import default_device

    chosen = device or default_device()
    return f"{platform.node()}:{'cuda:0' if chosen == 'cuda' else chosen}"


@flow(name="extract", flow_run_name="extract {model} into {out}", validate_parameters=True)
def extract_flow(
    model: str,
    samples: str,
    out: str,
    analysers: list[AnalyserChoice] = [],  # noqa: B006 - Prefect copies it, and its form shows the default
    options: ExtractOptions = ExtractOptions(),  # noqa: B008 - frozen
    cluster: ClusterChoice | None = None,
) -> Receipt:
    """Record what a model attends to; the same parameters again do only what is missing.

    Args:
        model: Name on a hub, a folder with safetensors, or embedded:NAME.
        samples: Folder of images, JSONL, CSV or Parquet file, or embedded:NAME.
        out: Folder or URL of the run, such as run.zarr.
        analysers: Analysers whose needs the run shall meet.
        options: How to extract.
        cluster: A Dask cluster to work on; none to work in this process.
    """
    return extract_stage(model, samples, out, analysers, options, cluster)
