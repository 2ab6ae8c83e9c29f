"""Reductions over heads that a run computes when asked."""

import numpy as np

from attnscope.attention_array import HeadMean
from attnscope.testing import make_run


def test_attention_mean_of_a_dense_run_is_the_mean_over_heads_of_what_is_asked_for() -> None:
    run = make_run(samples=3, heads=3)
    attention = run.attention("vision.self").values
    mean = run.array("vision.self", "attention_mean")
    assert mean.dims == ("sample", "layer", "query_token", "key_token")
    np.testing.assert_allclose(mean.values, attention.mean(2), rtol=1e-6)
    chosen = mean.isel(sample=[2, 0], layer=1, query_token=slice(1, 9, 3), key_token=-1)
    np.testing.assert_allclose(chosen.values, attention.mean(2)[[2, 0], 1, 1:9:3, -1], rtol=1e-6)


def test_attention_mean_is_not_read_before_it_is_indexed(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    shapes = []
    outer = HeadMean._outer
    monkeypatch.setattr(HeadMean, "_outer", lambda self, key: shapes.append(outer(self, key).shape) or outer(self, key))
    mean = make_run(samples=3).array("vision.self", "attention_mean")
    assert not shapes
    mean.isel(sample=0, layer=slice(1, 2)).values.sum()
    assert shapes == [(1, 10, 10)]


def test_relevance_from_stored_gradients_is_the_positive_mean_of_the_product() -> None:
    run = make_run(samples=2, quantities=frozenset({"attention", "attention_grad"}))
    generator = np.random.default_rng(1)
    gradient = generator.normal(size=(2, 2, 2, 10, 10)).astype(np.float32)
    for layer in range(2):
        run.write_layer("vision.self", "attention_grad", range(2), layer, gradient[:, layer])
    expected = np.maximum(gradient * run.attention("vision.self").values, 0).mean(2)
    np.testing.assert_allclose(run.array("vision.self", "attention_relevance").values, expected, rtol=1e-6)
