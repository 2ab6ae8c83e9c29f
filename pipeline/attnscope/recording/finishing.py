"""From a followed softmax to a recorded call: its layout, and the proof of its recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnscope.recording import provenance
from attnscope.recording.calls import AttentionCall, quietly
from attnscope.recording.layouts import Layout, four_axes, layout_of
from attnscope.recording.provenance import Scores
from attnscope.recording.state import Frame, Recording, Softmax

Fields = dict[str, Any]

# The product of half-precision queries and keys is rounded before the softmax in eager code: an error of eps |score|.
BASE_ERROR = {torch.float64: 2e-6, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ROWS_PROVEN = 16


@dataclass(frozen=True, eq=False)
class Probabilities:
    """A softmax over keys on its way to the value: (*lead, query_token, key_token), or swapped where `flipped`.

    `altered` where the probabilities were multiplied or rearranged, `cut` where only a part of the keys is left,
    `dropped` where dropout ran on them.
    """

    origin: Softmax
    flipped: bool = False
    altered: bool = False
    cut: bool = False
    dropped: bool = False


def finish(recording: Recording, found: Probabilities, actual: Tensor, value: Tensor, output: Tensor) -> Tensor:
    """Record actual (*lead, query_token, key_token) @ value = output; gives the output to go on with.

    One softmax is one call: a second product with the same probabilities is not recorded again, and a softmax whose
    keys are consumed piece by piece is recorded as a whole, without value and output.
    """
    origin = found.origin
    if origin.done:
        return output
    name = "" if origin.frame is None else origin.frame.name
    if name is None:
        return output
    if found.cut:
        record_alone(recording, origin)
        return output
    origin.finish()
    layout = layout_of(tuple(output.shape[:-2]), None if origin.frame is None else origin.frame.module)
    routed, shown = layout.route(output)
    with quietly():
        fields: Fields = {"value": layout.canonical(value), "output": shown}
        fields |= _explained(origin, layout, layout.canonical(actual), found)
    record(recording, name, kernel_of(origin.frame, "own code"), fields)
    return routed


def record_alone(recording: Recording, origin: Softmax) -> None:
    """Record a softmax whose product with a value, if there is one, was not seen.

    Its rows are what it ran over: GroupViT's patches, which choose among groups, are queries.
    """
    origin.finish()
    if origin.frame is None or origin.frame.name is None:
        return
    recording.cover(origin.tensor)
    module = origin.frame.module
    with quietly():
        if origin.scores is not None:
            layout = layout_of(tuple(origin.tensor.shape[:-2]), module)
            fields = _explained(origin, layout, layout.canonical(origin.tensor), Probabilities(origin))
        else:
            probabilities = origin.tensor.mT if origin.flipped else origin.tensor
            fields = {"probabilities": four_axes(probabilities, module).detach()}
    record(recording, origin.frame.name, "own code", fields)


def record(recording: Recording, name: str, kernel: str, fields: Fields) -> None:
    tier = "multihead" if kernel == "MultiheadAttention" else "function"
    complete: Fields = {"query": None, "key": None, "value": None, "output": None} | fields

    def make(name: str, number: int, index: int) -> AttentionCall:
        return AttentionCall(name, number, index, kernel, tier, **complete)

    recording.add(name, make)


def kernel_of(frame: Frame | None, kernel: str) -> str:
    return "MultiheadAttention" if frame is not None and isinstance(frame.module, nn.MultiheadAttention) else kernel


def _explained(origin: Softmax, layout: Layout, actual: Tensor, found: Probabilities) -> Fields:
    """Recipe fields where they reproduce the probabilities; else those, with query and key if they are known."""
    kept = {"probabilities": actual.detach()}
    scores = origin.scores
    if not isinstance(scores, Scores):
        return kept
    try:
        fields = provenance.recipe(_laid_out(scores, layout), layout.batch_head)
    except RuntimeError:
        return kept
    if found.dropped:
        actual = layout.canonical(origin.tensor.mT if found.flipped else origin.tensor)
    if not (found.altered and found.dropped) and _reproduces(fields, actual):
        return fields
    return {"query": fields["query"], "key": fields["key"]} | kept


def _laid_out(scores: Scores, layout: Layout) -> Scores:
    scores = replace(scores, lead=layout.lead)
    if layout.order is None:
        return scores
    permuted = provenance.permute(scores, layout.order)
    assert permuted is not None
    return permuted


def _reproduces(fields: Fields, actual: Tensor) -> bool:
    """Whether the recipe gives the actual probabilities on rows spread evenly, those without a valid key left out."""
    complete: Fields = {"value": None, "output": None} | fields
    call = AttentionCall("", 0, 0, "", "", **complete)
    if tuple(actual.shape) != call.shape:
        return False
    queries = actual.shape[2]
    rows = torch.linspace(0, queries - 1, min(queries, ROWS_PROVEN)).round().long().to(actual.device)
    scores = call.scores(rows)
    masked = scores == float("-inf")
    difference = (call.attention(rows) - actual[:, :, rows].float()).abs()
    difference = difference.masked_fill(masked.all(dim=-1, keepdim=True), 0.0).amax()
    largest = scores.masked_fill(masked, 0.0).abs().amax()
    # Sums may have been rounded in the narrower of the types on the way.
    dtype = max((actual.dtype, fields["query"].dtype), key=lambda dtype: torch.finfo(dtype).eps)
    limit = BASE_ERROR.get(dtype, 8e-3) + 4 * torch.finfo(dtype).eps * largest
    return not bool(difference > limit)
