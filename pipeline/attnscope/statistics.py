"""Uncertainty over samples, for analysers."""

import numpy as np


def bootstrap_interval(
    values: np.ndarray, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval (low, high) of the mean over the first axis; NaN where fewer than two are finite.

    `values` is (sample, ...), each bound (...). Missing values are NaN: they are drawn like others and then left out
    of the mean, so each column may miss different samples. The same samples are drawn for all columns, which keeps
    what is paired paired.

    References
    ----------
    Efron, B. and Tibshirani, R. (1993). An Introduction to the Bootstrap, section 13.3.
    """
    values = np.asarray(values, float)
    flat = values.reshape(len(values), int(np.prod(values.shape[1:])))
    present = np.isfinite(flat)
    filled = np.where(present, flat, 0.0)
    generator = np.random.default_rng(seed)
    means = np.full((draws, flat.shape[1]), np.nan)
    for draw in range(draws if len(flat) else 0):
        times = np.bincount(generator.integers(len(flat), size=len(flat)), minlength=len(flat))
        counted = times @ present
        np.divide(times @ filled, counted, out=means[draw], where=counted > 0)
    bounds = np.full((2, flat.shape[1]), np.nan)
    enough = present.sum(0) >= 2
    if enough.any():
        bounds[:, enough] = np.nanquantile(means[:, enough], [(1 - level) / 2, (1 + level) / 2], axis=0)
    low, high = bounds.reshape(2, *values.shape[1:])
    return low, high
