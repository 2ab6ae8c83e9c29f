"""A comparison: the same analyses of several runs side by side, such as of several models or checkpoints.

Of every variable that the runs' results share: its mean in each run, over layers where it has them, and where it has
samples the difference to the first run over the samples that both have, sample by sample.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from attnscope.report import Element, Facts, LineChart, Note, Paragraph, Section, Series, Table, render_page
from attnscope.run import EXTRACTED, Run
from attnscope.statistics import bootstrap_interval

Results = Mapping[str, xr.Dataset]
"""What one analyser gave for each of the runs, by the label of the run."""


def render_comparison(runs: Mapping[str, Run]) -> str:
    """One self-contained HTML page on how the analyses of several runs, named by their labels, differ."""
    names = sorted({name for run in runs.values() for name in run.analyses})
    sections = [Section(name, _section(name, runs)) for name in names]
    return render_page(f"Comparison of {len(runs)} runs", _summary(runs), sections)


def _summary(runs: Mapping[str, Run]) -> Iterator[Element]:
    columns = ["run", "model", "class", "layers", "samples used", "weights digest"]
    yield Table(columns, [_row(label, run) for label, run in runs.items()])
    yield Paragraph(
        f"Differences are to {next(iter(runs))!r}, over the samples that both runs used. Intervals are 95 % percentile"
        " bootstrap intervals of the mean over samples."
    )


def _row(label: str, run: Run) -> Sequence[object]:
    layers = max((len(site.layers) for site in run.plan.sites.values()), default=0)
    used = int((run.status == EXTRACTED).sum())
    described = run.attrs
    digest = str(described.get("weights_digest", ""))[:12]
    return label, described.get("model", ""), described.get("model_class", ""), layers, used, digest


def _section(name: str, runs: Mapping[str, Run]) -> Iterator[Element]:
    results = {label: run.analysis(name) for label, run in runs.items() if name in run.analyses}
    without = [label for label in runs if label not in results]
    if without:
        yield Note(f"These runs have no such analysis: {', '.join(without)}.")
    options = {label: str(result.attrs.get("options", "")) for label, result in results.items()}
    if len(set(options.values())) > 1:
        yield Note("The analyses were made with different options.", "problem")
        yield Facts(list(options.items()))
    means = list(_means(results))
    if not means:
        yield Paragraph("The results share no variable of numbers.")
        return
    yield Table(["variable", "units", *results], means, "Means over everything that is finite.")
    differences = list(_differences(results))
    if differences:
        columns = ["variable", "run", "samples", "difference of the mean", "low", "high"]
        yield Table(columns, differences, f"Differences to {next(iter(results))!r}, sample by sample.")
    yield from _charts(results)


def _shared(results: Results) -> list[str]:
    """Variables of numbers that every result has."""
    first, *others = results.values()
    return [
        str(name)
        for name, variable in first.data_vars.items()
        if all(name in other for other in others) and variable.dtype.kind in "fiub"
    ]


def _means(results: Results) -> Iterator[Sequence[object]]:
    for name in _shared(results):
        units = next(iter(results.values()))[name].attrs.get("units", "")
        yield (name, units, *(_mean(result[name]) for result in results.values()))


def _differences(results: Results) -> Iterator[Sequence[object]]:
    """Of each variable by sample: run, samples that both used, mean difference to the first run, and its interval."""
    (_, first), *others = results.items()
    for name in _shared(results):
        if "sample" not in first[name].dims or "sample" not in first.coords:
            continue
        for label, other in others:
            if "sample" not in other[name].dims or "sample" not in other.coords:
                continue
            both = [s for s in first["sample"].values if s in set(other["sample"].values)]
            theirs, mine = (_by_sample(r[name].sel(sample=both)) for r in (other, first))
            paired = theirs - mine
            low, high = bootstrap_interval(paired)
            used = int(np.isfinite(paired).sum())
            yield name, label, used, _finite_mean(paired), float(low), float(high)


def _charts(results: Results) -> Iterator[Element]:
    for name in _shared(results):
        by_layer = {label: result[name] for label, result in results.items() if "layer" in result[name].dims}
        if len(by_layer) < len(results):
            continue
        first = next(iter(by_layer.values()))
        units = first.attrs.get("units", "")
        label = f"{first.attrs.get('long_name', name)} ({units})" if units else str(first.attrs.get("long_name", name))
        yield from _chart(name, label, by_layer)


def _chart(name: str, y_label: str, by_layer: Mapping[str, xr.DataArray]) -> Iterator[Element]:
    """The mean of each layer in each run; models of different depth by the share of layers below."""
    curves = {label: _by_layer(values) for label, values in by_layer.items()}
    counts = {len(curve) for curve in curves.values()}
    if max(counts) < 2:
        return
    if len(counts) == 1:
        layers = next(iter(by_layer.values()))
        x = layers["layer"].values if "layer" in layers.coords else np.arange(max(counts))
        yield LineChart(x, [Series(label, curve) for label, curve in curves.items()], "layer", y_label, name)
        return
    x = np.linspace(0, 1, max(counts))
    series = [Series(n, np.interp(x, np.linspace(0, 1, len(curve)), curve)) for n, curve in curves.items()]
    yield LineChart(x, series, "relative depth", y_label, f"{name}, between layers interpolated")


def _by_sample(values: xr.DataArray) -> np.ndarray:
    return _reduced(values, "sample")


def _by_layer(values: xr.DataArray) -> np.ndarray:
    return _reduced(values, "layer")


def _reduced(values: xr.DataArray, kept: str) -> np.ndarray:
    """The mean of what is finite over all dimensions but one; NaN where nothing is."""
    flat = np.asarray(values.transpose(kept, ...).values, float).reshape(values.sizes[kept], -1)
    finite = np.isfinite(flat)
    total = np.where(finite, flat, 0).sum(axis=1)
    count = finite.sum(axis=1)
    return np.divide(total, count, out=np.full(len(flat), np.nan), where=count > 0)


def _mean(values: xr.DataArray) -> float:
    return _finite_mean(np.asarray(values.values, float))


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
