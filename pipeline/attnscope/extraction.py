"""Extraction: run a model over samples and write what it attends to into a run.

Whole blocks of samples at a time: encode, forward under `recording` (and backward where a gradient is wanted), reduce
and encode each layer as it comes, write, and mark the block as done at the very end.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from zarr.abc.store import Store

from attnscope.analysis import requirements
from attnscope.batching import writer_threads
from attnscope.beginning import check_same, open_or_create, probe_inputs
from attnscope.blocks import (
    Job,
    Layouts,
    Work,
    batch_seed,
    claimed_blocks,
    encoded_batches,
    evaluation,
    extract_within_memory,
)
from attnscope.capturing import Places
from attnscope.claims import Claims
from attnscope.conditions import Condition
from attnscope.families import GENERIC, Inputs
from attnscope.families.generating import generating
from attnscope.families.labels import encoded_samples
from attnscope.loading import LoadedModel, ModelError, load_model
from attnscope.perturbing import Batches, extract_conditions
from attnscope.planning import Prepared, prepare, run_model
from attnscope.progress import DeadlineReached, Progress, Reporter
from attnscope.quantities import ANSWERS, ExtractSpec
from attnscope.ready import collated, cut_batch
from attnscope.recording import AttentionCall, recording, taps_kept
from attnscope.regions import RegionReader
from attnscope.run import LEFT_OUT, Run
from attnscope.samples import Sample, SampleError, read_samples, unique_ids
from attnscope.stores import full_disk_told
from attnscope.writing import BlockWriter

if TYPE_CHECKING:
    from attnscope.analysis import Analyser

__all__ = ["DeadlineReached", "Extraction", "Progress", "extract", "join_extraction"]


def extract(
    model: str | Path | torch.nn.Module,
    samples: "str | Path | Iterable[Sample] | Iterable[Mapping[str, torch.Tensor]]",
    analysers: "Iterable[Analyser]" = (),
    out: str | Path | Store | None = None,
    *,
    spec: ExtractSpec | None = None,
    target: str | int | None = None,
    encoding: str | None = None,
    form: str | None = None,
    summaries: bool | None = None,
    generate: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    batch_size: int | None = None,
    limit: int | None = None,
    grow: bool = False,
    progress: Callable[[Progress], None] | None = None,
    deadline: float | None = None,
    drive: "Callable[[Extraction], None]" = lambda begun: begun.finish(),
) -> Run:
    """Extract into a new run, or finish one that was begun with the same call.

    Parameters
    ----------
    model
        A hub name, a folder with safetensors, `embedded:NAME`, or a loaded module.
    samples
        A source (see `read_samples`), `reference:[SPLIT:]N`, `embedded:photographs` or `embedded:sentences`, an
        iterable of `Sample`, or of ready inputs: dicts of tensors with a leading batch axis.
    analysers, spec
        What to record: the union of what the analysers require and the spec; without analysers the spec defaults to
        the attention of every layer, and with them attention is recorded as well unless a spec is given.
    out
        A folder or URL; None for a run in memory.
    target
        The scalar that gradients are taken of, see `ExtractSpec`.
    encoding, form, summaries
        How attention is stored, and whether its summaries are, see `ExtractSpec`.
    generate
        How many tokens the model may write behind each prompt, greedily; they are recorded with it.
    grow
        Whether samples that the run doesn't know yet are added behind those that it has.
    deadline
        Seconds after which the block in hand is given up, and no further one is begun.
    drive
        What is given the extraction when the model is loaded and the run is there, to have its blocks extracted; by
        default one after another, here.

    Raises
    ------
    ModelError, SampleError, RunError, StoreError, RecordingError, UnrecordedAttention
        Each with one sentence that says what to do.
    """
    started = time.monotonic()
    wanted = _wanted(
        analysers, spec, target=target, encoding=encoding, form=form, summaries=summaries, generate=generate
    )
    listed, ready = _listed(samples, limit)
    loaded = load_model(
        model,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if wanted.quantities & ANSWERS.keys() and not wanted.generate:
        raise ModelError("each written token as a target needs a model that writes: give generate=N (--generate N)")
    if wanted.generate:
        loaded = _writing(loaded, wanted.generate, ready)
    report = Reporter(progress, started, len(listed), deadline)
    with evaluation(loaded.model), full_disk_told():
        source = str(samples) if isinstance(samples, str | Path) else ""
        recorded = replace(wanted, conditions=())
        run, prepared = open_or_create(loaded, recorded, (listed, ready), (out, source), batch_size, grow, report)
    report.total = len(prepared.samples)
    drive(Extraction(loaded, run, run.spec, prepared, ready, batch_size, report, wanted.conditions))
    return run


def _writing(loaded: LoadedModel, most: int, ready: Sequence[Inputs] | None) -> LoadedModel:
    """The model with a family that lets it write behind each prompt."""
    if ready is not None:
        raise SampleError("a model writes behind prompts that are made of samples; ready inputs are taken as they are")
    try:
        return replace(loaded, family=generating(loaded.family, loaded, most))
    except ValueError as error:
        raise ModelError(str(error)) from None


@dataclass
class Extraction:
    """An extraction that has begun: the model is loaded, and the run is there."""

    loaded: LoadedModel
    run: Run
    spec: ExtractSpec
    prepared: Prepared
    ready: Sequence[Inputs] | None
    batch_size: int | None
    report: Reporter
    conditions: tuple[Condition, ...] = ()
    fitting: int | None = None

    def blocks(self) -> Iterator[range]:
        """Extract block by block what is missing, and give each that is done; ends when nothing is missing.

        When all blocks are there, the model is run under the conditions that the run lacks.
        """
        self.report.already(self.run.status)
        with Claims(self.run.store) as claims:
            claims.remove_partial_files()
            yield from self._extract(self.run.missing(), claims)
            claims.remove_partial_files()
            claims.clear()
        # Others may have done a part of it.
        self.report.already(self.run.status)
        self.report("done")
        self.run_conditions()

    def finish(self) -> None:
        """Extract all that is missing."""
        for _ in self.blocks():
            pass

    def run_conditions(self) -> None:
        """Run the model under the conditions that the run lacks; all blocks must be there."""
        if self.conditions:
            with evaluation(self.loaded.model), full_disk_told():
                _extract_conditions(self)

    def part(self, block: range, samples: Sequence[Sample]) -> tuple[int, int]:
        """Extract one block, if it is missing: the number of its samples left out, and bytes written, by this process.

        Nothing but the block is looked at, so that it costs the same in a run of any size.
        """
        self.prepared = prepare(samples, self.loaded, room=self.run.plan.streams).at(block.start)
        self.report = Reporter(None, time.monotonic(), len(block))
        self._whole(block)
        return self.report.left_out, self.report.bytes

    def leave_out(self, block: range, reason: str) -> None:
        """Mark all samples of a block as left out for a reason; the model isn't run."""
        self.prepared.problems.update(dict.fromkeys(block, reason))
        self._whole(block)

    def _whole(self, block: range) -> None:
        with Claims(self.run.store) as claims:
            for _ in self._extract([block], claims):
                pass

    def _extract(self, missing: list[range], claims: Claims) -> Iterator[range]:
        report = self.report
        with evaluation(self.loaded.model), taps_kept(self.loaded.model), full_disk_told():
            places = Places.of(self.run, self.spec)
            if missing and self.fitting is None:
                self.fitting = _batch_size(self, places)
            device = self.loaded.device
            writer = BlockWriter(writer_threads(device), takes_turns=device.type == "cpu")
            job = Job(self.loaded, self.run, self.spec, self.prepared, self.ready, self.fitting or 1, writer, places,
                       report.check, RegionReader(self.loaded), claims)  # fmt: skip
            try:
                # More than once only where others took over what this process had claimed, and didn't finish it.
                while missing:
                    for block in claimed_blocks(self.run, missing, claims, report.check):
                        extract_within_memory(job, block, report)
                        # Once memory ran out, it would again.
                        self.fitting = job.batch_size if self.fitting else None
                        yield from report.add(job.done)
                    writer.flush()
                    yield from report.add(job.done)
                    missing = [block for block in missing if self.run.is_missing(block)]
            finally:
                writer.close()
                for _ in report.add(job.done):
                    pass


