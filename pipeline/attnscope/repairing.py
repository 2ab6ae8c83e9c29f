"""Repairing a run: what is broken is made missing again, so that the next extraction does it anew.

Metadata is written again from the plan, blocks lose their marks and what is stored of them, analyses are deleted; what
belongs to the whole run (weights, names of samples) is noted as lost.
"""

import itertools
from collections.abc import Iterable

import zarr

from attnscope.arrays import WHOLE_RUN
from attnscope.checking import CheckReport, Fault, check_run
from attnscope.claims import Claims
from attnscope.outputs import forget_set, set_of
from attnscope.run import Run, RunError, open_run
from attnscope.stores import delete, delete_below, open_group


def repair_run(run: Run, found: CheckReport) -> list[str]:
    """Make everything missing that a check found broken; what was done, a sentence each.

    Sound blocks are left as they are. What is missing comes back with the next extraction, analyses when they are run
    again.

    Raises
    ------
    RunError
        While another process extracts into the run.
    """
    with Claims(run.store) as claims:
        if not claims.alone():
            raise RunError(f"another process is extracting into {run.location}; repair it when that has ended")
    restored = [place for place in _in_order({f.place for f in found.faults if not f.samples}) if run.restore(place)]
    faults = found.faults
    if restored:
        # What lies behind broken metadata can be looked at only now.
        run = open_run(run.store, read_only=False)
        faults = check_run(run).faults
    analyses = sorted({fault.place.split("/")[1] for fault in faults if fault.place.startswith("analyses/")})
    for name in analyses:
        delete_below(run.store, f"analyses/{name}")
    outputs = sorted({name for fault in faults if (name := set_of(fault.place))})
    for name in outputs:
        forget_set(open_group(run.store, mode="r+"), name)
    faults = tuple(fault for fault in faults if not set_of(fault.place))
    lost = sorted({part for fault in faults if (part := _part_of_all(fault))})
    if lost:
        for part in lost:
            _delete_part(run, part)
        run.set_attrs(lost=[*run.lost, *(part for part in lost if part not in run.lost)])
    touched = {at for fault in faults if not _part_of_all(fault) for at in fault.samples}
    blocks = [block for block in run.blocks() if touched & set(block)]
    for block in blocks:
        forget(run, block)
    done = [f"{place} has its metadata again" for place in restored]
    done += [f"analysis {name!r} is deleted: run it again" for name in analyses]
    done += [f"outputs under conditions {name!r} are deleted: the next extraction runs them again" for name in outputs]
    done += [f"{part} will be written by the next extraction" for part in lost]
    if blocks:
        count = sum(map(len, blocks))
        done.append(f"{count:,} samples in {len(blocks):,} blocks are missing again: the next extraction does them")
    return done


def forget(run: Run, block: range) -> None:
    """Make a block missing: its mark goes first, then whatever is stored of it."""
    arrays = run.arrays_of_blocks()
    for path, array in sorted(arrays.items(), key=lambda item: item[0] != "samples/status"):
        for key in _keys_of_block(run, path, array, block):
            delete(run.store, key)


def _keys_of_block(run: Run, path: str, array: zarr.Array, block: range) -> Iterable[str]:
    written = array.shards or array.chunks
    counts = [range(-(-length // size)) for length, size in zip(array.shape, written, strict=True)]
    for axis, name in enumerate(array.metadata.dimension_names or ()):  # type: ignore[union-attr]
        # Of elements, each block has one shard.
        if name in ("sample", "element"):
            place = block.start // (written[axis] if name == "sample" else run.plan.unit)
            counts[axis] = range(place, place + 1)
    return (f"{path}/{array.metadata.encode_chunk_key(place)}" for place in itertools.product(*counts))


def _part_of_all(fault: Fault) -> str | None:
    """The part of the run that a fault touches as a whole: weights of a site, or what is known of the samples."""
    group, _, name = fault.place.rpartition("/")
    if group == "samples" and name in WHOLE_RUN:
        return fault.place
    return "weights" if fault.place.startswith("weights") else None


def _delete_part(run: Run, part: str) -> None:
    # The chunks alone, for an array that is made with the run.
    delete_below(run.store, part if part == "weights" else f"{part}/c")


def _in_order(places: Iterable[str]) -> list[str]:
    """Groups before what lies in them."""
    return sorted(places, key=lambda place: (place.count("/"), place))
