"""Training under a real Prefect: the same weights as without it, and a card for people to see."""

import importlib
import json
import sys
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


def test_a_flow_trains_on_samples(tmp_path: Path) -> None:
    from attnscope_flows.reference import train_flow

    lines = [json.dumps({"text": f"text number {number} of many"}) for number in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    changes = {"batch": 8, "steps": 2, "decay": 2, "examine_every": 2, "validation_scenes": 4}
    receipt = train_flow(
        "text", str(tmp_path / "out"), 0, changes, samples=str(tmp_path / "texts.jsonl"), dtype="bfloat16"
    )
    assert receipt["digest"] == weights_digest(tmp_path / "out")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["recipe"]["dtype"] == "bfloat16" and card["samples"]["train"] == 24


def test_the_card_is_an_artifact(tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    from attnscope_flows.reference import train_flow

    train_flow("text", str(tmp_path), 1, SHORT, scenes=8)
    with get_client(sync_client=True) as client:
        cards = [str(a.data) for a in client.read_artifacts() if a.key == "reference-text"]
    # Other trainings of the same server may have left theirs.
    assert any(card.startswith("# reference:text") for card in cards)


def test_a_training_that_cannot_be_is_refused(tmp_path: Path) -> None:
    from attnscope_flows.reference import train_flow

    with pytest.raises(making.ReferenceError, match="unknown reference model 'nobody'"):
        train_flow("nobody", str(tmp_path / "x"))


def test_a_flow_tabulates_what_the_library_tabulates(tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    from attnscope.reference.tabulating import Variant, tabulate
    from attnscope_flows.reference import table_flow

    short = SHORT | {"scenes": 20}
    variants = [{"name": "a", "model": "text", "changes": short}, {"name": "b", "model": "text", "changes": short}]
    (tmp_path / "counting.py").write_text(
        "def sizes(folder):\n    return {'bytes': float((folder / 'model.safetensors').stat().st_size)}\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        receipt = table_flow(variants, str(tmp_path / "flow"), [0], "counting:sizes", processes=2)
        measure = importlib.import_module("counting").sizes
        tabulate([Variant(v["name"], v["model"], short) for v in variants], [0], str(tmp_path / "plain"), measure)  # type: ignore[arg-type]
    finally:
        sys.path.remove(str(tmp_path))
    assert receipt["rows"] == 2
    for name in ("table.json", "a-0/model.safetensors", "b-0/model.safetensors"):
        assert (tmp_path / "flow" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    with get_client(sync_client=True) as client:
        tables = [str(a.data) for a in client.read_artifacts() if str(a.key).startswith("table")]
    assert any("| a |" in text for text in tables)
