"""A whole study as a flow: extract, analyse, report; and the same of several models, compared."""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from attnscope.study import (
    DEFAULT_CHOICES,
    AnalyserChoice,
    ClusterChoice,
    ExtractOptions,
    Receipt,
    Stages,
    compare,
    study,
    write_comparison,
)
from attnscope_flows.analyse import analyse_task, report_task
from attnscope_flows.artifacts import link_artifact
from attnscope_flows.extract import RETRY_AFTER, extract_stage, may_pass


@task(
    name="compare",
    task_run_name="compare {out}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
def compare_task(runs: dict[str, str], out: str) -> Receipt:
    """Write the page on how the analyses of several runs differ."""
    receipt = write_comparison(runs, out)
    link_artifact(out, "comparison")
    return receipt


STAGES = Stages(extract=extract_stage, analyse=analyse_task, report=report_task, compare=compare_task)


@flow(name="study", flow_run_name="study {model} into {out}", validate_parameters=True)
def study_flow(
    model: str,
    samples: str,
    out: str,
    analysers: list[AnalyserChoice] = list(DEFAULT_CHOICES),  # noqa: B006 - Prefect copies it, and its form shows it
    options: ExtractOptions = ExtractOptions(),  # noqa: B008 - frozen
    cluster: ClusterChoice | None = None,
) -> Receipt:
    """Extract, run analysers, and write a report into a folder.

    Args:
        model: Name on a hub, a folder with safetensors, or embedded:NAME.
        samples: Folder of images, JSONL, CSV or Parquet file, or embedded:NAME.
        out: Folder for run.zarr and report.html.
        analysers: Analysers with their options.
        options: How to extract.
        cluster: A Dask cluster to work on; none to work in this process.
    """
    return study(model, samples, out, analysers, options, cluster, stages=STAGES)


@flow(name="compare", flow_run_name="compare {models} in {out}", validate_parameters=True)
def compare_flow(
    models: list[str],
    samples: str,
    out: str,
    analysers: list[AnalyserChoice] = list(DEFAULT_CHOICES),  # noqa: B006
    options: ExtractOptions = ExtractOptions(),  # noqa: B008
    cluster: ClusterChoice | None = None,
) -> Receipt:
    """Run the same study on several models, or checkpoints of one training, and show how they differ.

    Args:
        models: Names on a hub, folders with safetensors, or embedded:NAME; the others are compared with the first.
        samples: Folder of images, JSONL, CSV or Parquet file, or embedded:NAME.
        out: Folder for the runs and comparison.html.
        analysers: Analysers with their options.
        options: How to extract.
        cluster: A Dask cluster to work on; none to work in this process.
    """
    return compare(models, samples, out, analysers, options, cluster, stages=STAGES)
