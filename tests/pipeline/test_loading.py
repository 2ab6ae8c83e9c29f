"""Loading a model by name."""

from pathlib import Path

import pytest
import torch

from attnscope import loading
from attnscope.loading import ModelError, load_model


def test_a_model_with_a_parameter_that_was_not_filled_is_read_again(
    tiny_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = loading._weights
    times: list[int] = []

    def unfilled_at_first(*given: object) -> torch.nn.Module:
        times.append(len(times))
        model = read(*given)  # type: ignore[arg-type]
        return model if len(times) > 1 else model.to("meta")

    monkeypatch.setattr(loading, "_weights", unfilled_at_first)
    assert not any(p.is_meta for p in load_model(tiny_vit).model.parameters())
    assert len(times) == 2


def test_a_model_that_stays_unfilled_is_refused(tiny_vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = loading._weights
    monkeypatch.setattr(loading, "_weights", lambda *given: read(*given).to("meta"))
    with pytest.raises(ModelError, match="without values; try again"):
        load_model(tiny_vit)
