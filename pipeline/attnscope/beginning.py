"""Before the first block: the run is planned and made, or the one that was begun is opened and held to the same."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from zarr.abc.store import Store

from attnscope.batching import batch_that_fits
from attnscope.blocks import SEED
from attnscope.claims import POLL, Claims
from attnscope.families import Inputs
from attnscope.families.labels import encoded_samples
from attnscope.families.regions import boxed_streams
from attnscope.families.weights import projections
from attnscope.growing import in_stored_order, room_for_regions, with_room
from attnscope.loading import LoadedModel
from attnscope.planning import Prepared, check_space, forecast_bytes, plan_run, prepare, probe
from attnscope.progress import Reporter
from attnscope.proving import look_at_projections
from attnscope.quantities import ExtractSpec
from attnscope.ready import largest_inputs, text_lengths
from attnscope.run import BrokenRun, Run, RunError, RunStands, open_run
from attnscope.samples import Sample, SampleError


def open_or_create(
    loaded: LoadedModel,
    spec: ExtractSpec,
    given: tuple[list[Sample], Sequence[Inputs] | None],
    ends: tuple[str | Path | Store | None, str],
    batch_size: int | None,
    grow: bool,
    report: Reporter,
) -> tuple[Run, Prepared]:
    """The run, and its samples in stored order; those that are still to be extracted are measured."""
    (listed, ready), (out, source) = given, ends
    report("plan", message=f"checking {loaded.name}")
    digest = loaded.digest()
    existing = _existing(out)
    if existing is not None:
        return _resumed(loaded, existing, spec, given, digest, grow)
    prepared = prepare(listed, loaded) if ready is None else Prepared(listed, text_lengths(ready), {})
    inputs = probe_inputs(loaded, prepared, ready)
    calls, outputs = probe(loaded, inputs)
    if ready is not None:
        prepared = replace(prepared, longest=_longest(loaded, spec, prepared, ready))
    thumbnails = ready is None and any(s.image is not None for s in prepared.samples)
    roomy = with_room(prepared, loaded.text_limit) if grow else prepared
    plan = plan_run(calls, spec, roomy, batch_size, thumbnails, grows=grow)
    regions = room_for_regions(prepared.samples, grow)
    plan = replace(plan, regions=regions, boxed=boxed_streams(inputs, plan.streams) if regions else ())
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
    check_same(run, spec, digest)
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
        _mend(loaded, run, prepared, probe_inputs(loaded, prepared, ready))
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


def check_same(run: Run, spec: ExtractSpec, digest: str) -> None:
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
        "seed": SEED,
    }


def _target(loaded: LoadedModel, spec: ExtractSpec, outputs: object) -> dict[str, object]:
    """What gradients and scores are taken of, by name, even where none was asked for."""
    if not spec.needs_gradient and "score" not in spec.quantities:
        return {}
    return {"target": loaded.family.target(outputs) if spec.target is None else spec.target}


def probe_inputs(loaded: LoadedModel, prepared: Prepared, ready: Sequence[Inputs] | None) -> Inputs:
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
            prepared.problems[i] = str(error)
    first = next(iter(prepared.problems.items()))
    raise SampleError(
        f"none of the {len(prepared.samples)} samples can be used;"
        f" the first, {prepared.sample(first[0]).id!r}: {first[1]}"
    )


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


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
