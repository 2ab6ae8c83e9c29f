"""Runs of small models that plugins are tried on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr

from attnscope import Run
from attnscope.conditions import Condition
from attnscope.testing import make_run

OutputsOf = Callable[[Condition], dict[str, Any]]


@pytest.fixture
def run_with_outputs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A function that makes a run whose outputs under each condition are those that a function gives.

    The function gives `changed`, and what else it likes of `score`, `loss`, `correct`, `asked`, `content`, each
    (sample,), or (sample, phrase) for a condition by phrase.
    """

    def make(samples: int, outputs_of: OutputsOf, phrases: int = 1) -> Run:
        run = make_run(samples=samples, quantities=frozenset({"attention", "attention_relevance", "score"}))

        def outputs_under(self: Run, conditions: list[Condition]) -> xr.Dataset:
            by_phrase = any(c.by_phrase for c in conditions)
            shape = (samples, phrases) if by_phrase else (samples,)
            fills = {"score": np.nan, "loss": np.nan, "correct": np.nan, "asked": 1, "content": 8}
            found = {}
            for name, fill in {**fills, "changed": 0}.items():
                rows = [np.asarray(outputs_of(c).get(name, fill), float) for c in conditions]
                rows = [r[:, None] if by_phrase and r.ndim == 1 else r for r in rows]
                found[name] = np.stack([np.broadcast_to(r, shape) for r in rows])
            dims = ("condition", "sample", "phrase")[: 1 + len(shape)]
            return xr.Dataset({name: (dims, values) for name, values in found.items()})

        monkeypatch.setattr(Run, "outputs_under", outputs_under)
        monkeypatch.setattr(Run, "_require_conditions", lambda self, spec, asker: None)
        return run

    return make
