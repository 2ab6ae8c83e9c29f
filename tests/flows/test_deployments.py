"""Deployments: where they run from, and the form that Prefect makes of their parameters."""

from datetime import timedelta
from pathlib import Path

import pytest

from attnscope.plugins import load_plugins

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("flow", ["extract", "analyse", "study"])
def test_deployments_run_from_the_installed_package(flow: str) -> None:
    from attnscope_flows.deployments import deployment

    made = deployment(flow, "nightly", {"model": "x"}, cron="0 2 * * *")
    assert made.entrypoint == f"attnscope_flows.{flow}.{flow}_flow"
    assert made.parameters == {"model": "x"}
    assert [schedule.schedule.cron for schedule in made.schedules] == ["0 2 * * *"]
    hourly = deployment(flow, "hourly", {}, interval=timedelta(hours=1))
    assert [schedule.schedule.interval for schedule in hourly.schedules] == [timedelta(hours=1)]


@pytest.mark.parametrize("flow", ["extract", "analyse", "study"])
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
