"""From a recipe and a seed to trained weights: the same to the bit each time, whether or not it was cut short."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import JsonValue
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnscope.reference import simla, simla_lessons
from attnscope.reference.answering import answer_losses
from attnscope.reference.corpus import VOCABULARY, Corpus, build_corpus
from attnscope.reference.examining import (
    Items,
    examine_answers,
    examine_captions,
    examine_matching,
    examine_retrieval,
    examine_words,
)
from attnscope.reference.kinds import build_learner
from attnscope.reference.learners import WORLD, JointLearner, Mapper, Retriever, Sizes
from attnscope.reference.lessons import (
    HARD_SHARE,
    WORLD_LOSSES,
    contrastive_losses,
    joint_losses,
    mapper_losses,
    word_losses,
)
from attnscope.reference.painter import Painter, examine_pixels, paint_losses
from attnscope.reference.pair_examining import (
    examine_joint_pairs,
    examine_pair_captions,
    examine_pair_retrieval,
    examine_pair_words,
)
from attnscope.reference.pairs import RECORD, Learnable, Prepared, Shape, open_prepared, prepare
from attnscope.reference.scan import Scan, examine_scan, scan_losses
from attnscope.reference.scenes import WORLD_VERSION, Generator
from attnscope.reference.sharing import ALONE, Share
from attnscope.reference.simla import Simla
from attnscope.reference.weights import weights_digest


class ReferenceError(ValueError):
    """A model that can't be made; the message is one sentence."""


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Hard scenes are asked about from step `hard_from`. The rate rises over `warm_up` steps to its peak and stays there
    until the validation figures reach all `goals`, or for `steps` at most; then it falls to zero over `decay` steps.
    `without` names losses that are left out. `alignment` is the score of its attention (see ALIGNMENTS), the model's
    own where it is empty.

    `samples` is what it learns from in the place of generated scenes: a source that `attnscope.samples` reads, or a
    folder of prepared pairs; `validation_scenes` of them each are held out for goals and for the card. `tokenizer` and
    `vocabulary` say what is made of their texts (see `Shape`). From `side` on: sizes (see `Sizes`). `batch` is how many
    scenes or pairs a step takes, 0 for the lesson's own number. `dtype` is what most of a step is computed in; weights
    stay float32. `processes` share each batch, on `device` (cpu or cuda). `encoders` is the folder of a clip that
    learned from the same samples: a mapper stands behind its encoders, which decide on sizes.
    """

    model: str
    scenes: int = 16000
    hard_from: int = 0
    steps: int = 3000
    decay: int = 500
    warm_up: int = 100
    peak_rate: float = 1.5e-3
    weight_decay: float = 0.02
    clip: float = 1.0
    examine_every: int = 200
    validation_scenes: int = 256
    goals: Mapping[str, float] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    # What came later is told where it isn't the model's own: a training that was begun before still goes on.
    alignment: str = field(default="", repr=False)
    samples: str = field(default="", repr=False)
    tokenizer: str = field(default="words", repr=False)
    vocabulary: int = field(default=8000, repr=False)
    side: int = field(default=WORLD.side, repr=False)
    patch: int = field(default=WORLD.patch, repr=False)
    width: int = field(default=WORLD.width, repr=False)
    heads: int = field(default=WORLD.heads, repr=False)
    layers: int = field(default=WORLD.layers, repr=False)
    text_layers: int = field(default=WORLD.text_layers, repr=False)
    length: int = field(default=WORLD.length, repr=False)
    batch: int = field(default=0, repr=False)
    dtype: str = field(default="float32", repr=False)
    device: str = field(default="cpu", repr=False)
    processes: int = field(default=1, repr=False)
    encoders: str = field(default="", repr=False)

    def __repr__(self) -> str:
        own = RECIPES[self.model]
        shown = (f for f in dataclasses.fields(self) if f.repr or getattr(self, f.name) != getattr(own, f.name))
        return f"Recipe({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def key(self) -> str:
        """What a checkpoint is of: everything but where and over how many processes it was computed."""
        return repr(dataclasses.replace(self, device="cpu", processes=1))

    @property
    def shape(self) -> Shape:
        """How its samples are prepared."""
        sees = LESSONS[self.model].sees
        side = self.side if sees == "images" else 0
        return Shape(side, self.length, self.tokenizer, self.vocabulary, self.validation_scenes, sees == "regions")

    def sizes(self, prepared: Prepared | None) -> Sizes:
        """The sizes of its model."""
        words = len(VOCABULARY if prepared is None else prepared.vocabulary)
        return Sizes(words, *(getattr(self, f.name) for f in dataclasses.fields(Sizes)[1:]))


_JOINT_GOALS = {"words_colour": 0.98, "words_shape": 0.97, "matching_balanced": 0.91, "answers_attributes": 0.96}

# No hard scenes, so that less than a minute is enough.
_SMALL: dict[str, Any] = {
    "scenes": 6000,
    "hard_from": 10**6,
    "warm_up": 50,
    "peak_rate": 3e-3,
    "examine_every": 200,
    "validation_scenes": 128,
}

RECIPES = {
    "vilt": Recipe("vilt", decay=200, peak_rate=2e-3, hard_from=600, goals=_JOINT_GOALS),
    "clip": Recipe("clip", steps=2500, goals={"image_to_text": 0.62, "text_to_image": 0.62}),
    "lxmert": Recipe("lxmert", decay=200, hard_from=600, goals=_JOINT_GOALS),
    "text": Recipe("text", steps=400, decay=200),
    "simla": Recipe(
        "simla", steps=2600, decay=300, hard_from=2900, layers=simla.SIZES.layers, text_layers=simla.SIZES.text_layers
    ),
    "mapper": Recipe("mapper", decay=300, peak_rate=2e-3, goals={"answers_attributes": 0.98, "captions_true": 0.98}),
    "scan": Recipe("scan", steps=150, decay=70, **_SMALL),
    "answering": Recipe("answering", steps=350, decay=150, **_SMALL),
    "painter": Recipe("painter", steps=220, decay=100, **_SMALL),
}


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training is: steps done of at most so many, mean losses, the last validation figures."""

    model: str
    stage: str
    step: int
    steps: int
    seconds: float
    losses: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


