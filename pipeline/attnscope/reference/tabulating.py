"""Variants of a training, each with several seeds, as one table: means with intervals, and differences paired by seed.

Every (variant, seed) is a folder of its own, `OUT/VARIANT-SEED`, with the model and its figures beside it; the same
call again trains and measures only what is missing.
"""

import csv
import dataclasses
import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from attnscope.reference.making import Receipt, ReferenceError, examine, recipe_of, train
from attnscope.reference.training import Listener
from attnscope.reference.weights import write_json

Measure = Callable[[Path], Mapping[str, float]]
"""From the folder of a trained model to its figures by name; NaN where one can't be told."""

FIGURES = "figures.json"
# 97.5 % quantiles of Student's t with 1 to 10 degrees of freedom.
_T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)
_Z = 1.959963985


@dataclass(frozen=True)
class Variant:
    """A name, the model that is trained, and the fields of its recipe that differ."""

    name: str
    model: str
    changes: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict)


def variant_of(given: Mapping[str, object]) -> Variant:
    """A variant as a flow's parameters give it: a mapping of name, model and changes.

    Raises
    ------
    ReferenceError
        When a part is missing, unknown or of the wrong kind.
    """
    parts = {"changes": {}, **given}
    kinds = {"name": str, "model": str, "changes": Mapping}
    if parts.keys() != kinds.keys() or not all(isinstance(parts[k], kind) for k, kind in kinds.items()):
        raise ReferenceError(f"variant {dict(given)!r} is not a mapping of a name, a model and changes of its recipe")
    return Variant(**parts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % Student-t interval; one seed has none."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Row:
    """One figure of a variant, and its difference from the first variant's, paired by seed.

    `verdict` is 'apart' where the difference's interval lies on one side of 0, 'noise' where it holds 0, 'one seed'
    where there is no interval, and '' where there is no difference.
    """

    variant: str
    figure: str
    value: Estimate
    difference: Estimate | None
    verdict: str


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 1e-4.

    Above 10 degrees of freedom by the expansion around the normal quantile (Cornish and Fisher, 1937; Abramowitz and
    Stegun 26.7.5).
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of independent values: mean +- t s / sqrt(n), s with n - 1 in its denominator."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, None, None, len(values))
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def verdict(difference: Estimate | None) -> str:
    """What a paired difference says, as in `Row`."""
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return "one seed"
    return "noise" if difference.low <= 0 <= difference.high else "apart"


Measured = Mapping[str, Mapping[int, Mapping[str, float]]]
"""The figures of each variant and seed."""


def compare(measured: Measured) -> list[Row]:
    """A row for each variant and figure; seeds where a figure is missing or NaN are left out of it."""
    base = _by_figure(next(iter(measured.values())))
    rows = []
    for number, (variant, of_seeds) in enumerate(measured.items()):
        for figure, values in _by_figure(of_seeds).items():
            paired = [values[seed] - base[figure][seed] for seed in values if seed in base.get(figure, {})]
            difference = estimate(paired) if number and paired else None
            rows.append(Row(variant, figure, estimate(list(values.values())), difference, verdict(difference)))
    return rows


def _by_figure(of_seeds: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for seed, figures in of_seeds.items():
        for name, value in figures.items():
            if math.isfinite(value):
                found.setdefault(name, {})[seed] = value
    return found


def tabulate(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    out: str,
    measure: Measure | None = None,
    *,
    processes: int = 1,
    listener: Listener | None = None,
) -> list[Row]:
    """Train and measure what is missing, write the table into `out`, and give its rows.

    Without `measure` the figures are those of the model's card, named SPLIT_FIGURE. With several `processes` each
    trains whole (variant, seed) pairs in one thread, with the same result; `measure` must then be a function that
    another process can import. The listener hears of trainings in this process alone.

    Raises
    ------
    ReferenceError
        When a variant can't be trained, or two have one name; before anything is trained.
    """
    check(variants, seeds)
    cells = [(variant, seed) for variant in variants for seed in seeds]
    if processes == 1:
        for variant, seed in cells:
            make(variant, seed, out, measure, listener)
    else:
        with ProcessPoolExecutor(min(processes, len(cells)), get_context("spawn")) as pool:
            for done in as_completed([pool.submit(make, variant, seed, out, measure) for variant, seed in cells]):
                done.result()
    return write_table(variants, seeds, out, measure)


def check(variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Refuse what can't become a table.

    Raises
    ------
    ReferenceError
        When there is no variant or no seed, one occurs twice, or a variant has no such recipe.
    """
    if not variants or not seeds:
        raise ReferenceError("a table needs at least one variant and one seed")
    names: tuple[object, ...] = tuple(variant.name for variant in variants)
    for kind, given in (("variant", names), ("seed", tuple(seeds))):
        if twice := [one for one in given if given.count(one) > 1]:
            raise ReferenceError(f"{kind} {twice[0]!r} is given twice")
    for variant in variants:
        if not re.fullmatch(r"[\w+.=-]+", variant.name):
            raise ReferenceError(f"variant {variant.name!r} can't name a folder; letters, digits and _+.=- can")
        recipe_of(variant.model, variant.changes)


def folder_of(variant: Variant, seed: int, out: str) -> Path:
    """Where a variant's model with a seed lies."""
    return Path(out) / f"{variant.name}-{seed}"


def make(
    variant: Variant, seed: int, out: str, measure: Measure | None = None, listener: Listener | None = None
) -> Receipt:
    """Train one variant with one seed and measure it, unless its figures are there already."""
    folder = folder_of(variant, seed, out)
    done = _figures(variant, seed, out, measure) is not None
    if not done:
        recipe = recipe_of(variant.model, variant.changes)
        train(recipe, seed, str(folder), listener)
        found = (measure or partial(_of_card, variant, seed))(folder)
        kept = _kept(variant, seed, out)
        kept["figures"][_name_of(measure)] = {k: float(v) if math.isfinite(v) else None for k, v in found.items()}
        write_json(folder / FIGURES, kept)
    return {"variant": variant.name, "seed": seed, "folder": str(folder), "was_there": done}


def _of_card(variant: Variant, seed: int, folder: Path) -> dict[str, float]:
    """All figures of the model's card, which is written as well."""
    examine(recipe_of(variant.model, variant.changes), seed, str(folder))
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return {f"{split}_{k}": v["value"] for split, figures in card["figures"].items() for k, v in figures.items()}


def _kept(variant: Variant, seed: int, out: str) -> dict:
    """What the folder holds of this recipe and seed: figures by what measured them."""
    key = {"recipe": repr(recipe_of(variant.model, variant.changes)), "seed": seed}
    file = folder_of(variant, seed, out) / FIGURES
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return kept if key.items() <= kept.items() else {**key, "figures": {}}


def _figures(variant: Variant, seed: int, out: str, measure: Measure | None) -> dict[str, float] | None:
    found = _kept(variant, seed, out)["figures"].get(_name_of(measure))
    return None if found is None else {k: math.nan if v is None else v for k, v in found.items()}


def _name_of(measure: Measure | None) -> str:
    """What a measure is called in the file of figures: its module and name, with what it was given."""
    if measure is None:
        return "card"
    if isinstance(measure, partial):
        given = [*map(repr, measure.args), *(f"{k}={v!r}" for k, v in sorted(measure.keywords.items()))]
        return f"{_name_of(measure.func)}({', '.join(given)})"
    return f"{measure.__module__}:{getattr(measure, '__qualname__', type(measure).__qualname__)}"


def measure_of(name: str | None) -> Measure | None:
    """The measure that a flow or a command names, 'package.module:function'.

    Raises
    ------
    ReferenceError
        When it can't be imported.
    """
    if name is None:
        return None
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ReferenceError(f"measure {name!r} can't be imported ({error}); name it package.module:function") from None


def write_table(
    variants: Sequence[Variant], seeds: Sequence[int], out: str, measure: Measure | None = None
) -> list[Row]:
    """Compare the figures that lie in `out`, and write table.json, table.csv and table.md there."""
    measured = {v.name: {seed: _figures(v, seed, out, measure) or {} for seed in seeds} for v in variants}
    rows = compare(measured)
    folder = Path(out)
    table = {
        "variants": [dataclasses.asdict(variant) for variant in variants],
        "seeds": list(seeds),
        "measure": _name_of(measure),
        "interval": "95 % Student-t over seeds",
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(folder / "table.json", table)
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        records = [_flat(row) for row in rows]
        writer = csv.DictWriter(file, list(records[0]) if records else ["variant"])
        writer.writeheader()
        writer.writerows(records)
    (folder / "table.md").write_text(page(rows, seeds), encoding="utf-8")
    return rows


def read_table(out: str) -> list[Row]:
    """The rows of a table that was written into a folder."""
    rows = json.loads((Path(out) / "table.json").read_text(encoding="utf-8"))["rows"]
    return [
        Row(
            row["variant"],
            row["figure"],
            Estimate(**row["value"]),
            row["difference"] and Estimate(**row["difference"]),
            row["verdict"],
        )
        for row in rows
    ]


def _flat(row: Row) -> dict[str, object]:
    found = {"variant": row.variant, "figure": row.figure, **vars(row.value)}
    for name in (field.name for field in dataclasses.fields(Estimate)):
        found[f"difference_{name}"] = getattr(row.difference, name, None)
    return {**found, "verdict": row.verdict}


def page(rows: Sequence[Row], seeds: Sequence[int], figures: Sequence[str] | None = None) -> str:
    """Markdown: a table of means and one of differences, variants down and figures (all unless named) across."""
    by_place = {(row.variant, row.figure): row for row in rows}
    variants = list(dict.fromkeys(row.variant for row in rows))
    shown = list(figures or dict.fromkeys(row.figure for row in rows))
    if len(seeds) == 1:
        return "\n".join([f"Seed {seeds[0]} alone, so no intervals.", "", *_grid(by_place, variants, shown, _value)])
    lines = [f"Means over seeds {', '.join(map(str, seeds))}; in brackets the 95 % Student-t interval over seeds.", ""]
    lines += _grid(by_place, variants, shown, _value)
    if len(variants) > 1:
        lines += ["", f"Differences from {variants[0]}, paired by seed. Noise: the interval holds 0. Each interval"]
        lines[-1] += " stands for itself; none is widened for the number of comparisons."
        lines += ["", *_grid(by_place, variants[1:], shown, _difference)]
    return "\n".join(lines)


def _grid(
    rows: Mapping[tuple[str, str], Row], variants: Sequence[str], figures: Sequence[str], cell: Callable[[Row], str]
) -> Iterator[str]:
    yield f"| variant | {' | '.join(figure.replace('_', ' ') for figure in figures)} |"
    yield "|---|" + "---|" * len(figures)
    for variant in variants:
        cells = [cell(rows[variant, figure]) if (variant, figure) in rows else "-" for figure in figures]
        yield f"| {variant} | {' | '.join(cells)} |"
    yield ""


def _value(row: Row) -> str:
    return _words(row.value)


def _difference(row: Row) -> str:
    if row.difference is None:
        return "-"
    return f"{_words(row.difference, '+')}, {row.verdict}"


def _words(one: Estimate, sign: str = "") -> str:
    words = f"{one.mean:{sign}.3f}"
    return words if one.low is None or one.high is None else f"{words} ({one.low:{sign}.3f} to {one.high:{sign}.3f})"
