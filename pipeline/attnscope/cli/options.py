"""Options that several commands share, and what their values mean."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pydantic import JsonValue

    from attnscope.study import AnalyserChoice, ClusterChoice

Command = Callable[..., object]


class Target(click.ParamType):
    """A class number, or the name of a target."""

    name = "target"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Digits as a number, all else as text."""
        text = str(value)
        return int(text) if text.isdecimal() else text


def declare(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    """The command with these options, in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def extract_options(command: Command) -> Command:
    """The options of everything that extracts; the command is given them as one ExtractOptions, `options`."""
    declared = [
        click.option(
            "--target", type=Target(), help="Take gradients of this: a class number, predicted, cls_norm, ..."
        ),
        click.option("--encoding", type=click.Choice(["float16", "exact", "compact"]), help="How attention is stored."),
        click.option(
            "--form",
            type=click.Choice(["auto", "dense", "factored", "ragged"]),
            help="Attention itself, query and key, or attention without padding; auto takes what is smallest.",
        ),
        click.option(
            "--summaries/--no-summaries",
            default=None,
            help="Store what answers questions over many samples beside the attention (not by default).",
        ),
        click.option(
            "--generate",
            type=click.IntRange(min=1),
            metavar="N",
            help="Let the model write up to N tokens behind each prompt, and record them with it.",
        ),
        click.option("--device", help="Where the model runs: cpu, cuda, cuda:1; a GPU if there is one."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Precision of the model."),
        click.option("--batch-size", type=click.IntRange(min=1), help="Samples that the model sees at once."),
        click.option("--attn-implementation", help="Attention kernel of transformers: sdpa, eager, ..."),
        click.option("--revision", help="Branch, tag or commit of the model on its hub."),
        click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
        click.option("--limit", type=click.IntRange(min=1), help="Use only the first N samples.", metavar="N"),
        click.option("--grow/--no-grow", default=None, help="Add samples that the run doesn't know yet."),
        click.option(
            "--deadline",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="Stop extracting after so many seconds; the same command goes on.",
        ),
    ]

    @wraps(command)
    def gathered(**given: object) -> object:
        from attnscope.study import ExtractOptions

        options = {name: given.pop(name) for name in ExtractOptions.model_fields}
        return command(**given, options=ExtractOptions(**options))  # type: ignore[arg-type]

    return declare(gathered, declared)


def cluster_options(command: Command) -> Command:
    """`--cluster` and `--cluster-option`; the command is given them as one ClusterChoice or None, `cluster`."""
    declared = [
        click.option(
            "--cluster",
            metavar="CLUSTER",
            help="Work on a Dask cluster: the address of a scheduler, a number of local processes, or a class.",
        ),
        click.option(
            "--cluster-option",
            "cluster_assignments",
            multiple=True,
            metavar="NAME=VALUE",
            help="Option of the class of cluster; repeatable. Values are JSON where they parse.",
        ),
    ]

    @wraps(command)
    def gathered(*, cluster: str | None, cluster_assignments: Sequence[str], **given: object) -> object:
        return command(**given, cluster=_cluster_from(cluster, cluster_assignments))

    return declare(gathered, declared)


def _cluster_from(cluster: str | None, assignments: Sequence[str]) -> "ClusterChoice | None":
    """The cluster that was chosen, if any."""
    from attnscope.study import ClusterChoice

    options = {}
    for assignment in assignments:
        name, option, value = _parsed(assignment)
        options[f"{name}.{option}" if name else option] = value
    if cluster is None:
        if assignments:
            raise click.UsageError("--cluster-option needs --cluster")
        return None
    return ClusterChoice(at=cluster, options=options)


def option_assignments(command: Command) -> Command:
    """`--option NAME=VALUE`, as often as wanted."""
    return click.option(
        "--option",
        "assignments",
        multiple=True,
        metavar="NAME=VALUE",
        help="Option of an analyser; ANALYSER.NAME=VALUE where several have it. Values are JSON where they parse.",
    )(command)


def study_choices(command: Command) -> Command:
    """`--analyser` and `--option`; the command is given them as `choices`, those of any study if none is named."""
    return _chosen(command, "--analyser", "Run this analyser; repeatable.", by_default=True)


def extract_choices(command: Command) -> Command:
    """`--for` and `--option`; the command is given them as `choices`."""
    return _chosen(command, "--for", "Record what this analyser needs; repeatable.", by_default=False)


def _chosen(command: Command, flag: str, told: str, by_default: bool) -> Command:
    @wraps(command)
    def gathered(*, names: Sequence[str], assignments: Sequence[str], **given: object) -> object:
        from attnscope.study import DEFAULT_CHOICES

        default = [choice.name for choice in DEFAULT_CHOICES] if by_default else []
        return command(**given, choices=choices_from(names or default, assignments))

    named = click.option(flag, "names", multiple=True, metavar="ANALYSER", help=told)
    return declare(gathered, [named, option_assignments])


def choices_from(names: Iterable[str], assignments: Sequence[str]) -> "list[AnalyserChoice]":
    """The named analysers with the options that are assigned to them."""
    from attnscope.analysis import make_analyser
    from attnscope.study import AnalyserChoice

    made = {analyser.name: analyser for analyser in (make_analyser(name) for name in names)}
    known = {name: [field.name for field in dataclasses.fields(made[name])] for name in made}  # type: ignore[arg-type]
    options: dict[str, dict[str, JsonValue]] = {name: {} for name in made}
    for assignment in assignments:
        name, option, value = _parsed(assignment)
        options[_owner(name, option, known)][option] = value
    choices = [AnalyserChoice(name=name, options=options[name]) for name in made]
    for choice in choices:
        choice.make()
    return choices


def _parsed(assignment: str) -> "tuple[str, str, JsonValue]":
    left, equals, text = assignment.partition("=")
    if not equals or not left.strip():
        raise click.UsageError(f"--option {assignment!r} is not NAME=VALUE")
    name, _, option = left.strip().rpartition(".")
    return name.replace("-", "_"), option.replace("-", "_"), parsed_value(text)


def parsed_value(text: str) -> "JsonValue":
    """What a value means: JSON where it parses, and text where it doesn't."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _owner(name: str, option: str, known: dict[str, list[str]]) -> str:
    """The analyser that an option is meant for."""
    if name:
        if name not in known:
            raise click.UsageError(f"--option {name}.{option}: {name!r} is not among the analysers {_listed(known)}")
        return name
    owners = [analyser for analyser, options in known.items() if option in options]
    if len(owners) > 1:
        raise click.UsageError(f"--option {option}: {_listed(owners)} have it, say which: {owners[0]}.{option}=...")
    if not owners:
        told = "; ".join(f"{analyser} has {_listed(options)}" for analyser, options in known.items())
        raise click.UsageError(f"no analyser has an option {option!r}: {told or 'none is named'}")
    return owners[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
