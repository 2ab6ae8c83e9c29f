"""From a recipe to a model's folder with its card, in two stages that a flow calls as tasks."""

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import transformers
from pydantic import JsonValue
from torch import nn

from attnscope.reference.alignments import check_alignment
from attnscope.reference.cards import card_page
from attnscope.reference.checking import ReferenceError, batch_of, check_values
from attnscope.reference.corpus import VOCABULARY, Corpus, build_corpus
from attnscope.reference.encoders import check_vocabulary, encoder_sizes
from attnscope.reference.examining import (
    Figure,
    Items,
    examine_answers,
    examine_captions,
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
from attnscope.reference.lessons import WORLD_LOSSES
from attnscope.reference.pairs import RECORD, SPLITS, Prepared, Shape, left_out, open_prepared
from attnscope.reference.pairs import prepare as prepare_pairs
from attnscope.reference.scan import examine_scan
from attnscope.reference.scenes import WORLD_VERSION
from attnscope.reference.settings import SCORED
from attnscope.reference.simla_examining import examine_grounding, examine_ranking, examine_reconstruction
from attnscope.reference.spreading import train_spread
from attnscope.reference.training import (
    LESSONS,
    RECIPES,
    Listener,
    Recipe,
    Training,
    TrainingProgress,
    data_folder,
    prepare_samples,
    untold_losses,
)
from attnscope.reference.weights import (
    KEPT_HEADS,
    WORLD_HEADS,
    read_learner,
    weights_digest,
    write_json,
    write_model,
)
from attnscope.samples import SampleError

Figures = dict[str, Figure]
Receipt = dict[str, JsonValue]
_EXAMINED = 512
_CHECKPOINTS = "training"


def recipe_of(name: str, changes: Mapping[str, object] | None = None) -> Recipe:
    """The recipe of a model, with some of its fields changed; goals of generated scenes are none for samples.

    What a folder of prepared samples or of encoders has decided, such as the side of images, need not be said again.

    Raises
    ------
    ReferenceError
        When there is no such model, its recipe has no such field or loss, no loss is left, or a value can't be.
    AlignmentError
        When there is no such score.
    """
    if name not in RECIPES:
        raise ReferenceError(f"unknown reference model {name!r}; known: {', '.join(RECIPES)}")
    known = {field.name for field in dataclasses.fields(Recipe)} - {"model"}
    if unknown := sorted(set(changes or ()) - known):
        raise ReferenceError(f"a recipe has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    changes = _decided(name, changes or {}) | dict(changes or {})
    recipe = dataclasses.replace(RECIPES[name], **changes)  # type: ignore[arg-type]
    check_values(recipe)
    if recipe.samples and "goals" not in changes:
        recipe = dataclasses.replace(recipe, goals={})
    if unknown := sorted(set(recipe.without) - set(LESSONS[name].names)):
        raise ReferenceError(f"{name} has no loss {unknown[0]!r}; its losses are {', '.join(LESSONS[name].names)}")
    if set(LESSONS[name].names) <= set(recipe.without) | untold_losses(recipe):
        raise ReferenceError(f"{name} has no loss left to learn from; its losses are {', '.join(LESSONS[name].names)}")
    if recipe.alignment and name not in SCORED:
        raise ReferenceError(f"{name} has its own score in its attention; {', '.join(SCORED)} take another")
    if recipe.alignment:
        check_alignment(recipe.alignment)
    # As JSON gives it, it is a list.
    return dataclasses.replace(recipe, without=tuple(recipe.without))


def _decided(name: str, changes: Mapping[str, object]) -> dict[str, object]:
    """The fields of a recipe that folders of prepared samples and of encoders, if it names such, have decided."""
    source, encoders = changes.get("samples"), changes.get("encoders")
    sizes: dict[str, object] = {}
    if source and isinstance(encoders, str) and encoders and LESSONS[name].encoders:
        sizes |= encoder_sizes(encoders)
    if not isinstance(source, str) or not (Path(source) / RECORD).is_file():
        return sizes
    found = dataclasses.asdict(open_prepared(Path(source)).shape)
    side, _ = found.pop("side"), found.pop("regions")
    found["validation_scenes"] = found.pop("held_out")
    return sizes | found | ({"side": side} if LESSONS[name].sees == "images" else {})


def train(recipe: Recipe, seed: int, out: str, listener: Listener | None = None) -> Receipt:
    """Train into a folder, or finish what was begun there with the same recipe and seed.

    Samples are prepared into `OUT/data` first, unless they are prepared already. The receipt's `notes` are sentences
    about what was left out.

    Raises
    ------
    SampleError
        When the samples can't be learned from.
    ReferenceError
        When the folder holds a training of other samples, another recipe or seed, and samples are learned from.
    """
    folder = Path(out) / _CHECKPOINTS
    notes = _prepare(recipe, folder, listener)
    training = Training(recipe if recipe.processes == 1 else _on_processor(recipe), seed, folder, listener)
    resumed = training.resume()
    if recipe.samples and not resumed and training.begun:
        raise ReferenceError(f"{out!r} holds a training of another recipe, seed or data; name another folder")
    if recipe.processes > 1 and not training.done:
        train_spread(recipe, seed, folder, listener)
        training.resume()
    training.advance()
    words = VOCABULARY if training.prepared is None else training.prepared.vocabulary
    learner = training.learner.cpu()
    of_samples = bool(recipe.samples)
    write_model(recipe.model, learner, Path(out), vocabulary=words, of_samples=of_samples, alignment=recipe.alignment)
    receipt: Receipt = {"model": recipe.model, "steps": training.step, "seconds": round(training.seconds)}
    return {**receipt, "resumed": resumed, "notes": [*notes]}


def _on_processor(recipe: Recipe) -> Recipe:
    """The same in one process on the processor, for reading what was trained."""
    return dataclasses.replace(recipe, processes=1, device="cpu")


def prepare(source: str, out: str, shape: Shape, listener: Listener | None = None) -> Receipt:
    """Prepare samples into a folder, which recipes can name as theirs.

    Raises
    ------
    SampleError
        When the samples can't be learned from.
    """
    prepared = prepare_pairs(source, Path(out), shape, _teller("samples", 0, listener))
    return {"folder": out, "samples": prepared.count, "digest": prepared.digest, "notes": [*_shortfalls(prepared)]}


def _prepare(recipe: Recipe, folder: Path, listener: Listener | None) -> list[str]:
    """Prepare the samples of a recipe where it has some, and say what was left out."""
    if not recipe.samples:
        return []
    prepared = prepare_samples(recipe, folder, _teller(recipe.model, recipe.steps, listener))
    usable, batch = len(prepared.split("train")), batch_of(recipe)
    if usable < batch:
        raise SampleError(f"samples {recipe.samples!r} leave {usable} to learn from, fewer than a batch of {batch}")
    if recipe.encoders:
        check_vocabulary(recipe, prepared)
    untold = sorted(untold_losses(recipe))
    needed = ", ".join(f"{name} (it needs {WORLD_LOSSES[name]})" for name in untold)
    told = [f"without the loss of {needed}, which samples don't tell"] if untold else []
    return [*_shortfalls(prepared), *told]


def _teller(name: str, steps: int, listener: Listener | None) -> Callable[[int], None]:
    def tell(seen: int) -> None:
        if listener is not None:
            listener(TrainingProgress(name, f"preparing, {seen:,} read", 0, steps, 0.0))

    return tell


def _shortfalls(prepared: Prepared) -> Iterator[str]:
    """Sentences about what samples lack."""
    if prepared.left_out:
        name, problem = next(left_out(prepared))
        yield (
            f"{prepared.left_out:,} of {prepared.count + prepared.left_out:,} samples were left out, first {name!r}:"
            f" {problem}; all are named in {prepared.left_out_at}"
        )
    if prepared.cut:
        yield f"{prepared.cut:,} texts were cut to {prepared.shape.length} tokens"
    if prepared.boxless:
        yield (
            f"{prepared.boxless:,} of {prepared.count:,} samples name no box; their regions are the same parts of every"
            " image"
        )


def examine(recipe: Recipe, seed: int, out: str, scenes: int = _EXAMINED) -> Receipt:
    """Examine the model in a folder on scenes or samples that it never saw, and write its card.

    `scenes` are how many of each split of the generated world; of samples, all that are held out as 'test' are taken.
    """
    folder = Path(out)
    training = _finished(recipe, seed, folder)
    learner = read_learner(recipe.model, folder)
    heads = WORLD_HEADS + KEPT_HEADS
    untaught = {n for n, _ in learner.named_parameters() if recipe.samples and n.startswith(heads)}
    figures = {
        split: {name: dataclasses.asdict(figure) for name, figure in found.items()}
        for split, found in _figures_by_split(recipe, training, learner, scenes).items()
    }
    card = {
        "model": recipe.model,
        "seed": seed,
        "parameters": sum(p.numel() for name, p in learner.named_parameters() if name not in untaught),
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
    if training.prepared is not None:
        card |= _of_samples(training.prepared)
    write_json(folder / "card.json", card)
    (folder / "README.md").write_text(card_page(card), encoding="utf-8")
    return {"model": recipe.model, "card": str(folder / "README.md"), "digest": weights_digest(folder)}


def _finished(recipe: Recipe, seed: int, folder: Path) -> Training:
    there = not recipe.samples or (data_folder(recipe, folder / _CHECKPOINTS) / RECORD).is_file()
    training = Training(_on_processor(recipe), seed, folder / _CHECKPOINTS) if there else None
    if training is None or not (training.resume() and training.done):
        raise ReferenceError(f"{str(folder)!r} holds no finished training of this recipe and seed; train first")
    return training


def _figures_by_split(recipe: Recipe, training: Training, learner: nn.Module, scenes: int) -> dict[str, Figures]:
    examine_pairs = LESSONS[recipe.model].examine_pairs
    if training.prepared is not None and examine_pairs is not None:
        found = examine_pairs(learner, training.prepared.split("test"))
        return {"test": {name: items.figure() for name, items in found.items()}}
    return {
        split: model_figures(recipe.model, learner, build_corpus(split, range(scenes))) for split in ("test", "hard")
    }


def _of_samples(prepared: Prepared) -> dict[str, object]:
    """What a card says of samples in the place of the generated world."""
    sizes = {split: len(prepared.split(split)) for split in SPLITS}
    return {
        "world_version": None,
        "samples": {
            "source": prepared.source,
            "digest": prepared.digest,
            "left_out": prepared.left_out,
            "cut_texts": prepared.cut,
            "vocabulary": len(prepared.vocabulary),
            **sizes,
        },
        "examined_scenes": sizes["test"],
        "interval": "95 % bootstrap over samples",
        "licence": "",
    }


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

_JOINT_WORDS = (_words, partial(_words, condition="_without_object"), partial(_words, condition="_without_image"))
_JOINT: tuple[Callable[..., dict[str, Items]], ...] = (
    *_JOINT_WORDS,
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
    "simla": (
        _prefixed("matching", examine_ranking),
        _prefixed("similarity", examine_retrieval),
        *_JOINT_WORDS,
        _prefixed("matching", examine_matching),
        _prefixed("grounding", examine_grounding),
        examine_reconstruction,
    ),
    "mapper": (_prefixed("answers", examine_answers), _prefixed("captions", examine_captions)),
    "scan": (examine_scan, examine_attention),
    "answering": (_prefixed("answers", examine_answers), examine_attention),
    "painter": (examine_painting, examine_attention),
}
