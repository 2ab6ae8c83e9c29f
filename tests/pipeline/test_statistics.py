"""Sums that make intervals over samples, and areas under curves: hand-computed answers and invariants."""

import numpy as np
import pytest
import xarray as xr

from attnscope.statistics import (
    add_sums,
    area_under_curve,
    bootstrap_interval,
    bootstrap_sums,
    interval_of_sums,
    mean_height,
    mean_ranks,
    measured,
    sample_sums,
    with_intervals,
)


def test_sums_of_blocks_add_up_to_the_sums_of_all_in_any_order() -> None:
    values = np.random.default_rng(0).normal(size=(11, 2, 3))
    values[4, 1] = np.nan
    whole = bootstrap_sums(values, np.arange(11), draws=20, seed=3)
    parts = [bootstrap_sums(values[b], np.arange(11)[b], draws=20, seed=3) for b in (slice(7, 11), slice(0, 7))]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-12)
    np.testing.assert_allclose(whole[0, 0] / whole[1, 0], np.nanmean(values, 0))


def test_interval_is_that_of_the_draws_by_hand() -> None:
    # Two draws: means 3 and 1; percentiles of two values are linear between them.
    sums = np.array([[4.0, 6.0, 1.0], [2.0, 2.0, 1.0]])
    mean, low, high = interval_of_sums(sums)
    np.testing.assert_allclose([mean, low, high], [2, 1 + 0.025 * 2, 3 - 0.025 * 2])


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    values = generator.exponential(size=(200, 300)) - 1
    low, high = bootstrap_interval(values, draws=400)
    assert 0.9 < ((low < 0) & (high > 0)).mean() < 0.98


def test_means_and_intervals_stand_beside_the_sums_that_parts_combine_by() -> None:
    values = np.random.default_rng(1).normal(size=(6, 2))
    values[2:, 1] = np.nan

    def sums(at: slice) -> xr.Dataset:
        array = xr.DataArray(values[at], dims=("sample", "layer"), attrs={"long_name": "a thing", "units": "nat"})
        block = xr.Dataset({"thing": array}, {"layer": [3, 4]})
        return sample_sums(block, np.arange(6)[at], draws=30, seed=1)

    result = with_intervals(add_sums(with_intervals(sums(slice(i, i + 2))) for i in (0, 2, 4)))
    xr.testing.assert_allclose(result, with_intervals(sums(slice(0, 6))))
    np.testing.assert_allclose(result["thing"], [values[:, 0].mean(), values[:2, 1].mean()])
    np.testing.assert_array_equal(result["thing_samples"], [6, 2])
    assert (result["thing_low"] < result["thing"]).all()
    assert result["thing"].attrs == {"long_name": "a thing", "units": "nat"}
    assert result["thing_samples"].attrs["units"] == "1"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_area_is_the_share_of_pairs_in_order(dtype: type) -> None:
    generator = np.random.default_rng(2)
    scores = generator.integers(0, 6, (4, 30)).astype(dtype)
    positive = generator.random(30) < 0.4
    expected = [np.mean([(a > b) + (a == b) / 2 for a in row[positive] for b in row[~positive]]) for row in scores]
    np.testing.assert_allclose(area_under_curve(scores, positive), expected)


def test_mean_height_of_a_curve_by_hand() -> None:
    fractions = (0, 0.5, 1)
    assert mean_height(np.array([1, 1, 1.0]), fractions) == 1
    np.testing.assert_array_equal(mean_height(np.array([[1, 0.5, 0], [0, 0.5, 0]]), fractions), [0.5, 0.25])
    # 0.25 * (1 + 0.2) / 2 + 0.25 * (0.2 + 0) / 2 over 0.5.
    assert mean_height(np.array([1, 0.2, 0]), (0, 0.25, 0.5)) == pytest.approx(0.35)
    assert mean_height(np.array([1.0, 3.0]), (0.25, 0.9)) == pytest.approx(2)
    assert mean_height(np.array([3.0]), (0.5,)) == 3


def test_area_is_not_defined_without_both_kinds_or_with_a_gap() -> None:
    assert np.isnan(area_under_curve(np.arange(3.0), np.ones(3, bool)))
    assert np.isnan(area_under_curve(np.array([1.0, np.nan, 2.0]), np.array([True, False, False])))


def test_equal_values_share_their_rank() -> None:
    np.testing.assert_array_equal(mean_ranks(np.array([[3, 1, 3, 0], [2, 2, 2, 2]])), [[3.5, 2, 3.5, 1], [2.5] * 4])


def test_what_was_measured_is_named_without_intervals_and_sums() -> None:
    parts = ["mass_sums", "mass", "mass_low", "mass_high", "mass_samples", "too_low", "lone_sums"]
    assert measured(parts) == ["mass", "too_low", "lone_sums"]
