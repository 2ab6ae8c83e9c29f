"""The closed form of the gradient by the attention, against autograd through each family's own eager softmax."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnscope.compatibility import EXAMPLES
from attnscope.compatibility.witness import call_error, first_tensor
from attnscope.recording import recording

# Grouped heads, rotary positions, softcaps, biases, windows, cross-attention, own attention code, several streams.
NAMES = ("vit", "dinov3", "swin", "llama", "gemma2", "t5", "bart", "whisper", "gptj", "vilt", "lxmert", "blip",
         "blip_2", "llava")  # fmt: skip


class SoftmaxesInGraph(TorchFunctionMode):
    """What every softmax returned, still in the graph."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.softmax, Tensor.softmax, nn.functional.softmax):
            self.seen.append(result)
        return result


def given(name: str, dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in EXAMPLES[name].inputs().items()}


def score_of(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return first_tensor(model(**given(name, dtype))).square().mean()


def eager(name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The softmaxes that a model's eager code runs and that the score depends on, and the gradient by each."""
    with SoftmaxesInGraph() as spy:
        score = score_of(EXAMPLES[name].build("eager").to(dtype), name, dtype)
    gradients = torch.autograd.grad(score, spy.seen, allow_unused=True)
    used = [(s, g) for s, g in zip(spy.seen, gradients, strict=True) if g is not None]
    return [s.detach() for s, _ in used], [g for _, g in used]


def closed(name: str, kernel: str, dtype: torch.dtype, own: Sequence[Tensor]) -> list[Tensor]:
    """The gradient by each of these softmaxes, without the matrix in the graph."""
    model = EXAMPLES[name].build(kernel).to(dtype)
    with recording(model) as recorded:
        score = score_of(model, name, dtype)
    calls = [call for call in recorded if call.value is not None]
    slopes = torch.autograd.grad(score, [call.output for call in calls], allow_unused=True)
    found = []
    for softmax in own:
        errors = [call_error(call, softmax) for call in calls]
        best = min(range(len(errors)), key=errors.__getitem__)
        assert errors[best] <= 1e-5
        found.append(calls[best].attention_gradient(slopes[best]))
    return found


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference in units of the largest gradient of each softmax, where a key may be attended to."""
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        theirs = theirs[..., : mine.shape[-1]].reshape(mine.shape)
        worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max()))
    return worst


@pytest.mark.parametrize(("name", "kernel"), [(n, k) for n in NAMES for k in EXAMPLES[n].kernels])
def test_closed_form_equals_autograd_through_the_eager_softmax(name: str, kernel: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        own, truth = eager(name, torch.float64)
        assert len(own) >= 1
        # The closed form is taken in float32, and some eager code rounds its softmax to that on the way.
        assert relative_error(closed(name, kernel, torch.float64, own), truth) <= 2e-6
        # In float32 the forward itself is rounded: no further from the truth than autograd in float32 is.
        rounded = relative_error(eager(name, torch.float32)[1], truth)
        assert relative_error(closed(name, kernel, torch.float32, own), truth) <= max(1e-5, 3 * rounded)