Listener = Callable[[TrainingProgress], None]


@dataclass
class _State:
    """All that a training goes on from, beside weights and optimizer: the steps done, and when decay began."""

    step: int = 0
    decay_from: int | None = None
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)


class Training:
    """One training: call `advance` until it is `done`.

    Samples, where the recipe has some, were prepared into `data_folder(folder)` before. Each of several processes has
    a training of its own with its share; the first one examines and writes.
    """

    def __init__(
        self, recipe: Recipe, seed: int, folder: Path, listener: Listener | None = None, share: Share = ALONE
    ) -> None:
        torch.set_num_threads(1)
        self.recipe, self.seed, self.folder = recipe, seed, folder
        self._tell = listener or (lambda progress: None)
        self._share = share
        self.prepared = open_prepared(data_folder(recipe, folder)) if recipe.samples else None
        encoders = Path(recipe.encoders) if recipe.encoders else None
        self._encoders = {} if encoders is None else {"encoders": weights_digest(encoders)}
        torch.manual_seed(seed)
        self.learner = build_learner(recipe.model, recipe.alignment, recipe.sizes(self.prepared), encoders)
        self.learner.without = frozenset(recipe.without) | untold_losses(recipe)
        self.learner.share = share
        self.learner.to(device_of(recipe, share.number))
        matrices = [p for p in self.learner.parameters() if p.ndim >= 2]
        rest = [p for p in self.learner.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6)
        self._state = _State()
        self._corpus: Learnable | None = None
        self._validation: Learnable | None = None

    @property
    def done(self) -> bool:
        """Whether the last step is behind it."""
        return self._state.step >= self._last_step

    @property
    def begun(self) -> bool:
        """Whether its folder has a checkpoint, of this training or another one."""
        return self._checkpoint.is_file()

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def decay_from(self) -> int | None:
        """The step from which the rate fell, when it has begun to."""
        return self._state.decay_from

    @property
    def seconds(self) -> float:
        """Seconds of processor time that the training took, those before it was resumed included."""
        return self._state.seconds

    @property
    def _last_step(self) -> int:
        decay_from = self._state.decay_from
        return (self.recipe.steps if decay_from is None else decay_from) + self.recipe.decay

    def advance(self, steps: int | None = None) -> None:
        """Train for so many steps (until the end), with a checkpoint at every examination."""
        if self.done:
            return
        last = self._last_step if steps is None else self._state.step + steps
        if self._corpus is None:
            started = time.process_time()
            self._report("drawing scenes" if self.prepared is None else "opening samples")
            self._corpus, self._validation = self.corpus("train"), self.corpus("validation")
            if not self._state.step:
                self.learner.prepare(self._corpus)
            self._state.seconds += time.process_time() - started
        losses: list[dict[str, float]] = []
        while not self.done and self._state.step < last:
            started = time.process_time()
            losses.append(self._one_step())
            self._state.step += 1
            if self._state.step % self.recipe.examine_every == 0 or self.done:
                if self._share.number == 0:
                    self._examine()
                    self._state.seconds += time.process_time() - started
                    self.save()
                self._state.decay_from = self._share.agree(self._state.decay_from)
                means = torch.tensor([[*one.values()] for one in losses], device=self.learner.device).mean(0)
                self._share.average([means])
                self._report("training", dict(zip(losses[0], means.tolist(), strict=True)))
                losses.clear()
            else:
                self._state.seconds += time.process_time() - started

    def corpus(self, split: str) -> Learnable:
        """What it learns from ('train') or is examined on ('validation')."""
        if self.prepared is not None:
            return self.prepared.split(split)
        return _scenes(split, self.recipe.scenes if split == "train" else self.recipe.validation_scenes)

    def _one_step(self) -> dict[str, float]:
        state, recipe = self._state, self.recipe
        if state.decay_from is None and state.step >= recipe.steps:
            state.decay_from = state.step
        rate = recipe.peak_rate * min(1.0, (state.step + 1) / recipe.warm_up)
        if state.decay_from is not None:
            rate *= 1 - (state.step - state.decay_from) / recipe.decay
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.Generator(np.random.PCG64([WORLD_VERSION, self.seed, state.step]))
        share = HARD_SHARE if state.step >= recipe.hard_from else 0.0
        losses = self._losses(rng, share)
        self._optimizer.zero_grad()
        sum(losses.values(), torch.zeros((), device=self.learner.device)).backward()
        self._share.average([p.grad for p in self.learner.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(self.learner.parameters(), recipe.clip)
        self._optimizer.step()
        self.learner.follow(state.step + 1)
        return {name: loss.item() for name, loss in losses.items()}

    def _losses(self, rng: Generator, hard_share: float) -> dict[str, Tensor]:
        recipe, learner = self.recipe, self.learner
        batch = {"batch": recipe.batch} if recipe.batch else {}
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            losses = LESSONS[recipe.model].losses(learner, self._corpus, rng, hard_share, **batch)
        return {name: loss for name, loss in losses.items() if name not in learner.without}

    def _examine(self) -> None:
        assert self._validation is not None
        self.learner.eval()
        self._state.figures = self._figures(self._validation)
        self.learner.train()
        if unknown := sorted(self.recipe.goals.keys() - self._state.figures.keys()):
            known = ", ".join(self._state.figures)
            raise ReferenceError(f"goal {unknown[0]!r} is no figure of {self.recipe.model}; its figures are {known}")
        reached = all(self._state.figures[name] >= goal for name, goal in self.recipe.goals.items())
        if self.recipe.goals and reached and self._state.decay_from is None:
            self._state.decay_from = self._state.step

    def _figures(self, corpus: Learnable) -> dict[str, float]:
        lessons = LESSONS[self.recipe.model]
        if self.prepared is not None and lessons.examine_pairs is not None:
            found = lessons.examine_pairs(self.learner, corpus)
            return {name: float(items.values.mean()) for name, items in found.items()}
        # Generated scenes are examined on the processor.
        device = self.learner.device
        figures = lessons.figures(self.learner.cpu(), corpus)
        self.learner.to(device)
        return figures

    def _report(self, stage: str, losses: Mapping[str, float] | None = None) -> None:
        state = self._state
        self._tell(
            TrainingProgress(
                self.recipe.model, stage, state.step, self._last_step, state.seconds, losses or {}, state.figures
            )
        )

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        tensors: dict[str, Tensor] = {f"weights/{n}": p.detach() for n, p in self.learner.named_parameters()}
        for name, parameter in self.learner.named_parameters():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        tensors |= {f"kept/{name}": value for name, value in self._kept()}
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._checkpoint.with_suffix(".unfinished")
        state = vars(self._state) | self._key
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, unfinished, {"state": json.dumps(state)})
        unfinished.replace(self._checkpoint)

    @property
    def _key(self) -> dict[str, JsonValue]:
        """What a checkpoint must be of for this training to go on from it."""
        data = {} if self.prepared is None else {"data": self.prepared.digest}
        return {"recipe": self.recipe.key, "seed": self.seed, **data, **self._encoders}

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        """What the learner keeps beside its parameters."""
        parameters = {name for name, _ in self.learner.named_parameters()}
        state = self.learner.state_dict()
        return ((name, state[name]) for name, _ in self.learner.named_buffers() if name in state.keys() - parameters)

    def resume(self) -> bool:
        """Go on from the folder's checkpoint; False where it has none of this recipe and seed."""
        if not self.begun:
            return False
        with safe_open(self._checkpoint, "pt") as file:
            state = json.loads(file.metadata()["state"])
            if {key: state.pop(key, None) for key in self._key} != self._key:
                return False
            there = set(file.keys())
            with torch.no_grad():
                for name, parameter in self.learner.named_parameters():
                    parameter.copy_(file.get_tensor(f"weights/{name}"))
                    # A parameter that no loss reaches has none.
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in there]
                    state_of = {key: file.get_tensor(f"{key}/{name}") for key in keys}
                    moved = {key: value.to(parameter.device) for key, value in state_of.items() if key != "step"}
                    self._optimizer.state[parameter] = state_of | moved
                for name, value in self._kept():
                    value.copy_(file.get_tensor(f"kept/{name}"))
        self._state = _State(**state)
        return True


