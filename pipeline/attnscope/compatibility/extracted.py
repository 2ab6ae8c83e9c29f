"""What extraction stores of a batch, against what recording gives of the same batch."""

from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn

from attnscope.capturing import Places
from attnscope.compatibility.examples import Inputs
from attnscope.compatibility.witness import forward
from attnscope.extraction import extract
from attnscope.plan import SitePlan
from attnscope.quantities import ExtractSpec
from attnscope.ready import collated, cut_batch
from attnscope.recording import AttentionCall, Recording, recording
from attnscope.run import Run

SPEC = ExtractSpec(encoding="exact")


def extracted(model: nn.Module, inputs: Inputs) -> Run:
    """A run in memory of one batch of ready inputs, attention as float32."""
    return extract(model, [inputs], spec=SPEC, batch_size=len(cut_batch(inputs)))


def stored_error(run: Run, model: nn.Module, inputs: Inputs) -> float:
    """Largest difference between stored and recorded attention, over all sites, layers and samples; inf where it lacks.

    Layers that are made of several calls are compared value by value, as their tokens' order is the layout's business.
    """
    places = Places.of(run, SPEC)
    values = {site: run.attention(site).values for site in run.sites}
    samples = cut_batch(inputs)
    together = _recorded(model, samples)
    if places.one_by_one or any(call.shape[0] != len(samples) for call in together):
        batches = [([i], _recorded(model, [sample], seed=i)) for i, sample in enumerate(samples)]
    else:
        batches = [(list(range(len(samples))), together)]
    errors = [0.0]
    for rows, recorded in batches:
        parts: dict[tuple[str, int], list[np.ndarray]] = {}
        for call in recorded:
            place = places.find(call)
            assert place is not None
            site, layer, is_part = place
            if is_part:
                parts.setdefault((site, layer), []).append(_allowed(call))
            else:
                errors.append(_whole_error(values[site][rows, layer], call))
        for (site, layer), found in parts.items():
            errors.append(_parts_error(values[site][rows, layer], np.concatenate(found)))
    return max(errors)


def _recorded(model: nn.Module, samples: Sequence[Inputs], seed: int = 0) -> Recording:
    with recording(model) as rec:
        forward(model, collated(samples), seed=seed)
    return rec


def _whole_error(stored: np.ndarray, call: AttentionCall) -> float:
    expected = call.attention().numpy()
    beyond = stored.copy()
    beyond[..., : expected.shape[-2], : expected.shape[-1]] = np.nan
    stored = stored[..., : expected.shape[-2], : expected.shape[-1]]
    known = ~np.isnan(stored)
    if not known.any() or not np.isnan(beyond).all():
        return float("inf")
    return float(np.abs(stored - expected)[known].max())


def _allowed(call: AttentionCall) -> np.ndarray:
    return call.attention()[call.attention() > 0].numpy()


def _parts_error(stored: np.ndarray, recorded: np.ndarray) -> float:
    """Largest distance of a stored value from the nearest recorded one."""
    stored, recorded = stored[stored > 0], np.sort(recorded)
    if not len(stored) or not len(recorded):
        return float("inf")
    above = np.searchsorted(recorded, stored).clip(1, len(recorded) - 1) if len(recorded) > 1 else 0
    nearest = np.minimum(np.abs(recorded[above] - stored), np.abs(recorded[above - 1] - stored))
    return float(nearest.max())


def dense_only(run: Run, calls: Iterable[AttentionCall]) -> dict[str, str]:
    """The sites of a run that can't be stored factored, and why: what beside query and key makes their attention."""
    by_module = {call.module: call for call in calls}
    sites = {name: site for name, site in run.plan.sites.items() if not site.recipes}
    return {name: _reason(site, by_module[site.modules[0]]) for name, site in sites.items()}


def _reason(site: SitePlan, call: AttentionCall) -> str:
    if -1 in site.call_numbers:
        return "parts"
    return "probabilities" if call.probabilities is not None else "bias"
