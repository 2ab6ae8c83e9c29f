"""Entropy of attention: closed forms, bounds, objects told from background, every kind of site."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import attnscope
import attnscope_attention_entropy as ae
from attnscope import Run, analyse
from attnscope.analysis import make_analyser
from attnscope.testing import check_analyser
from attnscope_attention_entropy import AttentionEntropy

FEW = AttentionEntropy(draws=20)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_entropy_of_known_rows(dtype: type) -> None:
    rows = np.array([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, np.nan]], dtype)
    np.testing.assert_allclose(ae.entropy(rows), [np.log(4), 0, np.log(2), 1.5 * np.log(2)], rtol=1e-6)


def test_entropy_is_that_of_the_definition_whatever_the_row_sums_to() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(0, 3, (2, 5, 9))
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = [[-sum(a * np.log(a) for a in row) for row in head] for head in weights]
    np.testing.assert_allclose(ae.entropy(weights), expected, rtol=1e-12)
    # A sink takes a share of every row.
    np.testing.assert_allclose(ae.entropy(0.3 * weights), expected, rtol=1e-12)
    assert (ae.entropy(weights) <= np.log(9)).all()
    np.testing.assert_allclose(ae.entropy(weights[..., generator.permutation(9)]), expected, rtol=1e-12)


def test_a_row_without_a_key_has_no_entropy_and_one_key_no_evenness() -> None:
    assert np.isnan(ae.entropy(np.array([np.nan, np.nan])))
    assert np.isnan(ae.entropy(np.zeros(3)))
    np.testing.assert_array_equal(ae.evenness(np.array([0.0, np.log(3)]), np.array([1, 3])), [np.nan, 1])


def test_low_entropy_inside_an_object_has_area_one() -> None:
    objects = np.array([[True, True, False, False, False], [False, False, False, True, False]])
    np.testing.assert_array_equal(ae.separate(np.array([[0.1, 0.2, 2, 0.3, 1], [2, 2, 0, 2, 0]]), objects), [1, 0])
    assert np.isnan(ae.separate(np.ones(5), objects[:0]))


def test_analyser_keeps_the_contract() -> None:
    result = check_analyser(FEW)
    assert result["entropy"].dims == ("site", "modality", "layer", "head")
    assert {"object_area_low", "object_area_high", "object_area_samples"} <= set(result.data_vars)


@pytest.fixture(scope="module")
def found(known_run):  # type: ignore[no-untyped-def]
    known = known_run()
    return known, analyse(known.run, FEW, save=False)


def test_means_are_those_of_the_definition_at_every_site(found) -> None:  # type: ignore[no-untyped-def]
    known, result = found
    used = [0, 1, 3]
    for site, modality in (
        ("vision.self", "image"),
        ("text.self", "text"),
        ("text.vision", "text"),
        ("joint.self", "image"),
    ):
        queries = known.run.plan.sites[site].queries
        tokens = known.run.tokens(queries)
        code = {"image": 2, "text": 1}[modality]
        means = []
        for sample in used:
            rows = known.attention[site, 1][sample][:, tokens["kind"].values[sample] == code]
            rows = rows[:, rows.sum((0, 2)) > 0]
            logarithms = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
            means.append(-(rows * logarithms).sum(-1).mean(-1))
        chosen = result.sel(site=site, modality=modality, layer=1)
        heads = len(means[0])
        np.testing.assert_allclose(chosen["entropy"].values[:heads], np.mean(means, 0), rtol=1e-5)
        np.testing.assert_allclose(chosen["entropy_mean"], np.mean(means), rtol=1e-5)
        assert chosen["entropy_mean_samples"] == 3


def test_objects_are_told_from_the_rest_and_ground_is_no_object(found) -> None:  # type: ignore[no-untyped-def]
    known, result = found
    inside = np.zeros((3, 4), bool)
    inside[:2, :2] = inside[2, 2:] = True
    areas = []
    for sample in (0, 1, 3):
        rows = known.attention["vision.self", 0][sample][:, 2:]
        entropies = -(rows * np.log(rows)).sum(-1).mean(0)
        pairs = [(a < b) + (a == b) / 2 for a in entropies[inside.ravel()] for b in entropies[~inside.ravel()]]
        areas.append(np.mean(pairs))
    chosen = result.sel(site="vision.self", modality="image", layer=0)
    np.testing.assert_allclose(chosen["object_area"], np.mean(areas), atol=1e-6)
    low, high = float(chosen["object_area_low"]), float(chosen["object_area_high"])
    assert min(areas) - 1e-6 <= low <= np.mean(areas) <= high <= max(areas) + 1e-6


def test_what_is_not_there_is_counted_or_told(found, known_run) -> None:  # type: ignore[no-untyped-def]
    _, result = found
    assert float(result["dead_rows_sums"].isel(moment=0, draw=0).sum()) == 3 * 2
    html = "".join(element.html() for element in FEW.report(result))
    assert "6 query rows" in html
    assert result["entropy"].sel(site="vision.self", modality="text").isnull().all()
    bare = analyse(known_run(regions=False, sites=("vision.self",)).run, FEW, save=False)
    assert bare["object_area"].isnull().all()
    assert "No sample carries a region" in "".join(element.html() for element in FEW.report(bare))
    with pytest.raises(ValueError, match=r"has no site 'audio\.self'"):
        AttentionEntropy(sites=("audio.self",)).analyse(known_run(sites=("vision.self",)).run)


def test_parts_combine_into_the_whole_in_one_block_or_many(known_run) -> None:  # type: ignore[no-untyped-def]
    run = known_run(5, unit=2).run
    whole = analyse(run, FEW, save=False)
    parts = FEW.combine([FEW.analyse(run.part(range(0, 3))), FEW.analyse(run.part(range(3, 5)))])
    xr.testing.assert_allclose(parts, whole)
    assert list(parts["shown_id"].values[0]) == ["s0", "s1", "s2", "s4"]


def test_options_are_checked_and_layers_chosen(known_run) -> None:  # type: ignore[no-untyped-def]
    analyser = make_analyser("attention-entropy", {"layers": [1], "draws": 5})
    result = analyse(known_run(sites=("vision.self",)).run, analyser, save=False)
    np.testing.assert_array_equal(result["layer"], [1])
    with pytest.raises(ValueError, match="has no layer 9; it has 0 to 1"):
        AttentionEntropy(layers=(9,)).analyse(known_run(sites=("vision.self",)).run)


def peak_bytes(run: Run, analyser: AttentionEntropy) -> int:
    tracemalloc.start()
    analyser.analyse(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_samples(known_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    few, many = (
        known_run(n, unit=8, location=str(tmp_path / f"{n}.zarr"), sites=("vision.self",)).run for n in (16, 80)
    )
    peak_bytes(few, FEW)
    assert peak_bytes(many, FEW) < 1.5 * peak_bytes(few, FEW)


@pytest.mark.slow
def test_on_real_weights_entropy_lies_within_its_bounds() -> None:
    run = attnscope.extract("embedded:dinov2-small", "embedded:photographs", limit=2)
    result = analyse(run, FEW, save=False).sel(site="vision.self", modality="image")
    most = np.log(run.plan.sites["vision.self"].key_tokens)
    assert ((result["entropy"] > 0) & (result["entropy"] < most)).all()
    assert ((result["object_area"] >= 0) & (result["object_area"] <= 1)).all()
    html = "".join(element.html() for element in FEW.report(analyse(run, FEW, save=False)))
    assert html.count("<img ") == 2 * 6
