"""Modes on samples: maps read off queries, what modes add to attention, objects; by brute force from known inputs."""

import itertools

import numpy as np
import pytest
import xarray as xr

from attnscope import ExtractSpec, Sample, analyse, extract
from attnscope.run import MissingQuantity
from attnscope.testing import make_run
from attnscope_qk_svd import QKSVD
from attnscope_qk_svd import modes as qk
from attnscope_qk_svd import on_samples as on

USED = (0, 1, 3)
YES = QKSVD(on_samples="yes", draws=20, null_draws=3, vectors=True)
PATCHES = slice(2, None)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_inputs_are_read_off_queries_and_keys(dtype: type, tolerance: float) -> None:
    generator = np.random.default_rng(0)
    query, key = generator.normal(size=(2, 3, 5, 20)).astype(dtype)
    tokens = generator.normal(size=(7, 20)).astype(dtype)
    left, values, right = qk.singular_modes(query, key)
    query_reader, key_reader = qk.mode_readers(query, key, 1e-6)
    read = np.einsum("tf,hcf->htc", tokens, query) @ query_reader
    np.testing.assert_allclose(read, np.einsum("tf,hnf->htn", tokens, left), atol=20 * tolerance)
    read_of_key = np.einsum("tf,hcf->htc", tokens, key) @ key_reader
    np.testing.assert_allclose(read_of_key, np.einsum("tf,hnf->htn", tokens, right), atol=20 * tolerance)
    scores = np.einsum("htn,hn,hsn->hts", read, values, read_of_key)
    expected = np.einsum("tf,hcf,hcg,sg->hts", tokens, query, key, tokens)
    np.testing.assert_allclose(scores, expected, atol=100 * tolerance * np.abs(expected).max())


def test_readers_of_modes_without_size_read_nothing() -> None:
    query, key = np.random.default_rng(0).normal(size=(2, 1, 4, 9))
    query[:, 3] = query[:, 0]
    query_reader, key_reader = qk.mode_readers(query, key, 1e-6)
    assert (query_reader[..., 3] == 0).all()
    assert (key_reader[..., 3] == 0).all()


def test_contributions_sum_to_how_far_attended_keys_score_above_the_mean() -> None:
    generator = np.random.default_rng(1)
    query, key, values = generator.normal(size=(2, 6, 3)), generator.normal(size=(2, 6, 3)), generator.random((2, 3))
    scores = np.einsum("hin,hn,hjn->hij", query, values, key)
    allowed = np.tri(6, dtype=bool)
    allowed[2] = False
    attention = np.where(allowed, np.exp(scores), 0)
    attention = np.divide(attention, attention.sum(-1, keepdims=True), where=allowed.any(-1)[:, None], out=attention)
    rows = np.broadcast_to(allowed, attention.shape)
    found = on.contributions(np.where(allowed, attention, np.nan), rows, query, key, values)
    gains = [
        [(attention[h, i] * scores[h, i]).sum() - scores[h, i, allowed[i]].mean() for i in range(6) if i != 2]
        for h in range(2)
    ]
    np.testing.assert_allclose(found.sum(-1), np.mean(gains, 1))
    assert (np.mean(gains, 1) >= 0).all(), "a softmax prefers what scores high"


def test_a_mode_is_scored_by_the_sign_that_gives_more() -> None:
    query = np.array([[[1.0, -3], [0, 2]]])
    key = np.array([[[2.0, -4], [-5, 1]]])
    score, sign = on.score_tokens(query, key)
    # Mode 0: 1 * 2 against 0 * 5; mode 1: 2 * 1 against 3 * 4.
    np.testing.assert_array_equal(score, [[2, 12]])
    np.testing.assert_array_equal(sign, [[1, -1]])


def test_the_strongest_object_is_that_of_the_largest_mean() -> None:
    shares = np.array([[1.0, 1, 0, 0, 0], [0, 0, 0.5, 0, 0]])
    maps = np.array([[[4.0, 0, 0], [0, 0, 0], [3, 0, 0], [0, 0, 1], [0, 0, 1]]])
    np.testing.assert_array_equal(on.strongest_object(maps, shares), [[1, 0, 2]])


