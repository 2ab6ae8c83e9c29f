"""Relevance, rollout and raw attention: hand-computed cases, limits, and a brute-force reference."""

import dataclasses

import numpy as np
import pytest
import xarray as xr

import attnscope_relevance as rel
from attnscope import Run, Sample, analyse
from attnscope.analysis import make_analyser
from attnscope.plan import RunPlan, SitePlan
from attnscope.quantities import ExtractSpec
from attnscope.run import EXTRACTED, LEFT_OUT
from attnscope.testing import check_analyser, make_run
from attnscope.tokens import KIND_CODES, TokenLayout, text_layout
from attnscope_relevance import Relevance, reading, walking

SAMPLES, LAYERS, TOKENS = 3, 4, 7


@pytest.fixture
def maps() -> np.ndarray:
    """Attention-like maps (layer, sample, query_token, key_token), rows sum to 1."""
    scores = np.exp(np.random.default_rng(0).normal(0, 2, (LAYERS, SAMPLES, TOKENS, TOKENS)))
    return scores / scores.sum(-1, keepdims=True)


def fold_back(row: np.ndarray, maps, step) -> np.ndarray:  # type: ignore[no-untyped-def]
    """A row (token,) carried through maps that come last layer first."""
    for one in maps:
        row = step(row, np.nan_to_num(one))
    return row


