"""One block of samples: encoded, run, recorded and written, and marked as done at the very end."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from attnscope.batching import is_out_of_memory
from attnscope.capturing import Places, Taker
from attnscope.claims import POLL, Claims
from attnscope.families import Inputs
from attnscope.families.labels import encoded_samples
from attnscope.families.layouts import DEFAULT_LAYOUTS, sample_count
from attnscope.families.regions import given_boxes
from attnscope.families.scores import written_logits
from attnscope.loading import LoadedModel
from attnscope.plan import THUMBNAIL_PIXELS
from attnscope.planning import Prepared, RecordingError, run_model
from attnscope.progress import BlockDone, Reporter
from attnscope.quantities import ANSWERS, RESIDUALS, SCORE_GRADIENTS, ExtractSpec
from attnscope.ready import alike, collated
from attnscope.recording import AttentionCall, recording
from attnscope.regions import RegionReader
from attnscope.residuals import ResidualTap, residual_shares
from attnscope.run import EXTRACTED, LEFT_OUT, Run
from attnscope.samples import Sample, SampleError, image_size
from attnscope.tokens import TokenLayout, unknown_layout
from attnscope.writing import BlockBuffer, BlockWriter, TokenBuffer

SEED = 0


@dataclass
class Work:
    """Which samples go through which model, and how many at once."""

    loaded: LoadedModel
    run: Run
    spec: ExtractSpec
    prepared: Prepared
    ready: Sequence[Inputs] | None
    batch_size: int


@dataclass
class Job(Work):
    """The same with all that recording and writing need; what does not change while a run is extracted."""

    writer: BlockWriter
    places: Places
    check: Callable[[], None]
    regions: RegionReader
    claims: Claims
    done: deque[BlockDone] = field(default_factory=deque)


def claimed_blocks(run: Run, missing: list[range], claims: Claims, check: Callable[[], None]) -> Iterator[range]:
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


def extract_within_memory(job: Job, block: range, report: Reporter) -> None:
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


def _extract_block(job: Job, block: range) -> None:
    """Extract one block; it is committed when all of it is written, while the next one is under way."""
    batches, problems = encoded_batches(job, block)
    rows = [r for batch_rows, _ in batches for r in batch_rows]
    claim = _claim_name(job.run, block)
    jobs = job.writer.block(lambda: job.claims.may_hold(claim))
    buffer = BlockBuffer(job.run, block, rows, jobs)
    tokens = {name: TokenBuffer(len(block), count) for name, count in job.run.plan.streams.items()}
    regions = _Regions(job, block)
    scores = np.full((1, len(block)), np.nan, np.float32)
    pictures = np.zeros((len(block), THUMBNAIL_PIXELS, THUMBNAIL_PIXELS, 3), np.uint8)
    try:
        with torch.random.fork_rng(devices=_cuda_devices(job.loaded)):
            for batch_rows, inputs in batches:
                job.check()
                seed = batch_seed(block, batch_rows)
                layouts = Layouts(job, inputs, seed)
                _draw_from(seed, job.loaded)
                score, counts = _run_batch(job, buffer, batch_rows, inputs, layouts)
                if score is not None:
                    scores[0, batch_rows] = score
                for name, count in counts.items():
                    tokens[name].put(batch_rows, layouts.of(name, count))
                    regions.put(name, batch_rows, layouts.of(name, count), inputs)
                if job.run.plan.thumbnails:
                    pictures[batch_rows] = _thumbnails(job, block, batch_rows, inputs)
        if rows and (unfinished := buffer.unfinished()):
            raise RecordingError(
                f"the model did not run {unfinished[0]} for every sample; its calls differ between batches"
            )
    except BaseException:
        buffer.abandon()
        raise
    done = BlockDone(block, len(problems), buffer.bytes)

    def finish() -> None:
        if not job.claims.may_hold(claim):
            # This process was suspended, and another has taken the block over: it is the other's to write.
            job.claims.give_up(claim)
            buffer.abandon()
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
    job: Job,
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


def encoded_batches(work: Work, block: range) -> tuple[list[tuple[list[int], Inputs]], dict[int, str]]:
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


def _sharing(work: Work, block: range, rows: Sequence[int]) -> Iterator[list[int]]:
    """The rows in order, as many as a batch takes, and only such as can be put into one."""
    ready = work.ready
    groups = [list(rows)] if ready is None else alike([ready[i] for i in block], rows)
    for group in groups:
        yield from (group[start : start + work.batch_size] for start in range(0, len(group), work.batch_size))


def _encode(work: Work, block: range, rows: list[int], problems: dict[int, str]) -> tuple[list[int], Inputs]:
    if work.ready is not None:
        return rows, collated([work.ready[block.start + r] for r in rows])
    samples = [work.prepared.sample(block.start + r) for r in rows]
    try:
        return rows, encoded_samples(samples, work.loaded)
    except SampleError:
        pass
    usable = []
    for row, sample in zip(rows, samples, strict=True):
        try:
            encoded_samples([sample], work.loaded)
            usable.append(row)
        except SampleError as error:
            problems[row] = str(error)
    kept = [work.prepared.sample(block.start + r) for r in usable]
    return usable, encoded_samples(kept, work.loaded) if kept else {}


def _run_batch(
    job: Job, buffer: BlockBuffer, rows: list[int], inputs: Inputs, layouts: "Layouts"
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
        calls = [recorded[i] for i in places]
        pairs = [None if tap is None else tap.pairs.get(i) for i in places]
        if job.spec.quantities & ANSWERS.keys():
            logits = written_logits(outputs, inputs, loaded)
            for answer in range(logits.shape[1]):
                for call, gradient, shares in _sloped(logits[:, answer], calls, pairs, follows, keep=True):
                    take.take_answer(answer, call, gradient, shares)
                take.finish_answer()
            take.finish_answers(logits.shape[1])
            del logits
        del outputs, recorded, tap
        by_score = bool(job.spec.quantities & SCORE_GRADIENTS)
        for call, gradient, shares in _sloped(score if by_score else None, calls, pairs, follows):
            take(call, gradient, shares)
    take.finish()
    return score.detach().float().cpu().numpy(), take.tokens


def _sloped(
    score: torch.Tensor | None,
    calls: list[AttentionCall],
    pairs: list[tuple[torch.Tensor, torch.Tensor] | None],
    follows: bool,
    keep: bool = False,
) -> Iterator[tuple[AttentionCall, torch.Tensor | None, dict[str, torch.Tensor] | None]]:
    """Each call with the derivative of the score by its output (None for none), and the shares of its residuals.

    Unless the graph is to be kept for another score, what has been given is let go.
    """
    outputs = [c.output for c in calls] + [pair[1] for pair in pairs if pair is not None]
    slopes = [None] * len(outputs) if score is None else _gradients(score, outputs, keep)
    terms = iter(slopes[len(calls) :])
    waiting = deque(zip(calls, pairs, slopes, strict=False))
    del outputs, slopes
    if not keep:
        calls.clear()
        pairs.clear()
    while waiting:
        call, pair, gradient = waiting.popleft()
        slope = next(terms) if pair is not None else None
        yield call, gradient, residual_shares(call, pair, slope) if follows else None


def _gradients(
    score: torch.Tensor, tensors: Sequence[torch.Tensor | None], keep: bool = False
) -> list[torch.Tensor | None]:
    """Derivative of the score by each tensor; None where the score doesn't depend on it."""
    if not score.requires_grad:
        raise RecordingError("the score does not depend on the model's inputs: no gradient can be taken of it")
    dependent = [t for t in tensors if t is not None and t.requires_grad]
    asked = torch.autograd.grad(score.sum(), dependent, allow_unused=True, retain_graph=keep) if dependent else ()
    found = iter(asked)
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]


