"""Deployments of the flows, to be served on a schedule."""

from datetime import timedelta

from prefect.deployments.runner import RunnerDeployment
from prefect.flows import Flow
from prefect.types.entrypoint import EntrypointType

from attnscope_flows.analyse import analyse_flow
from attnscope_flows.extract import extract_flow
from attnscope_flows.study import study_flow

FLOWS: dict[str, Flow] = {"extract": extract_flow, "analyse": analyse_flow, "study": study_flow}


def deployment(
    flow: str,
    name: str,
    parameters: dict[str, object],
    *,
    cron: str | None = None,
    interval: timedelta | None = None,
    rrule: str | None = None,
) -> RunnerDeployment:
    """A deployment of one of the flows ('extract', 'analyse', 'study') under a name, with at most one schedule.

    It runs from the installed package: nothing is copied, and a worker needs no more than attnscope.
    """
    made = FLOWS[flow].to_deployment(
        name,
        parameters=parameters,
        cron=cron,
        interval=interval,
        rrule=rrule,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)  # a coroutine in asynchronous code alone
    return made
