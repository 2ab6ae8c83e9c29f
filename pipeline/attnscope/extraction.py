"""Extraction: run a model over samples and write what it attends to into a run.

Whole blocks of samples at a time: encode, forward under `recording` (and backward where a gradient is wanted), reduce
and encode each layer as it comes, write, and mark the block as done at the very end.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from zarr.abc.store import Store

from attnscope.analysis import requirements
from attnscope.batching import batch_that_fits, is_out_of_memory, writer_threads
from attnscope.capturing import Places, Taker
from attnscope.claims import POLL, Claims
from attnscope.conditions import Condition
from attnscope.families import GENERIC, Inputs
from attnscope.families.generating import generating
from attnscope.families.labels import encoded_samples
from attnscope.families.layouts import DEFAULT_LAYOUTS
from attnscope.families.weights import projections
from attnscope.growing import in_stored_order, room_for_regions, with_room
from attnscope.loading import LoadedModel, ModelError, load_model
from attnscope.perturbing import Batches, extract_conditions
from attnscope.plan import THUMBNAIL_PIXELS
from attnscope.planning import (
    Prepared,
    RecordingError,
    check_space,
    forecast_bytes,
    plan_run,
    prepare,
    probe,
    run_model,
)
from attnscope.proving import look_at_projections
from attnscope.quantities import RESIDUALS, ExtractSpec
from attnscope.ready import alike, collated, cut_batch, largest_inputs, text_lengths
from attnscope.recording import AttentionCall, recording
from attnscope.regions import RegionReader
from attnscope.residuals import ResidualTap, residual_shares
from attnscope.run import EXTRACTED, LEFT_OUT, MISSING, BrokenRun, Run, RunError, RunStands, open_run
from attnscope.samples import Sample, SampleError, read_samples, unique_ids
from attnscope.stores import full_disk_told
from attnscope.tokens import TokenLayout, unknown_layout
from attnscope.writing import BlockBuffer, BlockWriter, TokenBuffer

if TYPE_CHECKING:
    from attnscope.analysis import Analyser

_SEED = 0


class DeadlineReached(RuntimeError):
    """The time that was given is over; the run can be resumed."""


@dataclass(frozen=True)
class Progress:
    """How far an extraction is: samples done of all, left out, bytes encoded, seconds since the start."""

    stage: str
    done: int
    total: int
    left_out: int
    bytes_written: int
    seconds: float
    message: str = ""


@dataclass(frozen=True)
class ReadySample:
    """One sample whose model inputs were made by the caller; tensors have a leading axis of length 1."""

    id: str
    inputs: Inputs


@dataclass(frozen=True)
class _BlockDone:
    """A block that was committed: how many samples were left out, and the bytes of its site quantities."""

    block: range
    left_out: int
    nbytes: int


@dataclass
class _Work:
    """Which samples go through which model, and how many at once."""

    loaded: LoadedModel
    run: Run
    spec: ExtractSpec
    prepared: Prepared
    ready: Sequence[Inputs] | None
    batch_size: int


@dataclass
class _Job(_Work):
    """The same with all that recording and writing need; what does not change while a run is extracted."""

    writer: BlockWriter
    places: Places
    check: Callable[[], None]
    regions: RegionReader
    claims: Claims
    done: deque[_BlockDone] = field(default_factory=deque)


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

    Raises
    ------
    ModelError, SampleError, RunError, StoreError, RecordingError, UnrecordedAttention
        Each with one sentence that says what to do.
    """
    begun = begin_extraction(
        model, samples, analysers, out, spec=spec, target=target, encoding=encoding, form=form, summaries=summaries,
        generate=generate, device=device, dtype=dtype, attn_implementation=attn_implementation, revision=revision,
        trust_remote_code=trust_remote_code, batch_size=batch_size, limit=limit, grow=grow, progress=progress,
        deadline=deadline,
    )  # fmt: skip
    for _ in begun.blocks():
        pass
    return begun.run