class _Regions:
    """How much of each token of a block lies in each region of its sample, and its own box, by stream."""

    def __init__(self, job: Job, block: range) -> None:
        self._job = job
        self._block = block
        plan = job.run.plan
        self._shares = {
            name: np.full((len(block), plan.regions, count), np.nan, np.float32)
            for name, count in plan.streams.items()
            if plan.regions
        }
        self._boxes = {name: np.full((len(block), plan.streams[name], 4), np.nan, np.float32) for name in plan.boxed}

    def put(self, stream: str, rows: Sequence[int], layout: TokenLayout, inputs: Inputs) -> None:
        if stream not in self._shares:
            return
        into = self._shares[stream]
        for at, row in enumerate(rows):
            sample = self._job.prepared.sample(self._block.start + row)
            boxes = self._put_boxes(stream, row, sample, inputs, at)
            into[row, :, : layout.token_count] = self._job.regions.shares(sample, layout, at, into.shape[1], boxes)

    def _put_boxes(self, stream: str, row: int, sample: Sample, inputs: Inputs, at: int) -> np.ndarray | None:
        """The boxes of a sample's tokens, (token, 4) in pixels of its image; None where they aren't known."""
        size = image_size(sample) if stream in self._boxes else None
        given = None if size is None else given_boxes(inputs, at, size)
        if given is None:
            return None
        self._boxes[stream][row, : len(given)] = given
        return self._boxes[stream][row, : len(given)]

    def write(self) -> None:
        for stream, shares in self._shares.items():
            self._job.run.write_block(f"{stream}/region_share", self._block, shares)
        for stream, boxes in self._boxes.items():
            self._job.run.write_block(f"{stream}/box", self._block, boxes)


class Layouts:
    """The token layouts of one batch, each made once, when it is first asked for."""

    def __init__(self, work: Work, inputs: Inputs, seed: int) -> None:
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
                _draw_from(self._seed, self._work.loaded)
                self._made[stream, tokens] = _layout(self._work, self._inputs, stream, tokens)
        return self._made[stream, tokens]

    def kinds(self, stream: str, tokens: int) -> np.ndarray:
        """The kinds of these tokens, (sample, token) codes."""
        return self.of(stream, tokens).kind


def _layout(work: Work, inputs: Inputs, stream: str, tokens: int) -> TokenLayout:
    samples = sample_count(inputs)
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


def _thumbnails(work: Work, block: range, rows: Sequence[int], inputs: Inputs) -> np.ndarray:
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


def _draw_from(seed: int, loaded: LoadedModel) -> None:
    """Seed what a forward draws from; `torch.manual_seed` does so for absent devices too, a hundred times as slowly."""
    if loaded.device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def batch_seed(block: range, rows: Sequence[int]) -> int:
    """What a batch's forward draws from, such as ViLT's order of patches."""
    return SEED + block.start + rows[0]


@contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
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
