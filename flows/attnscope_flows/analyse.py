"""Analysis and report as flows."""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from attnscope.study import AnalyserChoice, ClusterChoice, Receipt, analyse_run, held_cluster, write_report
from attnscope_flows.artifacts import report_artifacts
from attnscope_flows.extract import RETRY_AFTER, may_pass


@task(
    name="analyse",
    task_run_name="{choice.name} on {run}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
def analyse_task(
    run: str, choice: AnalyserChoice, cluster: ClusterChoice | None = None, *, unless_fresh: bool = False
) -> Receipt:
    """Run one analyser and save what it gives in the run."""
    return analyse_run(run, choice, cluster, unless_fresh=unless_fresh)


@task(
    name="report",
    task_run_name="report {out}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
def report_task(run: str, out: str) -> Receipt:
    """Write the report of all analyses of a run, and show its key figures."""
    receipt = write_report(run, out)
    report_artifacts(run, out)
    return receipt


@flow(name="analyse", flow_run_name="analyse {run}", validate_parameters=True)
def analyse_flow(
    run: str,
    analysers: list[AnalyserChoice],
    report: str | None = None,
    cluster: ClusterChoice | None = None,
) -> list[Receipt]:
    """Run analysers on a run that stands.

    Args:
        run: Folder or URL of the run.
        analysers: Analysers with their options.
        report: HTML file to write afterwards, if any.
        cluster: A Dask cluster for analysers that can combine parts; none to work in this process.
    """
    with held_cluster(cluster):
        receipts = [analyse_task(run, choice, cluster) for choice in analysers]
    if report is not None:
        receipts.append(report_task(run, report))
    return receipts
