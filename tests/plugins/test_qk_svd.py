"""Singular modes of the query-key interaction: closed forms, invariants, and the labelled result."""

import numpy as np
import pytest
import xarray as xr

from attnscope import Run, analyse
from attnscope.analysis import make_analyser
from attnscope.testing import check_analyser, make_run
from attnscope_qk_svd import QKSVD
from attnscope_qk_svd import modes as qk

HEADS, CHANNELS, FEATURES = 3, 6, 24


@pytest.fixture
def projections() -> tuple[np.ndarray, np.ndarray]:
    query, key = np.random.default_rng(0).normal(size=(2, HEADS, CHANNELS, FEATURES))
    return query, key


def average(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    return qk.average_cosine(*qk.singular_values(query, key))


def whole(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    return np.swapaxes(query, -1, -2) @ key


def test_two_by_two_by_hand() -> None:
    # M = diag(3, 4) rotated on the key side by 90 degrees: u_1 = e2 meets v_1 = e1, u_2 = e1 meets v_2 = -e2.
    query, key = np.diag([3.0, 4.0]), np.array([[0.0, -1.0], [1.0, 0.0]])
    values, cosines = qk.singular_values(query, key)
    np.testing.assert_allclose(values, [4, 3], rtol=1e-12)
    np.testing.assert_allclose(cosines, [0, 0], atol=1e-12)


def test_average_cosine_is_the_trace_over_the_nuclear_norm(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    matrix = whole(query, key)
    expected = np.trace(matrix, axis1=-2, axis2=-1) / np.linalg.norm(matrix, "nuc", axis=(-2, -1))
    np.testing.assert_allclose(average(query, key), expected, atol=1e-12)


def test_singular_values_and_vectors_are_those_of_the_full_matrix(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    u, s, vt = np.linalg.svd(whole(query, key))
    left, values, right = qk.singular_modes(query, key)
    np.testing.assert_allclose(values, s[:, :CHANNELS], rtol=1e-10)
    np.testing.assert_allclose(s[:, CHANNELS:], 0, atol=1e-12)
    expected = np.einsum("hfn,hnf->hn", u[:, :, :CHANNELS], vt[:, :CHANNELS])
    np.testing.assert_allclose(qk.singular_values(query, key)[1], expected, atol=1e-10)
    np.testing.assert_allclose(np.abs(np.einsum("hnf,hfn->hn", left, u[:, :, :CHANNELS])), 1, atol=1e-10)
    np.testing.assert_allclose(np.abs(np.einsum("hnf,hnf->hn", right, vt[:, :CHANNELS])), 1, atol=1e-10)


def test_modes_are_orthonormal_and_give_the_matrix_back(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    left, values, right = qk.singular_modes(query, key)
    for vectors in (left, right):
        np.testing.assert_allclose(
            vectors @ np.swapaxes(vectors, 1, 2), np.eye(CHANNELS)[None].repeat(HEADS, 0), atol=1e-12
        )
    np.testing.assert_allclose(np.einsum("hnf,hn,hng->hfg", left, values, right), whole(query, key), atol=1e-10)


def test_modes_give_the_score_of_any_pair_of_tokens(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    tokens = np.random.default_rng(1).normal(size=(5, FEATURES))
    left, values, right = qk.singular_modes(query, key)
    scores = np.einsum("if,hcf,hcg,jg->hij", tokens, query, key, tokens)
    modes = np.einsum("if,hnf,hn,hng,jg->hij", tokens, left, values, right, tokens)
    np.testing.assert_allclose(modes, scores, atol=1e-9)


@pytest.mark.parametrize(("sign", "expected"), [(1, 1), (-1, -1)])
def test_key_equal_to_query_up_to_sign_has_cosine_one_up_to_sign(projections, sign, expected) -> None:  # type: ignore[no-untyped-def]
    query, _ = projections
    values, cosines = qk.singular_values(query, sign * query)
    np.testing.assert_allclose(cosines, expected, atol=1e-10)
    np.testing.assert_allclose(qk.average_cosine(values, cosines), expected, atol=1e-12)


def test_a_skew_interaction_has_average_cosine_zero(projections) -> None:  # type: ignore[no-untyped-def]
    half, other = (side[:, : CHANNELS // 2] for side in projections)
    query = np.concatenate([half, other], 1)
    key = np.concatenate([other, -half], 1)
    matrix = whole(query, key)
    np.testing.assert_allclose(matrix, -np.swapaxes(matrix, 1, 2), atol=1e-12)
    np.testing.assert_allclose(average(query, key), 0, atol=1e-12)


@pytest.mark.parametrize("channels", [3, 64, 600])
def test_features_that_fill_no_whole_piece_are_kept(channels: int) -> None:
    query, key = np.random.default_rng(0).normal(size=(2, 1, channels, 700))
    expected = np.linalg.svd(whole(query, key))[1][:, :channels]
    np.testing.assert_allclose(qk.singular_values(query, key)[0], expected, rtol=1e-8)


def test_dependent_and_nearly_dependent_rows_are_decomposed_as_exactly(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    for distance in (0, 1e-14, 1e-9, 1e-6):
        query = query.copy()
        query[:, 1] = query[:, 0] + distance * query[:, 1]
        left, values, right = qk.singular_modes(query, key)
        expected = np.linalg.svd(whole(query, key))[1][:, :CHANNELS]
        np.testing.assert_allclose(values, expected, atol=1e-13 * expected.max())
        np.testing.assert_allclose(np.einsum("hnf,hn,hng->hfg", left, values, right), whole(query, key), atol=1e-12)


def test_more_channels_than_features_give_as_many_modes_as_features(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = (side[:, :, :4] for side in projections)
    left, values, right = qk.singular_modes(query, key)
    assert left.shape == right.shape == (HEADS, 4, 4)
    np.testing.assert_allclose(np.einsum("hnf,hn,hng->hfg", left, values, right), whole(query, key), atol=1e-12)


def test_random_projections_have_average_cosine_near_zero() -> None:
    query, key = np.random.default_rng(0).normal(size=(2, 50, 16, 256))
    averages = average(query, key)
    assert abs(averages.mean()) < 0.01
    assert averages.std() < 2 / np.sqrt(16 * 256)


def test_gauge_of_the_channels_changes_nothing(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    gauge = np.random.default_rng(2).normal(size=(CHANNELS, CHANNELS)) + 3 * np.eye(CHANNELS)
    turned_query = np.einsum("dc,hdf->hcf", gauge, query)
    turned_key = np.einsum("cd,hdf->hcf", np.linalg.inv(gauge), key)
    for before, after in zip(qk.singular_modes(query, key), qk.singular_modes(turned_query, turned_key), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-9)


def test_swapping_query_and_key_swaps_the_vectors_and_keeps_the_cosines(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    left, values, right = qk.singular_modes(query, key)
    swapped_left, swapped_values, swapped_right = qk.singular_modes(key, query)
    np.testing.assert_allclose(swapped_values, values, rtol=1e-10)
    sign = np.sign(np.einsum("hnf,hnf->hn", swapped_left, right))[..., None]
    np.testing.assert_allclose(swapped_left * sign, right, atol=1e-9)
    np.testing.assert_allclose(swapped_right * sign, left, atol=1e-9)
    np.testing.assert_allclose(qk.singular_values(key, query)[1], qk.singular_values(query, key)[1], atol=1e-10)


def test_largest_entry_of_each_left_vector_is_positive(projections) -> None:  # type: ignore[no-untyped-def]
    left, _, _ = qk.singular_modes(*projections)
    largest = np.take_along_axis(left, np.abs(left).argmax(-1)[..., None], -1)
    assert (largest > 0).all()


def test_cosines_of_equal_singular_values_share_their_mean_whatever_the_rotation() -> None:
    generator = np.random.default_rng(3)
    left, right = (np.linalg.qr(generator.normal(size=(12, 3)))[0].T for _ in range(2))
    turn = np.linalg.qr(generator.normal(size=(2, 2)))[0]
    values = np.array([5.0, 2.0, 2.0])
    turned_left, turned_right = left.copy(), right.copy()
    turned_left[1:], turned_right[1:] = turn @ left[1:], turn @ right[1:]
    groups = qk.degenerate_groups(values, 1e-6)
    np.testing.assert_array_equal(groups, [0, 1, 1])
    cosines = [np.einsum("nf,nf->n", u, v) for u, v in ((left, right), (turned_left, turned_right))]
    assert not np.allclose(*cosines)
    np.testing.assert_allclose(*(qk.share_within_groups(c, groups) for c in cosines), atol=1e-12)


def test_single_precision_is_within_a_hundred_thousandth(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    exact = qk.singular_values(query, key)[0]
    single = qk.singular_values(query.astype(np.float32), key.astype(np.float32))[0]
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, exact, rtol=1e-5)


def test_permuted_averages_are_those_of_permuted_keys(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    nuclear_norm = qk.singular_values(query, key)[0].sum(-1)
    drawn = qk.permuted_averages(query, key, nuclear_norm, draws=2, seed=5)
    generator = np.random.default_rng(5)
    for one in drawn:
        permuted = key[:, :, generator.permutation(FEATURES)]
        values, cosines = qk.singular_values(query, permuted)
        np.testing.assert_allclose(values.sum(-1), nuclear_norm, rtol=1e-12)
        np.testing.assert_allclose(one, qk.average_cosine(values, cosines), atol=1e-12)


def test_bias_ratio_is_that_of_the_score_terms_on_white_tokens(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    bias = np.random.default_rng(4).normal(size=(HEADS, CHANNELS))
    ratio = qk.bias_ratio(bias, key, qk.singular_values(query, key)[0])
    one, other = np.random.default_rng(5).normal(size=(2, 40000, FEATURES))
    for head in range(HEADS):
        bilinear = np.einsum("if,fg,ig->i", one, whole(query, key)[head], other).std()
        np.testing.assert_allclose(ratio[head], (other @ (bias[head] @ key[head])).std() / bilinear, rtol=0.03)


def test_rectangular_interaction_has_singular_values_and_no_cosines(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections[0], projections[1][:, :, :10]
    values, cosines = qk.singular_values(query, key)
    np.testing.assert_allclose(values, np.linalg.svd(whole(query, key))[1][:, :CHANNELS], rtol=1e-10)
    assert np.isnan(cosines).all()


class MadeWeights:
    """As much of a run as the analyser reads, with weights that no made run has."""

    def __init__(self, **sites: xr.Dataset) -> None:
        self._weights = {name.replace("_", "."): weights for name, weights in sites.items()}
        self.sites = tuple(self._weights)

    location = "made"

    def weights(self, site: str) -> xr.Dataset:
        if not self._weights[site]:
            raise ValueError(f"no weights of {site}")
        return self._weights[site]

    def quantities(self, site: str) -> tuple[str, ...]:
        return ()


def made_weights(query: np.ndarray, key: np.ndarray, layers: tuple[int, ...] = (0,), **attrs: object) -> xr.Dataset:
    """Weights of one site with the same projections in every layer."""

    def stack(side: np.ndarray) -> np.ndarray:
        return np.stack([side] * len(layers))

    square = query.shape[-1] == key.shape[-1]
    return xr.Dataset(
        {
            "query": (("layer", "head", "channel", "feature"), stack(query)),
            "key": (("layer", "kv_head", "channel", "feature" if square else "key_feature"), stack(key)),
            "query_bias": (("layer", "head", "channel"), stack(query[..., 0])),
            "key_bias": (("layer", "kv_head", "channel"), stack(key[..., 0])),
        },
        {"layer": list(layers)},
        attrs,
    )


def test_analyser_keeps_the_contract() -> None:
    result = check_analyser(QKSVD())
    assert result["singular_value"].dims == ("site", "layer", "head", "mode")
    assert (result["singular_value"].diff("mode") <= 0).all()


def test_analyser_gives_the_modes_of_the_stored_weights() -> None:
    run = make_run(layers=3, heads=2)
    result = analyse(run, QKSVD(vectors=True), save=False).sel(site="vision.self")
    weights = run.weights("vision.self")
    for layer in (0, 2):
        query, key = (weights[side].sel(layer=layer).values.astype(float) for side in ("query", "key"))
        s = np.linalg.svd(whole(query, key))[1]
        chosen = result.sel(layer=layer)
        np.testing.assert_allclose(chosen["singular_value"], s[:, :4], rtol=1e-6)
        matrix = np.einsum(
            "hnf,hn,hng->hfg", chosen["left_vector"], chosen["singular_value"], chosen["right_vector"], dtype=float
        )
        np.testing.assert_allclose(matrix, whole(query, key), atol=1e-5)
        np.testing.assert_allclose(
            chosen["cosine_average"], (chosen["cosine"] * chosen["singular_value"]).sum("mode") / s.sum(-1), rtol=1e-9
        )
        np.testing.assert_allclose(chosen["layer_cosine_average"], chosen["cosine_average"].mean("head"), rtol=1e-9)


def test_layers_are_chosen_by_the_models_own_numbers() -> None:
    run = make_run(layers=3)
    everything = analyse(run, QKSVD(), save=False)
    chosen = analyse(run, QKSVD(layers=(2,)), save=False)
    np.testing.assert_array_equal(chosen["layer"], [2])
    xr.testing.assert_allclose(chosen["singular_value"], everything["singular_value"].sel(layer=[2]))
    with pytest.raises(ValueError, match="has no layer 7; it has 0 to 2"):
        QKSVD(layers=(7,)).analyse(run)


def test_query_heads_that_share_a_key_head_use_that_one(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    query = np.concatenate([query, query[::-1] + 1])
    run = MadeWeights(text_self=made_weights(query, key))
    result = QKSVD().analyse(run).sel(site="text.self", layer=0)  # type: ignore[arg-type]
    for head in range(2 * HEADS):
        expected = np.linalg.svd(query[head].T @ key[head // 2])[1][:CHANNELS]
        np.testing.assert_allclose(result["singular_value"].sel(head=head), expected, rtol=1e-10)


def test_sites_of_different_size_stand_side_by_side_with_what_they_lack_undefined(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    small = made_weights(query[:2, :4, :12], key[:2, :4, :12], layers=(0,))
    run = MadeWeights(vision_self=made_weights(query, key, layers=(0, 1)), text_self=small)
    result = QKSVD().analyse(run)  # type: ignore[arg-type]
    assert dict(result["cosine"].sizes) == {"site": 2, "layer": 2, "head": 3, "mode": 6}
    alone = QKSVD(sites=("text.self",)).analyse(run).sel(site="text.self")  # type: ignore[arg-type]
    beside = result.sel(site="text.self")
    xr.testing.assert_allclose(beside.sel(layer=[0], head=[0, 1], mode=range(4)), alone)
    assert beside["singular_value"].sel(layer=1).isnull().all()
    assert beside["degenerate_group"].sel(head=2).max() == -1
    assert "".join(element.html() for element in QKSVD().report(result))


def test_rectangular_site_says_why_it_has_no_cosines(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    run = MadeWeights(text_vision=made_weights(query, key[:, :, :10]))
    result = QKSVD(vectors=True).analyse(run)  # type: ignore[arg-type]
    assert np.isfinite(result["singular_value"]).all()
    assert result["cosine_average"].isnull().all()
    assert result["right_vector"].sizes["key_feature"] == 10
    assert "text.vision: queries and keys have different features" in result.attrs["caveats"]
    assert "different features" in "".join(element.html() for element in QKSVD().report(result))


def test_rotary_model_carries_its_caveat_into_the_report(projections) -> None:  # type: ignore[no-untyped-def]
    run = MadeWeights(text_self=made_weights(*projections, rotary=True))
    result = QKSVD().analyse(run)  # type: ignore[arg-type]
    assert "rotates queries and keys by position" in "".join(element.html() for element in QKSVD().report(result))


def test_norm_gain_scales_the_features_of_both_sides(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    gain = np.random.default_rng(6).uniform(0.5, 2, FEATURES)
    plain = made_weights(query * gain, key * gain)
    run = MadeWeights(text_self=made_weights(query, key).assign(norm_gain=(("layer", "feature"), gain[None])))
    result = QKSVD(use_norm_gain=True).analyse(run)  # type: ignore[arg-type]
    expected = QKSVD().analyse(MadeWeights(text_self=plain))  # type: ignore[arg-type]
    xr.testing.assert_allclose(result["singular_value"], expected["singular_value"])
    xr.testing.assert_allclose(result["cosine"], expected["cosine"])
    with pytest.raises(ValueError, match=r"no norm gain for site 'text\.self'"):
        QKSVD(use_norm_gain=True).analyse(MadeWeights(text_self=plain))  # type: ignore[arg-type]


def test_a_head_of_zeros_is_left_undefined_without_a_warning() -> None:
    run = MadeWeights(text_self=made_weights(np.zeros((2, 3, 8)), np.zeros((2, 3, 8))))
    result = QKSVD().analyse(run)  # type: ignore[arg-type]
    assert (result["singular_value"] == 0).all()
    assert result["cosine_average"].isnull().all()
    assert "".join(element.html() for element in QKSVD().report(result))


def test_modes_without_a_singular_value_have_no_cosine(projections) -> None:  # type: ignore[no-untyped-def]
    query, key = projections
    query = query.copy()
    query[:, 4:] = query[:, :2]
    result = QKSVD().analyse(MadeWeights(text_self=made_weights(query, key))).squeeze()  # type: ignore[arg-type]
    assert result["cosine"].isel(mode=slice(4, None)).isnull().all()
    matrix = whole(query, key)
    expected = np.trace(matrix, axis1=-2, axis2=-1) / np.linalg.norm(matrix, "nuc", axis=(-2, -1))
    np.testing.assert_allclose(result["cosine_average"], expected, atol=1e-12)


def test_options_come_by_name_and_wrong_ones_are_refused(make_run_of_weights: Run) -> None:
    analyser = make_analyser("qk-svd", {"layers": [1], "precision": "float32"})
    assert analyser == QKSVD(layers=(1,), precision="float32")
    result = analyse(make_run_of_weights, analyser, save=False)
    exact = analyse(make_run_of_weights, QKSVD(layers=(1,)), save=False)
    np.testing.assert_allclose(result["singular_value"], exact["singular_value"], rtol=1e-5)


@pytest.fixture
def make_run_of_weights() -> Run:
    return make_run(quantities=frozenset({"weights"}))


def test_a_site_without_projections_is_left_out_by_name(projections) -> None:  # type: ignore[no-untyped-def]
    both = MadeWeights(text_self=made_weights(*projections), vision_self=xr.Dataset())
    result = QKSVD().analyse(both)  # type: ignore[arg-type]
    assert list(result["site"].values) == ["text.self"]
    assert "vision.self: the model makes its queries and keys with no linear layers" in result.attrs["caveats"]
    for run, sites in ((both, ("vision.self",)), (MadeWeights(vision_self=xr.Dataset()), None)):
        with pytest.raises(ValueError, match=r"no weights of|of no site"):
            QKSVD(sites=sites).analyse(run)  # type: ignore[arg-type]
