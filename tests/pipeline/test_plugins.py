"""Loading plugins: each on its own, conflicts and misspelt hooks named."""

import os
import subprocess
import sys
import textwrap
from importlib.metadata import distribution
from pathlib import Path

import pytest

ANALYSER = """
    from dataclasses import dataclass
    from attnscope import ExtractSpec, hookimpl

    @dataclass(frozen=True)
    class Made:
        name = {name!r}

        def requires(self):
            return ExtractSpec()

    @hookimpl
    def {hook}(register):
        register(Made)
"""
SHOW = """
    import warnings
    from attnscope.plugins import load_plugins

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugins = load_plugins()
    print("analysers:", *sorted(plugins.analysers))
    print("families:", *sorted(plugins.families))
    for warning in caught:
        print(warning.category.__name__, warning.message)
    for (kind, name), source in sorted(plugins.sources.items()):
        print(kind, name, source.distribution, source.version, source.module)
"""


def install(folder: Path, distribution: str, code: str, *, version: str = "1.0") -> None:
    """Put a distribution of one module into a folder, as pip would."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    described = folder / f"{module}-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (described / "entry_points.txt").write_text(f"[attnscope]\n{module} = {module}\n")


def load(folder: Path) -> subprocess.CompletedProcess[str]:
    """What loading the plugins says, in a process of its own that finds the folder's distributions."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHOW)], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip


def own_analysers(*more: str) -> str:
    """The line that names attnscope's own analysers, which have the names of their entry points, and some more."""
    own = {point.name for point in distribution("attnscope").entry_points if point.group == "attnscope"} - {"families"}
    assert {"qk_svd", "relevance"} <= own
    return " ".join(["analysers:", *sorted({*own, *more})])


def test_analysers_come_with_their_distribution_and_version(tmp_path: Path) -> None:
    install(tmp_path, "outside-one", ANALYSER.format(name="made", hook="attnscope_register_analysers"), version="2.5")
    told = load(tmp_path).stdout
    assert own_analysers("made") in told
    assert "analyser made outside-one 2.5 outside_one" in told
    assert "analyser qk_svd attnscope" in told


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
        ("raise RuntimeError('broken inside')", "broken inside"),
        ("answer = 42", "it implements no attnscope hook"),
        (
            ANALYSER.format(name="made", hook="attnscope_register_analyser"),
            "unknown hook 'attnscope_register_analyser'",
        ),
        (ANALYSER.format(name="", hook="attnscope_register_analysers"), "has no name"),
        (
            ANALYSER.replace("(register)", "(registry)").format(name="made", hook="attnscope_register_analysers"),
            "registry",
        ),
    ],
    ids=["import error", "raises", "no hook", "misspelt hook", "nameless", "misspelt argument"],
)
def test_a_broken_plugin_is_named_in_a_warning_and_costs_the_others_nothing(
    tmp_path: Path, code: str, reason: str
) -> None:
    install(tmp_path, "outside-broken", code)
    install(tmp_path, "outside-good", ANALYSER.format(name="good", hook="attnscope_register_analysers"))
    finished = load(tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert own_analysers("good") in finished.stdout
    [families] = [line for line in finished.stdout.splitlines() if line.startswith("families:")]
    assert {"bert", "clip", "vit"} <= set(families.split())
    [warning] = [line for line in finished.stdout.splitlines() if line.startswith("RuntimeWarning")]
    assert "'outside_broken' of outside-broken 1.0" in warning
    assert reason in finished.stdout


def test_what_a_plugin_registered_before_it_failed_is_not_kept(tmp_path: Path) -> None:
    code = (
        ANALYSER.format(name="half", hook="attnscope_register_analysers") + "        raise RuntimeError('too late')\n"
    )
    install(tmp_path, "outside-half", code)
    told = load(tmp_path).stdout
    assert own_analysers() in told
    assert "too late" in told


@pytest.mark.parametrize("name", ["relevance", "twin"])
def test_a_name_offered_twice_is_an_error_that_names_both(tmp_path: Path, name: str) -> None:
    first = "attnscope" if name == "relevance" else "outside-one"
    if name == "twin":
        install(tmp_path, "outside-one", ANALYSER.format(name=name, hook="attnscope_register_analysers"))
    install(tmp_path, "outside-two", ANALYSER.format(name=name, hook="attnscope_register_analysers"), version="3.1")
    finished = load(tmp_path)
    assert finished.returncode != 0
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith(f"attnscope.plugins.PluginConflict: analyser {name!r} is offered by {first} ")
    assert "and by outside-two 3.1; uninstall one of them" in last
