"""Uncertainty over samples, and measures of agreement, for analysers.

Resampling is done with sums: every draw of the bootstrap gives each sample a number of times that it counts, which
depends on the seed and the sample's position alone. Sums over blocks of samples therefore add up to the sums over all
of them, whoever made them and in whatever order, and nothing needs to be kept of a sample that was counted.
"""

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
import xarray as xr

_ENDING = "_sums"
_SUMS_OF = "bootstrap sums of: "
_MOMENTS = ("value", "count")
_PARTS = {
    "": "{}",
    "_low": "lower end of the 95 % bootstrap interval of: {}",
    "_high": "upper end of the 95 % bootstrap interval of: {}",
    "_samples": "number of samples that count in: {}",
}


def measured(names: Sequence[str]) -> list[str]:
    """Names of variables without those that only carry another one's interval, count or bootstrap sums."""
    known = set(names)
    parts = (*filter(None, _PARTS), _ENDING)
    return [name for name in names if not any(name.removesuffix(part) in known - {name} for part in parts)]


def bootstrap_interval(
    values: np.ndarray, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval (low, high) of the mean over the first axis; NaN where fewer than two are finite.

    `values` is (sample, ...), each bound (...). Missing values are NaN: they are drawn like others and then left out
    of the mean, so each column may miss different samples. The same samples are drawn for all columns, which keeps
    what is paired paired.

    References
    ----------
    Efron, B. and Tibshirani, R. (1993). An Introduction to the Bootstrap, section 13.3; with a Poisson number of
    times for each sample: Chamandy, N. et al. (2012). Estimating Uncertainty for Massive Data Streams. Google.
    """
    values = np.asarray(values, float)
    sums = bootstrap_sums(values, np.arange(len(values)), draws=draws, seed=seed)
    _, low, high = interval_of_sums(sums, level=level)
    return low, high


def bootstrap_sums(values: np.ndarray, samples: np.ndarray, *, draws: int = 200, seed: int = 0) -> np.ndarray:
    """Sums and counts of some samples under each draw of the bootstrap: (2, 1 + draw, ...).

    `values` is (sample, ...), NaN where missing; `samples` are the positions of these samples in the run. Draw 0
    counts every sample once. Sums of the same seed may be added.
    """
    values = np.asarray(values, float)
    times = _times(samples, draws, seed)
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    present = np.isfinite(flat)
    sums = np.stack([times.T @ np.where(present, flat, 0.0), times.T @ present.astype(float)])
    return sums.reshape(2, 1 + draws, *values.shape[1:])


def interval_of_sums(sums: np.ndarray, *, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and the ends of its interval, (...) each, of sums (2, 1 + draw, ...); no interval of fewer than two."""
    totals, counts = sums
    means = np.divide(totals, counts, out=np.full(totals.shape, np.nan), where=counts > 0)
    bounds = np.full((2, *means.shape[1:]), np.nan)
    enough = counts[0] >= 2
    if enough.any() and len(means) > 1:
        bounds[:, enough] = np.nanquantile(means[1:, enough], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return means[0], bounds[0], bounds[1]


def sample_sums(values: xr.Dataset, samples: np.ndarray, *, draws: int = 200, seed: int = 0) -> xr.Dataset:
    """The bootstrap sums of every variable (sample, ...) of a block: variables `<name>_sums` (moment, draw, ...)."""
    found = {}
    for name, array in values.data_vars.items():
        ordered = array.transpose("sample", ...)
        sums = bootstrap_sums(ordered.values, samples, draws=draws, seed=seed)
        attrs = {"long_name": _SUMS_OF + str(array.attrs["long_name"]), "units": array.attrs["units"]}
        found[f"{name}{_ENDING}"] = (("moment", "draw", *ordered.dims[1:]), sums, attrs)
    kept = {str(n): c for n, c in values.coords.items() if "sample" not in c.dims}
    return xr.Dataset(found, {**kept, "moment": list(_MOMENTS)})


def add_sums(parts: Iterable[xr.Dataset]) -> xr.Dataset:
    """The sums of all parts, one after the other, so that no two parts need to be in memory beside the total."""
    with xr.set_options(keep_attrs=True, arithmetic_join="exact"):
        return reduce(lambda total, part: total + part, (part[sums_in(part)] for part in parts))


def sums_in(result: xr.Dataset) -> list[str]:
    """Names of the variables of a result that are bootstrap sums."""
    return [str(name) for name in result.data_vars if str(name).endswith(_ENDING)]


def with_intervals(sums: xr.Dataset) -> xr.Dataset:
    """Means over samples of bootstrap sums, with the sums beside them.

    For `<name>_sums`: `<name>`, `<name>_low`, `<name>_high` (95 % interval) and `<name>_samples` (how many count).
    """
    found: dict[str, xr.DataArray] = {}
    for full in sums_in(sums):
        array = sums[full].transpose("moment", "draw", ...)
        name, template = full.removesuffix(_ENDING), array.isel(moment=0, draw=0, drop=True)
        values = (*interval_of_sums(array.values), array.values[1, 0])
        for (ending, words), part in zip(_PARTS.items(), values, strict=True):
            meaning = str(array.attrs["long_name"]).removeprefix(_SUMS_OF)
            attrs = {"long_name": words.format(meaning), "units": array.attrs["units"]}
            if ending == "_samples":
                attrs["units"] = "1"
            found[f"{name}{ending}"] = template.copy(data=part).assign_attrs(attrs)
    return sums.assign(found)


def _times(samples: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each sample counts under each draw, (sample, 1 + draw): once, then Poisson of mean 1."""
    times = np.ones((len(samples), 1 + draws))
    for row, sample in zip(times, np.asarray(samples).tolist(), strict=True):
        row[1:] = np.random.Generator(np.random.Philox(key=seed, counter=sample << 64)).poisson(1.0, draws)
    return times


def mean_height(values: np.ndarray, at: Sequence[float]) -> np.ndarray:
    """Area under curves (..., point) by trapezoids over the width of their grid `at`; the value where that is a point.

    In the units of the values: what perturbation studies call the area under the curve, whatever share the grid spans.
    """
    if len(at) == 1:
        return values[..., 0]
    return np.trapezoid(values, at, axis=-1) / (at[-1] - at[0])


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, (...) in [0, 1]: the chance that a positive scores above a negative, ties by half.

    `scores` is (..., item), `positive` (item) bool; NaN where one of the two is absent, or a score is NaN.
    (Hanley and McNeil, Radiology 1982: the Mann-Whitney statistic.)
    """
    positive = np.asarray(positive, bool)
    above, below = int(positive.sum()), int((~positive).sum())
    if not above or not below:
        return np.full(scores.shape[:-1], np.nan)
    ranks = mean_ranks(scores)
    area = (ranks[..., positive].sum(-1) - above * (above + 1) / 2) / (above * below)
    return np.where(np.isnan(scores).any(-1), np.nan, area)


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on along the last axis; equal values share their mean rank."""
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    size = values.shape[-1]
    place = np.broadcast_to(np.arange(size), values.shape)
    breaks = np.diff(ordered, axis=-1) != 0
    edge = np.ones((*values.shape[:-1], 1), bool)
    first = np.maximum.accumulate(np.where(np.concatenate([edge, breaks], -1), place, 0), -1)
    last = np.minimum.accumulate(np.where(np.concatenate([breaks, edge], -1), place, size)[..., ::-1], -1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, -1)
    return ranks
