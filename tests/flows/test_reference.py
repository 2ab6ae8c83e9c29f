"""Training under a real Prefect: the same weights as without it, and a card for people to see."""

import json
from pathlib import Path

import pytest

from attnscope.reference import making
from attnscope.reference.weights import weights_digest

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("prefect"), pytest.mark.slow]

SHORT = {"scenes": 40, "steps": 4, "decay": 2, "examine_every": 3, "validation_scenes": 8}


def test_a_flow_trains_the_weights_that_the_library_trains(tmp_path: Path) -> None:
    from attnscope_flows.reference import listener, train_flow

    told = []
    token = listener.set(told.append)
    try:
        receipt = train_flow("text", str(tmp_path / "flow"), 5, SHORT, scenes=16)
    finally:
        listener.reset(token)
    making.train(making.recipe_of("text", SHORT), 5, str(tmp_path / "plain"))
    assert receipt["digest"] == weights_digest(tmp_path / "flow") == weights_digest(tmp_path / "plain")
    assert json.loads((tmp_path / "flow" / "card.json").read_text())["steps"] == 6
    assert [p.step for p in told if p.stage == "training"] == [3, 6]


def test_the_card_is_an_artifact(tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    from attnscope_flows.reference import train_flow

    train_flow("text", str(tmp_path), 1, SHORT, scenes=8)
    with get_client(sync_client=True) as client:
        cards = [a for a in client.read_artifacts() if a.key == "reference-text"]
    assert cards and str(cards[0].data).startswith("# reference:text")


def test_a_training_that_cannot_be_is_refused(tmp_path: Path) -> None:
    from attnscope_flows.reference import train_flow

    with pytest.raises(making.ReferenceError, match="unknown reference model 'nobody'"):
        train_flow("nobody", str(tmp_path / "x"))