def test_preference_by_hand_and_of_uniform_attention() -> None:
    shares = np.array([[0.5, 1, 0, 0], [0, 0, 0.9, 0]])
    attention = np.zeros((1, 4, 4))
    attention[0, 1] = [0.2, 0.4, 0.1, 0.1]  # asked by the first object; sums to 0.8 over these keys
    attention[0, 2] = [0, 0, 1, 0]
    first = np.array([0.1 + 0.4, 0.09, 0.8 - 0.59]) / 0.8
    second = np.array([0.9, 0, 0.1])
    found = on.prefer(attention, shares, shares)
    np.testing.assert_allclose(found, [(first + second) / 2])
    np.testing.assert_allclose(found.sum(-1), 1)
    areas = [np.mean([1.5, 0.9]) / 4, np.mean([0.9, 1.5]) / 4]
    np.testing.assert_allclose(on.prefer(np.ones((1, 4, 4)), shares, shares), [[*areas, 1 - sum(areas)]])


@pytest.fixture(scope="module")
def known(known_run):  # type: ignore[no-untyped-def]
    return known_run()


@pytest.fixture(scope="module")
def found(known) -> xr.Dataset:  # type: ignore[no-untyped-def]
    return analyse(known.run, YES, save=False)


def projections(known, found: xr.Dataset, site: str, layer: int, head: int, sample: int):  # type: ignore[no-untyped-def]
    """Projections of the known inputs on the vectors of one head: (token, mode) of queries and of keys."""
    chosen = found.sel(site=site, layer=layer).isel(head=head)
    queries, keys = (known.hidden[getattr(known.run.plan.sites[site], side), layer] for side in ("queries", "keys"))
    left = chosen["left_vector"].dropna("feature", how="all").values
    right = chosen["right_vector"].dropna(chosen["right_vector"].dims[-1], how="all").values
    return queries[sample] @ left.T, keys[sample] @ right.T


@pytest.mark.parametrize(("site", "head"), [("vision.self", 3), ("vision.self", 0), ("joint.self", 1)])
def test_top_images_and_objects_are_those_of_the_known_inputs(known, found, site: str, head: int) -> None:  # type: ignore[no-untyped-def]
    patches = PATCHES if site == "vision.self" else slice(7, None)
    shares = np.zeros((3, 12))
    shares[0, [0, 1, 4, 5]] = shares[1, [10, 11]] = 1
    shares[2] = 1 - shares[:2].sum(0)
    layer = 1
    chosen = found.sel(site=site, layer=layer).isel(head=head)
    for mode in range(4):
        best = []
        for sample in USED:
            query, key = (p[patches, mode] for p in projections(known, found, site, layer, head, sample))
            options = [(max(0, (s * query).max()) * max(0, (s * key).max()), s) for s in (1, -1)]
            score, sign = max(options)
            same = [np.argmax([(sign * m)[o == 1].mean() for o in shares]) for m in (query, key)]
            best.append((score, sample, float(same[0] == same[1])))
        best.sort(reverse=True)
        at = chosen.isel(mode=mode)
        np.testing.assert_allclose(at["top_score"].values[:3], [b[0] for b in best], rtol=1e-4)
        np.testing.assert_array_equal(at["top_sample"].values[:3], [b[1] for b in best])
        np.testing.assert_array_equal(at["top_same"].values[:3], [b[2] for b in best])
    weights = chosen["singular_value"].values
    expected = (weights * np.nanmean(chosen["top_same"].values, -1)).sum() / weights.sum()
    np.testing.assert_allclose(chosen["same_object"], expected)
    np.testing.assert_allclose(chosen["same_object_chance"], 1 / 3)


@pytest.mark.parametrize("site", ["vision.self", "text.self", "text.vision", "joint.self"])
def test_contributions_are_those_of_the_known_inputs(known, found, site: str) -> None:  # type: ignore[no-untyped-def]
    plan = known.run.plan.sites[site]
    asking, asked = ((known.run.tokens(s)["kind"].values != 0) for s in (plan.queries, plan.keys))
    layer, head = 0, 1
    chosen = found.sel(site=site, layer=layer).isel(head=head)
    gains = []
    for sample in USED:
        query, key = projections(known, found, site, layer, head, sample)
        weights = known.attention[site, layer][sample, head]
        rows = []
        for i in np.flatnonzero(asking[sample] & (weights.sum(-1) > 0)):
            allowed = asked[sample] & (weights[i] > 0)
            over_mean = weights[i] @ key - key[allowed].mean(0)
            rows.append(chosen["singular_value"].values * query[i] * over_mean)
        gains.append(np.mean(rows, 0))
    np.testing.assert_allclose(chosen["contribution"], np.mean(gains, 0), rtol=1e-3, atol=1e-4)


