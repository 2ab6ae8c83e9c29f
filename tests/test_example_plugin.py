"""A plugin from outside stands beside the built-in ones, everywhere: installed as a user installs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attnscope.testing import make_run

EXAMPLE = Path(__file__).parent / "example_plugin"

USE = """
    import json
    from attnscope import analyse, render
    from attnscope.analysis import make_analyser
    from attnscope.families import find_family
    from attnscope.plugins import load_plugins
    from attnscope.testing import check_analyser, make_run

    plugins = load_plugins()
    analyser = make_analyser("attention-distance")
    check_analyser(analyser)
    run = make_run()
    html = render(run, [analyse(run, make_analyser(name)) for name in ("qk_svd", "attention_distance")])
    result = run.analysis("attention_distance")
    print(json.dumps({
        "source": plugins.source("analyser", "attention_distance").distribution,
        "version": plugins.source("family", "example").version,
        "problems": plugins.problems,
        "family": find_family("example_vit").name,
        "stamp": [result.attrs["distribution"], result.attrs["version"]],
        "shown": "distance in patches" in html and "attnscope-example 1.2.3" in html,
        "distance": float(result["distance"].mean()),
    }))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the example distribution."""
    folder = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "attnscope_example.py"):
        (source / name).write_bytes((EXAMPLE / name).read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", str(folder), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def python(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-W", "error", *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_its_analyser_and_family_work_as_the_built_in_ones_do(installed: dict[str, str]) -> None:
    lines = [line.removeprefix("    ") for line in USE.splitlines()]
    told = json.loads(python(installed, "-c", "\n".join(lines)))
    assert told.pop("distance") == pytest.approx(1.4, abs=0.3)  # random attention on a 3 x 3 grid
    assert told == {
        "source": "attnscope-example",
        "version": "1.2.3",
        "problems": [],
        "family": "example",
        "stamp": ["attnscope-example", "1.2.3"],
        "shown": True,
    }


def test_the_command_line_lists_runs_and_reports_it(installed: dict[str, str], tmp_path: Path) -> None:
    make_run(location=str(tmp_path / "run.zarr"))

    def attnscope(*arguments: str) -> str:
        return python(installed, "-c", "from attnscope.cli import main; main()", *arguments)

    listed = attnscope("plugins")
    assert re.search(r"attention_distance +attnscope-example +1\.2\.3 +site", listed)
    assert re.search(r"example +attnscope-example +1\.2\.3", listed)
    attnscope("analyse", str(tmp_path / "run.zarr"), "attention_distance")
    attnscope("report", str(tmp_path / "run.zarr"), "--out", str(tmp_path / "report.html"))
    assert "distance in patches" in (tmp_path / "report.html").read_text()


@pytest.mark.server
@pytest.mark.slow
def test_a_study_flow_runs_it(installed: dict[str, str], tmp_path: Path) -> None:
    arguments = ("study", "embedded:dinov2-small", "embedded:photographs", "--out", str(tmp_path), "--limit", "2")
    options = ("--engine", "prefect", "--analyser", "attention_distance", "--option", "site=vision.self")
    python(installed, "-c", "from attnscope.cli import main; main()", *arguments, *options)
    assert "attnscope-example 1.2.3" in (tmp_path / "report.html").read_text()


def test_the_example_is_small_enough_to_copy() -> None:
    code = (EXAMPLE / "attnscope_example.py").read_text().splitlines()
    assert len(code) < 80
