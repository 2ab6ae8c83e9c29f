"""Flows under a real Prefect: the same numbers as the library, and errors that keep what they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

import attnscope
from attnscope.analysis import AnalyserError, make_analyser
from attnscope.cli import main
from attnscope.extraction import Progress
from attnscope.loading import ModelError
from attnscope.run import open_run
from attnscope.study import AnalyserChoice, ClusterChoice, ExtractOptions

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect"), pytest.mark.slow]

CHOICES = [
    AnalyserChoice(name="qk_svd", options={"null_draws": 3}),
    AnalyserChoice(name="relevance", options={"target": 1}),
]


def test_a_study_gives_the_numbers_of_the_library(model: Path, images: Path, tmp_path: Path) -> None:
    from attnscope_flows.study import study_flow

    receipt = study_flow(str(model), str(images), str(tmp_path), CHOICES)
    assert receipt["extracted"] == 5
    flowed = open_run(tmp_path / "run.zarr")
    analysers = [make_analyser(choice.name, choice.options) for choice in CHOICES]
    plain = attnscope.extract(str(model), str(images), analysers)
    np.testing.assert_array_equal(flowed.attention("vision.self"), plain.attention("vision.self"))
    for analyser in analysers:
        expected = attnscope.analyse(plain, analyser, save=False)
        xr.testing.assert_equal(flowed.analysis(analyser.name).load(), expected)
    assert "relevance" in (tmp_path / "report.html").read_text()


def test_parameters_come_as_json(model: Path, images: Path, tmp_path: Path) -> None:
    from attnscope_flows.analyse import analyse_flow
    from attnscope_flows.extract import extract_flow

    run = str(tmp_path / "run.zarr")
    plain = {"model": str(model), "samples": str(images), "out": run, "options": {"limit": 2, "encoding": "exact"}}
    assert extract_flow(**plain, analysers=[{"name": "relevance"}])["extracted"] == 2
    (analysed, reported) = analyse_flow(run, [{"name": "relevance"}], str(tmp_path / "r.html"))
    assert analysed["analyser"] == "relevance"
    assert reported["analyses"] == ["relevance"]
    assert open_run(run).spec.encoding == "exact"


def test_a_repeated_study_does_no_model_work(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope_flows.study import study_flow

    first = study_flow(str(model), str(images), str(tmp_path), CHOICES[:1])

    def refuse(*_: object) -> None:
        raise AssertionError("a block was extracted again")

    monkeypatch.setattr("attnscope.blocks._extract_block", refuse)
    assert study_flow(str(model), str(images), str(tmp_path), CHOICES[:1]) == first


def test_progress_reaches_the_listener(model: Path, images: Path, tmp_path: Path) -> None:
    from attnscope_flows import listener
    from attnscope_flows.extract import extract_flow

    heard: list[Progress] = []
    token = listener.set(heard.append)
    extract_flow(str(model), str(images), str(tmp_path / "run.zarr"))
    listener.reset(token)
    assert [progress.done for progress in heard if progress.stage == "done"] == [5]


def test_what_cannot_pass_is_raised_at_once(images: Path, tmp_path: Path) -> None:
    from attnscope_flows.extract import extract_flow
    from attnscope_flows.study import study_flow

    with pytest.raises(ModelError, match="unknown model 'embedded:nope'"):
        extract_flow("embedded:nope", str(images), str(tmp_path / "run.zarr"))
    with pytest.raises(AnalyserError, match="unknown analyser 'magic'"):
        study_flow("embedded:nope", str(images), str(tmp_path), [AnalyserChoice(name="magic")])


def test_trouble_that_can_pass_is_tried_again(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow

    from attnscope_flows import extract as module

    tried: list[int] = []

    def flaky(*arguments: object, **_: object) -> dict[str, object]:
        tried.append(1)
        if len(tried) < 3:
            raise ConnectionResetError("the store went away")
        return {"run": "x"}

    monkeypatch.setattr(module, "extract_part", flaky)
    task = module.extract_task.with_options(retry_delay_seconds=[0, 0, 0])

    @flow
    def trial() -> dict[str, object]:
        return task(str(model), str(images), str(tmp_path), [], ExtractOptions(), 1)

    assert trial() == {"run": "x"}
    assert len(tried) == 3


def test_a_flow_drives_a_cluster_and_shows_what_came_of_it(model: Path, images: Path, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    from attnscope_flows.study import study_flow

    cluster = ClusterChoice(at="1")
    receipt = study_flow(str(model), str(images), str(tmp_path / "study"), CHOICES[:1], cluster=cluster)
    assert receipt["extracted"] == 5
    plain = attnscope.extract(str(model), str(images), [make_analyser("qk_svd")])
    run = open_run(tmp_path / "study/run.zarr")
    np.testing.assert_array_equal(run.attention("vision.self"), plain.attention("vision.self"))
    with get_client(sync_client=True) as client:
        shown = {
            a.key: a for a in client.read_artifacts(limit=200) if a.key and tmp_path.name.replace("_", "-") in a.key
        }
    kinds = {key.partition("-")[0]: artifact for key, artifact in shown.items()}
    assert set(kinds) == {"progress", "results", "figure", "report"}
    assert float(kinds["progress"].data) == 100
    assert "5 of 5 samples" in kinds["progress"].description
    rows = json.loads(kinds["results"].data)
    assert {row["analyser"] for row in rows} == {"qk_svd"} and all(row["samples"] == 5 for row in rows)
    assert kinds["figure"].data.startswith("data:image/png;base64,iVBOR")
    assert (tmp_path / "study/report.html").as_uri() in kinds["report"].data


def test_the_command_line_runs_the_flow(model: Path, images: Path, tmp_path: Path) -> None:
    command = ["study", str(model), str(images), "--out", str(tmp_path / "s"), "--engine", "prefect", "--limit", "2"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "(2 of 2 samples extracted)" in result.stdout
    assert (tmp_path / "s" / "report.html").exists()


@pytest.mark.parametrize(
    ("model_name", "samples", "code", "told"),
    [
        ("embedded:nope", "images", 2, "unknown model 'embedded:nope'"),
        ("model", "absent", 2, "are neither a folder nor a file"),
        ("model", "empty", 1, "hold no sample"),
    ],
)
def test_errors_in_a_flow_are_the_same_sentences(
    model: Path, images: Path, tmp_path: Path, model_name: str, samples: str, code: int, told: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"images": images, "absent": tmp_path / "absent", "empty": tmp_path / "empty", "model": model}
    command = ["study", str(places.get(model_name, model_name)), str(places[samples]), "--out", str(tmp_path / "s")]
    result = CliRunner().invoke(main, [*command, "--engine", "prefect"])
    assert result.exit_code == code
    assert told in result.stderr.splitlines()[-1]


def test_a_command_brings_its_own_server_and_says_nothing_of_it(model: Path, images: Path, tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**bare, "HOME": str(tmp_path), "ATTNSCOPE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "attnscope.cli", "study", str(model), str(images), "--out", str(tmp_path / "s")]
    finished = subprocess.run(
        [*command, "--engine", "prefect"], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    assert "report:  " in finished.stdout
    # A line every ten seconds at most, on how far it is.
    assert all("samples" in line or "checking" in line for line in finished.stderr.splitlines()), finished.stderr
    assert [path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()] == ["prefect"]
    assert not list((tmp_path / ".prefect").glob("*.db"))
