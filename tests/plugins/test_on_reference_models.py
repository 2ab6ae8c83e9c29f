"""What the analysers say of the trained models that attnscope carries, on scenes that those never saw."""

import re
from pathlib import Path

import numpy as np
import pytest

import attnscope
from attnscope.quantities import ExtractSpec
from attnscope_faithfulness import Faithfulness
from attnscope_modality_ablation import ModalityAblation
from attnscope_multilevel_alignment import MultilevelAlignment
from attnscope_qk_svd import QKSVD
from attnscope_relevance import Relevance


@pytest.mark.slow
def test_relevance_of_clip_finds_the_named_objects_and_is_faithful() -> None:
    relevance = Relevance(methods=("relevance",))
    faithful = Faithfulness(
        rankings=("relevance",), ranking_options={"methods": ["relevance"]}, fractions=(0.0, 0.25, 0.75, 1.0)
    )
    spec = ExtractSpec(frozenset({"score"}))
    run = attnscope.extract("reference:clip", "reference:test:32", [relevance, faithful], spec=spec)
    found = attnscope.analyse(run, relevance, save=False).sel(stream="vision")
    assert float(found["pointing_low"][0]) > 5 * float(found["pointing_chance"].mean())
    areas = attnscope.analyse(run, faithful, save=False).squeeze("taken")
    own, floor = (areas.sel(ranking=name) for name in ("relevance", "random"))
    # The intervals stand apart: the score falls sooner, and stays longer, than in a random order.
    assert float(own["score_area_high"].sel(end="most")) < float(floor["score_area_low"].sel(end="most"))
    assert float(own["score_area_low"].sel(end="least")) > float(floor["score_area_high"].sel(end="least"))


@pytest.mark.slow
def test_vision_has_influence_on_the_words_of_lxmert() -> None:
    analyser = ModalityAblation(operators=("mean",))
    spec = ExtractSpec(frozenset({"score"}))
    run = attnscope.extract("reference:lxmert", "reference:test:24", [analyser], spec=spec)
    result = attnscope.analyse(run, analyser, save=False).squeeze()
    assert float(result["influence_low"].sel(level="part")) > 1
    assert float(result["influence_low"].sel(level="all")) > 1
    assert int(result["examples"]) > 20


@pytest.mark.slow
def test_words_of_lxmert_look_at_the_regions_that_they_name() -> None:
    analyser = MultilevelAlignment(maps="attention", negatives=False)
    run = attnscope.extract("reference:lxmert", "reference:test:16", [analyser])
    result = attnscope.analyse(run, analyser, save=False)
    for name in ("pointing", "mass", "box", "region"):
        assert (result[f"{name}_low"] > 1.5 * result[f"{name}_chance"]).all(), name
    assert (result["region_low"] > 5 * result["region_chance"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "model", "site"),
    [
        ("`reference:clip`, image", "reference:clip", "vision.self"),
        ("`reference:vilt`", "reference:vilt", "joint.self"),
        ("`reference:lxmert`, boxes", "reference:lxmert", "vision.self"),
    ],
)
def test_the_page_quotes_the_modes_of_the_weights_that_are_carried(row: str, model: str, site: str) -> None:
    run = attnscope.extract(model, "reference:test:1", [QKSVD()])
    found = attnscope.analyse(run, QKSVD(), save=False)["layer_cosine_average"].sel(site=site).dropna("layer")
    page = (Path(__file__).parents[2] / "docs/query-key-analysers.md").read_text(encoding="utf-8")
    quoted = re.search(rf"^\| {re.escape(row)} \| ([^;]*);", page, re.MULTILINE)
    assert quoted is not None
    np.testing.assert_allclose([float(number) for number in quoted[1].split()], found, atol=0.0051)
