"""Chosen values as rows: for reading, as CSV, JSON or Parquet, and the strongest of them."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import xarray as xr

from attnscope.tokens import KINDS

Columns = dict[str, np.ndarray]
"""Columns of equal length by name; the last one holds the values."""

ALONG = ("edge", "case")
"""Dimensions that only count what was found; their coordinates say it."""

_TOKEN_PARTS = ("kind", "text", "row", "column")
_WRITE_ROWS = 2**16


def columns_of(values: xr.DataArray, name: str) -> Columns:
    """One row for each value that is not NaN: what it belongs to, and itself."""
    loaded = np.asarray(values.values)
    there = np.ones(loaded.shape, bool) if loaded.dtype == bool else ~np.isnan(loaded)
    at = dict(zip(map(str, values.dims), np.nonzero(there), strict=True))
    count = int(there.sum())
    columns = {}
    for label in ("sample", "layer", "head", "kv_head"):
        if label in values.coords:
            columns[label] = _column(values.coords[label], at, count)
    for side in ("query", "key"):
        if f"{side}_token" not in values.coords:
            if f"{side}_kind" in values.coords:
                columns[f"{side}_kind"] = _column(values.coords[f"{side}_kind"], at, count)
            continue
        columns[f"{side}_token"] = _column(values.coords[f"{side}_token"], at, count)
        for part in _TOKEN_PARTS:
            if f"{side}_{part}" in values.coords:
                columns[f"{side}_{part}"] = _column(values.coords[f"{side}_{part}"], at, count)
        if f"{side}_kind" in columns:
            columns[f"{side}_kind"] = np.array(KINDS, object)[columns[f"{side}_kind"]]
    for dim in map(str, values.dims):
        if dim not in (*columns, *ALONG):
            columns[dim] = at[dim]
    columns[name] = loaded[there]
    return columns


def _column(coordinate: xr.DataArray, at: dict[str, np.ndarray], count: int) -> np.ndarray:
    """A coordinate's value for each row."""
    found = np.asarray(coordinate.values)
    rows = tuple(at[str(dim)] for dim in coordinate.dims)
    found = found[rows] if rows else np.broadcast_to(found, count)
    return found.astype(object) if found.dtype.kind in "UT" else found


def strongest(pieces: Iterable[Columns], count: int) -> Columns:
    """The rows with the largest values, largest first; earlier rows first among equals."""
    best: Columns = {}
    for piece in pieces:
        joined = {name: np.concatenate([best[name], piece[name]]) for name in piece} if best else piece
        order = np.argsort(-_values(joined), kind="stable")[:count]
        best = {name: column[order] for name, column in joined.items()}
    return best


def first_rows(pieces: Iterable[Columns], count: int) -> Columns:
    """The first rows; no piece behind them is read."""
    found: list[Columns] = []
    for piece in pieces:
        found.append(piece)
        if sum(len(_values(columns)) for columns in found) >= count:
            break
    if not found:
        return {}
    return {name: np.concatenate([columns[name] for columns in found])[:count] for name in found[0]}


def _values(columns: Columns) -> np.ndarray:
    return next(reversed(columns.values()))


# -- for reading -------------------------------------------------------------------------------------------------------


def text_table(columns: Columns) -> str:
    """An aligned table; each token is one column: its position, and its text, place or kind."""
    shown: dict[str, list[str]] = {}
    for name, column in columns.items():
        side, _, part = name.partition("_")
        if part in _TOKEN_PARTS and f"{side}_token" in columns:
            continue
        if part == "token" and f"{side}_kind" in columns:
            shown[side] = [_token_words(columns, side, row) for row in range(len(column))]
        else:
            shown[name] = [_words(value) for value in column.tolist()]
    right = {name for name, column in columns.items() if column.dtype.kind in "iuf"}
    return "\n".join(_lines(shown, right))


def plain_table(columns: Columns) -> str:
    """An aligned table of the columns as they are."""
    right = {name for name, column in columns.items() if column.dtype.kind in "iuf"}
    return "\n".join(_lines({name: [_words(v) for v in column.tolist()] for name, column in columns.items()}, right))


def _lines(shown: Mapping[str, Sequence[str]], right: set[str]) -> Iterator[str]:
    widths = {name: max([len(name), *map(len, cells)]) for name, cells in shown.items()}

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, (name, width) in zip(cells, widths.items(), strict=True)
        )
        return "  ".join(padded).rstrip()

    yield line(shown)
    for cells in zip(*shown.values(), strict=True):
        yield line(cells)


def _token_words(columns: Columns, side: str, row: int) -> str:
    number, text = columns[f"{side}_token"][row], str(columns[f"{side}_text"][row])
    if not text:
        place = columns[f"{side}_row"][row], columns[f"{side}_column"][row]
        text = f"({place[0]}, {place[1]})" if min(place) >= 0 else str(columns[f"{side}_kind"][row])
    return f"{number} {text}"


def _words(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def aligned(rows: Sequence[dict[str, object]]) -> str:
    """Rows of a dict each as an aligned table; numbers to the right."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = {name: ["" if row.get(name) is None else _cell(row[name]) for row in rows] for name in names}
    numbers = {n for n in names if all(isinstance(r.get(n), int | float | None) for r in rows)}
    return "\n".join(_lines(shown, numbers))


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else _words(value)


# -- for programs ------------------------------------------------------------------------------------------------------


def write_csv(pieces: Iterable[Columns], file: IO[str]) -> None:
    """A header, and a line for each row."""
    writer = csv.writer(file, lineterminator="\n")
    for number, columns in enumerate(pieces):
        if number == 0:
            writer.writerow(columns)
        for part in _parts(columns):
            writer.writerows(zip(*(_texts(column) for column in part.values()), strict=True))


def write_json(pieces: Iterable[Columns], about: dict[str, object], file: IO[str]) -> None:
    """One object: what the values are, and `rows`."""
    file.write(json.dumps(about)[:-1] + ', "rows": [')
    separator = "\n"
    for columns in pieces:
        for part in _parts(columns):
            for cells in zip(*(_plain(column) for column in part.values()), strict=True):
                file.write(separator + json.dumps(dict(zip(part, cells, strict=True))))
                separator = ",\n"
    file.write("\n]}\n")


def write_parquet(pieces: Iterable[Columns], about: dict[str, object], path: Path) -> None:
    """A Parquet file; what the values are stands in the metadata of its schema."""
    import pyarrow
    import pyarrow.parquet

    writer = None
    try:
        for columns in pieces:
            table = pyarrow.table({name: pyarrow.array(column) for name, column in columns.items()})
            table = table.replace_schema_metadata({name: json.dumps(value) for name, value in about.items()})
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table.cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()


def write_npy(values: xr.DataArray, file: IO[bytes]) -> None:
    """The array as it was chosen, NaN and all."""
    np.save(file, np.ascontiguousarray(values.values), allow_pickle=False)


def _parts(columns: Columns) -> Iterator[Columns]:
    for start in range(0, len(_values(columns)), _WRITE_ROWS):
        yield {name: column[start : start + _WRITE_ROWS] for name, column in columns.items()}


def _texts(column: np.ndarray) -> list[str]:
    # Shortest text that gives the same float32 back; as a Python float it would have digits that mean nothing.
    if column.dtype == object:
        return ["" if value is None else str(value) for value in column]
    return column.astype(str).tolist()


def _plain(column: np.ndarray) -> list[object]:
    return [float(text) for text in column.astype(str)] if column.dtype == np.float32 else column.tolist()
