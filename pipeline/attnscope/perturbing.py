"""The model under conditions: plain forwards of changed inputs, whose scores and losses are stored beside the run.

Nothing is recorded here, so that a condition costs one forward. Conditions that a run holds already are not run again.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
import xarray as xr
import zarr

from attnscope.ablation import Ablation, Applied, Case, ImageStatistics, ImageTokens, image_statistics, with_text
from attnscope.analysis import options_of, ranking_analyser
from attnscope.capturing import Places
from attnscope.claims import POLL, Claims
from attnscope.conditions import INTACT, RANDOM, Condition, Phrase, Ranking, distinct, distinct_rankings, phrases_of
from attnscope.families import Inputs
from attnscope.families.labels import LABELS, UNASKED
from attnscope.families.losses import divergence, embeddings, image_logits, object_head, word_loss
from attnscope.families.scores import answer_logits
from attnscope.hiding import hiding
from attnscope.loading import LoadedModel
from attnscope.outputs import (
    OUTPUTS,
    OutputSet,
    complete_sets,
    is_complete,
    make_set,
    split_sets,
    status_of,
    stored_sets,
    write_embeddings,
    write_set,
)
from attnscope.planning import RecordingError, run_model
from attnscope.run import EXTRACTED, MissingQuantity, Run
from attnscope.samples import Sample, SampleError
from attnscope.stores import open_group
from attnscope.tokens import KIND_CODES, TokenLayout

_STATISTICS_SAMPLES = 256
_AS_IT_IS = ("target", "embedding")
_WORDS = tuple(KIND_CODES[k] for k in ("text", "unknown"))


class Layouts(Protocol):
    """The token layouts of one batch."""

    def of(self, stream: str, tokens: int) -> TokenLayout:
        """The layout of a stream that has so many tokens in this batch."""
        ...


@dataclass(frozen=True)
class Batches:
    """What conditions need of an extraction: its samples, and how it makes batches of them.

    `encoded` gives the batches of a block, (rows in the block, inputs); `encode` the inputs of a list of samples, or
    SampleError; `layouts` those of a batch under a seed; `seed` that of a batch's forward.
    """

    samples: Sequence[Sample]
    encoded: Callable[[range], Sequence[tuple[list[int], Inputs]]]
    encode: Callable[[Sequence[int], Sequence[Sample]], Inputs]
    layouts: Callable[[Inputs, int], Layouts]
    seed: Callable[[range, Sequence[int]], int]


@dataclass
class _Stage:
    loaded: LoadedModel
    run: Run
    batches: Batches
    ablation: Ablation
    ranks: Mapping[Ranking, Mapping[str, np.ndarray]]
    places: Places
    target: str | int | None
    phrases: list[list[Phrase]]
    group: zarr.Group
    counts_tokens: bool
    embeds: bool


def extract_conditions(
    loaded: LoadedModel,
    run: Run,
    conditions: Sequence[Condition],
    batches: Batches,
    check: Callable[[str], None],
) -> None:
    """Run the model under the conditions that a finished run lacks, and store what it gives.

    `check` is told what is being done, and may stop it; what is done by then stays.

    Raises
    ------
    MissingQuantity
        When a ranking's analyser needs more than the run holds.
    ModelError, RecordingError
        When the model's kind of input doesn't allow a condition.
    """
    group = open_group(run.store, mode="r+")
    lacking = _lacking(group, conditions)
    if not lacking:
        return
    with Claims(run.store) as claims:
        while not claims.take("conditions"):
            check("waiting for another process")
            time.sleep(POLL)
        group = open_group(run.store, mode="r+")
        lacking = _lacking(group, conditions)
        phrases = [phrases_of(s.regions) for s in batches.samples]
        sets = _sets(group, lacking, max(map(len, phrases), default=0))
        for made in sets:
            make_set(group, made, run.plan.unit)
        if sets:
            stage = _stage(loaded, run, lacking, batches, phrases, group)
            _fill_sets(stage, sets, check)
        claims.release("conditions")


def _lacking(group: zarr.Group, conditions: Sequence[Condition]) -> list[Condition]:
    done = {c for made in complete_sets(group) for c in made.conditions}
    return [c for c in distinct(conditions) if c not in done]


def _sets(group: zarr.Group, lacking: Sequence[Condition], phrases: int) -> list[OutputSet]:
    """Sets that were begun with some of these conditions, then new ones of the others."""
    begun = [m for m in stored_sets(group) if set(m.conditions) & set(lacking) and not is_complete(group, m)]
    rest = [c for c in lacking if all(c not in made.conditions for made in begun)]
    return [*begun, *split_sets(rest, phrases)]


def _stage(
    loaded: LoadedModel,
    run: Run,
    lacking: Sequence[Condition],
    batches: Batches,
    phrases: list[list[Phrase]],
    group: zarr.Group,
) -> _Stage:
    rankings = distinct_rankings(lacking)
    ranks = {r: ranking_values(run, r) for r in rankings}
    extracted = [int(at) for at in np.flatnonzero(run.status == EXTRACTED)]
    statistics = None
    if any(c.operator in ("mean", "noise") and (c.image != "intact" or c.ask == "object") for c in lacking):
        statistics = _statistics(run, batches, extracted)

    def other(position: int, seed: int) -> Inputs:
        # A seeded step to another sample: never itself, where there is another.
        among = [at for at in extracted if at != position]
        if not among:
            return {}
        chosen = among[int(np.random.default_rng((seed, position)).integers(len(among)))]
        try:
            return batches.encode([chosen], [batches.samples[chosen]])
        except SampleError:
            return {}

    places = Places.of(run, run.spec)
    if any(c.operator == "drop" and c.image != "intact" for c in lacking) and not places.complete:
        raise MissingQuantity(
            f"tokens are hidden from every attention of the model, and {run.location} holds some sites or layers only;"
            " extract all of them, or use another operator than 'drop'"
        )
    target = run.spec.target if run.spec.target is not None else run.attrs.get("target")
    ablation = Ablation(loaded, statistics, other)
    counts = any(c.ask == "object" for c in lacking)
    embeds = any(c.ask == "embedding" for c in lacking)
    return _Stage(loaded, run, batches, ablation, ranks, places, target, phrases, group, counts, embeds)  # type: ignore[arg-type]


def _statistics(run: Run, batches: Batches, extracted: Sequence[int]) -> ImageStatistics | None:
    """Over the first samples that were extracted, some hundreds at most."""
    found: list[Inputs] = []
    for at in extracted[:_STATISTICS_SAMPLES]:
        found.append(batches.encode([at], [batches.samples[at]]))
    return image_statistics(found)


# -- rankings ----------------------------------------------------------------------------------------------------------


def ranking_values(run: Run, ranking: Ranking) -> dict[str, np.ndarray]:
    """The values that a ranking sorts by, (sample, token) for each stream that it ranks.

    They come from the analysis as it is saved in the run, where that has the ranking's options, and are computed
    otherwise.
    """
    if ranking.analyser == RANDOM:
        seed = int(json.loads(ranking.options).get("seed", 0))
        count = len(run.status)
        return {
            stream: np.stack([np.random.default_rng((seed, at)).random(tokens) for at in range(count)])
            for stream, tokens in run.plan.streams.items()
            if ranking.stream in (None, stream)
        }
    result = _analysis(run, ranking)
    if ranking.variable not in result:
        known = ", ".join(map(str, result.data_vars))
        raise MissingQuantity(f"analyser {ranking.analyser!r} gives no {ranking.variable!r}; it gives {known}")
    return _by_stream(run, ranking, result[ranking.variable].sel(dict(ranking.at)))


def _analysis(run: Run, ranking: Ranking) -> xr.Dataset:
    analyser = ranking_analyser(ranking)
    wanted = json.dumps(options_of(analyser), sort_keys=True, default=str)
    if analyser.name in run.analyses:
        saved = run.analysis(analyser.name)
        if saved.attrs.get("options") == wanted and saved.attrs.get("samples_missing") == 0:
            return saved
    run.require(replace(analyser.requires(), conditions=()), f"analyser {analyser.name!r}")
    return analyser.analyse(run)


def _by_stream(run: Run, ranking: Ranking, values: xr.DataArray) -> dict[str, np.ndarray]:
    for dim in ("stream", "site"):
        if dim in values.dims:
            parts = {str(name): values.sel({dim: name}) for name in values[dim].values}
            if dim == "site":
                parts = {run.plan.sites[name].keys: part for name, part in parts.items() if name in run.plan.sites}
            break
    else:
        fitting = [s for s, n in run.plan.streams.items() if n == values.sizes.get("token")]
        name = ranking.stream or str(values.attrs.get("stream", "")) or (fitting[0] if fitting else "")
        parts = {name: values}
    if any(set(part.dims) != {"sample", "token"} for part in parts.values()):
        raise MissingQuantity(
            f"a ranking is one value for each token of each sample, and {ranking.name!r} has {values.dims};"
            " pick one entry of the other dimensions"
        )
    return {
        name: part.transpose("sample", "token").values[:, : run.plan.streams[name]]
        for name, part in parts.items()
        if name in run.plan.streams and ranking.stream in (None, name)
    }


# -- blocks ------------------------------------------------------------------------------------------------------------


def _fill_sets(stage: _Stage, sets: Sequence[OutputSet], check: Callable[[str], None]) -> None:
    blocks = stage.run.blocks()
    for number, block in enumerate(blocks, start=1):
        todo = [m for m in sets if not status_of(stage.group, m)[block.start : block.stop].all()]
        if not todo:
            continue
        count = sum(len(made.conditions) for made in todo)
        check(f"{count:,} conditions, block {number:,} of {len(blocks):,}")
        values = {made: _empty(made, len(block)) for made in todo}
        vectors: dict[str, np.ndarray] = {}
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(stage.loaded)):
            for rows, inputs in stage.batches.encoded(block):
                batch = _Batch(stage, block, rows, inputs)
                for made in todo:
                    batch.fill(made, values[made])
                if stage.embeds:
                    batch.add_vectors(vectors, len(block))
        for made in todo:
            if any(c.ask == "embedding" for c in made.conditions):
                write_embeddings(stage.group, made, block, vectors)
            write_set(stage.group, made, block, values[made])


def _empty(made: OutputSet, samples: int) -> dict[str, np.ndarray]:
    return {name: np.full(made.shape(samples), fill, dtype) for name, (dtype, fill, _, _) in OUTPUTS.items()}


def _devices(loaded: LoadedModel) -> list[torch.device]:
    return [loaded.device] if loaded.device.type == "cuda" else []


@dataclass
class _Forward:
    """One forward: what the model gave, and what its tokens were."""

    outputs: object
    inputs: Inputs
    layouts: Layouts
    tokens: dict[str, int] = field(default_factory=dict)
    objects: torch.Tensor | None = None

    def image_logits(self, loaded: LoadedModel) -> torch.Tensor:
        """What the model says of its image tokens, (sample, image token, class)."""
        return self.objects if self.objects is not None else image_logits(self.outputs, loaded)


class _Batch:
    """One batch of samples under one condition after the other."""

    def __init__(self, stage: _Stage, block: range, rows: list[int], inputs: Inputs) -> None:
        self._stage = stage
        self._rows = rows
        self._inputs = inputs
        self._positions = [block.start + r for r in rows]
        self._seed = stage.batches.seed(block, rows)
        self._tokens = {
            name: {n: v.values for n, v in stage.run.tokens(name).isel(sample=self._positions).data_vars.items()}
            for name in stage.run.streams
        }
        self._intact = self._forward(inputs, [None] * len(rows))
        self._pinned = self._pins()

    def fill(self, made: OutputSet, values: Mapping[str, np.ndarray]) -> None:
        """Put what the model gives under each condition of a set into its arrays."""
        for at, condition in enumerate(made.conditions):
            if not made.by_phrase:
                found = self._under(condition, self._cases(condition, None))
                self._put(values, (at,), found)
                continue
            for number in range(made.phrases):
                if any(number < len(self._stage.phrases[p]) for p in self._positions):
                    found = self._under(condition, self._cases(condition, number))
                    self._put(values, (at, number), found)

    def add_vectors(self, vectors: dict[str, np.ndarray], samples: int) -> None:
        """Put the vectors of the intact images and texts into a block's arrays (sample, channel)."""
        for name, tensor in embeddings(self._intact.outputs, self._stage.loaded).items():
            if name not in vectors:
                vectors[name] = np.full((samples, tensor.shape[1]), np.nan, np.float32)
            vectors[name][self._rows] = _plain(tensor)

    def _put(self, values: Mapping[str, np.ndarray], place: tuple[int, ...], found: Mapping[str, np.ndarray]) -> None:
        for name, array in found.items():
            for row, value in zip(self._rows, array, strict=True):
                values[name][(place[0], row, *place[1:])] = value

    def _under(self, condition: Condition, cases: Sequence[Case]) -> dict[str, np.ndarray]:
        """The outputs of every sample under a condition, by name, (sample,)."""
        count = len(cases)
        applicable = np.array([c.phrase is not None or not condition.by_phrase for c in cases])
        inputs, replaced = self._inputs, np.ones(count, bool)
        if condition.text in ("negative", "given"):
            inputs, replaced = self._with_text(condition, cases)
        done = self._stage.ablation.apply(condition, inputs, cases)
        done.applies &= applicable & replaced
        changed = np.where(done.applies, done.changed, -1)
        found = {"changed": changed, "content": np.where(done.applies, done.content, 0)}
        if not done.applies.any():
            return found
        made = (
            self._intact
            if replace(condition, ask="target") == INTACT and condition.ask in _AS_IT_IS
            else self._forward(done.inputs, done.hidden)
        )
        numbers = self._numbers(condition, made, done)
        for name, (_, fill, _, _) in OUTPUTS.items():
            if name in numbers:
                found[name] = np.where(done.applies, numbers[name], fill)
        return found

    def _with_text(self, condition: Condition, cases: Sequence[Case]) -> tuple[Inputs, np.ndarray]:
        """The batch with the condition's texts, and which samples have one; the others keep theirs."""
        swapped = [with_text(c.sample, condition) for c in cases]
        samples = [s or c.sample for s, c in zip(swapped, cases, strict=True)]
        try:
            inputs = self._stage.batches.encode(self._positions, samples)
        except SampleError:
            return self._inputs, np.zeros(len(cases), bool)
        return inputs, np.array([s is not None for s in swapped])

    # -- one forward ------------------------------------------------------------------------------------------------

    def _forward(self, inputs: Inputs, grids: Sequence[np.ndarray | None]) -> _Forward:
        """The model on these inputs, with the image tokens of these grids hidden."""
        stage = self._stage
        layouts = stage.batches.layouts(inputs, self._seed)
        tokens: dict[str, int] = {}
        some = any(grid is not None and grid.any() for grid in grids)

        def hidden(stream: str, count: int) -> torch.Tensor | None:
            tokens[stream] = max(count, tokens.get(stream, 0))
            return _hidden_tokens(layouts.of(stream, count), grids, stream) if some else None

        torch.manual_seed(self._seed)
        if some or stage.counts_tokens:
            with hiding(stage.loaded.model, stage.run.plan, stage.places, hidden), object_head(stage.loaded) as told:
                outputs = run_model(stage.loaded, inputs)
            return _Forward(outputs, inputs, layouts, tokens, told[0] if told else None)
        return _Forward(run_model(stage.loaded, inputs), inputs, layouts, tokens)

    # -- what is made of it -----------------------------------------------------------------------------------------

    def _pins(self) -> torch.Tensor | None:
        """The class or word that the score is about, (sample,): what the model says of the intact inputs."""
        logits = self._answers(self._intact)
        if logits is None:
            return None
        target = self._stage.target
        if isinstance(target, int) or str(target).lstrip("-").isdigit():
            return torch.full((len(logits),), int(target), device=logits.device)  # type: ignore[arg-type]
        return logits.argmax(dim=-1)

    def _answers(self, made: _Forward) -> torch.Tensor | None:
        return answer_logits(made.outputs, made.inputs, self._stage.loaded, self._name(made))

    def _name(self, made: _Forward) -> str | int:
        target = self._stage.target
        return target if target is not None else self._stage.loaded.family.target(made.outputs)

    def _numbers(self, condition: Condition, made: _Forward, done: Applied) -> dict[str, np.ndarray]:
        loaded, count = self._stage.loaded, len(self._positions)
        numbers: dict[str, np.ndarray] = {}
        logits = self._answers(made)
        if logits is not None and self._pinned is not None:
            pinned = self._pinned[:, None]
            numbers["score"] = _plain(logits.float().gather(1, pinned)[:, 0])
            numbers["loss"] = _plain(-torch.log_softmax(logits.float(), dim=-1).gather(1, pinned)[:, 0])
            numbers["correct"] = _plain((logits.argmax(dim=-1) == self._pinned).float())
            numbers["asked"] = np.ones(count, np.int64)
        else:
            numbers["score"] = _plain(loaded.family.score(made.outputs, self._name(made), made.inputs, loaded))
        labels = done.labels if done.labels is not None else made.inputs.get(LABELS)
        if labels is not None:
            loss, correct = word_loss(made.outputs, labels, loaded)
            numbers |= {"loss": _plain(loss), "correct": _plain(correct)}
            numbers["asked"] = (labels != UNASKED).sum(dim=1).cpu().numpy()
        if condition.ask == "object":
            numbers |= self._objects(made, done)
        return numbers

    def _objects(self, made: _Forward, done: Applied) -> dict[str, np.ndarray]:
        loaded = self._stage.loaded
        mine, reference = (m.image_logits(loaded) for m in (made, self._intact))
        loss, correct = np.full((2, len(self._positions)), np.nan)
        for row, place in enumerate(done.asked_place):
            if place is None or not done.applies[row]:
                continue
            at, was = (_logit_of(m, v.shape[1], row, place) for m, v in ((made, mine), (self._intact, reference)))
            far, same = divergence(reference[row, was][None], mine[row, at][None])
            loss[row], correct[row] = float(far), float(same)
        return {"loss": loss, "correct": correct, "asked": np.ones(len(self._positions), np.int64)}

    # -- cases ------------------------------------------------------------------------------------------------------

    def _cases(self, condition: Condition, number: int | None) -> list[Case]:
        return [self._case(condition, row, number) for row in range(len(self._rows))]

    def _case(self, condition: Condition, row: int, number: int | None) -> Case:
        position = self._positions[row]
        phrases = self._stage.phrases[position]
        phrase = phrases[number] if number is not None and number < len(phrases) else None
        sample = self._stage.batches.samples[position]
        if condition.ranking is None:
            return Case(position, sample, phrase, self._image(row, list(self._tokens)))
        values = self._stage.ranks[condition.ranking]
        image = self._image(row, list(values))
        ranks: dict[str, np.ndarray] = {}
        if image is not None:
            ranks["image"] = values[image.stream][position][image.tokens]
        for stream in values:
            words = self._words(row, stream)
            if words.any():
                ranks["text"] = values[stream][position][: len(words)][words]
                break
        return Case(position, sample, phrase, image, ranks)

    def _image(self, row: int, streams: Sequence[str]) -> "ImageTokens | None":
        """The image tokens of a sample in the first of some streams that has any, one with places before others."""
        found = []
        for stream in streams:
            tokens = self._tokens[stream]
            image = ImageTokens.of(tokens["kind"][row], tokens["row"][row], tokens["column"][row], stream)
            if len(image.tokens):
                found.append(image)
        found.sort(key=lambda image: not image.on_grid)
        return found[0] if found else None

    def _words(self, row: int, stream: str) -> np.ndarray:
        """Which tokens of a stream are words, (token,) bool."""
        tokens = self._tokens[stream]
        return np.isin(tokens["kind"][row], _WORDS) & (tokens["token_text"][row] != "")