def begin_extraction(
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
) -> "Extraction":
    """Load the model, and make the run or open the one that was begun: what `extract` does before the first block."""
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
    if wanted.generate:
        loaded = _writing(loaded, wanted.generate, ready)
    report = _Reporter(progress, started, len(listed), deadline)
    with _evaluation(loaded.model), full_disk_told():
        source = str(samples) if isinstance(samples, str | Path) else ""
        recorded = replace(wanted, conditions=())
        run, prepared = _open_or_create(loaded, recorded, (listed, ready), (out, source), batch_size, grow, report)
    report.total = len(prepared.samples)
    return Extraction(loaded, run, run.spec, prepared, ready, batch_size, report, wanted.conditions)


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
    report: "_Reporter"
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

    def run_conditions(self) -> None:
        """Run the model under the conditions that the run lacks; all blocks must be there."""
        if self.conditions:
            with _evaluation(self.loaded.model), full_disk_told():
                _extract_conditions(self)

    def part(self, block: range, samples: Sequence[Sample]) -> tuple[int, int]:
        """Extract one block, if it is missing: the number of its samples left out, and bytes written, by this process.

        Nothing but the block is looked at, so that it costs the same in a run of any size.
        """
        self.prepared = prepare(samples, self.loaded, room=self.run.plan.streams).at(block.start)
        self.report = _Reporter(None, time.monotonic(), len(block))
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
        with _evaluation(self.loaded.model), full_disk_told():
            places = Places.of(self.run, self.spec)
            if missing and self.fitting is None:
                self.fitting = _batch_size(self, places)
            writer = BlockWriter(writer_threads(self.loaded.device))
            job = _Job(self.loaded, self.run, self.spec, self.prepared, self.ready, self.fitting or 1, writer, places,
                       report.check, RegionReader(self.loaded), claims)  # fmt: skip
            try:
                # More than once only where others took over what this process had claimed, and didn't finish it.
                while missing:
                    for block in _claimed(self.run, missing, claims, report.check):
                        _extract_within_memory(job, block, report)
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
    _check_same(run, run.spec, loaded.digest())
    nothing = Prepared((), np.zeros(0, np.int64), {})
    return Extraction(loaded, run, run.spec, nothing, None, batch_size, _Reporter(None, time.monotonic(), 0))


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


def _open_or_create(
    loaded: LoadedModel,
    spec: ExtractSpec,
    given: tuple[list[Sample], Sequence[Inputs] | None],
    ends: tuple[str | Path | Store | None, str],
    batch_size: int | None,
    grow: bool,
    report: "_Reporter",
) -> tuple[Run, Prepared]:
    """The run, and its samples in stored order; those that are still to be extracted are measured."""
    (listed, ready), (out, source) = given, ends
    report("plan", message=f"checking {loaded.name}")
    digest = loaded.digest()
    existing = _existing(out)
    if existing is not None:
        return _resumed(loaded, existing, spec, given, digest, grow)
    prepared = prepare(listed, loaded) if ready is None else Prepared(listed, text_lengths(ready), {})
    inputs = _probe_inputs(loaded, prepared, ready)
    calls, outputs = probe(loaded, inputs)
    if ready is not None:
        prepared = replace(prepared, longest=_longest(loaded, spec, prepared, ready))
    thumbnails = ready is None and any(s.image is not None for s in prepared.samples)
    roomy = with_room(prepared, loaded.text_limit) if grow else prepared
    plan = plan_run(calls, spec, roomy, batch_size, thumbnails, grows=grow)
    plan = replace(plan, regions=room_for_regions(prepared.samples, grow))
    forecast = forecast_bytes(calls, plan, spec, len(prepared.samples))
    report("plan", message=f"the run will take about {_megabytes(forecast)}")
    check_space(forecast, out)
    attrs = {**_described(loaded, digest), **_target(loaded, spec, outputs)}
    # Kept, so that a run which is resumed, perhaps with less memory free, is cut into the same batches.
    size = batch_size or batch_that_fits(loaded, plan, spec)
    attrs |= {"samples": source, "forecast_bytes": forecast, "batch_size": size}
    weights = partial(_write_weights, loaded, inputs) if "weights" in spec.quantities else None
    try:
        return Run.create(out, plan, spec, prepared.samples, attrs, weights), prepared
    except RunStands:
        # Another process was faster.
        return _resumed(loaded, open_run(out, read_only=False), spec, given, digest, grow)  # type: ignore[arg-type]