def join_extraction(loaded: LoadedModel, run: Run, batch_size: int | None) -> Extraction:
    """An extraction that another process has begun, for single parts of it.

    Raises
    ------
    RunError
        When the run was begun with other weights.
    """
    check_same(run, run.spec, loaded.digest())
    if run.spec.generate:
        loaded = _writing(loaded, run.spec.generate, None)
    nothing = Prepared((), np.zeros(0, np.int64), {})
    return Extraction(loaded, run, run.spec, nothing, None, batch_size, Reporter(None, time.monotonic(), 0))


def _wanted(
    analysers: "Iterable[Analyser]", spec: ExtractSpec | None, **changes: str | int | bool | None
) -> ExtractSpec:
    chosen = list(analysers)
    beside = [spec] if spec is not None else [ExtractSpec()]
    wanted = requirements(chosen, beside)
    return replace(wanted, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]


def _listed(
    samples: "str | Path | Iterable[Sample] | Iterable[Mapping[str, torch.Tensor]]", limit: int | None
) -> tuple[list[Sample], list[Inputs] | None]:
    """The samples in order; for ready inputs, stand-ins with numbers for names and one-row inputs beside them."""
    if isinstance(samples, str | Path):
        return _from_source(str(samples), limit), None
    given = list(samples)
    if not given:
        raise SampleError("there are no samples: the iterable is empty")
    listed = [s for s in given if isinstance(s, Sample)]
    if listed:
        return unique_ids(listed)[:limit], None
    batches = [b for b in given if isinstance(b, Mapping)]
    rows = [row for batch in batches for row in cut_batch(batch)]
    return [Sample(f"input-{i}") for i in range(len(rows[:limit]))], rows[:limit]


