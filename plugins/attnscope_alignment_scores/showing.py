"""The report of alignment scores: tables with intervals, curves of deletion and insertion, agreement with regions."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from attnscope.report import Citation, Element, Heading, HeatMap, LineChart, Note, Paragraph, Series, Table
from attnscope_alignment_scores.scores import ALIGNMENTS
from attnscope_alignment_scores.trained import FIGURE

# As many as can be told apart in one chart.
_IN_CURVES = ("model", "dot", "cosine", "relu_qwk", "additive", "random")
_MEASURES = {
    "divergence": "Jensen-Shannon, nats",
    "rank_agreement": "Kendall tau",
    "top_overlap": "strongest keys shared",
    "entropy": "entropy, nats",
    "deletion": "deletion",
    "insertion": "insertion",
}


def show(result: xr.Dataset) -> Iterator[Element]:
    """The elements of the report."""
    yield Paragraph(
        "How would the model's own queries and keys attend under another score? Each score is made into an attention"
        " over the same keys and set beside the model's own. Where what a score ranks first is significant, taking"
        " those keys away changes a head's output much (deletion, more is better), and they alone give it back"
        " (insertion, less is better). The output is had from stored attention and values; the model is not run again."
    )
    yield Citation(
        "Cao et al., Understanding Attention for Vision-and-Language Tasks, COLING 2022; the measures are attnscope's.",
        "https://arxiv.org/abs/2208.08104",
    )
    for site in result["site"].values:
        yield from _site_elements(str(site), result.sel(site=site))
    trained, evaluated = (int(result.attrs.get(f"samples_{n}", 0)) for n in ("trained_on", "evaluated"))
    yield Note(
        f"Learned scores were fitted for every head on {trained} samples; all are measured on {evaluated} others."
        if trained
        else f"All scores are measured on {evaluated} samples; there was none to fit learned scores on."
    )
    if result.attrs.get("not_scored"):
        yield Note(f"The run holds no queries and keys of {result.attrs['not_scored']}.")
    if result["trained_score"].isnull().all():
        yield Note(
            "What a model reaches that is trained with each score in its attention, the question of the paper's tables,"
            " is not measured in this run; the result keeps a place for it (trained_score), and option trained=FOLDER"
            " fills it from a table of `attnscope reference scores`."
        )
    else:
        yield from _trained_elements(result)


def _site_elements(site: str, result: xr.Dataset) -> Iterator[Element]:
    result = result.dropna("layer", how="all", subset=["divergence"])
    yield Heading(site)
    if not result.sizes["layer"]:
        yield Note("No sample was left to measure.")
        return
    names = [str(n) for n in result["alignment"].values]
    yield Table(
        ["score", "", *_MEASURES.values()],
        [
            (n, ALIGNMENTS[n].meaning, *(_with_interval(result.sel(alignment=n), f"mean_{m}") for m in _MEASURES))
            for n in names
        ],
        "Mean over layers, heads, rows and samples, with its 95 % interval over samples.",
    )
    yield HeatMap(
        result["divergence"].transpose("alignment", "layer").values, names, result["layer"].values, "score", "layer",
        "Jensen-Shannon, nats", "How far each score's attention lies from the model's own, by layer.",
    )  # fmt: skip
    yield from _curve_elements(result, names)
    yield from _fit_elements(result, names)
    yield from _region_elements(result, names)


def _curve_elements(result: xr.Dataset, names: list[str]) -> Iterator[Element]:
    if not result["deletion_curve"].notnull().any():
        yield Note(
            "The run holds no values, without which a head's output can't be computed: no deletion or insertion."
        )
        return
    fractions = result["fraction"].values
    for name, words in (("deletion", "taken away"), ("insertion", "left alone")):
        shown = [n for n in _IN_CURVES if n in names and result[f"{name}_curve"].sel(alignment=n).notnull().any()]
        series = [Series(n, result[f"{name}_curve"].sel(alignment=n).mean("layer").values) for n in shown]
        yield LineChart(
            fractions, series, f"fraction of keys {words}", "change of the output",
            f"{name.capitalize()}: change of a head's output over its length, mean over layers, heads, rows, samples.",
        )  # fmt: skip
    if "mean_deletion_over_random" in result:
        rows = [
            (n, *(_with_interval(result.sel(alignment=n), f"mean_{m}_over_random") for m in ("deletion", "insertion")))
            for n in names
            if n != "random"
        ]
        yield Table(
            ["score", "deletion over random", "insertion over random"], rows,
            "Paired with a random ranking of the same samples and layers: a ranking says something where the interval"
            " of deletion lies above 0 and that of insertion below.",
        )  # fmt: skip


def _fit_elements(result: xr.Dataset, names: list[str]) -> Iterator[Element]:
    learned = [n for n in names if result["fit_loss_after"].sel(alignment=n).notnull().any()]
    if learned:
        rows = [
            (n, *(float(result[f"fit_loss_{when}"].sel(alignment=n).mean()) for when in ("before", "after")))
            for n in learned
        ]
        yield Table(
            ["learned score", "loss before", "after the fit"], rows, "Nats, mean over layers, on the training samples."
        )


def _region_elements(result: xr.Dataset, names: list[str]) -> Iterator[Element]:
    told = [d for d in result["direction"].values if result["chance"].sel(direction=d).notnull()]
    if not told:
        yield Note("No evaluated sample carries a region that tokens here belong to.")
    for direction in told:
        chosen = result.sel(direction=direction)
        count = int(chosen["chance_samples"])
        rows = [
            (n, *(_with_interval(chosen.sel(alignment=n), f"mean_{m}") for m in ("pointing", "mass", "region_overlap")))
            for n in names
            if chosen["mean_mass"].sel(alignment=n).notnull()
        ]
        rows.append(("chance", *[_with_interval(chosen, "chance")] * 2, ""))
        yield Table(
            [str(direction), "pointing", "mass inside", "IoU"], rows,
            f"Does attention from the tokens of a region fall on it? Mean over layers, heads and {count} samples"
            " with regions; 95 % interval over samples." + (_CLS if str(direction).startswith("cls") else ""),
        )  # fmt: skip


_CLS = " The class token asks of all regions together."


def _trained_elements(result: xr.Dataset) -> Iterator[Element]:
    """What models reach that were trained with each score, a table per setting."""
    figures = [str(name) for name in result[FIGURE].values]
    for setting in dict.fromkeys(name.partition("/")[0] for name in figures):
        yield Heading(f"Trained with each score: {setting}")
        chosen = result.sel({FIGURE: [name for name in figures if name.startswith(f"{setting}/")]})
        chosen = chosen.dropna("alignment", how="all", subset=["trained_score"])
        names = [str(name) for name in chosen["alignment"].values]
        titles = [str(name).partition("/")[2].replace("_", " ") for name in chosen[FIGURE].values]
        for part, caption in _TRAINED.items():
            rows = [
                (n, *(_with_verdict(chosen.sel({"alignment": n, FIGURE: f}), part) for f in chosen[FIGURE].values))
                for n in names
            ]
            yield Table(["score", *titles], rows, caption.format(int(chosen["trained_seeds"].max())))


_TRAINED = {
    "trained_score": "What models trained with each score reach on scenes that they never saw: mean over {} seeds and"
    " its 95 % interval (Student's t).",
    "trained_difference": "Less what the scaled dot product of the same seed reaches. Noise: the interval holds 0; none"
    " is widened for the number of comparisons.",
}


def _with_verdict(result: xr.Dataset, name: str) -> str:
    """The figure with its interval; a difference with what it says."""
    words = _with_interval(result, name)
    low, high = (float(result[f"{name}_{end}"]) for end in ("low", "high"))
    return f"{words}, noise" if name == "trained_difference" and low <= 0 <= high else words


def _with_interval(result: xr.Dataset, name: str) -> str:
    mean, low, high = (float(result[f"{name}{end}"]) for end in ("", "_low", "_high"))
    if np.isnan(mean):
        return "-"
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} ({low:.3f} to {high:.3f})"
