"""Query and key projections of an attention module, whatever it calls them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import torch

    from attnscope.plan import SitePlan

_PAIRS = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("q_lin", "k_lin"),
    ("to_q", "to_k"),
    ("wq", "wk"),
    ("q", "k"),
)
_FUSED = ("qkv", "query_key_value", "qkv_proj", "Wqkv", "c_attn", "in_proj")


@runtime_checkable
class Folding(Protocol):
    """A module between the projections of query and key and their product."""

    def fold(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The projections, as `projections` names them, with what this module does to them."""


def projections(model: "torch.nn.Module", module: str, site: "SitePlan") -> dict[str, np.ndarray] | None:
    """Projections of one layer by head: `query` (head, channel, feature), `key` (kv_head, channel, feature), biases.

    What a module puts between projection and product, as a matrix of its own (`fold`), is part of them. None where the
    module has no such projections, or they don't have the site's sizes.
    """
    owner = _owner(model, module)
    found = _query_key(owner, site)
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
    for part in owner.children():
        if isinstance(part, Folding):
            arrays = part.fold(arrays)
    return arrays if arrays["query"].shape[1] == arrays["key"].shape[1] else None


def query_linear(model: "torch.nn.Module", module: str) -> "torch.nn.Module | None":
    """The module inside an attention module that makes its query (alone, or together with key and value)."""
    owner = _owner(model, module)
    names = {n: m for n, m in owner.named_modules() if _linear(m) is not None}
    for wanted in (*(query for query, _ in _PAIRS), *_FUSED):
        for name, part in names.items():
            if name.rsplit(".", 1)[-1] == wanted:
                return part
    return None


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
            return _split(linear, site, owner)
    weight = getattr(owner, "in_proj_weight", None)
    return None if weight is None else _split((weight, getattr(owner, "in_proj_bias", None)), site, owner)


def _linear(part: "torch.nn.Module") -> "tuple[torch.Tensor, torch.Tensor | None] | None":
    weight = getattr(part, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    # GPT-2's Conv1D stores its weight as (feature, output).
    if type(part).__name__ == "Conv1D":
        weight = weight.T
    return weight, getattr(part, "bias", None)


def _split(
    linear: "tuple[torch.Tensor, torch.Tensor | None]", site: "SitePlan", owner: "torch.nn.Module"
) -> "list[tuple[torch.Tensor, torch.Tensor | None]] | None":
    """Query and key of a fused projection of query, key and value, in the order of the owner's class."""
    rows = _ROW_ORDERS.get(type(owner).__name__, _stacked)(site, len(linear[0]))
    if rows is None:
        return None
    weight, bias = linear
    parts = [(weight[r], None if bias is None else bias[r]) for r in rows]
    # DeBERTa keeps the bias of the query apart.
    own_bias = dict(owner.named_parameters(recurse=False)).get("q_bias")
    return parts if own_bias is None else [(parts[0][0], own_bias), *parts[1:]]


def _stacked(site: "SitePlan", size: int) -> list[np.ndarray] | None:
    """All queries, then all keys, then all values."""
    queries, keys = site.heads * site.channels, site.kv_heads * site.channels
    if not queries < queries + keys <= size:
        return None
    return [np.arange(queries), np.arange(queries, queries + keys)]


def _by_key_head(site: "SitePlan", size: int) -> list[np.ndarray] | None:
    """For each key head its queries, its key and its value."""
    groups = site.heads // site.kv_heads
    if size != site.kv_heads * (groups + 2) * site.channels:
        return None
    rows = np.arange(size).reshape(site.kv_heads, groups + 2, site.channels)
    return [rows[:, :groups].ravel(), rows[:, groups].ravel()]


def _by_partition(site: "SitePlan", size: int) -> list[np.ndarray] | None:
    """In each of four partitions of the heads all queries, then all values, then all keys."""
    if size != 3 * site.heads * site.channels or site.heads % 4:
        return None
    rows = np.arange(size).reshape(4, 3, -1)
    return [rows[:, 0].ravel(), rows[:, 2].ravel()]


_ROW_ORDERS: "Mapping[str, Callable[[SitePlan, int], list[np.ndarray] | None]]" = {
    "BloomAttention": _by_key_head,
    "CodeGenAttention": _by_partition,
    "DisentangledSelfAttention": _by_key_head,
    "FalconAttention": _by_key_head,
    "GPTBigCodeAttention": _by_key_head,
    "GPTNeoXAttention": _by_key_head,
    "PersimmonAttention": _by_key_head,
}