def _from_source(source: str, limit: int | None) -> list[Sample]:
    if source.startswith("reference:"):
        from attnscope.reference import read_reference

        return read_reference(source, limit)
    if not source.startswith("embedded:"):
        return read_samples(source, limit)
    from attnscope.embedded import embedded_samples

    try:
        return embedded_samples(source.removeprefix("embedded:"))[:limit]
    except ModuleNotFoundError as error:
        raise SampleError(str(error)) from None


def _extract_conditions(begun: Extraction) -> None:
    """Run the model under the conditions that the run lacks; in batches of the samples' own, as they were recorded."""
    loaded, run, ready, report = begun.loaded, begun.run, begun.ready, begun.report
    places = Places.of(run, run.spec)
    left_out = {int(at): "it was left out" for at in np.flatnonzero(run.status == LEFT_OUT)}
    prepared = replace(begun.prepared, problems={**begun.prepared.problems, **left_out})
    size = _batch_size(begun, places) or 1
    work = Work(loaded, run, run.spec, prepared, ready, size)

    def encode(positions: Sequence[int], samples: Sequence[Sample]) -> Inputs:
        return collated([ready[at] for at in positions]) if ready is not None else encoded_samples(samples, loaded)

    def check(message: str) -> None:
        report.check()
        report("conditions", message)

    batches = Batches(
        samples=prepared.samples,
        encoded=lambda block: encoded_batches(work, block)[0],
        encode=encode,
        layouts=lambda inputs, seed: Layouts(work, inputs, seed),
        seed=batch_seed,
    )
    extract_conditions(loaded, run, begun.conditions, batches, check)


def _batch_size(begun: Extraction, places: Places) -> int | None:
    """Samples that the model sees at once: one where its calls don't keep the batch of samples.

    None where no sample is there to see that of.
    """
    family = begun.loaded.family
    size = begun.batch_size or int(str(begun.run.attrs["batch_size"]))
    if family.one_by_one or (places.one_by_one and family.fold is None):
        return 1
    if size == 1 or family is not GENERIC:
        return size
    try:
        inputs = probe_inputs(begun.loaded, begun.prepared, begun.ready)
    except SampleError:
        return None
    return size if _keeps_batch(begun.loaded, places, inputs) else 1


def _keeps_batch(loaded: LoadedModel, places: Places, inputs: Inputs) -> bool:
    """Whether calls over two samples are over a batch of two, as a model that packs its images doesn't have it."""
    batches = []

    def look(call: AttentionCall) -> None:
        if places.find(call) is not None:
            batches.append(call.shape[0])

    try:
        with torch.no_grad(), recording(loaded.model, on_call=look, audit=False):
            run_model(loaded, collated([inputs, inputs]))
    except (RuntimeError, ValueError):
        # Other calls, or none: a model whose images lie in one row may not take two of them.
        return False
    return set(batches) <= {2}
