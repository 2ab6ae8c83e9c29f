"""Extraction as a flow."""

import logging

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from attnscope.study import AnalyserChoice, ExtractOptions, Receipt, can_pass, extract_run
from attnscope_flows import listener

_log = logging.getLogger(__name__)

RETRY_AFTER = [5.0, 30.0, 120.0]
"""Seconds before each further try."""


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
    task_run_name="extract {model} into {out}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
def extract_task(
    model: str, samples: str, out: str, analysers: list[AnalyserChoice], options: ExtractOptions
) -> Receipt:
    """Extract into a run; a retry does only what is missing."""
    return extract_run(model, samples, out, analysers, options, listener=listener.get())


@flow(name="extract", flow_run_name="extract {model} into {out}", validate_parameters=True)
def extract_flow(
    model: str,
    samples: str,
    out: str,
    analysers: list[AnalyserChoice] = [],  # noqa: B006 - Prefect copies it, and its form shows the default
    options: ExtractOptions = ExtractOptions(),  # noqa: B008 - frozen
) -> Receipt:
    """Record what a model attends to; the same parameters again do only what is missing.

    Args:
        model: Name on a hub, a folder with safetensors, or embedded:NAME.
        samples: Folder of images, JSONL, CSV or Parquet file, or embedded:NAME.
        out: Folder or URL of the run, such as run.zarr.
        analysers: Analysers whose needs the run shall meet.
        options: How to extract.
    """
    return extract_task(model, samples, out, analysers, options)