def test_with_the_biases_among_the_modes_they_give_the_whole_score(known) -> None:  # type: ignore[no-untyped-def]
    analyser = QKSVD(on_samples="yes", use_bias=True, draws=5, null_draws=2, sites=("vision.self",))
    result = analyse(known.run, analyser, save=False).sel(site="vision.self", layer=1)
    weights = known.weights["vision.self", 1]
    hidden = known.hidden["vision", 1]
    gains = []
    for sample in USED:
        query = hidden[sample] @ weights["query"][2].T.astype(float) + weights["query_bias"][2]
        key = hidden[sample] @ weights["key"][1].T.astype(float) + weights["key_bias"][1]
        attention, scores = known.attention["vision.self", 1][sample, 2], query @ key.T
        gains.append(np.mean((attention * scores).sum(-1) - scores.mean(-1)))
    np.testing.assert_allclose(result["contribution"].isel(head=2).sum("mode"), np.mean(gains), rtol=1e-4)
    whole = qk.with_bias(weights["query"][2], weights["query_bias"][2]).astype(float).T @ qk.with_bias(
        weights["key"][1], weights["key_bias"][1]
    )
    expected = np.trace(whole) / np.linalg.norm(whole, "nuc")
    np.testing.assert_allclose(result["cosine_average"].isel(head=2), expected, rtol=1e-5)
    assert (result["bias_ratio"] == 0).all()


def test_permutations_leave_the_bias_in_its_place() -> None:
    query, key = np.random.default_rng(3).normal(size=(2, 2, 3, 6))
    nuclear = qk.singular_values(query, key)[0].sum(-1)
    drawn = qk.permuted_averages(query, key, nuclear, draws=3, seed=5, constant=True)
    generator = np.random.default_rng(5)
    for one in drawn:
        permuted = key[..., np.append(generator.permutation(5), 5)]
        np.testing.assert_allclose(one, np.einsum("hcf,hcf->h", query, permuted) / nuclear)


def test_preference_is_that_of_the_known_attention_in_every_direction(known, found) -> None:  # type: ignore[no-untyped-def]
    objects = ([0, 1, 4, 5], [10, 11])
    for site, first in (("vision.self", 2), ("joint.self", 7)):
        expected = []
        for sample, head in itertools.product(USED, range(known.run.plan.sites[site].heads)):
            weights = known.attention[site, 0][sample, head][first:, first:]
            weights = weights / weights.sum(-1, keepdims=True)
            one = [[weights[o[0]][o].sum(), weights[o[0]][p].sum()] for o, p in (objects, objects[::-1])]
            expected.append(np.mean(one, 0))
        chosen = found["layer_preference"].sel(site=site, layer=0, direction="image to image")
        np.testing.assert_allclose(chosen.sel(group=["same", "different"]), np.mean(expected, 0), rtol=1e-5)
        np.testing.assert_allclose(chosen.sum("group"), 1, rtol=1e-6)
    across = []
    for sample in USED:
        weights = known.attention["text.vision", 0][sample][:, [2, 4]][..., 2:]
        weights = weights / weights.sum(-1, keepdims=True)
        across.append(np.mean([weights[:, n][:, objects[n]].sum(-1) for n in (0, 1)]))
    chosen = found["layer_preference"].sel(site="text.vision", layer=0, direction="text to image", group="same")
    np.testing.assert_allclose(chosen, np.mean(across), rtol=1e-5)
    areas = found["area_preference"].sel(site="vision.self", direction="image to image")
    np.testing.assert_allclose(areas, [3 / 12, 3 / 12, 6 / 12])
    assert found["layer_preference"].sel(site="vision.self", direction="text to image").isnull().all()


