"""From a recipe to a model's folder with its card, in two stages that a flow calls as tasks."""

import dataclasses
import platform
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import transformers
from pydantic import JsonValue
from torch import nn

from attnscope.reference.alignments import check_alignment
from attnscope.reference.cards import card_page
from attnscope.reference.corpus import Corpus, build_corpus
from attnscope.reference.examining import (
    Figure,
    Items,
    examine_answers,
    examine_matching,
    examine_retrieval,
    examine_units,
    examine_words,
    hide_everything,
    hide_thing,
)
from attnscope.reference.inspecting import examine_attention
from attnscope.reference.judging import examine_painting
from attnscope.reference.learners import JointLearner, Seen
from attnscope.reference.scan import examine_scan
from attnscope.reference.scenes import WORLD_VERSION
from attnscope.reference.settings import SCORED
from attnscope.reference.training import LESSONS, RECIPES, Listener, Recipe, Training
from attnscope.reference.weights import read_learner, weights_digest, write_json, write_model

Figures = dict[str, Figure]
Receipt = dict[str, JsonValue]
_EXAMINED = 512
_CHECKPOINTS = "training"


class ReferenceError(ValueError):
    """A model that can't be made; the message is one sentence."""


def recipe_of(name: str, changes: Mapping[str, object] | None = None) -> Recipe:
    """The recipe of a model, with some of its fields changed.

    Raises
    ------
    ReferenceError
        When there is no such model, or its recipe has no such field or loss.
    AlignmentError
        When there is no such score.
    """
    if name not in RECIPES:
        raise ReferenceError(f"unknown reference model {name!r}; known: {', '.join(RECIPES)}")
    known = {field.name for field in dataclasses.fields(Recipe)} - {"model"}
    if unknown := sorted(set(changes or ()) - known):
        raise ReferenceError(f"a recipe has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    recipe = dataclasses.replace(RECIPES[name], **(changes or {}))  # type: ignore[arg-type]
    if unknown := sorted(set(recipe.without) - set(LESSONS[name].names)):
        raise ReferenceError(f"{name} has no loss {unknown[0]!r}; its losses are {', '.join(LESSONS[name].names)}")
    if recipe.alignment and name not in SCORED:
        raise ReferenceError(f"{name} has its own score in its attention; {', '.join(SCORED)} take another")
    if recipe.alignment:
        check_alignment(recipe.alignment)
    # As JSON gives it, it is a list.
    return dataclasses.replace(recipe, without=tuple(recipe.without))


def train(recipe: Recipe, seed: int, out: str, listener: Listener | None = None) -> Receipt:
    """Train into a folder, or finish what was begun there with the same recipe and seed."""
    training = Training(recipe, seed, Path(out) / _CHECKPOINTS, listener)
    resumed = training.resume()
    training.advance()
    write_model(recipe.model, training.learner, Path(out), recipe.alignment)
    return {"model": recipe.model, "steps": training.step, "seconds": round(training.seconds), "resumed": resumed}


def examine(recipe: Recipe, seed: int, out: str, scenes: int = _EXAMINED) -> Receipt:
    """Examine the model in a folder on scenes that it never saw, and write its card."""
    folder = Path(out)
    training = Training(recipe, seed, folder / _CHECKPOINTS)
    if not (training.resume() and training.done):
        raise ReferenceError(f"{out!r} holds no finished training of this recipe and seed; run the training first")
    learner = read_learner(recipe.model, folder)
    figures = {
        split: {
            name: dataclasses.asdict(figure) for name, figure in model_figures(recipe.model, learner, corpus).items()
        }
        for split, corpus in ((split, build_corpus(split, range(scenes))) for split in ("test", "hard"))
    }
    card = {
        "model": recipe.model,
        "seed": seed,
        "parameters": sum(p.numel() for p in learner.parameters()),
        "recipe": dataclasses.asdict(recipe),
        "world_version": WORLD_VERSION,
        "steps": training.step,
        "decay_from": training.decay_from,
        "processor_seconds": round(training.seconds),
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "examined_scenes": scenes,
        "interval": "95 % bootstrap over scenes",
        "figures": figures,
        "licence": "Apache-2.0",
        "digest": weights_digest(folder),
    }
    write_json(folder / "card.json", card)
    (folder / "README.md").write_text(card_page(card), encoding="utf-8")
    return {"model": recipe.model, "card": str(folder / "README.md"), "digest": weights_digest(folder)}


def model_figures(name: str, learner: nn.Module, corpus: Corpus) -> Figures:
    """All figures of a model on a corpus, by name; bits are surprise, the rest are parts from 0 to 1."""
    return {key: items.figure() for part in _EXAMINATIONS[name] for key, items in part(learner, corpus).items()}


def _prefixed(prefix: str, examined: Callable[..., dict[str, Items]]) -> Callable[..., dict[str, Items]]:
    return lambda learner, corpus: {f"{prefix}_{key}": items for key, items in examined(learner, corpus).items()}


def _words(learner: JointLearner, corpus: Corpus, condition: str = "") -> dict[str, Items]:
    change = _CONDITIONS[condition]
    examined = examine_words(learner, corpus, None if change is None else partial(change, learner, corpus))
    name = f"words{condition}"
    return {f"{name}_{role}_{what}": items for role, found in examined.items() for what, items in found.items()}


_CONDITIONS: dict[str, Callable[..., Seen] | None] = {
    "": None,
    "_without_object": hide_thing,
    "_without_image": hide_everything,
}

_JOINT: tuple[Callable[..., dict[str, Items]], ...] = (
    _words,
    partial(_words, condition="_without_object"),
    partial(_words, condition="_without_image"),
    _prefixed("matching", examine_matching),
    _prefixed("answers", examine_answers),
    _prefixed("hidden_units", examine_units),
    _prefixed("hidden_units_without_words", partial(examine_units, words_masked=True)),
)
_EXAMINATIONS: dict[str, tuple[Callable[..., dict[str, Items]], ...]] = {
    "vilt": _JOINT,
    "lxmert": _JOINT,
    "clip": (examine_retrieval,),
    "text": (_words,),
    "scan": (examine_scan, examine_attention),
    "answering": (_prefixed("answers", examine_answers), examine_attention),
    "painter": (examine_painting, examine_attention),
}
