"""Runs that grow: which of the given samples a run has, in which order, and which come behind them.

A run keeps its own order, that of arrival: samples are known by their ids, wherever a source lists them. One that has
left the source stays in the run.
"""

from collections.abc import Sequence
from dataclasses import replace

from attnscope.planning import Prepared
from attnscope.run import Run, RunError
from attnscope.samples import Sample

# Texts that come later may be longer than those that were there when the run was made.
_TEXT_ROOM = 2
_REGION_ROOM = 2


def in_stored_order(run: Run, given: Sequence[Sample], grow: bool) -> list[Sample]:
    """The samples of a run as they are stored, with what is given of each, and behind them those that it lacks.

    Raises
    ------
    RunError
        When the samples are others than those of the run, and it isn't to grow, or has no room for their regions.
    """
    stored = run.sample_ids
    # A repair may have found names lost.
    same = len(stored) == len(given) and all(
        name == sample.id or (run.lost and not name) for name, sample in zip(stored, given, strict=True)
    )
    if same:
        return list(given)
    if not grow:
        raise RunError(f"{run.location} holds other samples than these; choose another place, or let it grow (--grow)")
    if run.lost:
        raise RunError(f"{run.location} has lost names of samples; extract once without growing, which restores them")
    by_id = {sample.id: sample for sample in given}
    gone = "it was gone from the samples before it was extracted"
    kept = [by_id.pop(name, Sample(name, problem=gone)) for name in stored]
    for sample in by_id.values():
        if len(sample.regions) > run.plan.regions:
            raise RunError(
                f"sample {sample.id!r} has {len(sample.regions)} regions and {run.location} room for"
                f" {run.plan.regions}; extract into another run"
            )
    return [*kept, *by_id.values()]


def room_for_regions(samples: Sequence[Sample], grow: bool) -> int:
    """How many regions a sample of a run may have: as many as one has, or where the run is to grow, twice that."""
    most = max((len(sample.regions) for sample in samples), default=0)
    return max(_REGION_ROOM * most, _REGION_ROOM) if grow else most


def with_room(prepared: Prepared, text_limit: int | None) -> Prepared:
    """The same samples with room for texts twice as long, as far as the model takes such."""
    text = prepared.longest.get("text", 0)
    if not text:
        return prepared
    most = max(text, min(_TEXT_ROOM * text, text_limit or _TEXT_ROOM * text))
    return replace(prepared, longest={**prepared.longest, "text": most})
