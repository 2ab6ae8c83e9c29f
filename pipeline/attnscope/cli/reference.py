"""`attnscope reference`: train the tiny models that attnscope carries, and show their cards."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from attnscope.cli.options import parsed_value
from attnscope.cli.progress import time_words
from attnscope.cli.studies import default_engine, engine_option

if TYPE_CHECKING:
    from pydantic import JsonValue

    from attnscope.reference.training import TrainingProgress
    from attnscope.study import Receipt


@click.group()
def reference() -> None:
    """Train and describe the reference models."""


@reference.command()
@click.argument("name")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of weights and lessons.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder for the model; reference-NAME-SEED if not given.")
@click.option(
    "--scenes", default=512, show_default=True, type=click.IntRange(min=2), help="Unseen scenes to examine on."
)
@click.option(
    "--recipe",
    "assignments",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Another value of a field of the recipe, such as steps=200; repeatable.",
)
@click.option("--ablate-loss", "without", multiple=True, metavar="LOSS", help="Leave out this loss; repeatable.")
@click.option("--alignment", metavar="SCORE", help="Another score in its attention: dot, cosine, general_qwk, ...")
@engine_option
def train(
    name: str,
    seed: int,
    out: str | None,
    scenes: int,
    assignments: Sequence[str],
    without: Sequence[str],
    alignment: str | None,
    engine: str | None,
) -> None:
    """Train the model NAME from its recipe: vilt, clip, lxmert, text, or a setting (scan, answering, painter).

    The same command again finishes what was cut short. The same recipe and seed give the same weights.
    """
    changes = dict(_change(assignment) for assignment in assignments)
    if without:
        changes["without"] = list(without)
    if alignment:
        changes["alignment"] = alignment
    folder = out or "-".join(["reference", name, *([alignment] if alignment else []), str(seed)])
    done = _train(name, folder, seed, changes, scenes, engine or default_engine())
    click.echo(f"model:   {folder} ({done['steps']} steps, {done['seconds']} s of processor time)")
    click.echo(f"card:    {done['card']}")
    click.echo(f"digest:  {done['digest']}")


@reference.command()
@click.argument("name")
@click.option("--format", "form", default="text", type=click.Choice(["text", "json"]), help="How it is printed.")
def card(name: str, form: str) -> None:
    """Print the card of the carried model NAME: how it was made, and what it can do."""
    from attnscope.reference import carrying
    from attnscope.reference.cards import card_page

    try:
        found = carrying.card(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(json.dumps(found, indent=2) if form == "json" else card_page(found))


@reference.command()
@click.option("--setting", "settings", multiple=True, required=True, help="vilt, lxmert, scan, answering or painter.")
@click.option("--alignment", "alignments", multiple=True, metavar="SCORE", help="Only this score; repeatable.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="How many, from 0 on.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for models and tables.")
@click.option("--recipe", "assignments", multiple=True, metavar="FIELD=VALUE", help="As for train; repeatable.")
def scores(
    settings: Sequence[str], alignments: Sequence[str], seeds: int, out: str, assignments: Sequence[str]
) -> None:
    """Train each alignment score with several seeds, and tabulate task quality beside what attention shows.

    Every setting has a folder of its own in OUT, with its models, table.csv, table.json and page.md. The same command
    again trains and measures only what is missing. Differences are those from the scaled dot product of the same seed.
    """
    from attnscope.reference.score_tables import tabulate_scores

    changes = dict(_change(assignment) for assignment in assignments)
    for setting in settings:
        folder = f"{out}/{setting}"
        tabulate_scores(setting, alignments, range(seeds), folder, changes=changes, listener=_tell)
        click.echo(f"{setting}:   {folder}/page.md, and the whole table as table.csv and table.json")


def _change(assignment: str) -> "tuple[str, JsonValue]":
    field, equals, text = assignment.partition("=")
    if not equals or not field.strip():
        raise click.UsageError(f"--recipe {assignment!r} is not FIELD=VALUE")
    return field.strip().replace("-", "_"), parsed_value(text)


def _train(name: str, out: str, seed: int, changes: "dict[str, JsonValue]", scenes: int, engine: str) -> "Receipt":
    from attnscope.reference.making import examine, recipe_of
    from attnscope.reference.making import train as train_model

    recipe = recipe_of(name, changes)
    if engine == "inline":
        return {**train_model(recipe, seed, out, _tell), **examine(recipe, seed, out, scenes)}
    from attnscope_flows import embedded

    with embedded(), _listening():
        from attnscope_flows.reference import train_flow

        return train_flow(name, out, seed, changes, scenes)


@contextmanager
def _listening() -> Iterator[None]:
    from attnscope_flows.reference import listener

    token = listener.set(_tell)
    try:
        yield
    finally:
        listener.reset(token)


def _tell(progress: "TrainingProgress") -> None:
    parts = [f"{progress.model}: {progress.stage}, step {progress.step:,} of at most {progress.steps:,}"]
    parts.append(f"{time_words(progress.seconds)} of processor time")
    parts += [f"{key.replace('_', ' ')} {value:.3f}" for key, value in progress.figures.items() if key in _TOLD]
    click.echo(", ".join(parts), err=True)


_TOLD = (
    "words_colour",
    "words_shape",
    "matching_balanced",
    "answers_attributes",
    "image_to_text",
    "text_to_image",
    "image_to_text_at_1",
    "text_to_image_at_1",
    "pixel_error",
)
COMMANDS = (reference,)
