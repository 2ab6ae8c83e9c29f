"""Query and key projections of an attention module, whatever it calls them."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from attnscope.run import SitePlan

_PAIRS = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("q_lin", "k_lin"),
    ("to_q", "to_k"),
    ("wq", "wk"),
    ("q", "k"),
)
_FUSED = ("qkv", "query_key_value", "qkv_proj", "Wqkv", "c_attn", "in_proj")


def projections(model: "torch.nn.Module", module: str, site: "SitePlan") -> dict[str, np.ndarray] | None:
    """Projections of one layer by head: `query` (head, channel, feature), `key` (kv_head, channel, feature), biases.

    None where the module has no such projections, or they don't have the site's sizes.
    """
    found = _query_key(_owner(model, module), site)
    if found is None:
        return None
    arrays = {}
    for name, (weight, bias), heads in zip(("query", "key"), found, (site.heads, site.kv_heads), strict=True):
        if weight.shape[0] % heads:
            return None
        by_head = weight.reshape(heads, weight.shape[0] // heads, weight.shape[1])
        arrays[name] = by_head.detach().float().cpu().numpy()
        flat = np.zeros(by_head.shape[:2], np.float32) if bias is None else bias.detach().float().cpu().numpy()
        arrays[f"{name}_bias"] = flat.reshape(by_head.shape[:2])
    return arrays if arrays["query"].shape[1] == arrays["key"].shape[1] else None


def _owner(model: "torch.nn.Module", module: str) -> "torch.nn.Module":
    return model.get_submodule(module) if module else model


def _query_key(owner: "torch.nn.Module", site: "SitePlan") -> "list[tuple[torch.Tensor, torch.Tensor | None]] | None":
    """Weight (output, feature) and bias of the query and of the key projection."""
    parts = dict(owner.named_modules())
    for query, key in _PAIRS:
        for name in parts:
            last = name.rsplit(".", 1)
            if last[-1] == query and (other := ".".join([*last[:-1], key])) in parts:
                both = [_linear(parts[n]) for n in (name, other)]
                if all(b is not None for b in both):
                    return both  # type: ignore[return-value]
    for name, part in parts.items():
        if name.rsplit(".", 1)[-1] in _FUSED and (linear := _linear(part)) is not None:
            return _split(linear, site)
    weight = getattr(owner, "in_proj_weight", None)
    return None if weight is None else _split((weight, getattr(owner, "in_proj_bias", None)), site)


def _linear(part: "torch.nn.Module") -> "tuple[torch.Tensor, torch.Tensor | None] | None":
    weight = getattr(part, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    # GPT-2's Conv1D stores its weight as (feature, output).
    if type(part).__name__ == "Conv1D":
        weight = weight.T
    return weight, getattr(part, "bias", None)


def _split(
    linear: "tuple[torch.Tensor, torch.Tensor | None]", site: "SitePlan"
) -> "list[tuple[torch.Tensor, torch.Tensor | None]] | None":
    """Query and key of a fused projection that stacks query, key and value."""
    weight, bias = linear
    queries, keys = site.heads * site.channels, site.kv_heads * site.channels
    if not queries < queries + keys <= len(weight):
        return None
    ends = [(0, queries), (queries, queries + keys)]
    return [(weight[a:b], None if bias is None else bias[a:b]) for a, b in ends]
