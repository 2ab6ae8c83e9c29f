"""Recipes and rules: what, beside query and key, is needed to compute a call's attention again."""

from dataclasses import dataclass, field

import torch

from attnscope.plan import Recipe
from attnscope.recording import AttentionCall
from attnscope.recording.calls import MASKED_BELOW

_PROVED_ROWS = 16
# Half-precision queries and keys are stored as they are; other types are widened.
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Rules:
    """Which key each query of a call may attend to, beside the recipe's window.

    `key_valid` (batch, key_token) bool; `causal` (batch,) bool; `mask` (batch, query_token, key_token) bool where the
    others don't say it all.
    """

    key_valid: torch.Tensor
    causal: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class RuleReader:
    """Reads the rules of calls; a mask that several layers share is read once."""

    _seen: dict[tuple[int, int], tuple[torch.Tensor, Rules]] = field(default_factory=dict)

    def rules(self, call: AttentionCall) -> Rules:
        """The rules of a call that `recipe_of` gave a recipe for."""
        mask = call.mask
        if mask is None:
            batch, _, _, keys = call.shape
            valid = torch.ones(batch, keys, dtype=torch.bool)
            return Rules(valid, torch.full((batch,), call.causal), None)
        name = (id(mask), 0 if mask.is_inference() else mask._version)
        if name not in self._seen:
            # The mask is kept beside its rules, so that its id stays its own.
            self._seen[name] = (mask, _rules_of_mask(call))
        return self._seen[name][1]


def recipe_of(call: AttentionCall) -> Recipe | None:
    """The recipe of a call; None where query and key don't determine its attention together with boolean rules."""
    if call.query is None or call.key is None or call.probabilities is not None or call.bias is not None:
        return None
    if not _is_boolean(call.mask) or (call.sinks is not None and call.sinks.dim() > 1):
        return None
    _, _, queries, keys = call.shape
    return Recipe(
        scale=float(call.scale),
        softcap=call.softcap,
        window=call.window,
        causal_offset=call.causal_offset if call.causal else keys - queries,
        sinks=None if call.sinks is None else tuple(call.sinks.float().tolist()),
    )


def proved_rows(call: AttentionCall) -> torch.Tensor:
    """Query rows, evenly spread, on which a call's recipe is proved against what the kernel returned."""
    rows = call.shape[2]
    return torch.linspace(0, rows - 1, min(rows, _PROVED_ROWS), device="cpu").long().unique()


def _is_boolean(mask: torch.Tensor | None) -> bool:
    """Whether a mask only forbids, the same for every head."""
    if mask is None:
        return True
    if mask.ndim != 4 or mask.shape[1] != 1:
        return False
    return mask.dtype == torch.bool or bool(((mask == 0) | (mask <= MASKED_BELOW)).all())


def _rules_of_mask(call: AttentionCall) -> Rules:
    batch, _, queries, keys = call.shape
    mask = call.mask
    assert mask is not None
    allowed = (mask if mask.dtype == torch.bool else mask > MASKED_BELOW)[:, 0].expand(batch, queries, keys)
    valid = allowed.any(dim=1)
    plain = valid[:, None].expand(batch, queries, keys)
    causal = torch.full((batch,), call.causal)
    if torch.equal(allowed, plain):
        return Rules(valid.cpu(), causal, None)
    triangle = torch.ones(queries, keys, dtype=torch.bool, device=allowed.device).tril(keys - queries)
    if torch.equal(allowed, plain & triangle):
        return Rules(valid.cpu(), torch.ones_like(causal), None)
    return Rules(valid.cpu(), causal, allowed.cpu())
