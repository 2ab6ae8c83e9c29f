"""The report of relevance: maps over images and shaded words side by side, and a table for each stream."""

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from attnscope.reading import is_of_kind, on_grid
from attnscope.report import Element, Heading, ImageGrid, ImageRow, ShadedText, overlay

# Tokens whose relevance is kept in the result but shown on no map and counted in no statistic.
BESIDE_CONTENT = ("padding", "cls", "register", "special")


_ANSWERS_SHOWN, _TEXTS_SHOWN = 8, 2


def sample_elements(result: xr.Dataset) -> Iterator[Element]:
    """The shown samples: for each method its map over the image, and the words shaded below it."""
    shown = [
        (str(result["sample"].values[p]), result.isel(sample=p), at) for at, p in enumerate(result["shown"].values)
    ]
    yield from _rows_of(result, shown)


def answer_elements(result: xr.Dataset) -> Iterator[Element]:
    """The first shown samples' written tokens, where each is a target: a row of maps and shaded words for each."""
    if "answer_text" not in result:
        return
    for at, position in enumerate(result["shown"].values[:_TEXTS_SHOWN]):
        sample = result.isel(sample=position)
        words = [str(w) for w in sample["answer_text"].values if w][:_ANSWERS_SHOWN]
        methods = [str(m) for m in result["ranking"].values]
        shown = [
            (word, sample.assign({m: sample[f"each_{m}"].isel(answer=number) for m in methods}), at)
            for number, word in enumerate(words)
        ]
        yield Heading(f"{sample['sample'].item()}: each written token")
        yield from _rows_of(result, shown)


def _rows_of(result: xr.Dataset, shown: Sequence[tuple[str, xr.Dataset, int]]) -> Iterator[Element]:
    """A row for each name and sample, which is the n-th shown: the picture and a map and shaded words a method."""
    methods = [str(m) for m in result["ranking"].values]
    rows = []
    for name, sample, at in shown:
        on_grid = [s for s in sample["stream"].values if _on_grid(sample.sel(stream=s)).any()]
        worded = [s for s in sample["stream"].values if _worded(sample.sel(stream=s)).any()]
        words = [_words(sample.sel(stream=worded[0]), m) for m in methods] if worded else []
        if on_grid and "thumbnail" in result:
            picture = sample["thumbnail"].values[at]
            part = sample.sel(stream=on_grid[0])
            maps = [overlay(picture, _grid(part, part[m].values)) for m in methods]
            blank = [ShadedText([], [])] if words else []
            rows.append(ImageRow(name, [picture, *maps], [*blank, *words]))
        elif words:
            yield Heading(name, 4)
            yield from (ShadedText(w.tokens, w.weights, m) for w, m in zip(words, methods, strict=True))
    if rows:
        caption = "Each square is one patch; within a picture, colours run from its least to its most relevant patch."
        yield ImageGrid(["picture", *methods], rows, caption)


def _words(part: xr.Dataset, method: str) -> ShadedText:
    chosen = _worded(part)
    return ShadedText([str(t) for t in part["token_text"].values[chosen]], part[method].values[chosen])


def summary(result: xr.Dataset) -> tuple[list[str], list[tuple[object, ...]], str]:
    def line(what: str, name: str, at: xr.Dataset) -> tuple[object, ...]:
        return (what, *(float(at[f"{name}_{part}"]) for part in ("mean", "low", "high")))

    methods, pairs = result["ranking"].values, result["pair"].values
    rows = [line(f"share in the top tenth, {m}", "concentration", result.sel(ranking=m)) for m in methods]
    rows += [line(f"rank correlation, {p}", "agreement", result.sel(pair=p)) for p in pairs]
    if np.isfinite(result["pointing_mean"]).any():
        rows += [line(f"pointing, {m}", "pointing", result.sel(ranking=m)) for m in methods]
        rows.append(("pointing, chance", float(result["pointing_chance"].mean()), np.nan, np.nan))
    used = int(np.isfinite(result["concentration"].values).all(0).sum())
    caption = f"Over the content tokens of {used} samples: mean and 95 % bootstrap interval over samples."
    return ["", "mean", "low", "high"], rows, caption


def _grid(part: xr.Dataset, values: np.ndarray) -> np.ndarray:
    """The map (row, column) of the content tokens that lie on the patch grid."""
    row, column = part["row"].values.astype(int), part["column"].values.astype(int)
    return on_grid(values, np.where(_on_grid(part), row, -1), column)


def _on_grid(part: xr.Dataset) -> np.ndarray:
    return (part["row"].values >= 0) & _is_content(part)


def _worded(part: xr.Dataset) -> np.ndarray:
    return (part["token_text"].values != "") & _is_content(part)


def _is_content(part: xr.Dataset) -> np.ndarray:
    return ~is_of_kind(part["kind"].values, *BESIDE_CONTENT)
