"""Deployments: where they run from, and the form that Prefect makes of their parameters."""

from datetime import timedelta
from pathlib import Path

import pytest

from attnscope.plugins import load_plugins

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("flow", ["extract", "analyse", "study", "compare"])
def test_deployments_run_from_the_installed_package(flow: str) -> None:
    from attnscope_flows.deployments import deployment

    made = deployment(flow, "nightly", {"model": "x"}, cron="0 2 * * *")
    module = "study" if flow == "compare" else flow
    assert made.entrypoint == f"attnscope_flows.{module}.{flow}_flow"
    assert made.parameters == {"model": "x"}
    assert [schedule.schedule.cron for schedule in made.schedules] == ["0 2 * * *"]
    hourly = deployment(flow, "hourly", {}, interval=timedelta(hours=1))
    assert [schedule.schedule.interval for schedule in hourly.schedules] == [timedelta(hours=1)]


@pytest.mark.parametrize("flow", ["extract", "analyse", "study", "compare"])
def test_every_parameter_of_the_form_is_described(flow: str) -> None:
    from attnscope_flows.deployments import FLOWS

    schema = FLOWS[flow].parameters.model_dump()
    parts = [schema["properties"], *(part.get("properties", {}) for part in schema["definitions"].values())]
    undescribed = [name for part in parts for name, field in part.items() if not field.get("description")]
    assert undescribed == []


def test_the_default_analysers_are_installed() -> None:
    from attnscope_flows.deployments import FLOWS

    default = FLOWS["study"].parameters.model_dump()["properties"]["analysers"]["default"]
    assert {choice["name"] for choice in default} <= set(load_plugins().analysers)


def test_runs_are_named_after_model_and_run() -> None:
    from attnscope_flows.deployments import FLOWS

    assert FLOWS["extract"].flow_run_name == "extract {model} into {out}"
    assert FLOWS["analyse"].flow_run_name == "analyse {run}"
    assert FLOWS["study"].flow_run_name == "study {model} into {out}"


def test_the_example_of_the_page_serves_a_nightly_study(monkeypatch: pytest.MonkeyPatch) -> None:
    import prefect

    page = Path(__file__).parents[2] / "docs" / "scheduling.md"
    served: list[object] = []
    monkeypatch.setattr(prefect, "serve", lambda *deployments, limit: served.extend([*deployments, limit]))
    block = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(compile(block, str(page), "exec"), {})
    nightly, limit = served
    assert limit == 1
    assert (nightly.flow_name, nightly.name) == ("study", "nightly")


def test_the_project_file_deploys_every_flow_from_the_package() -> None:
    import yaml
    from prefect.utilities.importtools import import_object

    from attnscope_flows.deployments import FLOWS

    written = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text(encoding="utf-8"))
    assert written["pull"] == []
    flows = [import_object(deployed["entrypoint"]) for deployed in written["deployments"]]
    assert {flow.name for flow in flows} == set(FLOWS)
    for flow, deployed in zip(flows, written["deployments"], strict=True):
        given = deployed.get("parameters", {})
        assert set(given) <= set(flow.parameters.properties)
        for schedule in deployed.get("schedules", ()):
            assert schedule["active"] is False
    study = next(flow for flow in flows if flow.name == "study")
    study.validate_parameters(written["deployments"][0]["parameters"])


def test_each_kind_of_schedule_is_what_was_asked_for() -> None:
    from attnscope_flows.deployments import deployment

    weekly = deployment("study", "weekly", {}, rrule="FREQ=WEEKLY;BYDAY=MO", timezone="Europe/Berlin", pool="attnscope")
    (schedule,) = weekly.schedules
    assert schedule.schedule.rrule.endswith("FREQ=WEEKLY;BYDAY=MO")
    assert schedule.schedule.timezone == "Europe/Berlin"
    assert weekly.work_pool_name == "attnscope"
    assert deployment("study", "by hand", {}).schedules == []