def _resumed(
    loaded: LoadedModel,
    run: Run,
    spec: ExtractSpec,
    given: tuple[list[Sample], Sequence[Inputs] | None],
    digest: str,
    grow: bool,
) -> tuple[Run, Prepared]:
    """A run that stands, with those of the given samples that it lacks, and its samples in stored order."""
    listed, ready = given
    _check_same(run, spec, digest)
    samples = in_stored_order(run, listed, grow)
    if len(samples) > run.sample_count:
        if ready is not None and samples != listed:
            raise RunError(f"{run.location} holds other samples than these; choose another place")
        run, samples = _grown(run, listed)
    if ready is not None:
        prepared = Prepared(samples, text_lengths(ready), {})
    else:
        missing = [at for block in run.missing() for at in block]
        prepared = prepare(samples, loaded, missing, run.plan.streams)
    if run.lost:
        _mend(loaded, run, prepared, _probe_inputs(loaded, prepared, ready))
    return run, prepared


def _grown(run: Run, listed: list[Sample]) -> tuple[Run, list[Sample]]:
    """The run with room for the samples that it doesn't know yet; others that do the same are waited for."""
    with Claims(run.store) as claims:
        while not claims.take("growing"):
            time.sleep(POLL)
        # Another process may have added some of them meanwhile.
        run = Run(run.store, run.location)
        samples = in_stored_order(run, listed, grow=True)
        grown = run.grow(samples[run.sample_count :]) if len(samples) > run.sample_count else run
        claims.release("growing")
    return grown, samples


def _mend(loaded: LoadedModel, run: Run, prepared: Prepared, inputs: Inputs) -> None:
    """Write again what a repair found lost of the run as a whole."""
    with Claims(run.store) as claims:
        while not claims.take("mending"):
            time.sleep(POLL)
        lost = open_run(run.store).lost
        if "weights" in lost:
            _write_weights(loaded, inputs, run)
        if set(lost) - {"weights"}:
            run.describe(prepared.samples)
        run.set_attrs(lost=[])


def _existing(out: str | Path | Store | None) -> Run | None:
    """The run that stands at a place already; None where there is none, or one whose making was cut short."""
    if out is None:
        return None
    try:
        return open_run(out, read_only=False)
    except BrokenRun:
        raise
    except RunError as error:
        if "has schema" in str(error):
            raise
        return None


def _check_same(run: Run, spec: ExtractSpec, digest: str) -> None:
    if run.attrs.get("weights_digest") != digest:
        raise RunError(
            f"{run.location} was extracted from other weights ({run.attrs.get('model')}); choose another place"
        )
    if run.spec.generate != spec.generate:
        raise RunError(
            f"{run.location} was extracted with generate={run.spec.generate}, and this is generate={spec.generate};"
            " choose another place"
        )
    if run.spec != spec:
        run.require(spec)


def _described(loaded: LoadedModel, digest: str) -> dict[str, object]:
    return {
        "model": loaded.name,
        "revision": loaded.revision or "",
        "model_class": type(loaded.model).__name__,
        "weights_digest": digest,
        "family": loaded.family.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "attention_kernel": str(getattr(loaded.config, "_attn_implementation", None) or "own code"),
        "seed": _SEED,
    }


def _target(loaded: LoadedModel, spec: ExtractSpec, outputs: object) -> dict[str, object]:
    """What gradients and scores are taken of, by name, even where none was asked for."""
    if not spec.needs_gradient and "score" not in spec.quantities:
        return {}
    return {"target": loaded.family.target(outputs) if spec.target is None else spec.target}