def _hidden_tokens(layout: TokenLayout, grids: Sequence[np.ndarray | None], stream: str) -> torch.Tensor | None:
    """Which tokens of a stream a batch's grids hide, (sample, token) bool; None where the stream has no image."""
    if not (layout.kind == KIND_CODES["image"]).any():
        return None
    hidden = np.zeros(layout.kind.shape, bool)
    for row, grid in enumerate(grids):
        if grid is None or not grid.any():
            continue
        image = ImageTokens.of(layout.kind[row], layout.row[row], layout.column[row], stream)
        covered = image.covered(grid)
        if covered is None:
            raise RecordingError(f"nobody can tell which tokens of stream {stream!r} show a part of the image")
        hidden[row, image.tokens[covered]] = True
    return torch.from_numpy(hidden)


def _logit_of(made: _Forward, count: int, row: int, place: tuple[int, int]) -> int:
    """Which of `count` logits of image tokens is the one at a place on the grid."""
    for stream, tokens in made.tokens.items():
        layout = made.layouts.of(stream, tokens)
        image = ImageTokens.of(layout.kind[row], layout.row[row], layout.column[row], stream)
        at = np.flatnonzero((image.row == place[0]) & (image.column == place[1]))
        if not at.size:
            continue
        if len(image.tokens) == count:
            return int(at[0])
        if tokens == count:
            return int(image.tokens[at[0]])
    raise RecordingError(f"nobody can tell which of {count} image logits belongs to which image token")


def _plain(values: torch.Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()
