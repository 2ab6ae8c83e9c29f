"""`attnscope serve`, `schedule` and `prepare`: studies that run by the clock."""

import re
from collections.abc import Sequence
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import click

from attnscope.cli.options import (
    Command,
    choices_from,
    cluster_options,
    declare,
    extract_choices,
    extract_options,
    option_assignments,
    study_choices,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

    from attnscope.study import AnalyserChoice, ClusterChoice, ExtractOptions

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_POOL = click.option(
    "--pool", default="attnscope", show_default=True, help="The work pool whose workers do it.", metavar="NAME"
)


class Interval(click.ParamType):
    """A duration, such as 90s, 15m, 6h or 1d."""

    name = "interval"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """A number and a unit as a duration."""
        found = re.fullmatch(r"(\d+)([smhd])", str(value).strip())
        if found is None or not int(found[1]):
            self.fail(f"{value!r} is no interval such as 90s, 15m, 6h or 1d")
        return timedelta(**{_UNITS[found[2]]: int(found[1])})


def schedule_options(command: Command) -> Command:
    """What every scheduled flow has: a schedule, a name, a pool; the command is given them as `when`."""
    declared = [
        click.option("--cron", help="When, as cron has it: '0 2 * * *' is every night at two."),
        click.option("--interval", type=Interval(), help="How often: 90s, 15m, 6h, 1d."),
        click.option("--rrule", help="When, as calendars have it: 'FREQ=WEEKLY;BYDAY=MO'."),
        click.option("--timezone", default="UTC", show_default=True, help="What the schedule's hours are in."),
        click.option("--name", help="Name of the deployment; made of what it works on if not given."),
        _POOL,
    ]

    @wraps(command)
    def gathered(**given: object) -> object:
        when = {name: given.pop(name) for name in ("cron", "interval", "rrule", "timezone", "name", "pool")}
        if sum(when[name] is not None for name in ("cron", "interval", "rrule")) != 1:
            raise click.UsageError("say when it shall run: one of --cron, --interval, --rrule")
        return command(**given, when=when)

    return declare(gathered, declared)


@click.command()
@_POOL
@click.option("--limit", default=1, show_default=True, type=click.IntRange(min=1), help="Runs at the same time.")
def serve(pool: str, limit: int) -> int:
    """Run what is scheduled, until interrupted.

    Uses the Prefect server that PREFECT_API_URL or the active profile names; without one, starts its own on
    127.0.0.1:4200, with a database in attnscope's cache folder.
    """
    from attnscope_flows import server

    with server.environment() as url, server.told(), server.own_server(url):
        server.prepare(pool)
        click.echo(f"serving the work pool {pool!r}; what runs is shown at {url.removesuffix('/api')}")
        return server.work(pool, limit)


@click.command()
@_POOL
@click.option(
    "--device", "devices", multiple=True, help="A device that one task at a time may use; every GPU if not given."
)
def prepare(pool: str, devices: Sequence[str]) -> None:
    """Give a Prefect server what scheduled studies need.

    A work pool; an automation that ends runs whose worker was killed; a limit of one task for each device of this
    machine; and it says whether the server deletes old runs. Doing it again changes nothing.
    """
    from attnscope.loading import gpus
    from attnscope_flows import server

    with server.environment() as url, server.told():
        server.check_answers(url)
        for sentence in server.prepare(pool, devices or gpus()):
            click.echo(sentence)


@click.group()
def schedule() -> None:
    """Schedule a flow on a Prefect server; attnscope serve runs it."""


@schedule.command("study")
@click.argument("model")
@click.argument("samples")
@click.option("--out", required=True, help="Folder for the run and the report.")
@study_choices
@schedule_options
@cluster_options
@extract_options
def schedule_study(
    model: str,
    samples: str,
    out: str,
    choices: "list[AnalyserChoice]",
    when: dict[str, object],
    cluster: "ClusterChoice | None",
    options: "ExtractOptions",
) -> None:
    """Extract, analyse and report by the clock.

    Samples that came since the last time are added (see --grow; --no-grow to refuse them), and where nothing is new
    nothing is done.
    """
    parameters = _parameters(model, samples, out, choices, options, cluster)
    _deploy("study", when, parameters, f"{model} {samples}")


@schedule.command("extract")
@click.argument("model")
@click.argument("samples")
@click.option("--out", required=True, help="Where the run goes: a folder, such as run.zarr, or a URL.")
@extract_choices
@schedule_options
@cluster_options
@extract_options
def schedule_extract(
    model: str,
    samples: str,
    out: str,
    choices: "list[AnalyserChoice]",
    when: dict[str, object],
    cluster: "ClusterChoice | None",
    options: "ExtractOptions",
) -> None:
    """Record what a model attends to, by the clock; samples that came since are added."""
    parameters = _parameters(model, samples, out, choices, options, cluster)
    _deploy("extract", when, parameters, f"{model} {samples}")


@schedule.command("analyse")
@click.argument("run")
@click.argument("names", metavar="ANALYSER...", nargs=-1, required=True)
@click.option("--report", help="HTML file to write afterwards.")
@schedule_options
@option_assignments
@cluster_options
def schedule_analyse(
    run: str,
    names: Sequence[str],
    report: str | None,
    when: dict[str, object],
    assignments: Sequence[str],
    cluster: "ClusterChoice | None",
) -> None:
    """Run analysers on a run by the clock."""
    parameters: dict[str, object] = {
        "run": _anywhere(run),
        "analysers": _plain(choices_from(names, assignments)),
        "report": None if report is None else _anywhere(report),
        "cluster": _plain_cluster(cluster),
    }
    _deploy("analyse", when, parameters, f"{run} {' '.join(names)}")


@schedule.command("compare")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--samples", required=True, help="What all of them look at.")
@click.option("--out", required=True, help="Folder for the runs and comparison.html.")
@study_choices
@schedule_options
@cluster_options
@extract_options
def schedule_compare(
    models: Sequence[str],
    samples: str,
    out: str,
    choices: "list[AnalyserChoice]",
    when: dict[str, object],
    cluster: "ClusterChoice | None",
    options: "ExtractOptions",
) -> None:
    """Run the same study on several models by the clock, and show how they differ."""
    parameters = _parameters("", samples, out, choices, options, cluster)
    del parameters["model"]
    parameters["models"] = [_existing(model) for model in models]
    _deploy("compare", when, parameters, f"{' '.join(models)} {samples}")


def _parameters(
    model: str,
    samples: str,
    out: str,
    choices: "Sequence[AnalyserChoice]",
    options: "ExtractOptions",
    cluster: "ClusterChoice | None",
) -> dict[str, object]:
    """The parameters of a flow as plain values that mean the same in every folder.

    Scheduled runs grow unless they are told not to.
    """
    if options.grow is None:
        options = options.model_copy(update={"grow": True})
    return {
        "model": _existing(model),
        "samples": _existing(samples),
        "out": _anywhere(out),
        "analysers": _plain(choices),
        "options": options.model_dump(mode="json", exclude_none=True),
        "cluster": _plain_cluster(cluster),
    }


def _deploy(flow: str, when: dict[str, object], parameters: dict[str, object], about: str) -> None:
    from attnscope_flows import server

    pool = str(when["pool"])
    with server.environment() as url, server.told():
        server.check_answers(url)
        server.prepare(pool)
        from attnscope_flows.deployments import deploy

        name = str(when.pop("name") or re.sub(r"[^\w.-]+", "-", about).strip("-.")[-80:])
        deploy(flow, name, parameters, **when)
    click.echo(f"scheduled {flow}/{name} on the work pool {pool!r} at {url}; attnscope serve runs it when it is due")


def _plain(models: "Sequence[BaseModel]") -> list[dict[str, object]]:
    return [model.model_dump(mode="json") for model in models]


def _plain_cluster(cluster: "ClusterChoice | None") -> dict[str, object] | None:
    return None if cluster is None else cluster.model_dump(mode="json")


def _existing(name: str) -> str:
    """A place that is there as every folder knows it; any other name stays as it is."""
    return _anywhere(name) if Path(name).exists() else name


def _anywhere(place: str) -> str:
    """A place as every folder knows it."""
    return place if "://" in place else str(Path(place).resolve())


COMMANDS = (serve, schedule, prepare)
