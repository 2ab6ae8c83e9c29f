"""Alignment scores: identities between them, bounds, gradients, measures by brute force, every kind of site."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from attnscope import ExtractSpec, analyse, extract
from attnscope.analysis import make_analyser
from attnscope.conditions import Ranking
from attnscope.perturbing import ranking_values
from attnscope.run import MissingQuantity
from attnscope.testing import check_analyser, make_run
from attnscope_alignment_scores import AlignmentScores, comparing, fitting, scores
from attnscope_alignment_scores.scores import ALIGNMENTS, align, attend

HEADS, ROWS, KEYS, CHANNELS = 2, 5, 7, 4
PRECISIONS = [(np.float64, 1e-12), (np.float32, 2e-5)]
LEARNED = [name for name, one in ALIGNMENTS.items() if one.is_learned]
QUICK = AlignmentScores(draws=20, fit_steps=4, fit_rows=4, pairs=10**6)
USED = (0, 1, 3)


@pytest.fixture(params=PRECISIONS, ids=["float64", "float32"])
def made(request):  # type: ignore[no-untyped-def]
    dtype, tolerance = request.param
    generator = np.random.default_rng(0)
    query = generator.normal(size=(HEADS, ROWS, CHANNELS)).astype(dtype)
    key = generator.normal(size=(HEADS, KEYS, CHANNELS)).astype(dtype)
    weight = generator.normal(size=(HEADS, CHANNELS, CHANNELS)).astype(dtype)
    bias = generator.normal(size=(HEADS, CHANNELS)).astype(dtype)
    return query, key, {"weight": weight, "bias": bias}, tolerance


def everywhere(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, bool)


def softmax(values: np.ndarray) -> np.ndarray:
    return attend(values, everywhere(values))


def additive_parameters(dtype: type = np.float64) -> dict[str, np.ndarray]:
    start = fitting.first_parameters(ALIGNMENTS["additive"], HEADS, CHANNELS, 0.5, 1)
    return {name: values.astype(dtype) for name, values in start.items()}


def test_scores_are_those_of_their_formulas_pair_by_pair(made) -> None:  # type: ignore[no-untyped-def]
    query, key, given, tolerance = made
    w, b = given["weight"][1], given["bias"][1]
    q, k = query[1, 2], key[1, 3]
    more = additive_parameters(query.dtype)
    expected = {
        "dot": q @ k,
        "scaled_dot": q @ k / 2,
        "cosine": q @ k / np.sqrt((q @ q) * (k @ k)),
        "general_qwk": q @ (w @ k),
        "general_kwq": k @ (w @ q),
        "biased_general_qwk": q @ (w @ k + b),
        "biased_general_kwq": k @ (w @ q + b),
        "relu_qwk": max(0, q @ (w @ k + b)),
        "relu_kwq": max(0, k @ (w @ q + b)),
        "sigmoid_qwk": 1 / (1 + np.exp(-q @ (w @ k + b))),
        "sigmoid_kwq": 1 / (1 + np.exp(-k @ (w @ q + b))),
        "tanh_qwk": np.tanh(q @ (w @ k + b)),
        "tanh_kwq": np.tanh(k @ (w @ q + b)),
        "additive": more["vector"][1] @ np.tanh(more["query_weight"][1] @ q + more["key_weight"][1] @ k),
    }
    assert set(expected) == set(ALIGNMENTS) - {"model", "random"}
    for name, value in expected.items():
        found = align(ALIGNMENTS[name], query, key, {**given, **more})
        assert found.shape == (HEADS, ROWS, KEYS)
        np.testing.assert_allclose(found[1, 2, 3], value, atol=10 * tolerance)


def test_identities_between_scores(made) -> None:  # type: ignore[no-untyped-def]
    query, key, given, tolerance = made

    def of(name: str, **parameters: np.ndarray) -> np.ndarray:
        return align(ALIGNMENTS[name], query, key, {**given, **parameters})

    def near(one: np.ndarray, other: np.ndarray) -> None:
        np.testing.assert_allclose(one, other, atol=20 * tolerance)

    # q . b is the same for every key.
    near(softmax(of("biased_general_qwk")), softmax(of("general_qwk")))
    assert np.abs(softmax(of("biased_general_kwq")) - softmax(of("general_kwq"))).max() > 0.01
    near(of("general_kwq"), of("general_qwk", weight=np.swapaxes(given["weight"], -1, -2)))
    identity = np.broadcast_to(np.eye(CHANNELS, dtype=query.dtype), given["weight"].shape)
    near(of("general_qwk", weight=identity), of("dot"))
    near(of("dot"), of("scaled_dot") * np.sqrt(CHANNELS))
    unit_query, unit_key = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (query, key))
    near(of("cosine"), align(ALIGNMENTS["dot"], unit_query, unit_key))
    more = additive_parameters(query.dtype)
    joined = np.concatenate([more["query_weight"], more["key_weight"]], -1)
    near(scores.concat_scores(query, key, joined, more["vector"]), align(ALIGNMENTS["additive"], query, key, more))


def test_a_learned_matrix_is_absorbed_by_learned_projections(made) -> None:  # type: ignore[no-untyped-def]
    _, _, given, tolerance = made
    generator = np.random.default_rng(1)
    tokens = generator.normal(size=(KEYS, 9)).astype(given["weight"].dtype)
    by_query, by_key = generator.normal(size=(2, HEADS, CHANNELS, 9)).astype(tokens.dtype)
    query, key = (np.einsum("tf,hcf->htc", tokens, w) for w in (by_query, by_key))
    absorbed = np.einsum("tf,hcf->htc", tokens, np.swapaxes(given["weight"], -1, -2) @ by_query)
    np.testing.assert_allclose(
        align(ALIGNMENTS["general_qwk"], query, key, given),
        align(ALIGNMENTS["dot"], absorbed, key),
        atol=100 * tolerance,
    )


def test_where_features_are_normalised_and_scale_removed_three_scores_are_one(made) -> None:  # type: ignore[no-untyped-def]
    # The matching of SCAN: leaky ReLU of the score, norm over words, softmax over regions.
    query, key, _, tolerance = made
    query, key = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (query, key))
    attended = []
    for name in ("dot", "scaled_dot", "cosine"):
        score = align(ALIGNMENTS[name], query, key)
        leaky = np.where(score > 0, score, 0.1 * score)
        attended.append(softmax(9 * leaky / np.linalg.norm(leaky, axis=-1, keepdims=True)))
    np.testing.assert_allclose(attended[1], attended[0], atol=20 * tolerance)
    np.testing.assert_allclose(attended[2], attended[0], atol=20 * tolerance)


@pytest.mark.parametrize("name", [n for n in ALIGNMENTS if n not in ("model", "random")])
def test_every_attention_is_a_softmax(made, name: str) -> None:  # type: ignore[no-untyped-def]
    query, key, given, tolerance = made
    found = align(ALIGNMENTS[name], query, key, {**given, **additive_parameters(query.dtype)})
    allowed = everywhere(found)
    allowed[:, 0, 2] = allowed[:, 1] = False
    attention = attend(found, allowed)
    np.testing.assert_allclose(attention.sum(-1)[:, 2:], 1, atol=tolerance)
    assert (attention[:, 0, 2] == 0).all()
    assert (attention[:, 1] == 0).all(), "a row without a key attends to nothing"
    np.testing.assert_allclose(attend(found + 3, allowed), attention, atol=20 * tolerance)
    order = np.random.default_rng(2).permutation(KEYS)
    permuted = align(ALIGNMENTS[name], query, key[:, order], {**given, **additive_parameters(query.dtype)})
    np.testing.assert_allclose(attend(permuted, allowed[..., order]), attention[..., order], atol=20 * tolerance)
    np.testing.assert_array_equal(softmax(found[..., :1]), 1)


def test_bounded_scores_have_bounded_weights(made) -> None:  # type: ignore[no-untyped-def]
    query, key, given, _ = made
    steep = {"weight": 50 * given["weight"], "bias": given["bias"]}
    bounds = {"sigmoid_qwk": np.e / (np.e + KEYS - 1), "tanh_kwq": np.e / (np.e + (KEYS - 1) / np.e)}
    bounds["cosine"] = bounds["tanh_kwq"]
    for name, bound in bounds.items():
        attention = softmax(align(ALIGNMENTS[name], 50 * query, key, steep))
        assert attention.max() <= bound * (1 + 1e-5)
    assert softmax(align(ALIGNMENTS["dot"], 50 * query, key)).max() > bounds["tanh_kwq"]
    score = align(ALIGNMENTS["relu_qwk"], query, key, given)
    floor = softmax(score)[score == 0]
    np.testing.assert_allclose(softmax(score).min(-1)[(score == 0).any(-1)].min(), floor.min())
    for row, weights in zip(score.reshape(-1, KEYS), softmax(score).reshape(-1, KEYS), strict=True):
        np.testing.assert_allclose(weights[row == 0], 1 / np.exp(row).sum(), rtol=1e-5)


def lesson(is_set: bool) -> fitting.Lesson:
    generator = np.random.default_rng(4)
    allowed = np.broadcast_to(np.tri(ROWS, KEYS, 3, dtype=bool), (HEADS, ROWS, KEYS))
    target = np.where(allowed, generator.random((HEADS, ROWS, KEYS)), 0)
    target = (target > 0.5).astype(float) if is_set else target / target.sum(-1, keepdims=True)
    target[..., 0] = target[..., 0] + (target.sum(-1) == 0)
    query, key = generator.normal(size=(HEADS, ROWS, CHANNELS)), generator.normal(size=(HEADS, KEYS, CHANNELS))
    return fitting.Lesson(query, key, allowed, target, is_set)


@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize("name", LEARNED)
def test_slopes_are_those_of_the_loss(name: str, is_set: bool) -> None:
    one = lesson(is_set)
    generator = np.random.default_rng(5)
    start = fitting.first_parameters(ALIGNMENTS[name], HEADS, CHANNELS, 0.5, 0)
    given = {n: p.astype(float) + 0.3 * generator.normal(size=p.shape) for n, p in start.items()}
    _, slopes = fitting.loss_and_slopes(ALIGNMENTS[name], given, one)
    assert set(slopes) == set(given)
    for which, values in given.items():
        for at in list(np.ndindex(values.shape))[:: max(1, values.size // 7)]:
            around = []
            for step in (1e-6, -1e-6):
                moved = {n: p.copy() for n, p in given.items()}
                moved[which][at] += step
                around.append(fitting.loss_and_slopes(ALIGNMENTS[name], moved, one)[0])
            np.testing.assert_allclose(slopes[which][at], (around[0] - around[1]) / 2e-6, atol=1e-7)


def test_a_general_score_reaches_the_models_own_attention_at_once_and_others_by_steps() -> None:
    one = lesson(False)
    own = attend(0.5 * one.query @ np.swapaxes(one.key, -1, -2), one.allowed)
    mine = dataclasses.replace(one, target=own)
    least = comparing.entropy(own).mean()
    for name in ("general_qwk", "biased_general_kwq"):
        start = fitting.first_parameters(ALIGNMENTS[name], HEADS, CHANNELS, 0.5, 0)
        _, before, after = fitting.fit(ALIGNMENTS[name], start, [mine], steps=30)
        np.testing.assert_allclose([before, after], least, atol=1e-6)
    for name in ("relu_qwk", "tanh_kwq", "additive"):
        start = fitting.first_parameters(ALIGNMENTS[name], HEADS, CHANNELS, 0.5, 0)
        _, before, after = fitting.fit(ALIGNMENTS[name], start, [mine], steps=60)
        assert least - 1e-9 <= after < before


def test_a_planted_matrix_is_found_again() -> None:
    generator = np.random.default_rng(6)
    planted = {"weight": generator.normal(size=(1, CHANNELS, CHANNELS))}
    lessons = []
    for _ in range(6):
        query, key = generator.normal(size=(1, 20, CHANNELS)), generator.normal(size=(1, 12, CHANNELS))
        target = softmax(align(ALIGNMENTS["general_qwk"], query, key, planted))
        lessons.append(fitting.Lesson(query, key, everywhere(target), target, False))
    start = fitting.first_parameters(ALIGNMENTS["general_qwk"], 1, CHANNELS, 0.5, 0)
    found, _, after = fitting.fit(ALIGNMENTS["general_qwk"], start, lessons, steps=300)
    least = np.mean([comparing.entropy(one.target).mean() for one in lessons])
    assert after - least < 0.01
    np.testing.assert_allclose(found["weight"], planted["weight"], atol=0.2)


def test_divergence_and_entropy_by_hand() -> None:
    one, other = np.array([[1.0, 0], [0.5, 0.5], [0.3, 0.7]]), np.array([[0.0, 1], [0.5, 0.5], [0.6, 0.4]])
    middle = (one[2] + other[2]) / 2
    expected = sum((p * np.log(p / middle)).sum() for p in (one[2], other[2])) / 2
    np.testing.assert_allclose(comparing.divergence(one, other), [np.log(2), 0, expected])
    np.testing.assert_allclose(comparing.divergence(other, one), comparing.divergence(one, other))
    np.testing.assert_allclose(comparing.entropy(one)[:2], [0, np.log(2)])


def test_rank_agreement_is_kendalls_tau_b_with_ties_and_gaps() -> None:
    generator = np.random.default_rng(7)
    one, other = generator.integers(0, 5, (2, 3, 9)).astype(float)
    allowed = np.ones((3, 9), bool)
    allowed[1, 4:] = False
    allowed[2] = False
    expected = []
    for x, y, ok in zip(one, other, allowed, strict=True):
        signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in itertools.combinations(np.flatnonzero(ok), 2)]
        a, b = np.array(signs or [(0, 0)]).T
        expected.append((a * b).sum() / np.sqrt((a != 0).sum() * (b != 0).sum()) if (a != 0).any() else np.nan)
    pairs = comparing.draw_pairs(9, 100, 0)
    assert pairs.shape == (2, 36)
    np.testing.assert_allclose(comparing.rank_agreement(one, other, allowed, pairs), expected)
    # A random part of the pairs gives the same in the mean.
    wide = generator.normal(size=(2, 1, 200))
    mixed = wide[0] + wide[1]
    exact = comparing.rank_agreement(wide[0], mixed, np.ones((1, 200), bool), comparing.draw_pairs(200, 10**6, 0))
    parts = [
        comparing.rank_agreement(wide[0], mixed, np.ones((1, 200), bool), comparing.draw_pairs(200, 300, seed))
        for seed in range(50)
    ]
    np.testing.assert_allclose(np.mean(parts), exact[0], atol=0.03)


def test_ranks_put_the_highest_first_and_share_ties_out_at_random() -> None:
    order = np.array([3, 0, 2, 1])
    ranks = comparing.rank_keys(
        np.array([[1.0, 5, 1, 1], [2, 9, 1, 0]]), np.array([[True] * 4, [True, False, True, True]]), order
    )
    np.testing.assert_array_equal(ranks, [[2, 0, 3, 1], [0, 3, 1, 2]])
    mine = np.array([[0, 1, 2, 3]])
    np.testing.assert_array_equal(comparing.overlap(ranks[:1], mine, np.ones((1, 4), bool), 2), [0.5])


def test_output_change_is_that_of_the_softmax_without_the_keys() -> None:
    generator = np.random.default_rng(8)
    score, value = generator.normal(size=(1, 3, 8)), generator.normal(size=(1, 8, 4))
    allowed = np.ones((1, 3, 8), bool)
    allowed[0, 1, 5:] = False
    allowed[0, 2, 1:] = False
    attention = attend(score, allowed)
    ranks = comparing.rank_keys(attention, allowed, np.arange(8))
    deletion, insertion = comparing.output_change(attention, value, ranks, allowed, (0.25, 0.9))
    for row, count in ((0, 2), (1, 1)):
        by_weight = np.argsort(-attention[0, row])[: allowed[0, row].sum()]
        for found, kept in ((deletion, by_weight[count:]), (insertion, by_weight[:count])):
            masked = np.full(8, -np.inf)
            masked[kept] = score[0, row, kept]
            new, whole = (
                np.exp(s) / np.exp(s).sum() @ np.eye(8) @ value[0]
                for s in (masked, np.where(allowed[0, row], score[0, row], -np.inf))
            )
            np.testing.assert_allclose(found[0, 0, row], np.linalg.norm(new - whole) / np.linalg.norm(whole))
    assert np.isnan(deletion[:, 0, 2]).all(), "of one key none can be taken"
    assert np.isfinite(deletion[1, 0, :2]).all(), "one key is always left"


def test_grounding_by_hand() -> None:
    weights = np.array([[[0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]]])
    inside = np.array([[True, False, True, False], [False, False, True, True]])
    found = comparing.grounding(weights, inside, np.arange(4))
    np.testing.assert_allclose(found["pointing"], [[0.5, 1]])
    np.testing.assert_allclose(found["mass"], [[0.5, 0.7]])
    np.testing.assert_allclose(found["overlap"], [[1 / 3, 1]])


def test_analyser_keeps_the_contract_and_says_what_it_needs(known_run) -> None:  # type: ignore[no-untyped-def]
    run = known_run(5, sites=("vision.self",)).run
    whole = analyse(run, QUICK, save=False)
    parts = QUICK.combine([QUICK.analyse(run.part(range(0, 3))), QUICK.analyse(run.part(range(3, 5)))])
    xr.testing.assert_allclose(parts, whole)
    run.save_analysis("alignment_scores", whole)
    assert "".join(element.html() for element in QUICK.report(run.analysis("alignment_scores")))
    with pytest.raises(MissingQuantity, match="needs 'key', 'query', 'value'"):
        analyse(make_run(), QUICK)
    for options, words in (
        ({"alignments": ("dots",)}, "no score 'dots'; its scores are model, dot"),
        ({"fractions": (0.5, 0.2)}, "rising order"),
        ({"fractions": (0.5, 1.0)}, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=words):
            AlignmentScores(**options)
    assert make_analyser("alignment-scores", {"alignments": ["dot"]}) == AlignmentScores(alignments=("dot",))


@pytest.fixture(scope="module")
def known(known_run):  # type: ignore[no-untyped-def]
    return known_run()


@pytest.fixture(scope="module")
def plain(known) -> xr.Dataset:  # type: ignore[no-untyped-def]
    """The scores without parameters, on all samples and rows of every site."""
    analyser = dataclasses.replace(QUICK, alignments=("model", "dot", "scaled_dot", "cosine", "random"), queries=100)
    return analyse(known.run, analyser, save=False)


@pytest.mark.parametrize("site", ["vision.self", "text.self", "text.vision", "joint.self"])
def test_the_models_own_score_gives_its_own_attention_at_every_site(plain, site: str) -> None:  # type: ignore[no-untyped-def]
    chosen = plain.sel(site=site)
    # These models scale by 1 / sqrt(4).
    np.testing.assert_allclose(chosen["divergence"].sel(alignment="scaled_dot"), 0, atol=1e-6)
    for name, expected in (("model", 1), ("dot", 1), ("scaled_dot", 1)):
        np.testing.assert_allclose(chosen["rank_agreement"].sel(alignment=name), expected, atol=1e-3)
        np.testing.assert_allclose(chosen["top_overlap"].sel(alignment=name), expected, atol=1e-3)
    assert (chosen["divergence"].sel(alignment="cosine") > 0.001).all()
    assert (chosen["divergence_samples"].sel(alignment="dot") == 3).all()
    assert chosen["divergence"].sel(alignment="random").isnull().all()
    over = chosen["deletion"].sel(alignment="model") - chosen["deletion"].sel(alignment="random")
    np.testing.assert_allclose(chosen["deletion_over_random"].sel(alignment="model"), over, atol=1e-6)


def test_divergence_deletion_and_grounding_are_those_of_the_known_run(known, plain) -> None:  # type: ignore[no-untyped-def]
    site, layer = "vision.self", 1
    query, key, value = (known.run.array(site, n).isel(layer=layer).values for n in ("query", "key", "value"))
    divergences, deletions, masses, pointings = [], [], [], []
    for sample in USED:
        own = known.attention[site, layer][sample]
        repeated_key, repeated_value = (np.repeat(side[sample], 2, axis=0) for side in (key, value))
        unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (query[sample], repeated_key)]
        cosine = unit[0] @ np.swapaxes(unit[1], -1, -2)
        attention = softmax(cosine)
        middle = (attention + own) / 2
        divergences.append(
            np.mean(((attention * np.log(attention / middle)).sum(-1) + (own * np.log(own / middle)).sum(-1)) / 2)
        )
        changes = []
        for fraction in QUICK.fractions:
            count = min(max(int(fraction * 14 + 0.5), 1), 13)
            for head, row in itertools.product(range(4), range(14)):
                kept = np.argsort(-cosine[head, row])[count:]
                new = own[head, row, kept] / own[head, row, kept].sum() @ repeated_value[head, kept]
                whole = own[head, row] @ repeated_value[head]
                changes.append((fraction, np.linalg.norm(new - whole) / np.linalg.norm(whole)))
        curve = [np.mean([c for f, c in changes if f == fraction]) for fraction in QUICK.fractions]
        deletions.append(np.trapezoid(curve, QUICK.fractions) / (QUICK.fractions[-1] - QUICK.fractions[0]))
        for patches in ([0, 1, 4, 5], [10, 11]):
            rows = attention[:, 2:, 2:][:, patches]
            rows = rows / rows.sum(-1, keepdims=True)
            masses.extend([[sample, m] for m in rows[..., patches].sum(-1).ravel()])
            pointings.extend([[sample, float(p)] for p in np.isin(rows.argmax(-1), patches).ravel()])
    chosen = plain.sel(site=site, layer=layer, alignment="cosine")
    np.testing.assert_allclose(chosen["divergence"], np.mean(divergences), rtol=1e-4)
    np.testing.assert_allclose(chosen["deletion"], np.mean(deletions), rtol=1e-4)
    grounded = chosen.sel(direction="image to image")
    np.testing.assert_allclose(grounded["mass"], np.mean([m for _, m in masses]), rtol=1e-4)
    np.testing.assert_allclose(grounded["pointing"], np.mean([p for _, p in pointings]), rtol=1e-4)
    np.testing.assert_allclose(plain["chance"].sel(site=site, direction="cls to image"), 0.5)


def test_words_are_asked_for_the_patches_that_they_name(known, plain) -> None:  # type: ignore[no-untyped-def]
    masses = []
    for sample in USED:
        own = known.attention["text.vision", 0][sample][..., 2:]
        own = own / own.sum(-1, keepdims=True)
        masses += [own[:, word][:, patches].sum(-1) for word, patches in ((2, [0, 1, 4, 5]), (4, [10, 11]))]
    chosen = plain.sel(site="text.vision", layer=0, alignment="model")
    np.testing.assert_allclose(chosen["mass"].sel(direction="text to image"), np.mean(masses), rtol=1e-5)
    told = plain["chance"].sel(site="joint.self").dropna("direction")["direction"].values
    assert {"image to image", "image to text", "text to image", "text to text"} <= set(told)


def test_learned_scores_are_fitted_on_other_samples_than_they_are_measured_on(known_run) -> None:  # type: ignore[no-untyped-def]
    run = known_run(8, sites=("vision.self",), unit=4).run
    names = ("general_qwk", "tanh_kwq", "additive", "random")
    result = analyse(run, dataclasses.replace(QUICK, alignments=names, fit_steps=20), save=False)
    assert (result.attrs["samples_trained_on"], result.attrs["samples_evaluated"]) == (4, 3)
    assert (result["divergence_samples"].sel(alignment="additive") == 3).all()
    np.testing.assert_allclose(result["divergence"].sel(alignment="general_qwk"), 0, atol=1e-5)
    gained = (result["fit_loss_before"] - result["fit_loss_after"]).sel(alignment=["tanh_kwq", "additive"])
    assert (gained > 0.01).all()
    grounded = dataclasses.replace(QUICK, alignments=names, objective="regions", fit_steps=40)
    by_region = analyse(run, grounded, save=False).sel(site="vision.self", direction="image to image")
    mine = result.sel(site="vision.self", direction="image to image")
    assert (by_region["fit_loss_after"] < by_region["fit_loss_before"]).sel(alignment="general_qwk").all()
    assert by_region["fit_loss_after"].sel(alignment="general_qwk").mean() < 1.2
    assert mine["mean_mass"].sel(alignment="general_qwk").notnull()
    html = "".join(element.html() for element in QUICK.report(result))
    for words in ("fitted for every head on 4 samples", "trained_score", "over random", "image to image"):
        assert words in html


def test_one_sample_is_measured_without_learned_scores(known_run) -> None:  # type: ignore[no-untyped-def]
    result = analyse(known_run(1, sites=("text.self",)).run, QUICK, save=False)
    assert result["divergence"].sel(alignment="dot").notnull().all()
    assert result["divergence"].sel(alignment="additive").isnull().all()
    assert "none to fit" in "".join(element.html() for element in QUICK.report(result))


def test_attention_that_tokens_get_can_be_kept_and_ranks_them(known) -> None:  # type: ignore[no-untyped-def]
    options = {"sites": ("vision.self",), "alignments": ("model", "cosine"), "keep_received": True, "queries": 100}
    analyser = dataclasses.replace(QUICK, **options)
    result = analyse(known.run, analyser, save=False)
    assert result["received_cosine"].dims == ("site", "sample", "token")
    # Rankings are by position: a sample that was left out keeps its place.
    assert list(result["sample"].values) == ["s0", "s1", "s2", "s3"]
    assert result["received_model"].sel(sample="s2").isnull().all()
    expected = np.mean([known.attention["vision.self", layer][3].mean((0, 1)) for layer in (0, 1)], 0)
    found = result["received_model"].sel(site="vision.self", sample="s3")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    parts = analyser.combine([analyser.analyse(known.run.part(range(a, b))) for a, b in ((0, 2), (2, 4))])
    xr.testing.assert_allclose(parts, result)
    ranking = Ranking.by("alignment_scores", "received_model", dataclasses.asdict(analyser))
    ranks = ranking_values(known.run, ranking)
    np.testing.assert_allclose(ranks["vision"][3], expected, rtol=1e-5)


def test_rounded_attention_keeps_its_small_keys_and_its_causal_mask(known_run) -> None:  # type: ignore[no-untyped-def]
    analyser = dataclasses.replace(QUICK, alignments=("model", "scaled_dot"), queries=100)
    for site in ("vision.self", "text.self"):
        result = analyse(known_run(sites=(site,), encoding="compact").run, analyser, save=False)
        assert (result["divergence"].sel(alignment="scaled_dot") < 1e-3).all()
        # Weights that are rounded alike are ties.
        assert (result["rank_agreement"].sel(alignment="scaled_dot") > 0.5).all()
        entropies = result["entropy"].transpose("alignment", ...).values
        np.testing.assert_allclose(entropies[0], entropies[1], atol=0.02)


def test_check_analyser_holds_it_to_the_contract() -> None:
    result = check_analyser(QUICK)
    np.testing.assert_allclose(result["divergence"].sel(alignment="scaled_dot"), 0, atol=1e-6)


def test_on_real_weights_the_scaled_dot_is_the_models_own() -> None:
    spec = ExtractSpec(QUICK.requires().quantities)
    run = extract("embedded:minilm", "embedded:sentences", spec=spec, limit=4)
    analyser = dataclasses.replace(QUICK, alignments=("model", "dot", "scaled_dot", "cosine", "random"))
    result = analyse(run, analyser, save=False).sel(site="text.self")
    np.testing.assert_allclose(result["divergence"].sel(alignment="scaled_dot"), 0, atol=1e-4)
    assert (result["mean_deletion_over_random_low"].sel(alignment="model") > 0).all()


def trained_table(folder: Path, setting: str, seeds: int = 3) -> None:
    """A table of two figures of two scores, as `attnscope reference scores` writes it."""

    def of(mean: float, half: float | None) -> dict[str, float | None]:
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return {"mean": mean, "low": low, "high": high, "seeds": seeds}

    rows = [
        {"variant": "scaled_dot", "figure": "quality", "value": of(0.5, 0.1), "difference": None, "verdict": ""},
        {
            "variant": "cosine",
            "figure": "quality",
            "value": of(0.8, 0.2),
            "difference": of(0.3, 0.1),
            "verdict": "apart",
        },
        {
            "variant": "cosine",
            "figure": "mass",
            "value": of(0.4, 0.1),
            "difference": of(-0.01, 0.1),
            "verdict": "noise",
        },
    ]
    folder.mkdir(parents=True)
    table = {"setting": setting, "seeds": list(range(seeds)), "figures": ["quality", "mass"], "rows": rows}
    (folder / "scores.json").write_text(json.dumps(table))


def test_what_trained_models_reach_fills_its_place(known_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for setting in ("answers", "search"):
        trained_table(tmp_path / setting, setting)
    run = known_run(4, sites=("text.self",)).run
    names = ("model", "scaled_dot", "cosine", "random")
    analyser = dataclasses.replace(QUICK, alignments=names, trained=str(tmp_path))
    result = analyse(run, analyser, save=False)
    of = {"trained_figure": "search/quality"}
    np.testing.assert_allclose(result["trained_score"].sel(of), [np.nan, 0.5, 0.8, np.nan])
    np.testing.assert_allclose(result["trained_score_high"].sel(of | {"alignment": "cosine"}), 1.0)
    np.testing.assert_allclose(result["trained_difference"].sel(of), [np.nan, np.nan, 0.3, np.nan])
    assert result["trained_score"].sel(trained_figure="answers/mass", alignment="scaled_dot").isnull()
    html = "".join(element.html() for element in analyser.report(result))
    for words in ("Trained with each score: answers", "0.800 (0.600 to 1.000)", "0.300 (0.200 to 0.400)<", "3 seeds",
                  "-0.010 (-0.110 to 0.090), noise"):  # fmt: skip
        assert words in html
    assert "keeps a place" not in html
    parts = analyser.combine([analyser.analyse(run.part(range(a, b))) for a, b in ((0, 2), (2, 4))])
    xr.testing.assert_identical(parts["trained_score"], result["trained_score"])


def test_a_folder_without_tables_of_trained_scores_is_refused(known_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = known_run(1, sites=("text.self",)).run
    with pytest.raises(ValueError, match=r"holds no scores\.json; `attnscope reference scores --out"):
        analyse(run, dataclasses.replace(QUICK, trained=str(tmp_path)), save=False)
    (tmp_path / "scores.json").write_text('{"setting": "scan"}')
    with pytest.raises(ValueError, match="can't be read: KeyError"):
        analyse(run, dataclasses.replace(QUICK, trained=str(tmp_path)), save=False)