def all_rows(maps: np.ndarray, step) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The whole matrix (sample, row, token), one read-out row at a time."""
    samples = range(maps.shape[1])
    return np.stack([[fold_back(row, maps[::-1, s], step) for row in np.eye(maps.shape[-1])] for s in samples])


def brute_relevance(maps: np.ndarray) -> np.ndarray:
    """Equation 6 as it is written, for one sample: R <- R + A R in forward order, with loops."""
    size = maps.shape[-1]
    relevance = [[float(i == j) for j in range(size)] for i in range(size)]
    for layer in maps:
        added = [[sum(layer[i, k] * relevance[k][j] for k in range(size)) for j in range(size)] for i in range(size)]
        relevance = [[relevance[i][j] + added[i][j] for j in range(size)] for i in range(size)]
    return np.array(relevance)


def brute_rollout(maps: np.ndarray) -> np.ndarray:
    """Product of (A + I), rows normalised, later layers on the left."""
    total = np.eye(maps.shape[-1])
    for layer in maps:
        mixed = layer + np.eye(len(layer))
        total = mixed / mixed.sum(-1, keepdims=True) @ total
    return total


def test_two_tokens_two_layers_by_hand() -> None:
    first, second = np.array([[0.0, 1.0], [0.5, 0.5]]), np.array([[0.5, 0.5], [0.0, 1.0]])
    # I + A_1 = [[1, 1], [.5, 1.5]], I + A_2 = [[1.5, .5], [0, 2]]; row 0 of (I + A_2)(I + A_1) = [1.75, 2.25].
    read = np.array([1.0, 0.0])
    layers = [second, first]
    np.testing.assert_allclose(fold_back(read, layers, walking.add_relevance), [1.75, 2.25], rtol=1e-15)
    np.testing.assert_allclose(fold_back(read, layers, walking.add_rollout), [1.75 / 4, 2.25 / 4], rtol=1e-15)


def test_rows_carried_backwards_equal_the_full_product(maps: np.ndarray) -> None:
    relevance, rollout = all_rows(maps, walking.add_relevance), all_rows(maps, walking.add_rollout)
    for sample in range(SAMPLES):
        np.testing.assert_allclose(relevance[sample], brute_relevance(maps[:, sample]), rtol=1e-6)
        np.testing.assert_allclose(rollout[sample], brute_rollout(maps[:, sample]), rtol=1e-6)


def test_relevance_of_no_attention_is_the_identity(maps: np.ndarray) -> None:
    for step in (walking.add_relevance, walking.add_rollout):
        np.testing.assert_array_equal(
            all_rows(0 * maps, step), np.broadcast_to(np.eye(TOKENS), (SAMPLES, TOKENS, TOKENS))
        )


def test_relevance_of_identity_attention_doubles_with_each_layer(maps: np.ndarray) -> None:
    identity = np.broadcast_to(np.eye(TOKENS), maps.shape)
    np.testing.assert_allclose(all_rows(identity, walking.add_relevance)[0], 2**LAYERS * np.eye(TOKENS))
    np.testing.assert_allclose(all_rows(identity, walking.add_rollout)[0], np.eye(TOKENS))


def test_relevance_of_mean_attention_is_rollout_times_two_to_the_number_of_layers(maps: np.ndarray) -> None:
    np.testing.assert_allclose(
        all_rows(maps, walking.add_relevance), 2**LAYERS * all_rows(maps, walking.add_rollout), rtol=1e-12
    )


def test_rollout_rows_sum_to_one_and_relevance_holds_the_identity(maps: np.ndarray) -> None:
    np.testing.assert_allclose(all_rows(maps, walking.add_rollout).sum(-1), 1, rtol=1e-12)
    assert (all_rows(maps, walking.add_relevance) >= np.eye(TOKENS)).all()


def test_causal_maps_keep_relevance_lower_triangular(maps: np.ndarray) -> None:
    for step in (walking.add_relevance, walking.add_rollout):
        above = np.triu(np.ones((TOKENS, TOKENS), bool), 1)
        assert (all_rows(np.tril(maps), step)[:, above] == 0).all()


def test_permuting_tokens_permutes_relevance(maps: np.ndarray) -> None:
    order = np.random.default_rng(1).permutation(TOKENS)
    for step in (walking.add_relevance, walking.add_rollout):
        permuted = all_rows(maps[..., order, :][..., order], step)
        np.testing.assert_allclose(permuted, all_rows(maps, step)[:, order][..., order], rtol=1e-12)


def test_samples_of_a_batch_do_not_touch_each_other(maps: np.ndarray) -> None:
    together = all_rows(maps, walking.add_relevance)
    for sample in range(SAMPLES):
        np.testing.assert_allclose(all_rows(maps[:, [sample]], walking.add_relevance)[0], together[sample], rtol=1e-12)


def test_a_query_without_a_key_passes_its_relevance_on_unchanged(maps: np.ndarray) -> None:
    maps[:, :, 2] = np.nan
    for step in (walking.add_relevance, walking.add_rollout):
        np.testing.assert_array_equal(all_rows(maps, step)[:, 2], np.tile(np.eye(TOKENS)[2], (SAMPLES, 1)))
        assert np.isfinite(all_rows(maps, step)).all()


def test_weights_of_residual_and_attention_have_the_other_methods_as_limits(maps: np.ndarray) -> None:
    def weighted(residual: float, addition: float):  # type: ignore[no-untyped-def]
        ones = np.ones(TOKENS)
        return all_rows(maps, lambda row, one: walking.add_weighted(row, one, residual * ones, addition * ones))

    np.testing.assert_allclose(weighted(1, 1), all_rows(maps, walking.add_relevance), rtol=1e-12)
    np.testing.assert_allclose(weighted(0.5, 0.5), all_rows(maps, walking.add_rollout), rtol=1e-12)
    np.testing.assert_array_equal(weighted(1, 0), np.broadcast_to(np.eye(TOKENS), (SAMPLES, TOKENS, TOKENS)))


def two_streams(
    events: str, sizes: dict[str, int], seed: int = 0
) -> tuple[list[walking.Event], dict[walking.Event, np.ndarray]]:
    """Events such as 'ii qq qi' (the second stream is looked at) with maps of their own."""
    generator = np.random.default_rng(seed)
    made = [walking.Event(name, at, name[0], name[1]) for at, name in enumerate(events.split())]
    return made, {e: np.clip(generator.normal(size=(sizes[e.queries], sizes[e.keys])), 0, None) for e in made}


def by_matrices(walk: walking.Walk) -> walking.Rows:
    """The rows of stream q by whole matrices, whichever way the walk would have gone."""
    return {name: values for (s, name), values in walk._matrices().items() if s == "q"}


def test_rows_of_a_stream_that_looks_at_another_equal_the_whole_matrices() -> None:
    sizes = {"q": 3, "i": 5}
    events, maps = two_streams("ii ii qq qi qq qi", sizes)
    walk = walking.Walk(events, maps.__getitem__, sizes)
    whole = by_matrices(walking.Walk(events, maps.__getitem__, sizes))
    for row in np.eye(3):
        found = walk.rows("q", row)
        for name in sizes:
            np.testing.assert_allclose(found[name], row @ whole[name], rtol=1e-12)


def walked_by_loops(
    events: list[walking.Event], maps: dict[walking.Event, np.ndarray], sizes: dict[str, int]
) -> dict[tuple[str, str], np.ndarray]:
    """Equations 6, 7, 10 and 11 entry by entry, for events none of which steps together with another."""
    state = {(s, q): np.eye(sizes[s], sizes[q]) * (s == q) for s in sizes for q in sizes}

    def gain(stream: str, token: int) -> float:
        return sum(state[stream, stream][token]) - 1

    def normal(stream: str, of: str, i: int, j: int) -> float:
        own = float(stream == of and i == j)
        total = gain(stream, i)
        return own + ((state[stream, of][i, j] - own) / total if total > 0 else 0)

    for event in events:
        s, q, one = event.queries, event.keys, maps[event]
        new = {key: values.copy() for key, values in state.items()}
        for n, i in ((n, i) for n in sizes for i in range(sizes[s])):
            for j in range(sizes[n]):
                for k, m in ((k, m) for k in range(one.shape[0]) for m in range(one.shape[1])):
                    if s in (q, n):
                        new[s, n][i, j] += one[i, m] * state[q, n][m, j] * (k == i)
                    else:
                        new[s, n][i, j] += normal(s, s, k, i) * one[k, m] * normal(q, n, m, j)
        state = new
    return state


@pytest.mark.parametrize(
    "pattern", ["nn ii qq qi ii in qi", "nn ii in qq qi qq qi", "ii nn in qq ii ni nn qi qq qi", "ii nn in ii ni qi"]
)
def test_a_stream_that_is_seen_through_another_has_its_share(pattern: str) -> None:
    # q looks at i, which looks at n, or both at each other: what q has of n is what i has of it, per what i gained.
    sizes = {"q": 3, "i": 4, "n": 2}
    events, maps = two_streams(pattern, sizes)
    expected = walked_by_loops(events, maps, sizes)
    walk = walking.Walk(events, maps.__getitem__, sizes)
    for row in np.eye(3):
        found = walk.rows("q", row)
        for name in sizes:
            np.testing.assert_allclose(found[name], row @ expected["q", name], rtol=1e-12)
    assert expected["q", "n"].any()
    whole = walking.Walk(events, maps.__getitem__, sizes)._matrices()
    for place, values in expected.items():
        np.testing.assert_allclose(whole[place], values, rtol=1e-12)


@pytest.mark.parametrize("pattern", ["ii ii qq qi qq qi", "ii qq qi iq qq ii"])
def test_weighted_walks_have_the_plain_one_and_the_identity_as_limits(pattern: str) -> None:
    sizes = {"q": 3, "i": 5}
    events, maps = two_streams(pattern, sizes)

    def rows(share: float | None) -> walking.Rows:
        shares = None if share is None else lambda event: np.full(sizes[event.queries], share)
        return walking.Walk(events, maps.__getitem__, sizes, shares).rows("q", np.eye(3)[0])

    for name, row in rows(None).items():
        np.testing.assert_array_equal(rows(1.0)[name], row)
    # All of the weight on the residual: nothing is passed on, each layer doubles what there is.
    layers = pattern.count("qq")
    np.testing.assert_allclose(rows(2.0)["q"], 2**layers * np.eye(3)[0])
    assert not np.any(rows(2.0).get("i", 0))


def test_weighted_rows_equal_the_weighted_matrices() -> None:
    sizes = {"q": 3, "i": 5}
    events, maps = two_streams("ii ii qq qi qq qi", sizes)
    generator = np.random.default_rng(3)
    shares = {e: generator.uniform(0.9, 1.1, sizes[e.queries]) for e in events}
    walk = walking.Walk(events, maps.__getitem__, sizes, shares.__getitem__)
    whole = by_matrices(walking.Walk(events, maps.__getitem__, sizes, shares.__getitem__))
    for row in np.eye(3):
        for name, found in walk.rows("q", row).items():
            np.testing.assert_allclose(found, row @ whole[name], rtol=1e-12)


def test_without_transpose_and_norm_across_streams_it_would_be_one_stream() -> None:
    # The block-matrix identity, and that equation 10 is something else.
    sizes = {"q": 3, "i": 4}
    events, maps = two_streams("ii qi", sizes)
    joined = np.eye(7)
    for e in events:
        block = np.zeros((7, 7))
        rows, columns = (slice(0, 3) if s == "q" else slice(3, 7) for s in (e.queries, e.keys))
        block[rows, columns] = maps[e]
        joined = joined + block @ joined
    plain = maps[events[1]] @ (np.eye(4) + maps[events[0]])
    np.testing.assert_allclose(joined[:3, 3:], plain, rtol=1e-12)
    assert np.abs(walking.Walk(events, maps.__getitem__, sizes).rows("q", np.eye(3)[0])["i"] - plain[0]).max() > 0.01


def test_normalised_relevance_has_rows_of_two_and_dead_rows_stay_the_identity(maps: np.ndarray) -> None:
    walk = walking.Walk([], lambda event: np.zeros(0), {})
    relevance = brute_relevance(maps[:, 0])
    np.testing.assert_allclose(walk._normalised(relevance).sum(-1), 2, rtol=1e-12)
    assert walk.dead == 0
    relevance[2] = np.eye(TOKENS)[2]
    np.testing.assert_array_equal(walk._normalised(relevance)[2], np.eye(TOKENS)[2])
    assert walk.dead == 1


def test_one_dead_row_costs_no_other_row_anything() -> None:
    sizes = {"q": 3, "i": 4}
    events, maps = two_streams("ii qq qi", sizes)
    maps[events[0]][0] = 0
    walk = walking.Walk(events, maps.__getitem__, sizes)
    whole = by_matrices(walking.Walk(events, maps.__getitem__, sizes))
    found = walk.rows("q", np.eye(3)[0])["i"]
    assert np.isfinite(found).all()
    assert found.any()
    np.testing.assert_allclose(found, whole["i"][0], rtol=1e-12)
    assert walk.dead == 1


def test_without_a_gradient_relevance_is_the_identity() -> None:
    sizes = {"q": 3, "i": 4}
    events, maps = two_streams("ii qq qi iq", sizes)
    walk = walking.Walk(events, lambda event: 0 * maps[event], sizes)
    found = walk.rows("q", np.eye(3)[1])
    np.testing.assert_array_equal(found["q"], [0, 1, 0])
    assert "i" not in found or not found["i"].any()


def test_streams_that_look_at_each_other_step_together() -> None:
    names = ["tt", "ii", "ti", "it", "tt", "ii"]
    events = [walking.Event(name, at, name[0], name[1]) for at, name in enumerate(names)]
    assert [len(group) for group in walking._together(events)] == [1, 1, 2, 1, 1]


def test_the_row_that_answers_is_where_the_last_layer_has_a_gradient() -> None:
    last = np.zeros((6, 6))
    assert reading.answering_row(last) is None
    last[4, 2] = 0.1
    np.testing.assert_array_equal(reading.answering_row(last), np.eye(6)[4])
    last[1, 1] = 3
    np.testing.assert_array_equal(reading.answering_row(last), [0, 0.5, 0, 0, 0.5, 0])
    assert reading.answering_row(np.ones((6, 6))) is None


def test_read_out_rows() -> None:
    kind = np.array([[3, 2, 2, 0], [0, 1, 1, 1]])
    expected = {
        "mean": [[1 / 3, 1 / 3, 1 / 3, 0], [0, 1 / 3, 1 / 3, 1 / 3]],
        "auto": [[1, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3]],
        1: [[0, 1, 0, 0], [0, 0, 1, 0]],
        -1: [[0, 0, 1, 0], [0, 0, 0, 1]],
    }
    for row, weights in expected.items():
        np.testing.assert_allclose(reading.readout_rows(kind, row), weights)  # type: ignore[arg-type]
    np.testing.assert_allclose(reading.readout_rows(kind[:1], "cls"), [[1, 0, 0, 0]])
    with pytest.raises(ValueError, match="asks for a CLS token"):
        reading.readout_rows(kind, "cls")
    with pytest.raises(ValueError, match="row 3 lies outside"):
        reading.readout_rows(kind, 3)


def test_share_of_the_strongest_tokens() -> None:
    assert rel.top_share(np.ones(20)) == pytest.approx(0.1)
    assert rel.top_share(np.eye(20)[3]) == 1
    assert np.isnan(rel.top_share(np.zeros(20)))


def test_rank_correlation_by_hand_and_with_ties() -> None:
    one = np.array([1.0, 2.0, 3.0, 4.0])
    assert rel.rank_correlation(one, np.exp(one)) == pytest.approx(1)
    assert rel.rank_correlation(one, -one) == pytest.approx(-1)
    # 1 - 6 * (1 + 1) / (4 * 15), the formula without ties.
    assert rel.rank_correlation(one, np.array([2.0, 1.0, 3.0, 4.0])) == pytest.approx(0.8)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5, variances 4.5 and 5.
    assert rel.rank_correlation(np.array([1.0, 2.0, 2.0, 4.0]), one) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rel.rank_correlation(one, np.ones(4)))


def make_text_run(
    attention: np.ndarray, relevance: np.ndarray, kind: np.ndarray, *, layers: tuple[int, ...], status: np.ndarray
) -> Run:
    """A run of one text stream with the given maps (sample, layer, query_token, key_token); padding is NaN."""
    samples, depth, size, _ = attention.shape
    site = SitePlan("text", "text", layers, ("",) * depth, 1, 1, size, size)
    plan = RunPlan(streams={"text": size}, sites={"text.self": site}, unit=2)
    spec = ExtractSpec(frozenset({"attention_mean", "attention_relevance", "score"}))
    run = Run.create(None, plan, spec, [Sample(f"s{i}", text="x") for i in range(samples)], {"model": "made"})
    words = [[f"w{t}" for t in range(size)] for _ in range(samples)]
    # Queries of padding are valid rows as well: their keys are the real tokens, which they may attend to.
    valid = np.isfinite(attention).any(-1) | (kind == KIND_CODES["padding"])[:, None]
    for block in run.blocks():
        at = slice(block.start, block.stop)
        run.write_tokens("text", block, text_layout(words[at], kind[at]))
        for layer in range(depth):
            run.write_layer("text.self", "attention_mean", block, layer, attention[at, layer])
            run.write_layer("text.self", "attention_relevance", block, layer, relevance[at, layer])
            run.write_layer("text.self", "query_valid", block, layer, valid[at, layer])
        run.commit(block, status[at])
    return run


@pytest.fixture
def ragged() -> dict[str, np.ndarray]:
    """Three texts, of 7, 4 and 6 tokens, the second with a dead row, the third left out."""
    generator = np.random.default_rng(7)
    attention = np.exp(generator.normal(0, 2, (SAMPLES, LAYERS, TOKENS, TOKENS)))
    relevance = np.clip(generator.normal(size=attention.shape), 0, None)
    kind = np.full((SAMPLES, TOKENS), KIND_CODES["text"])
    kind[:, 0] = KIND_CODES["cls"]
    for sample, length in ((1, 4), (2, 6)):
        attention[sample, :, length:] = attention[sample, :, :, length:] = 0
        kind[sample, length:] = KIND_CODES["padding"]
    attention[1, 2, 3] = 0
    sums = attention.sum(-1, keepdims=True)
    attention = np.divide(attention, sums, out=np.zeros_like(attention), where=sums > 0)
    attention[1, 2, 3] = relevance[1, 2, 3] = np.nan
    for stored in (attention, relevance):
        padding = kind == KIND_CODES["padding"]
        stored[np.broadcast_to(padding[:, None, :, None] | padding[:, None, None, :], stored.shape)] = np.nan
    status = np.array([EXTRACTED, EXTRACTED, LEFT_OUT])
    return {"attention": attention, "relevance": relevance, "kind": kind, "status": status}


def test_analyser_equals_full_matrices_on_texts_of_several_lengths(ragged: dict[str, np.ndarray]) -> None:
    run = make_text_run(**ragged, layers=(3, 4, 5, 6))
    result = analyse(run, Relevance(), save=False).sel(stream="text")
    for sample, length in enumerate((7, 4)):
        relevance, attention = (
            np.nan_to_num(ragged[name][sample, :, :length, :length]) for name in ("relevance", "attention")
        )
        expected = {
            "relevance": brute_relevance(relevance)[0],
            "rollout": brute_rollout(attention)[0],
            "attention": attention[-1, 0],
        }
        for name, row in expected.items():
            np.testing.assert_allclose(result[name][sample, :length], row, rtol=1e-6, atol=1e-9, err_msg=name)
            assert result[name][sample, length:].isnull().all()
    assert result["relevance"][2].isnull().all()
    np.testing.assert_array_equal(result["dead_rows"], [0, 1, 0])
    assert result.attrs["readout"] == "text: CLS token"


def test_texts_are_shown_as_shaded_words_without_their_special_tokens(ragged: dict[str, np.ndarray]) -> None:
    result = analyse(make_text_run(**ragged, layers=(0, 1, 2, 3)), Relevance(), save=False)
    html = "".join(element.html() for element in Relevance().report(result))
    assert ">w1</mark>" in html
    assert ">w0</mark>" not in html
    assert "1 query rows had no valid key" in html


@pytest.mark.parametrize("start_layer", [5, -2])
def test_start_layer_leaves_out_the_layers_before_it(ragged: dict[str, np.ndarray], start_layer: int) -> None:
    run = make_text_run(**ragged, layers=(3, 4, 5, 6))
    result = analyse(run, Relevance(start_layer=start_layer), save=False).sel(stream="text")
    np.testing.assert_allclose(result["relevance"][0], brute_relevance(ragged["relevance"][0, 2:])[0], rtol=1e-6)
    np.testing.assert_allclose(result["rollout"][0], brute_rollout(ragged["attention"][0, 2:])[0], rtol=1e-6)
    np.testing.assert_allclose(result["attention"][0], ragged["attention"][0, -1, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="start_layer 7 lies behind the last layer, 6"):
        Relevance(start_layer=7).analyse(run)


def test_mean_read_out_is_the_mean_of_the_rows_of_real_tokens(ragged: dict[str, np.ndarray]) -> None:
    run = make_text_run(**ragged, layers=(0, 1, 2, 3))
    result = analyse(run, Relevance(row="mean"), save=False).sel(stream="text")
    relevance = np.nan_to_num(ragged["relevance"][1, :, :4, :4])
    np.testing.assert_allclose(result["relevance"][1, :4], brute_relevance(relevance).mean(0), rtol=1e-6)


def test_analyser_keeps_the_contract() -> None:
    result = check_analyser(Relevance())
    assert result["relevance"].dims == ("stream", "sample", "token")
    assert {"kind", "row", "column", "token_text"} <= set(result.coords)
    assert result["thumbnail"].sizes["shown"] == 3


def test_samples_in_blocks_equal_samples_in_one_block() -> None:
    run = make_run(samples=5)
    run.plan = dataclasses.replace(run.plan, unit=5)
    whole = Relevance().analyse(run)
    run.plan = dataclasses.replace(run.plan, unit=1)
    xr.testing.assert_allclose(Relevance().analyse(run), whole)


def test_only_what_the_methods_need_is_required() -> None:
    assert Relevance(methods=("rollout",)).requires() == ExtractSpec(frozenset({"attention_mean", "score"}))
    assert "attention_relevance" in Relevance(target=3).requires().quantities
    assert Relevance(target=3).requires().target == 3
    run = make_run(quantities=frozenset({"attention", "score"}))
    result = analyse(run, Relevance(methods=("rollout",)), save=False)
    assert "relevance" not in result
    np.testing.assert_allclose(result["rollout"].sum("token"), 1, rtol=1e-6)


def test_wrong_options_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="relevance"):
        make_analyser("relevance", {"methods": ["magic"]})
    with pytest.raises(ValueError, match="no method 'magic'; its methods are relevance, rollout, attention"):
        Relevance(methods=("magic",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no attention of stream 'text' is here; the run's streams are vision"):
        Relevance(streams=("text",)).analyse(make_run())


def test_maps_that_were_never_written_are_an_error() -> None:
    run = make_run(quantities=frozenset({"attention", "attention_relevance", "score"}))
    missing = np.full((2, 10, 10), np.nan, np.float32)
    run.write_layer("vision.self", "attention_relevance", range(2), 0, missing)
    with pytest.raises(ValueError, match="extracted without 'attention_relevance'"):
        Relevance().analyse(run)


def test_streams_of_different_length_stand_side_by_side() -> None:
    vision, text = 5, 3
    sites = {
        name: SitePlan(stream, stream, (0,), ("",), 1, 1, size, size)
        for name, stream, size in (("vision.self", "vision", vision), ("text.self", "text", text))
    }
    plan = RunPlan(streams={"vision": vision, "text": text}, sites=sites, unit=2)
    run = Run.create(None, plan, ExtractSpec(frozenset({"attention_mean"})), [Sample("a"), Sample("b")], {})
    for name, site in sites.items():
        size = site.query_tokens
        kind = np.full((2, size), KIND_CODES["image"])
        place = np.tile(np.arange(size), (2, 1))
        layout = TokenLayout(kind, np.full((2, size), name, object), place, place)
        run.write_tokens(site.queries, range(2), layout)
        run.write_layer(name, "query_valid", range(2), 0, np.ones((2, size), bool))
        run.write_layer(name, "attention_mean", range(2), 0, np.full((2, size, size), 1 / size))
    run.commit(range(2), np.full(2, EXTRACTED))
    result = Relevance(methods=("rollout",)).analyse(run)
    assert result["rollout"].sizes == {"stream": 2, "sample": 2, "token": 5}
    assert result["rollout"].sel(stream="text", token=[3, 4]).isnull().all()
    assert result["kind"].sel(stream="text", token=[3, 4]).max() == KIND_CODES["padding"]
    np.testing.assert_allclose(result["rollout"].sel(stream="text", token=slice(0, 2)), 1 / 3, rtol=1e-6)
    assert result.attrs["readout"].startswith("vision: mean over real tokens")
