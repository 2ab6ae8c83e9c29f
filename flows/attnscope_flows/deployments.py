"""Deployments of the flows, for a server that runs them on a schedule."""

from datetime import timedelta

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import Flow
from prefect.types.entrypoint import EntrypointType

from attnscope_flows.analyse import analyse_flow
from attnscope_flows.extract import extract_flow
from attnscope_flows.study import compare_flow, study_flow

FLOWS: dict[str, Flow] = {
    "extract": extract_flow,
    "analyse": analyse_flow,
    "study": study_flow,
    "compare": compare_flow,
}
# A run that is due while the one before is under way would only wait for the blocks of that one.
_ONE_AT_A_TIME = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)


def deployment(
    flow: str,
    name: str,
    parameters: dict[str, object],
    *,
    cron: str | None = None,
    interval: timedelta | None = None,
    rrule: str | None = None,
    timezone: str = "UTC",
    pool: str | None = None,
) -> RunnerDeployment:
    """A deployment of one of the flows ('extract', 'analyse', 'study', 'compare') with at most one schedule.

    It runs from the installed package: nothing is copied, and a worker needs no more than attnscope. It runs on a work
    pool where one is named, and is for `prefect.serve` where none is.
    """
    schedule: CronSchedule | IntervalSchedule | RRuleSchedule | None = None
    if cron is not None:
        schedule = CronSchedule(cron=cron, timezone=timezone)
    elif interval is not None:
        schedule = IntervalSchedule(interval=interval, timezone=timezone)
    elif rrule is not None:
        schedule = RRuleSchedule(rrule=rrule, timezone=timezone)
    made = FLOWS[flow].to_deployment(
        name,
        parameters=parameters,
        schedules=[] if schedule is None else [schedule],
        entrypoint_type=EntrypointType.MODULE_PATH,
        concurrency_limit=_ONE_AT_A_TIME,
        work_pool_name=pool,
        tags=["attnscope"],
    )
    assert isinstance(made, RunnerDeployment)  # a coroutine in asynchronous code alone
    return made


def deploy(flow: str, name: str, parameters: dict[str, object], **when: object) -> None:
    """Create the deployment on the server, or put this one in its place; see `deployment`."""
    deployment(flow, name, parameters, **when).apply()  # type: ignore[arg-type]
