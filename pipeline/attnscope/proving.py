"""What lies between an attention module's input and the query that its kernel receives, seen in one forward.

The singular modes of a projection describe the attention only where nothing but the projection stands between the two:
a rotary position, or a norm on the query, changes that. This looks, instead of trusting a config.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from attnscope.families import Inputs
from attnscope.families.weights import query_linear
from attnscope.loading import LoadedModel
from attnscope.planning import run_model
from attnscope.recording import AttentionCall, recording

# What rounding in the model's own precision may do to a projection, over its largest value.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
_TOLERANCE_ELSE = 1e-3


@dataclass
class Seen:
    """By module: whether its query is its projection and nothing more, and the gain of the norm before it."""

    is_plain: dict[str, bool] = field(default_factory=dict)
    norm_gain: dict[str, np.ndarray] = field(default_factory=dict)


def look_at_projections(
    loaded: LoadedModel, inputs: Inputs, queries: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Seen:
    """Run one forward and compare each recorded query with its projection: weight and bias by head, by module."""
    seen = Seen()
    entered: dict[str, torch.Tensor] = {}
    normed: list[tuple[torch.Tensor, torch.nn.Module]] = []
    handles = []

    def enter(name: str) -> object:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            entered[name] = args[0]

        return hook

    def leave(module: torch.nn.Module, args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            normed[:] = [*normed[-3:], (output, module)]

    def compare(call: AttentionCall) -> None:
        hidden = entered.get(call.module)
        if hidden is None or call.query is None or call.module not in queries or hidden.ndim != 3:
            return
        seen.is_plain[call.module] = _is_projection(call.query, hidden, *queries[call.module])
        gain = next((_gain(m) for output, m in normed if output is hidden), None)
        if gain is not None:
            seen.norm_gain[call.module] = gain

    for name in queries:
        linear = query_linear(loaded.model, name)
        if linear is not None:
            handles.append(linear.register_forward_pre_hook(enter(name)))  # type: ignore[arg-type]
    handles += [m.register_forward_hook(leave) for m in loaded.model.modules() if _is_norm(m)]
    try:
        with torch.no_grad(), recording(loaded.model, on_call=compare):
            run_model(loaded, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _is_projection(query: torch.Tensor, hidden: torch.Tensor, weight: np.ndarray, bias: np.ndarray) -> bool:
    matrix = torch.from_numpy(weight).to(hidden.device)
    offset = torch.from_numpy(bias).to(hidden.device)
    projected = torch.einsum("btf,hcf->bhtc", hidden.float(), matrix) + offset[None, :, None]
    if projected.shape != query.shape:
        return False
    allowed = _TOLERANCE.get(query.dtype, _TOLERANCE_ELSE) * projected.abs().max().clamp(min=1e-6)
    return bool((projected - query.float()).abs().max() <= allowed)


def _is_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _gain(module: torch.nn.Module) -> np.ndarray | None:
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    # Gemma's norm multiplies by one plus its weight.
    offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
    return weight.detach().float().cpu().numpy() + offset
