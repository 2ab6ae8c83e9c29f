"""For authors of analysers and families: runs with a known content, and checks of the contracts."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from attnscope.analysis import Analyser, analyse
from attnscope.plan import RunPlan, SitePlan
from attnscope.quantities import RANKS, TENSORS, ExtractSpec
from attnscope.run import EXTRACTED, Run
from attnscope.samples import Region, Sample
from attnscope.tokens import KINDS, TokenLayout, grid_layout

if TYPE_CHECKING:
    import torch

    from attnscope.families import ModelFamily


def make_run(
    samples: int = 3,
    *,
    layers: int = 2,
    heads: int = 2,
    grid: tuple[int, int] = (3, 3),
    channels: int = 4,
    features: int = 8,
    seed: int = 0,
    quantities: frozenset[str] = frozenset({"attention", "attention_relevance", "weights", "score"}),
    location: str | None = None,
) -> Run:
    """A finished run of one site, 'vision.self': a CLS token and a patch grid, filled by a seeded generator.

    Attention rows are softmaxes of normal scores (standard deviation 2), or of query . key / sqrt(channels) where one
    of those is asked for; `attention_relevance` is the positive part of a normal draw, value and weights are normal.
    Every sample carries one region over the upper left patch.
    """
    generator = np.random.default_rng(seed)
    tokens = 1 + grid[0] * grid[1]
    site = SitePlan(
        queries="vision",
        keys="vision",
        layers=tuple(range(layers)),
        modules=tuple(f"encoder.layer.{i}.attention" for i in range(layers)),
        heads=heads,
        kv_heads=heads,
        query_tokens=tokens,
        key_tokens=tokens,
        channels=channels,
        value_channels=channels,
    )
    plan = RunPlan(streams={"vision": tokens}, sites={"vision.self": site}, unit=2, thumbnails=True, regions=1)
    spec = ExtractSpec(quantities=quantities, encoding="exact", summaries=True)
    listed = [
        Sample(f"sample-{i}", text=f"thing {i}", regions=(Region("thing", (0, 0, 1, 1)),)) for i in range(samples)
    ]
    run = Run.create(location, plan, spec, listed, {"model": "made", "family": "made", "target": spec.target or ""})
    for block in run.blocks():
        scores = _scores(run, block, quantities, generator)
        attention = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        relevance = np.clip(generator.normal(0, 1, (len(block), layers, tokens, tokens)), 0, None)
        layout = grid_layout(len(block), *grid)
        run.write_tokens("vision", block, layout)
        run.write_block("vision/region_share", block, np.stack([np.arange(tokens) == 1] * len(block))[:, None])
        for layer in range(layers):
            run.write_layer("vision.self", "query_valid", block, layer, np.ones((len(block), tokens), bool))
            if "attention" in quantities:
                run.write_layer("vision.self", "attention", block, layer, attention[:, layer].astype(np.float32))
            if "attention_mean" in quantities:
                run.write_layer("vision.self", "attention_mean", block, layer, attention[:, layer].mean(1))
            if "attention_relevance" in quantities:
                run.write_layer("vision.self", "attention_relevance", block, layer, relevance[:, layer])
        if "attention" in quantities:
            for name, values in _summaries(attention.astype(np.float32), layout).items():
                run.write_layers("vision.self", name, block, values)
        if "score" in quantities:
            run.write_block("outputs/score", block, generator.normal(size=(1, len(block))).astype(np.float32))
        pictures = generator.integers(0, 255, (len(block), 224, 224, 3), dtype=np.uint8)
        run.write_block("samples/thumbnail", block, pictures)
        for name in ("image_digest", "reason"):
            run.write_block(f"samples/{name}", block, np.full(len(block), "", object))
        run.commit(block, np.full(len(block), EXTRACTED))
    if "weights" in quantities:
        for layer in range(layers):
            query, key = generator.normal(size=(2, heads, channels, features)).astype(np.float32)
            zeros = np.zeros((heads, channels), np.float32)
            run.write_weights(
                "vision.self", layer, {"query": query, "key": key, "query_bias": zeros, "key_bias": zeros}
            )
    return run


def _scores(run: Run, block: range, quantities: frozenset[str], generator: np.random.Generator) -> np.ndarray:
    """Scores (sample, layer, head, query_token, key_token) of a block; of query and key where those are written."""
    site = run.plan.sites["vision.self"]
    shape = (len(block), len(site.layers), site.heads, site.query_tokens)
    if not quantities & set(TENSORS):
        return generator.normal(0, 2, (*shape, site.key_tokens))
    vectors = generator.normal(0, 1.5, (3, *shape, site.channels))
    for name, values in zip(TENSORS, vectors, strict=True):
        for layer in range(shape[1]) if name in quantities else ():
            run.write_layer("vision.self", name, block, layer, values[:, layer].astype(np.float32))
    return vectors[0] @ np.swapaxes(vectors[1], -1, -2) / np.sqrt(site.channels)


def _summaries(attention: np.ndarray, layout: TokenLayout) -> dict[str, np.ndarray]:
    """Summaries of attention (sample, layer, head, query_token, key_token) among tokens of which none is padding."""
    order = np.argsort(-attention, axis=-1, kind="stable")[..., :RANKS]
    shape = (*attention.shape[:3], len(KINDS), len(KINDS))
    mean, most, largest = np.full((3, *shape), np.nan, np.float32)
    for of, to in itertools.product(np.unique(layout.kind), repeat=2):
        block = attention[..., layout.kind[0] == of, :][..., layout.kind[0] == to]
        mass = block.sum(-1)
        mean[..., of, to], most[..., of, to], largest[..., of, to] = mass.mean(-1), mass.max(-1), block.max((-2, -1))
    return {
        "entropy": -(attention * np.log(attention)).sum(-1),
        "top_key": order.astype(np.int32),
        "top_value": np.take_along_axis(attention, order, axis=-1),
        "kind_mass": mean,
        "kind_mass_max": most,
        "kind_max": largest,
    }


def check_analyser(analyser: Analyser) -> xr.Dataset:
    """Hold an analyser to its contract on a made run, and give its result.

    Checked: options are the fields of a frozen dataclass; `requires` is pure; the result is labelled, the same when
    computed again, and shown by `report`; and what it gives on parts of a run combines into what it gives on the whole.

    Raises
    ------
    AssertionError
        Naming the first point of the contract that is not kept.
    """
    assert dataclasses.is_dataclass(analyser), f"{type(analyser).__name__} is not a dataclass"
    assert type(analyser).__dataclass_params__.frozen, f"{type(analyser).__name__} is not frozen"
    spec = analyser.requires()
    assert spec == analyser.requires(), "requires() gives different specs"
    run = make_run(quantities=spec.quantities | {"attention"})
    result = analyse(run, analyser)
    xr.testing.assert_identical(result.drop_attrs(), analyse(run, analyser, save=False).drop_attrs())
    xr.testing.assert_equal(result, run.analysis(analyser.name))
    combine = getattr(analyser, "combine", None)
    if combine is not None:
        combined = combine(analyser.analyse(run.part(block)) for block in run.blocks())
        xr.testing.assert_allclose(combined, result, rtol=1e-6)
    html = "".join(element.html() for element in analyser.report(result))
    assert html, "report() shows nothing"
    return result


def check_family(family: "ModelFamily | str", model: "torch.nn.Module", inputs: "Mapping[str, torch.Tensor]") -> None:
    """Hold a family, or the one that answers for a model type, to its contract on one batch of a model.

    A batch with padding, of a small model with wide random weights, shows most. Checked: every attention that ran is
    placed by a rule, no two modules at one layer of a site, layers counted from 0 without a gap; each stream's layout
    has exactly the tokens that the model attended to, of known kinds, with padding where the mask hides a token; a
    fold gives each token its place once in each layer; and the stored weights give the query and the key.

    Raises
    ------
    AssertionError
        Naming the first point of the contract that is not kept.
    """
    from attnscope.families import find_family
    from attnscope.families.conformance import check
    from attnscope.loading import load_model

    loaded = load_model(model)
    loaded.family = find_family(family) if isinstance(family, str) else family
    check(loaded.family, loaded, dict(inputs))