def data_folder(recipe: Recipe, folder: Path) -> Path:
    """Where the samples of a training in a folder are prepared: beside it, unless the recipe names prepared ones."""
    source = Path(recipe.samples)
    return source if (source / RECORD).is_file() else folder.parent / "data"


def prepare_samples(recipe: Recipe, folder: Path, tell: Callable[[int], None] | None = None) -> Prepared:
    """Prepare the samples of a recipe for a training in a folder, or open what is prepared."""
    place = data_folder(recipe, folder)
    source = open_prepared(place).source if place == Path(recipe.samples) else recipe.samples
    return prepare(source, place, recipe.shape, tell)


def device_of(recipe: Recipe, number: int) -> torch.device:
    """The device that the process of this number computes on."""
    return torch.device(recipe.device, number) if recipe.device == "cuda" else torch.device(recipe.device)


def untold_losses(recipe: Recipe) -> frozenset[str]:
    """The losses that can't be asked for, because samples don't tell what they need."""
    return frozenset(LESSONS[recipe.model].names) & WORLD_LOSSES.keys() if recipe.samples else frozenset()


@lru_cache(maxsize=2)
def _scenes(split: str, count: int) -> Corpus:
    """The first scenes of a split, drawn once for all trainings of a process that come one after the other."""
    return build_corpus(split, range(count))


