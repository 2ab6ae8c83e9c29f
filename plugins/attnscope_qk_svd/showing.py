"""The report of singular modes: curves over depth, heads, what attention prefers, maps of modes on the images."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from attnscope.reading import on_grid
from attnscope.report import (
    Citation,
    Element,
    Heading,
    HeatMap,
    ImageGrid,
    ImageRow,
    LineChart,
    Note,
    Paragraph,
    Series,
    ShadedText,
    Table,
    overlay,
)

_BIAS = (
    "The bias of the queries adds b_q^T W_k x_j to the scores, which no mode of W_q^T W_k contains: for white inputs"
    " its standard deviation over that of x_i^T W_q^T W_k x_j has the median {:.2g} over heads, the greatest {:.2g}."
)


def show(result: xr.Dataset) -> Iterator[Element]:
    """The elements of the report."""
    yield Paragraph(
        "Does a head attend to tokens like the one that asks, or to others? The average cosine of the left and"
        " right singular vectors of W_q^T W_k is near 1 where like attends to like, near 0 where query and key"
        " directions have nothing in common, and negative where opposites attract. It is had from the weights alone."
    )
    yield Citation(
        "Pan, Philip, Xie and Schwartz, Dissecting Query-Key Interaction in Vision Transformers, NeurIPS 2024.",
        "https://arxiv.org/abs/2405.14880",
    )
    for site in result["site"].values:
        chosen = result.sel(site=site).dropna("layer", how="all", subset=["singular_value"])
        chosen = chosen.dropna("head", how="all", subset=["singular_value"])
        yield from _site_elements(str(site), chosen)
        yield from _preference_elements(chosen)
        yield from _mode_elements(chosen)
        yield from _display_elements(str(site), result)
    for caveat in filter(None, str(result.attrs.get("caveats", "")).split("; ")):
        yield Note(caveat[:1].upper() + caveat[1:] + ".")
    bias = result["bias_ratio"].values
    if np.isfinite(bias).any() and np.nanmax(bias) > 0:
        yield Note(_BIAS.format(np.nanmedian(bias), np.nanmax(bias)))


def _site_elements(site: str, result: xr.Dataset) -> Iterator[Element]:
    layers = result["layer"].values
    yield Heading(site)
    if np.isfinite(result["cosine_average"].values).any():
        observed = Series(
            "mean over heads",
            result["layer_cosine_average"].values,
            result["layer_cosine_average_low"].values,
            result["layer_cosine_average_high"].values,
            result["cosine_average"].transpose("layer", "head").values,
        )
        middle = (result["layer_null_low"] + result["layer_null_high"]).values / 2
        null = Series("features permuted", middle, result["layer_null_low"].values, result["layer_null_high"].values)
        shown = [observed, null] if np.isfinite(middle).any() else [observed]
        yield LineChart(
            layers, shown, "layer", "average cosine", zero_line=True,
            caption="Each dot is a head, the line their mean, the band its 95 % bootstrap interval over heads."
            " 'Features permuted' is where 95 % of random permutations fall that keep every singular value.",
        )  # fmt: skip
        yield HeatMap(
            result["cosine_average"].transpose("layer", "head").values, layers, result["head"].values, "layer", "head",
            "average cosine", "The same for every head: red attends to like, blue to opposite directions.", centre=0.0,
        )  # fmt: skip
    yield LineChart(
        result["mode"].values + 1, _spectra(result, layers), "mode", "singular value / largest", logarithmic=True,
        caption="How fast the singular values fall: mean over heads, band from the least to the greatest head. A steep"
        " curve means that few modes make the head.",
    )  # fmt: skip


def _spectra(result: xr.Dataset, layers: np.ndarray) -> list[Series]:
    chosen = sorted({0, len(layers) // 3, 2 * len(layers) // 3, len(layers) - 1})
    spectra = []
    for position in chosen:
        values = result["singular_value"].isel(layer=position).transpose("head", "mode").values
        largest = np.where(values[:, :1] > 0, values[:, :1], np.nan)
        # A logarithmic axis has no place for the exact zeros of a head of lower rank.
        relative = np.clip(values / largest, 1e-8, None)
        spectra.append(Series(f"layer {layers[position]}", relative.mean(0), relative.min(0), relative.max(0)))
    return spectra


def _preference_elements(result: xr.Dataset) -> Iterator[Element]:
    """Where attention from objects goes, for every direction in which samples tell it."""
    if "layer_preference" not in result:
        return
    layers = result["layer"].values
    for direction in result["direction"].values:
        chosen = result.sel(direction=direction)
        count = int(chosen["layer_preference_samples"].max())
        if not count:
            continue
        series = []
        for group in chosen["group"].values:
            mean, low, high = (
                chosen[f"layer_preference{end}"].sel(group=group).values for end in ("", "_low", "_high")
            )
            series.append(Series(str(group), mean, low, high))
        caption = (
            f"Attention from the middle of an object ({direction}): on the same object, on different ones, on the"
            f" background. Mean over heads and {count} samples with two objects or more, bands 95 % intervals over"
            " samples."
        )
        yield LineChart(layers, series, "layer", "share of attention", caption)
        areas = [(str(g), *(float(chosen[f"area_preference{e}"].sel(group=g)) for e in ("", "_low", "_high")))
                 for g in chosen["group"].values]  # fmt: skip
        yield Table(
            ["attention alike to all tokens", "share", "low", "high"], areas, "What the areas alone would give."
        )


def _mode_elements(result: xr.Dataset) -> Iterator[Element]:
    """What the modes do on the samples: objects that they join, and how much each mode adds."""
    if "contribution" not in result or not (result["contribution_count"] > 0).any():
        return
    layers = result["layer"].values
    if result["layer_same_object"].notnull().any():
        mean, low, high = (result[f"layer_same_object{end}"].values for end in ("", "_low", "_high"))
        points = result["same_object"].transpose("layer", "head").values
        same = Series("strongest object the same", mean, low, high, points)
        chance = Series("if all were alike", result["layer_same_object_chance"].values)
        yield LineChart(
            layers, [same, chance], "layer", "probability",
            caption="In the images where a mode is strongest: how often one and the same object (or the background)"
            " has the largest projection on both of its vectors, weighted by singular value. Dots: heads; band: 95 %"
            " interval over heads.",
        )  # fmt: skip
    cosine, low, high = (result[f"sample_cosine{end}"].values for end in ("", "_low", "_high"))
    if np.isfinite(cosine).any():
        plain = Series("by singular value", result["layer_cosine_average"].values)
        yield LineChart(
            layers, [Series("by contribution", cosine, low, high), plain], "layer", "average cosine", zero_line=True,
            caption="The average cosine once more, with modes weighted by what they add to the scores of the tokens"
            " that these samples attend to (95 % interval over samples), beside the weights' own average.",
        )  # fmt: skip
    # Without the biases the contributions of a head need not add up to anything positive.
    share = result["contribution"] / abs(result["contribution"]).sum("mode")
    yield HeatMap(
        share.isel(mode=slice(0, 16)).mean("head").transpose("layer", "mode").values, layers,
        np.arange(1, min(16, share.sizes["mode"]) + 1), "layer", "mode", "share of the score",
        "What each mode adds to how far attended tokens score above the mean token, over what all modes add or take,"
        " mean over heads.",
        centre=0.0,
    )  # fmt: skip


def _display_elements(site: str, result: xr.Dataset) -> Iterator[Element]:
    """Maps of some modes on the images that they are strongest on; words where there is no image."""
    if "display_score" not in result:
        return
    chosen = result.isel(display=np.flatnonzero(result["display_site"].values == site))
    rows: list[ImageRow] = []
    words: list[Element] = []
    for number in range(chosen.sizes["display"]):
        one = chosen.isel(display=number)
        layer, head, mode = (int(one[f"display_{n}"]) for n in ("layer", "head", "mode"))
        at = result.sel(site=site, layer=layer)
        cosine = float(at["cosine"].isel(head=head, mode=mode))
        told = "" if np.isnan(cosine) else f", cosine {cosine:.2f}"
        label = f"layer {layer}, head {head}, mode {mode + 1}{told}"
        filled = [r for r in range(one.sizes["display_rank"]) if np.isfinite(one["display_score"].values[r])]
        if "display_picture" in one and (one["display_key_row"].values >= 0).any():
            pictures = [p for r in filled for p in _pictures(one.isel(display_rank=r))]
            blank = np.full((8, 8, 3), 255, np.uint8)
            ids = ", ".join(str(one["display_id"].values[r]) for r in filled)
            width = 2 * one.sizes["display_rank"]
            rows.append(ImageRow(f"{label}: {ids}", [*pictures, *[blank] * (width - len(pictures))]))
        elif filled:
            words += [Heading(label, 4), *_words(one.isel(display_rank=filled[0]))]
    if rows:
        columns = ["query map", "key map"] * chosen.sizes["display_rank"]
        yield ImageGrid(
            columns, rows, "Projection of each patch on the left (query) and right (key) vector of a mode, in the"
            " images where it is strongest: bright tokens of the query map attend to bright ones of the key map. Shown"
            " are the first modes of the heads with the highest and the lowest average cosine, at a few depths.",
        )  # fmt: skip
    if words:
        yield Paragraph("Words by their projection on the vectors of a mode, in the sample where it is strongest.")
        yield from words


def _pictures(one: xr.Dataset) -> list[np.ndarray]:
    picture = one["display_picture"].values.astype(np.uint8)
    found = []
    for side in ("query", "key"):
        row, column = (one[f"display_{side}_{n}"].values.astype(int) for n in ("row", "column"))
        values = one[f"display_{side}_map"].values
        found.append(overlay(picture, on_grid(values, row, column)) if (row >= 0).any() else picture)
    return found


def _words(one: xr.Dataset) -> Iterator[Element]:
    for side in ("query", "key"):
        values = one[f"display_{side}_map"].values
        chosen = np.isfinite(values)
        strings = [str(t) for t in one[f"display_{side}_text"].values[chosen]]
        yield ShadedText(strings, values[chosen] - values[chosen].min(initial=0), f"{side} map")