def _probe_inputs(loaded: LoadedModel, prepared: Prepared, ready: Sequence[Inputs] | None) -> Inputs:
    """The inputs of the longest sample that can be encoded: no later one needs more tokens."""
    if ready is not None:
        # The longest text and the longest target, or the largest image, may be two samples'.
        return largest_inputs(ready)[0]
    for i in prepared.longest_first():
        if i in prepared.problems:
            continue
        try:
            return encoded_samples([prepared.sample(i)], loaded)
        except SampleError as error:
            prepared.problems[i] = _blameless(str(error))
    first = next(iter(prepared.problems.items()))
    raise SampleError(
        f"none of the {len(prepared.samples)} samples can be used;"
        f" the first, {prepared.sample(first[0]).id!r}: {first[1]}"
    )


def _blameless(message: str) -> str:
    """The reason alone: the sample's name stands beside it in the run."""
    return message


def _longest(loaded: LoadedModel, spec: ExtractSpec, prepared: Prepared, ready: Sequence[Inputs]) -> dict[str, int]:
    """The most tokens of each stream among the ready samples beside the first that is probed."""
    longest: dict[str, int] = {}
    for inputs in largest_inputs(ready)[1:]:
        streams = plan_run(probe(loaded, inputs)[0], spec, prepared, 1, thumbnails=False).streams
        longest |= {name: max(tokens, longest.get(name, 0)) for name, tokens in streams.items()}
    return longest


def _write_weights(loaded: LoadedModel, inputs: Inputs, run: Run) -> None:
    """Store the projections of every site that has them, with what was seen to stand before and behind them."""
    found = {
        (name, position): arrays
        for name, site in run.plan.sites.items()
        for position, module in enumerate(site.modules)
        if (arrays := projections(loaded.model, module, site)) is not None
    }
    modules = {place: run.plan.sites[place[0]].modules[place[1]] for place in found}
    queries = {modules[place]: (arrays["query"], arrays["query_bias"]) for place, arrays in found.items()}
    seen = look_at_projections(loaded, inputs, queries)
    for (name, position), arrays in found.items():
        gain = seen.norm_gain.get(modules[name, position])
        if gain is not None and gain.shape == arrays["query"].shape[-1:]:
            arrays["norm_gain"] = gain
        run.write_weights(name, position, arrays)
    for name in {name for name, _ in found}:
        plain = [seen.is_plain.get(module) for place, module in modules.items() if place[0] == name]
        run.describe_weights(name, rotary=not all(p is not False for p in plain), plain=all(p is True for p in plain))


