"""`attnscope demo`, `extract`, `analyse`, `report`, `study` and `compare`: from a model to a report."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from attnscope.cli.errors import DataFault
from attnscope.cli.options import (
    choices_from,
    cluster_options,
    extract_choices,
    extract_options,
    option_assignments,
    study_choices,
)
from attnscope.cli.progress import progress_line

if TYPE_CHECKING:
    from attnscope.study import AnalyserChoice, ClusterChoice, ExtractOptions, Receipt

DEMO_MODEL, DEMO_SAMPLES = "embedded:dinov2-small", "embedded:photographs"
DEFAULT_MODEL, DEFAULT_SAMPLES = "reference:clip", "reference:16"
# Model and samples of each study of the demo, by its folder inside of the demo's.
DEMO = {
    "": (DEMO_MODEL, DEMO_SAMPLES),
    "reference-clip": (DEFAULT_MODEL, DEFAULT_SAMPLES),
    "reference-vilt": ("reference:vilt", DEFAULT_SAMPLES),
    "reference-lxmert": ("reference:lxmert", DEFAULT_SAMPLES),
}
DEMO_QUERY = "vision.self --sample {sample} --layer 11 --query cls --key image --mean head --top 10"
engine_option = click.option(
    "--engine",
    type=click.Choice(["prefect", "inline"]),
    help="prefect (if it is installed): as a flow run; inline: the same functions without it.",
)
_FOLDER = click.Path(file_okay=False)


@click.command()
@click.option("--out", default="demo-out", show_default=True, type=_FOLDER, help="Folder for the run and the report.")
@engine_option
def demo(out: str, engine: str | None) -> None:
    """Run studies on models and images that installed packages and attnscope itself carry.

    A vision transformer looks at photographs, and three tiny image-text models at generated scenes; the singular modes
    of their query-key interactions and the relevance of patches and words go into reports. No model hub is needed.
    """
    from attnscope.study import DEFAULT_CHOICES, RUN_NAME, ExtractOptions, join

    for folder, (model, samples) in DEMO.items():
        asked = (model, samples, str(Path(out, folder)), DEFAULT_CHOICES, ExtractOptions(), None)
        _tell_study(_run(*asked, engine))
    run = join(out, RUN_NAME)
    click.echo(f"try:     attnscope query {run} {DEMO_QUERY.format(sample=_first_sample(run))}")


@click.command()
@click.argument("model")
@click.argument("samples")
@click.option("--out", required=True, help="Where the run goes: a folder, such as run.zarr, or a URL.")
@extract_choices
@cluster_options
@extract_options
def extract(
    model: str,
    samples: str,
    out: str,
    choices: "list[AnalyserChoice]",
    cluster: "ClusterChoice | None",
    options: "ExtractOptions",
) -> None:
    """Record what MODEL attends to in SAMPLES.

    MODEL is a hub name, a folder with safetensors, reference:NAME or embedded:NAME. SAMPLES is a folder of images, a
    JSONL, CSV or Parquet file, reference:N or embedded:NAME. The same command again does only what is missing.
    """
    from attnscope.study import extract_run

    with progress_line(model) as line:
        asked = partial(extract_run, model, samples, out, choices, options, cluster, listener=line)
        done = _blaming_samples(samples, asked)
    _tell_extracted(done)


@click.command()
@click.argument("run")
@click.argument("names", metavar="[ANALYSER]...", nargs=-1)
@option_assignments
@cluster_options
def analyse(
    run: str,
    names: Sequence[str],
    assignments: Sequence[str],
    cluster: "ClusterChoice | None",
) -> None:
    """Run analysers on a run and save what they give in it.

    Without an ANALYSER, all those whose needs the run meets.
    """
    from attnscope.run import open_run
    from attnscope.study import analyse_run, fitting_analysers, held_cluster

    opened = open_run(run)
    names = names or [choice.name for choice in fitting_analysers(opened)]
    if not names:
        raise click.UsageError(f"{run} meets the needs of no installed analyser; extract with --for ANALYSER")
    with held_cluster(cluster):
        for choice in choices_from(names, assignments):
            _tell_analysed(analyse_run(run, choice, cluster))


@click.command()
@click.argument("run")
@click.option("--out", help="The HTML file; report.html beside the run if not given.", type=click.Path(dir_okay=False))
def report(run: str, out: str | None) -> None:
    """Write a report of all analyses of a run as one HTML file."""
    from attnscope.run import open_run
    from attnscope.stores import is_url
    from attnscope.study import REPORT_NAME, write_report

    open_run(run)
    page = out or (REPORT_NAME if is_url(run) else str(Path(run).resolve().parent / REPORT_NAME))
    done = write_report(run, page)
    if not done["analyses"]:
        click.echo(f"attnscope: note: {run} holds no analyses yet; run: attnscope analyse {run}", err=True)
    click.echo(f"report:  {page}")


@click.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.argument("samples", required=False)
@click.option("--out", required=True, type=_FOLDER, help="Folder for the run and the report.")
@study_choices
@engine_option
@cluster_options
@extract_options
def study(
    model: str,
    samples: str | None,
    out: str,
    choices: "list[AnalyserChoice]",
    engine: str | None,
    cluster: "ClusterChoice | None",
    options: "ExtractOptions",
) -> None:
    """Extract, analyse and report in one.

    Writes run.zarr and report.html into a folder. Without MODEL and SAMPLES: a tiny CLIP that attnscope carries, on
    generated scenes. A reference model needs no SAMPLES. Without --analyser: qk_svd and relevance.
    """
    if samples is None and not model.startswith("reference:"):
        raise click.UsageError(
            f"name the samples that {model} shall see; reference models alone have scenes of their own"
        )
    _tell_study(_run(model, samples or DEFAULT_SAMPLES, out, choices, options, cluster, engine))


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--samples", required=True, help="What all of them look at.")
@click.option("--out", required=True, type=_FOLDER, help="Folder for the runs and comparison.html.")
@study_choices
@engine_option
@cluster_options
@extract_options
def compare(
    models: Sequence[str],
    samples: str,
    out: str,
    choices: "list[AnalyserChoice]",
    engine: str | None,
    cluster: "ClusterChoice | None",
    options: "ExtractOptions",
) -> None:
    """Run the same study on several models, and show how they differ.

    MODEL is as for study, such as the checkpoints of one training. Without --analyser: qk_svd and relevance.
    """
    done = _run(list(models), samples, out, choices, options, cluster, engine)
    runs = done["runs"]
    assert isinstance(runs, dict)
    for label, run in runs.items():
        click.echo(f"{label}: {run}")
    click.echo(f"report:  {done['report']}")


def _run(
    model: str | list[str],
    samples: str,
    out: str,
    choices: "Sequence[AnalyserChoice]",
    options: "ExtractOptions",
    cluster: "ClusterChoice | None",
    engine: str | None,
) -> "Receipt":
    """Run the study, or the comparison of several models, with Prefect if it is there and wanted, else inline."""
    alone = isinstance(model, str)
    call: Callable[..., Receipt]
    with progress_line(str(model) if alone else model[0]) as line:
        if (engine or default_engine()) == "inline":
            from attnscope.study import Stages, compare, extract_run, study

            call = partial(study if alone else compare, stages=Stages(extract=partial(extract_run, listener=line)))
            return _blaming_samples(samples, lambda: call(model, samples, out, choices, options, cluster))
        from attnscope_flows import embedded

        with embedded(line):
            from attnscope_flows.study import compare_flow, study_flow

            flows: dict[bool, Callable[..., Receipt]] = {True: study_flow, False: compare_flow}
            call = flows[alone]
            return _blaming_samples(samples, lambda: call(model, samples, out, list(choices), options, cluster))


def default_engine() -> str:
    """Prefect where it is installed."""
    from importlib.util import find_spec

    return "prefect" if find_spec("prefect") else "inline"


def _blaming_samples(samples: str, call: "Callable[[], Receipt]") -> "Receipt":
    """Call; samples that are not there at all are a fault of the command, not of the data."""
    from attnscope.samples import SampleError

    try:
        return call()
    except SampleError as error:
        if Path(samples).exists():
            raise
        raise click.ClickException(str(error)) from None


def _tell_extracted(done: "Receipt") -> None:
    words = [f"{done['extracted']} of {done['samples']} samples extracted"]
    if done["left_out"]:
        words.append(f"{done['left_out']} left out")
    click.echo(f"run:     {done['run']} ({', '.join(words)})")
    reasons = done["reasons"]
    assert isinstance(reasons, dict)
    for name, reason in reasons.items():
        click.echo(f"         left out {name!r}: {reason}")
    if not done["extracted"]:
        raise DataFault(f"none of the {done['samples']} samples could be used")


def _tell_analysed(done: "Receipt") -> None:
    from attnscope.statistics import measured

    variables = done["variables"]
    assert isinstance(variables, list)
    click.echo(f"{done['analyser']}: {', '.join(measured([*map(str, variables)]))} saved in {done['run']}")


def _tell_study(done: "Receipt") -> None:
    _tell_extracted(done)
    click.echo(f"report:  {done['report']}")


def _first_sample(run: str) -> str:
    from attnscope.run import EXTRACTED, open_run

    opened = open_run(run)
    return opened.sample_ids[int((opened.status == EXTRACTED).argmax())]


COMMANDS = (demo, extract, analyse, report, study, compare)
