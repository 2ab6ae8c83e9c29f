"""`attnscope sql`: SQL over the tables of a run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnscope.cli.query import FORMATS, format_of, write_text

if TYPE_CHECKING:
    import duckdb
    import numpy as np

    from attnscope.cli.tables import Columns
    from attnscope.tabling import Tables

_FORMATS = tuple(form for form in FORMATS if form != "npy")


@click.command(epilog="Tables: samples, tokens, edges (attention weights p above a threshold), heads, kinds, and "
               "ANALYSER.VARIABLE for what analysers gave.")  # fmt: skip
@click.argument("run")
@click.argument("statement", metavar="QUERY", required=False)
@click.option(
    "--edges-above",
    type=click.FloatRange(0, 1),
    default=0.125,
    show_default=True,
    help="What weight makes an edge; from 0.112 on no attention is read.",
)
@click.option("--rows", type=click.IntRange(min=1), default=40, show_default=True, help="Rows of a table at most.")
@click.option("--format", "form", type=click.Choice(_FORMATS), help="Default: what --out ends in, else table.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write; stdout if not given.")
def sql(run: str, statement: str | None, edges_above: float, rows: int, form: str | None, out: Path | None) -> None:
    """Ask a run in SQL.

    QUERY is one SELECT in DuckDB's dialect. Only the tables that it names are made, and nothing is changed. Without a
    QUERY the command lists the tables.
    """
    from attnscope.run import open_run
    from attnscope.tabling import Tables

    form = format_of(form, out)
    tables = Tables(open_run(run), edges_above)
    if statement is None:
        write_text(_listing(tables) + "\n", out)
        return
    _write(_answer(statement, tables), statement, form, (out, rows))


def _listing(tables: "Tables") -> str:
    from attnscope.cli.tables import aligned

    return aligned([{"table": name} for name in tables.makers])


def _answer(statement: str, tables: "Tables") -> "Columns":
    """The columns of the answer; what is null is None."""
    import duckdb

    with duckdb.connect(":memory:", config={"enable_external_access": "false"}) as database:
        try:
            for name in _named(database, statement, tables):
                _add(database, name, tables)
            found = database.execute(statement).fetchnumpy()
        except duckdb.Error as error:
            raise click.UsageError(str(error).splitlines()[0]) from None
    return {name: _without_mask(column) for name, column in found.items()}


def _without_mask(column: "np.ndarray") -> "np.ndarray":
    import numpy as np

    values = np.ma.getdata(column)
    if not np.ma.is_masked(column):
        return values
    values = values.astype(object)
    values[np.ma.getmaskarray(column)] = None
    return values


def _write(columns: "Columns", statement: str, form: str, to: tuple[Path | None, int]) -> None:
    from attnscope.cli import tables

    out, rows = to
    if form == "parquet":
        assert out is not None
        tables.write_parquet([columns], {"query": statement}, out)
    elif form == "table":
        count = len(next(iter(columns.values())))
        lines = [tables.plain_table({name: column[:rows] for name, column in columns.items()})]
        if count > rows:
            lines.append(f"the first {rows:,} of {count:,} rows; --format csv gives them all")
        write_text("\n".join(lines) + "\n", out)
    else:
        with click.open_file(str(out or "-"), "w", encoding="utf-8") as text:
            if form == "csv":
                tables.write_csv([columns], text)
            else:
                tables.write_json([columns], {"query": statement}, text)


def _named(database: "duckdb.DuckDBPyConnection", statement: str, tables: "Tables") -> list[str]:
    """The tables that a query names, in the order of those that there are."""
    ((serialised,),) = database.execute("select json_serialize_sql(?)", [statement]).fetchall()
    tree = json.loads(serialised)
    if tree["error"] and tree["error_type"] == "parser":
        raise click.UsageError(f"the query can't be read: {tree['error_message']}")
    if tree["error"] or len(tree["statements"]) != 1:
        raise click.UsageError("a run is asked by one SELECT; nothing in it can be changed")
    nodes = list(_nodes(tree))
    passing = {entry["key"].lower() for node in nodes if "cte_map" in node for entry in node["cte_map"]["map"]}
    named = [node for node in nodes if node.get("type") == "BASE_TABLE"]
    wanted = {".".join(filter(None, (node["schema_name"], node["table_name"]))).lower() for node in named} - passing
    known = {name.lower(): name for name in tables.makers}
    unknown = sorted(wanted - set(known))
    if unknown:
        raise click.UsageError(f"there is no table {unknown[0]!r}; there are {', '.join(known.values())}")
    return [name for lower, name in known.items() if lower in wanted]


def _nodes(tree: object) -> Iterator[dict[str, Any]]:
    """Every object of a JSON tree."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)


def _add(database: "duckdb.DuckDBPyConnection", name: str, tables: "Tables") -> None:
    analysis, _, table = name.rpartition(".")
    database.register("made", dict(tables.makers[name]()))
    if analysis:
        database.execute(f'create schema if not exists "{analysis}"')
        database.execute(f'create table "{analysis}"."{table}" as select * from made')
    else:
        database.execute(f'create table "{table}" as select * from made')
    database.unregister("made")
