"""`attnscope query`: values of a run, chosen by name, as a table or for other programs."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from attnscope.cli.errors import DataFault

if TYPE_CHECKING:
    import xarray as xr

    from attnscope.cli.tables import Columns
    from attnscope.run import Run
    from attnscope.selection import Choice, Selection

FORMATS = ("table", "csv", "json", "parquet", "npy")
_BINARY = ("parquet", "npy")
_DIMS = {"query": "query_token", "key": "key_token"}
STATS = {"entropy": "entropy", "mass": "kind_mass", "max": "kind_max"}
_REDUCIBLE = click.Choice(["sample", "layer", "head", "kv_head", "query", "key", "channel"])


@click.command(epilog="Tokens are named by position (5), slice (2:5), kind (text, image, cls), text ('dog'), or a box "
               "of rows and columns on the patch grid (0:4,8:12).")  # fmt: skip
@click.argument("run")
@click.argument("site", metavar="[SITE[/QUANTITY]]", required=False)
@click.option("--sample", help="Id, position or slice.")
@click.option("--layer", help="The model's own numbers: 3, 2:5 (5 not included), 3,7.")
@click.option("--head", help="Number, slice or list.")
@click.option("--query", help="Query tokens.")
@click.option("--key", help="Key tokens.")
@click.option("--sum", "sums", multiple=True, type=_REDUCIBLE, help="Sum over a dimension, before any mean.")
@click.option("--mean", "means", multiple=True, type=_REDUCIBLE, help="Average over a dimension.")
@click.option("--stat", type=click.Choice(list(STATS)), help="Summaries in place of the values, see below.")
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Only the K largest values, largest first.")
@click.option("--rows", type=click.IntRange(min=1), default=40, show_default=True, help="Rows of a table at most.")
@click.option("--format", "form", type=click.Choice(FORMATS), help="Default: what --out ends in, else table.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write; stdout if not given.")
def query(
    run: str,
    site: str | None,
    sums: Sequence[str],
    means: Sequence[str],
    stat: str | None,
    top: int | None,
    rows: int,
    form: str | None,
    out: Path | None,
    **choices: str | None,
) -> None:
    """Show values of a run.

    SITE is a kind of attention, such as vision.self, and QUANTITY another quantity of it than attention. Without a
    SITE the command lists what the run holds.

    With --stat, which reads no attention of a run with summaries: entropy (nats, mean over the chosen queries, by
    head), mass (what keys of a kind get together, mean over the queries of a kind), or max (the largest weight between
    them).
    """
    from attnscope.computed import computed_summary
    from attnscope.run import open_run
    from attnscope.selection import choose

    form = format_of(form, out)
    opened = open_run(run)
    if site is None:
        write_text(listing(opened) + "\n", out)
        return
    name, _, quantity = site.partition("/")
    if stat is not None:
        if quantity:
            raise click.UsageError(f"--stat {stat} is of the attention: name the site alone, {name!r}")
        quantity = STATS[stat]
    quantity = quantity or "attention"
    computed = None
    if stat is not None and quantity not in opened.quantities(name) and "attention" in opened.quantities(name):
        computed = computed_summary(opened, name, quantity)
        click.echo(f"{run} holds no summaries: --stat {stat} reads the attention itself", err=True)
    selection = choose(opened, name, quantity, choices, computed)
    if stat == "entropy" and "query_token" in selection.array.dims and "query" not in means:
        means = (*means, "query")
    answer = Answer(selection, f"{name}/{quantity}", tuple(sums), tuple(means))
    answer.check_reductions()
    if top is not None and quantity == "attention" and not sums and not means:
        answer = Strongest(opened, name, top, choices)
    _write(answer, form, out, top, rows)


class Answer:
    """A selection with its reductions, read sample by sample where that is possible."""

    def __init__(self, selection: "Selection", name: str, sums: tuple[str, ...], means: tuple[str, ...]) -> None:
        self._selection = selection
        self.name = name
        self._sums = [_DIMS.get(dim, dim) for dim in sums]
        self._means = [_DIMS.get(dim, dim) for dim in means]

    def check_reductions(self) -> None:
        """Raise UsageError for a dimension that is not there (any more)."""
        dims = [str(dim) for dim in self._selection.array.dims]
        for option, wanted in (("sum", self._sums), ("mean", self._means)):
            for dim in wanted:
                if dim not in dims:
                    held = ", ".join(d.removesuffix("_token") for d in dims) or "none"
                    raise click.UsageError(
                        f"--{option} {dim.removesuffix('_token')}: the choice leaves {held} to reduce"
                    )
                dims.remove(dim)

    @property
    def about(self) -> dict[str, object]:
        """What the values are."""
        attrs = self._selection.array.attrs
        said = {"quantity": self.name, "long_name": attrs.get("long_name", ""), "units": attrs.get("units", "")}
        return said | {"sum": self._sums, "mean": self._means}

    @property
    def size(self) -> int:
        """Number of values, padding and all."""
        total = 1
        for dim, length in self._selection.array.sizes.items():
            total *= 1 if dim in (*self._sums, *self._means) else length
        return total

    def values(self) -> "xr.DataArray":
        """All of it at once."""
        return self._reduced(self._selection.values())

    def pieces(self) -> "Iterator[Columns]":
        """Rows of one sample after another; of all at once where samples are reduced."""
        from attnscope.cli.tables import columns_of

        parts = [self._selection.values()] if "sample" in (*self._sums, *self._means) else self._selection.by_sample()
        for part in parts:
            yield columns_of(self._reduced(part), self.name.rpartition("/")[2])

    def _reduced(self, values: "xr.DataArray") -> "xr.DataArray":
        for dim in self._sums:
            # Nothing but NaN has no sum: a padded row stays NaN.
            values = values.sum(dim, min_count=1, keep_attrs=True) if values.dtype.kind == "f" else values.sum(dim)
        for dim in self._means:
            # In double precision, and back: a mean over many float32 values loses digits.
            values = values.astype("float64").mean(dim, keep_attrs=True).astype("float32")
        return values


class Strongest(Answer):
    """The largest attention weights of a choice, found from the strongest keys of each query where these settle it."""

    def __init__(self, run: "Run", site: str, count: int, choices: "Mapping[str, Choice]") -> None:
        from attnscope.questions import strongest_edges
        from attnscope.selection import Selection

        super().__init__(Selection(strongest_edges(run, site, count, choices)), f"{site}/attention", (), ())


def listing(run: "Run") -> str:
    """What a run holds, for reading."""
    from attnscope.cli.tables import aligned
    from attnscope.study import counts
    from attnscope.tokens import KINDS

    counted = counts(run)
    model = run.attrs.get("model", "unknown model")
    sites: list[dict[str, object]] = []
    for name in run.sites:
        for quantity in run.quantities(name):
            array = run.array(name, quantity)
            sites.append(
                {
                    "site": name,
                    "quantity": quantity,
                    "shape": " x ".join(map(str, array.shape)),
                    "dimensions": ", ".join(map(str, array.dims)),
                    "units": unit_words(str(array.attrs.get("units", ""))),
                }
            )
    streams: list[dict[str, object]] = []
    for stream in run.streams:
        kind = run.tokens(stream)["kind"].values
        kinds = [word for code, word in enumerate(KINDS) if (kind == code).any()]
        streams.append({"stream": stream, "tokens": run.plan.streams[stream], "kinds": ", ".join(kinds)})
    layers = [f"{name}: layers {_range_words(plan.layers)}" for name, plan in run.plan.sites.items()]
    return "\n\n".join(
        [
            f"{run.location}: {model}, {counted['extracted']} of {counted['samples']} samples extracted,"
            f" {counted['left_out']} left out",
            aligned(sites),
            "\n".join(layers),
            aligned(streams),
            f"analyses: {', '.join(run.analyses) or 'none'}",
        ]
    )


def unit_words(units: str) -> str:
    """A unit in words."""
    return {"1": "dimensionless", "": "-"}.get(units, units)


def _range_words(numbers: Sequence[int]) -> str:
    if list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return ", ".join(map(str, numbers))


def format_of(form: str | None, out: Path | None) -> str:
    """The format that was asked for, or that the name of the file implies."""
    ending = out.suffix.removeprefix(".") if out is not None else ""
    form = form or (ending if ending in FORMATS else "table")
    if form == "parquet" and out is None:
        raise click.UsageError("--format parquet needs --out FILE")
    if form == "npy" and out is None and sys.stdout.isatty():
        raise click.UsageError("--format npy is not for a terminal: give --out FILE, or pipe it on")
    return form


def _write(answer: Answer, form: str, out: Path | None, top: int | None, rows: int) -> None:
    from attnscope.cli import tables

    if form == "npy":
        if top is not None:
            raise click.UsageError("--top gives rows, and npy holds an array: choose another --format")
        with _binary(out) as file:
            tables.write_npy(answer.values(), file)
        return
    pieces = iter([tables.strongest(answer.pieces(), top)]) if top is not None else answer.pieces()
    if form == "parquet":
        assert out is not None
        tables.write_parquet(pieces, answer.about, out)
    elif form == "table":
        write_text(_table(answer, pieces, top, rows) + "\n", out)
    else:
        with click.open_file(str(out or "-"), "w", encoding="utf-8") as text:
            if form == "csv":
                tables.write_csv(pieces, text)
            else:
                tables.write_json(pieces, answer.about, text)


def _table(answer: Answer, pieces: "Iterator[Columns]", top: int | None, rows: int) -> str:
    from attnscope.cli.tables import first_rows, text_table

    columns = first_rows(pieces, max(rows, top or 0))
    shown = len(next(reversed(columns.values()))) if columns else 0
    if not shown:
        raise DataFault(f"{answer.name} holds no values for this choice: its samples are not extracted, or all padding")
    about = answer.about
    lines = [f"{answer.name}: {about['long_name']}, {unit_words(str(about['units']))}", text_table(columns)]
    if shown == rows and shown < answer.size and top is None:
        lines.append(
            f"the first {shown:,} of {answer.size:,} values; --top K gives the strongest, --format csv gives them all"
        )
    return "\n".join(lines)


def write_text(text: str, out: Path | None) -> None:
    """Write to a file, or to stdout."""
    with click.open_file(str(out or "-"), "w", encoding="utf-8") as file:
        file.write(text)


def _binary(out: Path | None) -> IO[bytes]:
    return click.open_file(str(out or "-"), "wb")
