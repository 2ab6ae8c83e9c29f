"""From a recipe and a seed to trained weights: the same to the bit each time, whether or not it was cut short."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attnscope.reference.answering import answer_losses
from attnscope.reference.corpus import Corpus, build_corpus
from attnscope.reference.examining import (
    Items,
    examine_answers,
    examine_matching,
    examine_retrieval,
    examine_words,
)
from attnscope.reference.learners import Clip, JointLearner
from attnscope.reference.lessons import HARD_SHARE, contrastive_losses, joint_losses, word_losses
from attnscope.reference.painter import Painter, examine_pixels, paint_losses
from attnscope.reference.scan import Scan, examine_scan, scan_losses
from attnscope.reference.scenes import WORLD_VERSION
from attnscope.reference.settings import build_learner


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Hard scenes are asked about from step `hard_from`. The rate rises over `warm_up` steps to its peak and stays there
    until the validation figures reach all `goals`, or for `steps` at most; then it falls to zero over `decay` steps.
    `without` names losses that are left out. `alignment` is the score of its attention (see ALIGNMENTS), the model's
    own where it is empty.
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
    alignment: str = ""


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
    """One training: call `advance` until it is `done`."""

    def __init__(self, recipe: Recipe, seed: int, folder: Path, listener: Listener | None = None) -> None:
        torch.set_num_threads(1)
        self.recipe, self.seed, self.folder = recipe, seed, folder
        self._tell = listener or (lambda progress: None)
        torch.manual_seed(seed)
        self.learner = build_learner(recipe.model, recipe.alignment)
        self.learner.without = frozenset(recipe.without)
        matrices = [p for p in self.learner.parameters() if p.ndim >= 2]
        rest = [p for p in self.learner.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6)
        self._state = _State()
        self._corpus: Corpus | None = None
        self._validation: Corpus | None = None

    @property
    def done(self) -> bool:
        """Whether the last step is behind it."""
        return self._state.step >= self._last_step

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
            self._report("drawing scenes")
            self._corpus = _scenes("train", self.recipe.scenes)
            self._validation = _scenes("validation", self.recipe.validation_scenes)
            self._state.seconds += time.process_time() - started
        losses: list[dict[str, float]] = []
        while not self.done and self._state.step < last:
            started = time.process_time()
            losses.append(self._one_step())
            self._state.step += 1
            if self._state.step % self.recipe.examine_every == 0 or self.done:
                self._examine()
                self._state.seconds += time.process_time() - started
                self.save()
                self._report("training", {k: float(np.mean([one[k] for one in losses])) for k in losses[0]})
                losses.clear()
            else:
                self._state.seconds += time.process_time() - started

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
        losses = LESSONS[recipe.model].losses(self.learner, self._corpus, rng, share)
        losses = {name: loss for name, loss in losses.items() if name not in self.learner.without}
        self._optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), recipe.clip)
        self._optimizer.step()
        self.learner.follow(state.step + 1)
        return {name: loss.item() for name, loss in losses.items()}

    def _examine(self) -> None:
        assert self._validation is not None
        self.learner.eval()
        self._state.figures = LESSONS[self.recipe.model].figures(self.learner, self._validation)
        self.learner.train()
        reached = all(self._state.figures[name] >= goal for name, goal in self.recipe.goals.items())
        if self.recipe.goals and reached and self._state.decay_from is None:
            self._state.decay_from = self._state.step

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
        state = vars(self._state) | {"recipe": repr(self.recipe), "seed": self.seed}
        save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished, {"state": json.dumps(state)})
        unfinished.replace(self._checkpoint)

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        """What the learner keeps beside its parameters."""
        parameters = {name for name, _ in self.learner.named_parameters()}
        state = self.learner.state_dict()
        return ((name, state[name]) for name, _ in self.learner.named_buffers() if name in state.keys() - parameters)

    def resume(self) -> bool:
        """Go on from the folder's checkpoint; False where it has none of this recipe and seed."""
        if not self._checkpoint.is_file():
            return False
        with safe_open(self._checkpoint, "pt") as file:
            state = json.loads(file.metadata()["state"])
            if (state.pop("recipe"), state.pop("seed")) != (repr(self.recipe), self.seed):
                return False
            with torch.no_grad():
                for name, parameter in self.learner.named_parameters():
                    parameter.copy_(file.get_tensor(f"weights/{name}"))
                    self._optimizer.state[parameter] = {
                        key: file.get_tensor(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                    }
                for name, value in self._kept():
                    value.copy_(file.get_tensor(f"kept/{name}"))
        self._state = _State(**state)
        return True


@lru_cache(maxsize=2)
def _scenes(split: str, count: int) -> Corpus:
    """The first scenes of a split, drawn once for all trainings of a process that come one after the other."""
    return build_corpus(split, range(count))


def _joint_figures(learner: JointLearner, corpus: Corpus) -> dict[str, float]:
    examined = (("matching", examine_matching(learner, corpus)), ("answers", examine_answers(learner, corpus)))
    return _word_figures(learner, corpus) | {
        f"{prefix}_{name}": float(items.values.mean()) for prefix, found in examined for name, items in found.items()
    }


def _word_figures(learner: JointLearner, corpus: Corpus) -> dict[str, float]:
    found = examine_words(learner, corpus)
    return {f"words_{role}": float(items["accuracy"].values.mean()) for role, items in found.items()}


def _retrieval_figures(learner: Clip, corpus: Corpus) -> dict[str, float]:
    return _means(examine_retrieval(learner, corpus))


def _scan_figures(learner: Scan, corpus: Corpus) -> dict[str, float]:
    return _means(examine_scan(learner, corpus))


def _answer_figures(learner: JointLearner, corpus: Corpus) -> dict[str, float]:
    return {f"answers_{name}": value for name, value in _means(examine_answers(learner, corpus)).items()}


def _paint_figures(learner: Painter, corpus: Corpus) -> dict[str, float]:
    return _means(examine_pixels(learner, corpus))


def _means(examined: Mapping[str, Items]) -> dict[str, float]:
    return {name: float(items.values.mean()) for name, items in examined.items()}


@dataclass(frozen=True)
class _Lessons:
    """How a kind of model is taught: the losses of one step with their names, and figures that goals are set for."""

    names: tuple[str, ...]
    losses: Callable[..., dict[str, Tensor]]
    figures: Callable[..., dict[str, float]]


_JOINT = _Lessons(("words", "match", "answers", "hidden_units", "units"), joint_losses, _joint_figures)
LESSONS = {
    "vilt": _JOINT,
    "lxmert": _JOINT,
    "clip": _Lessons(("images", "texts", "units"), contrastive_losses, _retrieval_figures),
    "text": _Lessons(("words",), word_losses, _word_figures),
    "scan": _Lessons(("match", "units"), scan_losses, _scan_figures),
    "answering": _Lessons(("answers", "units"), answer_losses, _answer_figures),
    "painter": _Lessons(("pixels",), paint_losses, _paint_figures),
}
