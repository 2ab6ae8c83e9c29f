"""What models reach whose attention was trained with each score: the tables that `attnscope reference scores` makes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

TABLE = "scores.json"
FIGURE = "trained_figure"
_PARTS = {"": "mean", "_low": "low", "_high": "high"}
_MEANINGS = {
    "trained_score": ("mean over seeds of what a model trained with this score reaches", "value"),
    "trained_difference": (
        "that less what one trained with the scaled dot product reaches, paired by seed",
        "difference",
    ),
}


def read_trained(folder: str, alignments: Sequence[str]) -> xr.Dataset:
    """`trained_score` and `trained_difference` (trained_figure, alignment) with Student-t intervals over seeds.

    A figure is named SETTING/FIGURE. The folder is that of one setting's table, or holds such folders.

    Raises
    ------
    ValueError
        When it holds no table that can be read.
    """
    files = [file for pattern in (TABLE, f"*/{TABLE}") for file in sorted(Path(folder).glob(pattern))]
    if not files:
        raise ValueError(f"{folder!r} holds no {TABLE}; `attnscope reference scores --out {folder}` makes one")
    try:
        tables = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return _labelled(tables, alignments)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a table of trained scores in {folder!r} can't be read: {error!r}") from None


def _labelled(tables: Sequence[Mapping[str, Any]], alignments: Sequence[str]) -> xr.Dataset:
    figures = [f"{table['setting']}/{figure}" for table in tables for figure in table["figures"]]
    found = {f"{name}{end}": np.full((len(figures), len(alignments)), np.nan) for name in _MEANINGS for end in _PARTS}
    for table in tables:
        for row in table["rows"]:
            if row["variant"] not in alignments:
                continue
            at = figures.index(f"{table['setting']}/{row['figure']}"), alignments.index(row["variant"])
            for name, (_, part) in _MEANINGS.items():
                for end, key in _PARTS.items():
                    # No difference from itself, and no interval from one seed.
                    found[f"{name}{end}"][at] = (
                        np.nan if row[part] is None or row[part][key] is None else row[part][key]
                    )
    dims = (FIGURE, "alignment")
    variables = {name: xr.Variable(dims, values, _describe(name)) for name, values in found.items()}
    variables["trained_seeds"] = xr.Variable(
        FIGURE,
        [len(table["seeds"]) for table in tables for _ in table["figures"]],
        {"long_name": "how many seeds each score was trained with", "units": "1"},
    )
    return xr.Dataset(variables, {FIGURE: np.array(figures, object), "alignment": np.array(alignments, object)})


def _describe(name: str) -> dict[str, str]:
    stem = name.removesuffix("_low").removesuffix("_high")
    bound = {"": "", "_low": ", lower 95 % bound", "_high": ", upper 95 % bound"}[name.removeprefix(stem)]
    return {"long_name": f"{_MEANINGS[stem][0]}{bound} (Student's t over seeds)", "units": "1"}