def _extract_conditions(begun: Extraction) -> None:
    """Run the model under the conditions that the run lacks; in batches of the samples' own, as they were recorded."""
    loaded, run, ready, report = begun.loaded, begun.run, begun.ready, begun.report
    places = Places.of(run, run.spec)
    left_out = {int(at): "it was left out" for at in np.flatnonzero(run.status == LEFT_OUT)}
    prepared = replace(begun.prepared, problems={**begun.prepared.problems, **left_out})
    size = _batch_size(begun, places) or 1
    work = _Work(loaded, run, run.spec, prepared, ready, size)

    def encode(positions: Sequence[int], samples: Sequence[Sample]) -> Inputs:
        return collated([ready[at] for at in positions]) if ready is not None else encoded_samples(samples, loaded)

    def check(message: str) -> None:
        report.check()
        report("conditions", message)

    batches = Batches(
        samples=prepared.samples,
        encoded=lambda block: _encoded_batches(work, block)[0],
        encode=encode,
        layouts=lambda inputs, seed: _Layouts(work, inputs, seed),
        seed=_batch_seed,
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
        inputs = _probe_inputs(begun.loaded, begun.prepared, begun.ready)
    except SampleError:
        return None
    return size if _keeps_batch(begun.loaded, places, inputs) else 1


def _batch_seed(block: range, rows: Sequence[int]) -> int:
    """What a batch's forward draws from, such as ViLT's order of patches."""
    return _SEED + block.start + rows[0]


def _keeps_batch(loaded: LoadedModel, places: Places, inputs: Inputs) -> bool:
    """Whether calls over two samples are over a batch of two, as a model that packs its images doesn't have it."""
    batches = []

    def look(call: AttentionCall) -> None:
        if places.find(call) is not None:
            batches.append(call.shape[0])

    try:
        with torch.no_grad(), recording(loaded.model, on_call=look, audit=False):
            run_model(loaded, collated([inputs, inputs]))
    except RecordingError:
        return False
    return set(batches) <= {2}


def _extract_within_memory(job: _Job, block: range, report: "_Reporter") -> None:
    """Extract one block; when memory runs out, again from its start with half the batch, down to one sample."""
    while True:
        try:
            return _extract_block(job, block)
        except (RuntimeError, MemoryError) as error:
            if job.batch_size == 1 or not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback would hold on to the tensors that have to go.
        job.writer.flush()
        job.batch_size //= 2
        if job.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        report("extract", f"memory ran out; going on with batches of {job.batch_size}")


def _claimed(run: Run, missing: list[range], claims: Claims, check: Callable[[], None]) -> Iterator[range]:
    """Each of the missing blocks that no other process has claimed, or that another has claimed and abandoned.

    It stays claimed: who commits it releases it. Ends when none of them is missing: what others have in their hands is
    waited for. `check` is called now and then.
    """
    while missing:
        theirs = []
        for block in missing:
            check()
            name = _claim_name(run, block)
            if not run.is_missing(block):
                continue
            if not claims.take(name):
                theirs.append(block)
                continue
            # Its former owner may have finished it just before it was claimed.
            if run.is_missing(block):
                yield block
            else:
                claims.release(name)
        if len(theirs) == len(missing):
            time.sleep(POLL)
        missing = theirs


def _claim_name(run: Run, block: range) -> str:
    """What a block is claimed as: all of it, where the missing part of one that has grown is given alone."""
    return str(block.start // run.plan.unit * run.plan.unit)


def _extract_block(job: _Job, block: range) -> None:
    """Extract one block; it is committed when all of it is written, while the next one is under way."""
    batches, problems = _encoded_batches(job, block)
    rows = [r for batch_rows, _ in batches for r in batch_rows]
    claim = _claim_name(job.run, block)
    jobs = job.writer.block(lambda: job.claims.may_hold(claim))
    buffer = BlockBuffer(job.run, block, rows, jobs)
    tokens = {name: TokenBuffer(len(block), count) for name, count in job.run.plan.streams.items()}
    regions = _Regions(job, block)
    scores = np.full((1, len(block)), np.nan, np.float32)
    pictures = np.zeros((len(block), THUMBNAIL_PIXELS, THUMBNAIL_PIXELS, 3), np.uint8)
    with torch.random.fork_rng(devices=_cuda_devices(job.loaded)):
        for batch_rows, inputs in batches:
            job.check()
            seed = _batch_seed(block, batch_rows)
            layouts = _Layouts(job, inputs, seed)
            torch.manual_seed(seed)
            score, counts = _run_batch(job, buffer, batch_rows, inputs, layouts)
            if score is not None:
                scores[0, batch_rows] = score
            for name, count in counts.items():
                tokens[name].put(batch_rows, layouts.of(name, count))
                regions.put(name, batch_rows, layouts.of(name, count))
            if job.run.plan.thumbnails:
                pictures[batch_rows] = _thumbnails(job, block, batch_rows, inputs)
    if rows and (unfinished := buffer.unfinished()):
        raise RecordingError(
            f"the model did not run {unfinished[0]} for every sample; its calls differ between batches"
        )
    done = _BlockDone(block, len(problems), buffer.bytes)

    def finish() -> None:
        if not job.claims.may_hold(claim):
            # This process was suspended, and another has taken the block over: it is the other's to write.
            job.claims.give_up(claim)
            return
        regions.write()
        _write_rest(job, block, tokens, scores, pictures, problems)
        if not job.claims.holds(claim):
            job.claims.give_up(claim)
            return
        job.run.commit(block, np.array([LEFT_OUT if r in problems else EXTRACTED for r in range(len(block))]))
        job.claims.release(claim)
        job.done.append(done)

    jobs.close(finish)


def _write_rest(
    job: _Job,
    block: range,
    tokens: Mapping[str, TokenBuffer],
    scores: np.ndarray,
    pictures: np.ndarray,
    problems: Mapping[int, str],
) -> None:
    """Write what is not of a site."""
    run = job.run
    for name, stream in tokens.items():
        run.write_tokens(name, block, stream.layout)
    if "score" in job.spec.quantities or job.spec.needs_gradient:
        run.write_block("outputs/score", block, scores)
    if run.plan.thumbnails:
        run.write_block("samples/thumbnail", block, pictures)
    samples = [job.prepared.sample(i) for i in block]
    digests = ["" if r in problems else s.image_digest() for r, s in enumerate(samples)]
    run.write_block("samples/image_digest", block, np.array(digests, object))
    run.write_block("samples/reason", block, np.array([problems.get(r, "") for r in range(len(block))], object))


def _encoded_batches(work: _Work, block: range) -> tuple[list[tuple[list[int], Inputs]], dict[int, str]]:
    """Inputs of a block in batches of like length: (rows in the block, inputs); and the reasons of those left out."""
    problems = {i - block.start: work.prepared.problems[i] for i in block if i in work.prepared.problems}
    rows = [r for r in range(len(block)) if r not in problems]
    rows.sort(key=lambda r: work.prepared.length(block.start + r))
    batches = []
    for chosen in _sharing(work, block, rows):
        usable, inputs = _encode(work, block, chosen, problems)
        if usable:
            batches.append((usable, inputs))
    return batches, problems


def _sharing(work: _Work, block: range, rows: Sequence[int]) -> Iterator[list[int]]:
    """The rows in order, as many as a batch takes, and only such as can be put into one."""
    ready = work.ready
    groups = [list(rows)] if ready is None else alike([ready[i] for i in block], rows)
    for group in groups:
        yield from (group[start : start + work.batch_size] for start in range(0, len(group), work.batch_size))


def _encode(work: _Work, block: range, rows: list[int], problems: dict[int, str]) -> tuple[list[int], Inputs]:
    if work.ready is not None:
        return rows, collated([work.ready[block.start + r] for r in rows])
    encode = encoded_samples
    samples = [work.prepared.sample(block.start + r) for r in rows]
    try:
        return rows, encode(samples, work.loaded)
    except SampleError:
        pass
    usable = []
    for row, sample in zip(rows, samples, strict=True):
        try:
            encode([sample], work.loaded)
            usable.append(row)
        except SampleError as error:
            problems[row] = _blameless(str(error))
    kept = [work.prepared.sample(block.start + r) for r in usable]
    return usable, encode(kept, work.loaded) if kept else {}


def _run_batch(
    job: _Job, buffer: BlockBuffer, rows: list[int], inputs: Inputs, layouts: "_Layouts"
) -> tuple[np.ndarray | None, Mapping[str, int]]:
    """Forward one batch, and backward where gradients are wanted; every call goes into the buffer.

    Gives the scores, where they are wanted, and the tokens that each stream had.
    """
    loaded, family, target = job.loaded, job.loaded.family, job.spec.target
    take = Taker(loaded, job.run, job.places, buffer, (rows, inputs), layouts.kinds)
    if not job.spec.needs_gradient:
        with torch.no_grad(), recording(loaded.model, on_call=take):
            outputs = run_model(loaded, inputs)
        take.finish()
        wanted = "score" in job.spec.quantities
        score = family.score(outputs, target, inputs, loaded) if wanted else None
        return None if score is None else score.float().cpu().numpy(), take.tokens
    with torch.enable_grad(), _graph_from_inputs(loaded.model, inputs) as leaves:
        follows = bool(job.spec.quantities & RESIDUALS)
        with recording(loaded.model) as recorded, ResidualTap(recorded) if follows else nullcontext() as tap:
            outputs = run_model(loaded, leaves)
        score = family.score(outputs, target, inputs, loaded)
        places = [i for i, c in enumerate(recorded) if job.places.find(c) is not None]
        calls: list[AttentionCall | None] = [recorded[i] for i in places]
        pairs = [None if tap is None else tap.pairs.get(i) for i in places]
        wanted_of = [c.output for c in calls if c is not None] + [pair[1] for pair in pairs if pair is not None]
        slopes = _gradients(score, wanted_of)
    del outputs, recorded, tap, wanted_of
    terms = iter(slopes[len(calls) :])
    for i, gradient in enumerate(slopes[: len(calls)]):
        call, pair = calls[i], pairs[i]
        assert call is not None
        slope = next(terms) if pair is not None else None
        take(call, gradient, residual_shares(call, pair, slope) if follows else None)
        calls[i] = pairs[i] = None
    take.finish()
    return score.detach().float().cpu().numpy(), take.tokens


def _gradients(score: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Derivative of the score by each tensor; None where the score doesn't depend on it."""
    if not score.requires_grad:
        raise RecordingError("the score does not depend on the model's inputs: no gradient can be taken of it")
    dependent = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(score.sum(), dependent, allow_unused=True) if dependent else ())
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]


class _Regions:
    """How much of each token of a block lies in each region of its sample, by stream."""

    def __init__(self, job: _Job, block: range) -> None:
        self._job = job
        self._block = block
        plan = job.run.plan
        self._shares = {
            name: np.full((len(block), plan.regions, count), np.nan, np.float32)
            for name, count in plan.streams.items()
            if plan.regions
        }

    def put(self, stream: str, rows: Sequence[int], layout: TokenLayout) -> None:
        if stream not in self._shares:
            return
        into = self._shares[stream]
        for at, row in enumerate(rows):
            sample = self._job.prepared.sample(self._block.start + row)
            into[row, :, : layout.token_count] = self._job.regions.shares(sample, layout, at, into.shape[1])

    def write(self) -> None:
        for stream, shares in self._shares.items():
            self._job.run.write_block(f"{stream}/region_share", self._block, shares)


class _Layouts:
    """The token layouts of one batch, each made once, when it is first asked for."""

    def __init__(self, work: _Work, inputs: Inputs, seed: int) -> None:
        self._work = work
        self._inputs = inputs
        self._seed = seed
        self._made: dict[tuple[str, int], TokenLayout] = {}

    def of(self, stream: str, tokens: int) -> TokenLayout:
        """The layout of a stream that has so many tokens in this batch.

        Raises
        ------
        RecordingError
            When the family lays out fewer tokens than the model attended to.
        """
        if (stream, tokens) not in self._made:
            with torch.random.fork_rng(devices=_cuda_devices(self._work.loaded)):
                # A layout that depends on what the model drew (ViLT's order of patches) draws it again.
                torch.manual_seed(self._seed)
                self._made[stream, tokens] = _layout(self._work, self._inputs, stream, tokens)
        return self._made[stream, tokens]

    def kinds(self, stream: str, tokens: int) -> np.ndarray:
        """The kinds of these tokens, (sample, token) codes."""
        return self.of(stream, tokens).kind


def _layout(work: _Work, inputs: Inputs, stream: str, tokens: int) -> TokenLayout:
    samples = len(next(iter(inputs.values())))
    sites = work.run.plan.sites.values()
    packed = {s for site in sites if site.guessed and -1 in site.call_numbers for s in (site.queries, site.keys)}
    base = stream.partition(".")[0]
    layout = None if stream in packed else work.loaded.family.streams.get(base, DEFAULT_LAYOUTS.get(base))
    made = unknown_layout(samples, tokens) if layout is None else layout(inputs, work.loaded, tokens)
    if not tokens <= made.token_count <= work.run.plan.streams[stream]:
        raise RecordingError(
            f"family {work.loaded.family.name!r} lays out {made.token_count} tokens of stream {stream!r}, of which"
            f" the model attended to {tokens}"
        )
    return made


def _thumbnails(work: _Work, block: range, rows: Sequence[int], inputs: Inputs) -> np.ndarray:
    """The images as the model saw them, (sample, row, column, colour) uint8."""
    from PIL import Image

    size = (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS)
    pixels = inputs.get("pixel_values")
    processor = work.loaded.image_processor
    if pixels is not None and pixels.ndim == 4 and pixels.shape[1] == 3 and len(pixels) == len(rows):
        mean = torch.tensor(getattr(processor, "image_mean", None) or [0.0] * 3).view(3, 1, 1)
        std = torch.tensor(getattr(processor, "image_std", None) or [1.0] * 3).view(3, 1, 1)
        seen = ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(p) for p in seen]
    else:
        loaded = [work.prepared.sample(block.start + r).load_image() for r in rows]
        pictures = [p if p is not None else Image.new("RGB", size) for p in loaded]
    return np.stack([np.asarray(p.resize(size, Image.Resampling.BILINEAR)) for p in pictures])


@contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode with frozen parameters, and everything as it was afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _graph_from_inputs(model: torch.nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """Inputs whose floating tensors, and embeddings looked up from them, carry a graph.

    Of the parameters, those that stand for tokens carry one as well (learned queries, class tokens): what attends to
    nothing else would have no gradient. The others stay frozen, and no gradient of any is ever computed.
    """

    def with_graph(tensor: torch.Tensor) -> torch.Tensor:
        # A clone, because a model may add to its embeddings in place, which a leaf forbids.
        return tensor.detach().requires_grad_().clone()

    def embed(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output if output.requires_grad else with_graph(output)

    handles = [m.register_forward_hook(embed) for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    learned = [p for m in model.modules() for p in _token_parameters(m) if not p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(True)
    try:
        yield {k: with_graph(v) if v.is_floating_point() else v for k, v in inputs.items()}
    finally:
        for handle in handles:
            handle.remove()
        for parameter in learned:
            parameter.requires_grad_(False)


def _token_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of a module itself that may stand for tokens: of embeddings, and those of no layer's own kind."""
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, torch.nn.Embedding):
        return []
    return [p for p in module.parameters(recurse=False) if p.ndim >= 2 and p.is_floating_point()]


def _cuda_devices(loaded: LoadedModel) -> list[torch.device]:
    return [loaded.device] if loaded.device.type == "cuda" else []


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


class _Reporter:
    """Counts what is done and tells the caller."""

    def __init__(
        self, tell: Callable[[Progress], None] | None, started: float, total: int, deadline: float | None = None
    ) -> None:
        self.tell = tell
        self._started = started
        self._deadline = deadline
        self.total = total
        self.done = 0
        self.left_out = 0
        self.bytes = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def already(self, status: np.ndarray) -> None:
        self.done, self.left_out = int((status != MISSING).sum()), int((status == LEFT_OUT).sum())

    def check(self) -> None:
        if self._deadline is not None and self.seconds > self._deadline:
            raise DeadlineReached(
                f"stopped at the deadline with {self.done} of {self.total} samples done; repeat the command"
            )

    def add(self, committed: deque[_BlockDone]) -> Iterator[range]:
        """Tell of the blocks that were committed since the last time, and give each; the writer adds to the queue."""
        while committed:
            done = committed.popleft()
            self.add_block(done.block, done.left_out, done.nbytes)
            yield done.block

    def add_block(self, block: range, left_out: int, nbytes: int) -> None:
        """Tell of one block."""
        self.done += len(block)
        self.left_out += left_out
        self.bytes += nbytes
        self("extract")

    def __call__(self, stage: str, message: str = "") -> None:
        if self.tell is not None:
            self.tell(Progress(stage, self.done, self.total, self.left_out, self.bytes, self.seconds, message))
