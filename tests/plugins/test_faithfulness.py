"""Faithfulness: areas by hand, curves that are known, and real perturbations of a small model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import attnscope
from attnscope import Run, analyse
from attnscope.analysis import make_analyser, requirements
from attnscope.compatibility.examples import VISION, image, widened
from attnscope.conditions import INTACT, Condition
from attnscope.quantities import ExtractSpec
from attnscope_faithfulness import Faithfulness

FRACTIONS = (0.0, 0.25, 0.5, 1.0)


def test_conditions_are_run_once_where_rankings_do_not_matter() -> None:
    listed = Faithfulness(rankings=("relevance", "rollout"), fractions=FRACTIONS).requires().conditions
    assert listed.count(INTACT) == 1
    assert listed.count(Condition(image="all", operator="drop")) == 1
    # Two inner fractions, both ends, two rankings and the random one.
    assert len(listed) == 2 + 2 * 2 * 3
    assert len({c.name for c in listed}) == len(listed)
    # What the ranking's analyser needs is recorded as well.
    assert "attention_relevance" in requirements([Faithfulness()]).quantities
    assert requirements([Faithfulness(target=3)]).target == 3


@pytest.fixture
def known(run_with_outputs: Callable[..., Run]) -> Run:
    """Six samples whose score falls by the fraction with 'relevance', by its square root with 'random'."""
    slope = np.array([1, 2, 3, 4, 5, np.nan])

    def outputs_of(condition: Condition) -> dict[str, Any]:
        gone = {"intact": 0.0, "all": 1.0, "ranked": condition.fraction}[condition.image]
        if condition.ranking is not None:
            power = {"relevance": 1.0, "random": 2.0}[condition.ranking.analyser]
            gone = gone**power if condition.first == "most" else gone ** (2 * power)
        changed = np.full(6, round(8 * condition.fraction if condition.image == "ranked" else 8 * gone))
        changed[5] = -1
        return {"score": slope * (1 - gone), "correct": np.where(np.isnan(slope), np.nan, 1.0), "changed": changed}

    return run_with_outputs(6, outputs_of)


def test_curves_areas_and_paired_differences_are_what_the_outputs_say(known: Run) -> None:
    analyser = Faithfulness(rankings=("relevance",), fractions=FRACTIONS)
    result = analyse(known, analyser, save=False).sel(taken="image by drop")
    np.testing.assert_allclose(result["score"].sel(ranking="relevance", end="most"), 3 * (1 - np.array(FRACTIONS)))
    assert float(result["score_area"].sel(ranking="relevance", end="most")) == pytest.approx(1.5)
    # Of 1 - f**2 over 0, .25, .5, 1: .25 * (1 + .9375) / 2 + .25 * (.9375 + .75) / 2 + .5 * .75 / 2.
    expected = 0.25 * 1.9375 / 2 + 0.25 * 1.6875 / 2 + 0.5 * 0.75 / 2
    assert float(result["score_area"].sel(ranking="random", end="most")) == pytest.approx(3 * expected)
    pair = result.sel(pair="relevance - random", end="most")
    assert float(pair["score_difference"]) == pytest.approx(3 * (0.5 - expected))
    # Paired: the samples' slopes differ far more than the methods do.
    assert float(pair["score_difference_high"]) < 0
    assert float(result["score_area_high"].sel(ranking="relevance", end="most")) > float(
        result["score_area_low"].sel(ranking="random", end="most")
    )
    assert int(result["skipped"]) == 1
    np.testing.assert_allclose(result["removed"], [0, 2, 4, 8])
    assert np.isnan(result["score_areas"].sel(ranking="random", end="most").values[5])


def test_report_shows_curves_with_bands_and_what_was_left_out(known: Run) -> None:
    analyser = Faithfulness(rankings=("relevance",), fractions=FRACTIONS)
    html = "".join(e.html() for e in analyser.report(analyse(known, analyser, save=False)))
    assert html.count("<svg") == 4
    assert "relevance - random" in html
    assert "1 samples have no such tokens" in html
    assert "0.25: 2, 0.5: 4" in html


def test_a_model_perturbed_by_hand_gives_the_same_curve() -> None:
    model = widened(hf.ViTForImageClassification._from_config(hf.ViTConfig(**VISION), attn_implementation="eager"))
    inputs = image()
    analyser = Faithfulness(rankings=("attention",), fractions=FRACTIONS, target=1)
    run = attnscope.extract(model, [inputs], [analyser], spec=ExtractSpec(frozenset({"score"})))
    result = analyse(run, analyser, save=False).sel(taken="image by drop", ranking="attention")
    with torch.no_grad():
        last = model(**inputs, output_attentions=True).attentions[-1].mean(1)[:, 0, 1:]
    curve = np.zeros((2, 4))
    for sample in range(2):
        order = last[sample].argsort(descending=True)
        for at, fraction in enumerate(FRACTIONS):
            kept = [0, *(1 + order[round(16 * fraction) :]).tolist()]
            one = inputs["pixel_values"][sample : sample + 1]
            handle = model.vit.embeddings.register_forward_hook(lambda m, a, out, kept=kept: out[:, sorted(kept)])
            with torch.no_grad():
                curve[sample, at] = model(pixel_values=one).logits[0, 1]
            handle.remove()
    np.testing.assert_allclose(result["score"].sel(end="most"), curve.mean(0), atol=1e-5)
    np.testing.assert_allclose(result["score_areas"].sel(end="most"), np.trapezoid(curve, FRACTIONS, axis=1), atol=1e-5)
    np.testing.assert_allclose(result["removed"], [0, 4, 8, 16])


def test_options_are_checked() -> None:
    for fractions in ((0.1, 1.0), (0.0,), (0.0, 0.5, 0.5), (0.0, 1.5)):
        with pytest.raises(ValueError, match="fractions go up from 0 to at most 1"):
            Faithfulness(fractions=fractions)
    analyser = make_analyser("faithfulness", {"rankings": ["rollout"], "ranking_options": {"row": "mean"}})
    assert '"row": "mean"' in analyser.requires().conditions[1].ranking.options  # type: ignore[union-attr]
