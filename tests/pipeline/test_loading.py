"""Loading a model by name."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import PreTrainedModel, ViTModel

from attnscope import loading
from attnscope.loading import ModelError, load_model


def test_threads_load_one_after_another(tiny_vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two at once, each would take the other's stand-in for `tie_weights` for the real one, and leave it there."""
    tie_weights, init = PreTrainedModel.tie_weights, ViTModel.__init__
    both, met = threading.Barrier(2, timeout=0.5), []

    def wait_for_the_other(self: ViTModel, *given: object, **named: object) -> None:
        try:
            met.append(both.wait())
        except threading.BrokenBarrierError:
            both.reset()
        init(self, *given, **named)

    monkeypatch.setattr(ViTModel, "__init__", wait_for_the_other)
    with ThreadPoolExecutor(2) as threads:
        loaded = list(threads.map(load_model, [tiny_vit] * 2))
    assert not met
    assert PreTrainedModel.tie_weights is tie_weights
    assert not any(p.is_meta for one in loaded for p in one.model.parameters())


def test_an_unfilled_model_is_refused(tiny_vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = loading._weights
    monkeypatch.setattr(loading, "_weights", lambda *given: read(*given).to("meta"))
    with pytest.raises(ModelError, match="without values; is another thread loading a model"):
        load_model(tiny_vit)


def test_tied_weights_are_left_unfilled_where_tying_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "tie_weights", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"'cls\.predictions\.decoder\.weight' of .* without values"):
        load_model("reference:lxmert")