def test_parts_combine_into_the_whole(known_run) -> None:  # type: ignore[no-untyped-def]
    run = known_run(6, sites=("vision.self", "text.vision")).run
    analyser = QKSVD(on_samples="yes", draws=10, null_draws=2)
    parts = analyser.combine([analyser.analyse(run.part(range(a, b))) for a, b in ((0, 3), (3, 4), (4, 6))])
    whole = analyser.analyse(run)
    xr.testing.assert_allclose(parts, whole)
    run.save_analysis("qk_svd", whole)
    assert "".join(element.html() for element in analyser.report(run.analysis("qk_svd")))
    by_weights = QKSVD(on_samples="no", null_draws=2)
    xr.testing.assert_identical(by_weights.combine([by_weights.analyse(run)] * 2), by_weights.analyse(run))


def test_maps_that_would_be_wrong_are_refused_with_the_reason(known_run) -> None:  # type: ignore[no-untyped-def]
    only = {"sites": ("vision.self",), "draws": 5, "null_draws": 2}
    rotated = known_run(sites=("vision.self",), plain=False).run
    result = analyse(rotated, QKSVD(**only), save=False)
    assert "top_score" not in result
    assert "can't be read off" in result.attrs["caveats"]
    assert result["layer_preference"].notnull().any(), "what attention prefers needs no modes"
    assert "be read off" in "".join(element.html() for element in QKSVD().report(result))
    with_weights = make_run(quantities=frozenset({"weights", "attention"}))
    told = analyse(with_weights, QKSVD(null_draws=2, draws=5), save=False).attrs["caveats"]
    assert "on_samples=yes" in told
    with pytest.raises(MissingQuantity, match="needs 'key', 'query'"):
        analyse(with_weights, YES)


def test_report_shows_maps_on_images_and_words(known, found) -> None:  # type: ignore[no-untyped-def]
    html = "".join(element.html() for element in YES.report(found))
    assert "query map" in html
    assert "key map" in html
    assert html.count("<img ") >= 4 * 6
    assert "different ones" in html
    assert "<mark" in html, "words of a site of text"


def test_on_real_weights_the_models_own_inputs_are_read_off() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from attnscope.embedded import embedded_model, embedded_sentences

    sentences = embedded_sentences()[:3]
    run = extract("embedded:minilm", sentences, spec=ExtractSpec(YES.requires().quantities))
    result = analyse(run, YES, save=False).sel(site="text.self")
    assert result.attrs["caveats"] == ""
    folder = embedded_model("minilm")
    encoded = AutoTokenizer.from_pretrained(folder)(sentences[1].text, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**encoded, output_hidden_states=True).hidden_states
    weights = run.weights("text.self")
    for layer in (0, 5):
        query, key = (weights[side].sel(layer=layer).values.astype(float) for side in ("query", "key"))
        reader, _ = qk.mode_readers(query, key, 1e-6)
        stored = run.array("text.self", "query").isel(sample=1, layer=layer).values[:, : hidden[0].shape[1]]
        read = (stored - weights["query_bias"].sel(layer=layer).values[:, None]) @ reader
        left = result["left_vector"].sel(layer=layer).values
        expected = np.einsum("tf,hnf->htn", hidden[layer][0].numpy(), left)
        sized = (result["singular_value"] > 1e-3 * result["singular_value"].max("mode")).sel(layer=layer).values
        np.testing.assert_allclose(
            read.transpose(0, 2, 1)[sized], expected.transpose(0, 2, 1)[sized], atol=2e-3 * np.abs(expected).max()
        )
    assert (result["contribution_count"] == 3).all()


def test_rounding_weights_to_zero_masks_no_key(known_run) -> None:  # type: ignore[no-untyped-def]
    options = {"on_samples": "yes", "draws": 5, "null_draws": 2}
    for site in ("vision.self", "text.self"):
        exact, half = (
            analyse(known_run(sites=(site,), encoding=e).run, QKSVD(**options), save=False)
            for e in ("exact", "float16")
        )
        np.testing.assert_allclose(half["contribution"], exact["contribution"], rtol=0.02, atol=0.05)
        np.testing.assert_allclose(half["sample_cosine"], exact["sample_cosine"], atol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_any_precision_is_seen_to_project_plainly(dtype: str) -> None:
    sample = [Sample("one", text="A red cat sat on the box.")]
    run = extract("embedded:minilm", sample, spec=ExtractSpec(YES.requires().quantities), dtype=dtype)
    result = analyse(run, QKSVD(on_samples="yes", draws=5, null_draws=2), save=False)
    assert result.attrs["caveats"] == ""
    assert (result["contribution_count"] == 1).all()
