"""What a recipe may hold: each field by itself, and what must go together."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

import torch

from attnscope.reference.encoders import check_sizes
from attnscope.reference.pairs import TOKENIZERS
from attnscope.reference.training import LESSONS, RECIPES, Recipe, ReferenceError

# What a value must be, where the field's own value is of a kind.
_KINDS: dict[type, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    str: (str,),
    dict: (Mapping,),
    tuple: (tuple, list),
}
# Fields that only models take which learn from samples, and of them those that generated scenes have one value of.
_HOW = ("batch", "dtype", "device", "processes")
_OPEN = (
    *("samples", "tokenizer", "vocabulary", "side", "patch", "width", "heads", "layers", "text_layers", "length"),
    *_HOW,
)
_OF_SAMPLES = ("tokenizer", "vocabulary", "side", "patch", "length")
_OF_ENCODERS = ("width", "heads", "layers", "text_layers")
_CHOICES = {"tokenizer": TOKENIZERS, "dtype": ("float32", "bfloat16"), "device": ("cpu", "cuda")}
_LEAST = {"steps": 0, "batch": 0, "hard_from": 0, "vocabulary": 6, "length": 3, "validation_scenes": 1}
_LEAST |= dict.fromkeys(("side", "patch", "width", "heads", "layers", "text_layers", "processes", "decay"), 1)
_LEAST |= dict.fromkeys(("warm_up", "examine_every", "scenes"), 1)


def check_values(recipe: Recipe) -> None:
    """Refuse a recipe that can't be followed.

    Raises
    ------
    ReferenceError
        For the first value that can't be.
    """
    for field in dataclasses.fields(Recipe):
        _check_value(field, getattr(recipe, field.name), getattr(RECIPES[recipe.model], field.name))
    changed = [name for name in _OPEN if getattr(recipe, name) != getattr(RECIPES[recipe.model], name)]
    if changed and LESSONS[recipe.model].examine_pairs is None:
        able = ", ".join(name for name, lessons in LESSONS.items() if lessons.examine_pairs)
        raise ReferenceError(
            f"{recipe.model} learns from generated scenes alone, at one size, in one process;"
            f" {able} take {changed[0]!r}"
        )
    own = [name for name in changed if name in _HOW and LESSONS[recipe.model].alone_on_scenes]
    if own and not recipe.samples:
        raise ReferenceError(
            f"{recipe.model} learns from generated scenes at its own batch, in float32, in one process on the"
            f" processor; name samples for another {own[0]!r}"
        )
    fixed = [name for name in changed if name in _OF_SAMPLES]
    if fixed and not recipe.samples:
        own = getattr(RECIPES[recipe.model], fixed[0])
        raise ReferenceError(f"{fixed[0]!r} of generated scenes is {own!r}; name samples for another value")
    theirs = [name for name in changed if name in _OF_ENCODERS and LESSONS[recipe.model].encoders]
    if theirs and not recipe.samples:
        raise ReferenceError(f"{recipe.model} has the {theirs[0]!r} of its encoders; name samples for other ones")
    for wrong, sentence in _TOGETHER:
        if wrong(recipe):
            raise ReferenceError(sentence.format(recipe=recipe, batch=batch_of(recipe), devices=_devices()))
    if recipe.encoders:
        check_sizes(recipe)


def _check_value(field: "dataclasses.Field[object]", value: object, own: object) -> None:
    kinds = _KINDS[type(own)]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ReferenceError(f"the recipe's {field.name!r} is {value!r}, not a {kinds[-1].__name__.lower()}")
    if field.name in _CHOICES and value not in _CHOICES[field.name]:
        raise ReferenceError(f"the recipe's {field.name!r} is {value!r}; it can be {', '.join(_CHOICES[field.name])}")
    least = _LEAST.get(field.name)
    if least is not None and isinstance(value, int) and value < least:
        raise ReferenceError(f"the recipe's {field.name!r} is {value}, below {least}")


def batch_of(recipe: Recipe) -> int:
    """How many scenes or pairs a step takes; 0 where the lesson doesn't say."""
    batch = inspect.signature(LESSONS[recipe.model].losses).parameters.get("batch")
    return recipe.batch or (0 if batch is None else batch.default)


def _devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


_TOGETHER: tuple[tuple[Callable[[Recipe], bool], str], ...] = (
    (
        lambda r: bool(r.encoders) and not LESSONS[r.model].encoders,
        "{recipe.model} has encoders of its own; mapper takes 'encoders'",
    ),
    (
        lambda r: bool(r.encoders) and not r.samples,
        "{recipe.model} learns from generated scenes behind reference:clip; name samples for other 'encoders'",
    ),
    (
        lambda r: bool(r.samples) and LESSONS[r.model].encoders and not r.encoders,
        "{recipe.model} learns from samples behind a clip that was trained on them; name its folder as 'encoders'",
    ),
    (
        lambda r: LESSONS[r.model].sees == "images" and r.side % r.patch != 0,
        "a side of {recipe.side} pixels isn't made of patches of {recipe.patch}",
    ),
    (lambda r: r.width % r.heads != 0, "a width of {recipe.width} can't be shared by {recipe.heads} heads"),
    (lambda r: r.width % 4 != 0, "a width of {recipe.width} isn't a multiple of 4, which positions need"),
    (
        # Half as many wrong captions as scenes are shared as well.
        lambda r: batch_of(r) % (r.processes if r.samples or r.processes == 1 else 2 * r.processes) != 0,
        "a batch of {batch} can't be shared equally by {recipe.processes} processes",
    ),
    (
        lambda r: r.device == "cuda" and r.processes > _devices(),
        "{recipe.processes} process(es) on cuda need a device each, and there are {devices}",
    ),
)