def _joint_figures(learner: JointLearner, corpus: Corpus) -> dict[str, float]:
    matching = _means(examine_matching(learner, corpus), "matching_")
    return _word_figures(learner, corpus) | matching | _answer_figures(learner, corpus)


def _mapper_figures(learner: Mapper, corpus: Corpus) -> dict[str, float]:
    return _means(examine_captions(learner, corpus), "captions_") | _answer_figures(learner, corpus)


def _word_figures(learner: JointLearner, corpus: Corpus) -> dict[str, float]:
    found = examine_words(learner, corpus)
    return {f"words_{role}": float(items["accuracy"].values.mean()) for role, items in found.items()}


def _retrieval_figures(learner: Retriever, corpus: Corpus) -> dict[str, float]:
    return _means(examine_retrieval(learner, corpus))


def _scan_figures(learner: Scan, corpus: Corpus) -> dict[str, float]:
    return _means(examine_scan(learner, corpus))


def _answer_figures(learner: JointLearner, corpus: Corpus) -> dict[str, float]:
    return _means(examine_answers(learner, corpus), "answers_")


def _paint_figures(learner: Painter, corpus: Corpus) -> dict[str, float]:
    return _means(examine_pixels(learner, corpus))


def _means(examined: Mapping[str, Items], prefix: str = "") -> dict[str, float]:
    return {f"{prefix}{name}": float(items.values.mean()) for name, items in examined.items()}


