"""`attnscope reference`: train the tiny models that attnscope carries, and show their cards."""

import dataclasses
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


_processes_option = click.option(
    "--processes", default=1, show_default=True, type=click.IntRange(min=1), help="Trainings at a time, a thread each."
)


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
@click.option("--samples", help="Learn from these images and texts in the place of generated scenes.")
@click.option("--device", help="cpu or cuda.")
@click.option("--dtype", help="float32, or bfloat16 for most of a step; weights stay float32.")
@click.option("--processes", type=click.IntRange(min=1), help="Processes that share each batch; on cuda a device each.")
@click.option("--alignment", metavar="SCORE", help="Another score in its attention: dot, cosine, general_qwk, ...")
@engine_option
def train(
    name: str,
    seed: int,
    out: str | None,
    scenes: int,
    assignments: Sequence[str],
    without: Sequence[str],
    samples: str | None,
    device: str | None,
    dtype: str | None,
    processes: int | None,
    alignment: str | None,
    engine: str | None,
) -> None:
    """Train the model NAME from its recipe: vilt, clip, lxmert, text, simla, mapper, scan, answering or painter.

    The same command again finishes what was cut short. The same recipe and seed give the same weights.
    """
    changes = dict(_change(assignment) for assignment in assignments)
    named = {"samples": samples, "device": device, "dtype": dtype, "processes": processes}
    changes |= {field: value for field, value in named.items() if value is not None}
    if without:
        changes["without"] = list(without)
    if alignment:
        changes["alignment"] = alignment
    folder = out or "-".join(["reference", name, *([alignment] if alignment else []), str(seed)])
    done = _train(name, folder, seed, changes, scenes, engine or default_engine())
    for note in done["notes"]:  # type: ignore[union-attr]
        click.echo(f"note:    {note}")
    click.echo(f"model:   {folder} ({done['steps']} steps, {done['seconds']} s of processor time)")
    click.echo(f"card:    {done['card']}")
    click.echo(f"digest:  {done['digest']}")


@reference.command()
@click.argument("samples")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the prepared samples.")
@click.option("--side", default=48, show_default=True, type=click.IntRange(min=0), help="Pixels; 0 for texts alone.")
@click.option("--length", default=40, show_default=True, type=click.IntRange(min=3), help="Most tokens of a text.")
@click.option("--tokenizer", default="words", show_default=True, help="words, or wordpiece.")
@click.option("--vocabulary", default=8000, show_default=True, type=click.IntRange(min=6), help="Most entries.")
@click.option(
    "--held-out", default=256, show_default=True, type=click.IntRange(min=1), help="For goals, and again for the card."
)
@click.option("--regions", is_flag=True, help="Keep what nine boxes of each sample show, too, for lxmert.")
def prepare(
    samples: str, out: str, side: int, length: int, tokenizer: str, vocabulary: int, held_out: int, regions: bool
) -> None:
    """Scale the images of SAMPLES and number the words of their texts, once for many trainings.

    The folder can be named as the --samples of trainings, which then have its side, length and vocabulary.
    """
    from attnscope.reference import making
    from attnscope.reference.pairs import Shape

    done = making.prepare(samples, out, Shape(side, length, tokenizer, vocabulary, held_out, regions), _tell)
    for note in done["notes"]:  # type: ignore[union-attr]
        click.echo(f"note:    {note}")
    click.echo(f"samples: {out} ({done['samples']} usable)")


@reference.command()
@click.argument("variants", nargs=-1, required=True, metavar="NAME:MODEL[,FIELD=VALUE...]...")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the models and the table.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of each variant, with commas between.")
@click.option("--measure", metavar="MODULE:FUNCTION", help="What gives a model's figures; its card's if not given.")
@_processes_option
@click.option("--figure", "figures", multiple=True, help="Print this figure's columns alone; repeatable.")
@engine_option
def table(
    variants: Sequence[str],
    out: str,
    seeds: str,
    measure: str | None,
    processes: int,
    figures: Sequence[str],
    engine: str | None,
) -> None:
    """Train variants of models with several seeds and print means, intervals and differences from the first variant.

    A variant is a name, a model, and fields of its recipe that differ: full:vilt slow:vilt,peak_rate=1e-3 or
    no-answers:vilt,without=answers+match. The same command again makes only what is missing.
    """
    from attnscope.reference.tabulating import page, read_table

    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise click.UsageError(f"--seeds {seeds!r} are not numbers with commas between")
    numbers = [int(seed) for seed in seeds.split(",")]
    _tabulate([_variant(text) for text in variants], numbers, out, measure, processes, engine or default_engine())
    click.echo(page(read_table(out), numbers, figures))
    click.echo(f"table:   {out}/table.md, and as .csv and .json")


def _variant(text: str) -> "dict[str, JsonValue]":
    name, colon, rest = text.partition(":")
    if not colon:
        raise click.UsageError(f"variant {text!r} is not NAME:MODEL[,FIELD=VALUE...]")
    model, *assignments = rest.split(",")
    changes = dict(_change(assignment) for assignment in assignments)
    if isinstance(without := changes.get("without"), str):
        changes["without"] = [*without.split("+")]
    return {"name": name, "model": model, "changes": changes}


def _tabulate(
    variants: "list[dict[str, JsonValue]]", seeds: list[int], out: str, measure: str | None, processes: int, engine: str
) -> None:
    from attnscope.reference import tabulating

    chosen = [tabulating.variant_of(one) for one in variants]
    tabulating.check(chosen, seeds)
    measuring = tabulating.measure_of(measure)
    if engine == "inline":
        tabulating.tabulate(chosen, seeds, out, measuring, processes=processes, listener=_tell)
        return
    from attnscope_flows import embedded

    with embedded(), _listening():
        from attnscope_flows.reference import table_flow

        table_flow(variants, out, seeds, measure, processes)


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
@_processes_option
@engine_option
def scores(
    settings: Sequence[str],
    alignments: Sequence[str],
    seeds: int,
    out: str,
    assignments: Sequence[str],
    processes: int,
    engine: str | None,
) -> None:
    """Train each alignment score with several seeds, and tabulate task quality beside what attention shows.

    Every setting has a folder of its own in OUT, with its models, table.csv, table.json and page.md. The same command
    again trains and measures only what is missing. Differences are those from the scaled dot product of the same seed.
    """
    from attnscope.reference.score_tables import MEASURE, score_variants, write_scores

    changes = dict(_change(assignment) for assignment in assignments)
    for setting in settings:
        folder, numbers = f"{out}/{setting}", [*range(seeds)]
        variants = [dataclasses.asdict(variant) for variant in score_variants(setting, alignments, changes)]
        _tabulate(variants, numbers, folder, MEASURE, processes, engine or default_engine())
        write_scores(setting, numbers, folder, changes)
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