def _simla_figures(learner: Simla, corpus: Corpus) -> dict[str, float]:
    matching = _means(examine_matching(learner, corpus), "matching_")
    return _retrieval_figures(learner, corpus) | _word_figures(learner, corpus) | matching


@dataclass(frozen=True)
class _Lessons:
    """How a kind of model is taught: the losses of one step with their names, and figures that goals are set for.

    With `examine_pairs`, which gives such figures of pairs, it learns from samples as well, at any size, in several
    processes and on any device: its losses then take a `batch`, ask nothing but what `Learnable` has, and heed the
    learner's `share` and `device`. `sees` is what it needs of samples beside texts. With `alone_on_scenes` it learns
    from generated scenes all the same at its own batch, in float32 and in one process on the processor. With `encoders`
    it stands behind those of a clip, which decide on its sizes: the carried one, or one that learned from the same
    samples.
    """

    names: tuple[str, ...]
    losses: Callable[..., dict[str, Tensor]]
    figures: Callable[..., dict[str, float]]
    examine_pairs: Callable[..., dict[str, Items]] | None = None
    sees: Literal["images", "regions", ""] = "images"
    alone_on_scenes: bool = False
    encoders: bool = False


_JOINT = _Lessons(
    ("words", "match", "answers", "hidden_units", "units"),
    joint_losses,
    _joint_figures,
    examine_joint_pairs,
    alone_on_scenes=True,
)
LESSONS = {
    "vilt": _JOINT,
    "lxmert": dataclasses.replace(_JOINT, sees="regions"),
    "clip": _Lessons(("images", "texts", "units"), contrastive_losses, _retrieval_figures, examine_pair_retrieval),
    "text": _Lessons(("words",), word_losses, _word_figures, examine_pair_words, sees=""),
    "simla": _Lessons(simla_lessons.LOSSES, simla_lessons.simla_losses, _simla_figures, examine_pair_retrieval),
    "mapper": _Lessons(
        ("answers", "captions", "units"),
        mapper_losses,
        _mapper_figures,
        examine_pair_captions,
        alone_on_scenes=True,
        encoders=True,
    ),
    "scan": _Lessons(("match", "units"), scan_losses, _scan_figures),
    "answering": _Lessons(("answers", "units"), answer_losses, _answer_figures),
    "painter": _Lessons(("pixels",), paint_losses, _paint_figures),
}
