"""Scenes of a split as arrays, as models learn them: pixels, words with their roles, questions, and true classes."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from attnscope.families.regions import boxes_of, crop_regions
from attnscope.reference.captions import (
    ANSWERS,
    QUESTIONS,
    Caption,
    ask,
    contradict,
    describe,
    is_determined,
    vocabulary,
)
from attnscope.reference.pictures import draw_picture
from attnscope.reference.sampling import PICTURE_SIZE, regions_of
from attnscope.reference.scenes import COLOURS, HARD, SHAPES, Scene, draw_scene

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, CLS, SEP, MASK = 0, 2, 3, 4
VOCABULARY = (*SPECIAL, *vocabulary())
LENGTH = 40
"""The most tokens of a text."""

SIDE, PATCH = 48, 12
GRID = SIDE // PATCH
REGIONS, REGION_SIDE = 9, 8
CLASSES = (*(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES), "ground")
GROUND = len(CLASSES) - 1
MOST_THINGS = max(HARD.counts)
ROLES = ("", "colour", "shape", "size", "relation", "place", "ground")
NEGATIVES = ("attribute", "order", "relation", "place")

_IDS = {word: number for number, word in enumerate(VOCABULARY)}
_ANSWERS = {answer: number for number, answer in enumerate(ANSWERS)}
# The least part of a patch that an object fills for the patch to be of its class.
_LEAST_PART = 0.15


@dataclass(frozen=True)
class Corpus:
    """Arrays over scenes; where there is nothing, ids are 0 (padding) and numbers -1.

    `pixels` (scene, row, column, colour) uint8; `patches` and `patch_things` (scene, patch): class and thing of each;
    `patch_shows` (scene, thing, patch): whether any of a thing is in it; `crops` (scene, region, row, column, colour)
    uint8, `boxes` (scene, region, 4) in parts of the side, `regions` and `region_things` (scene, region);
    `region_shows` (scene, thing, region): whether more than half of the thing's box is in it; `things` (scene, thing)
    classes, and whether each is `large` (scene, thing); `words` (scene, token)
    ids, `roles` (scene, token) in ROLES, `determined`, and `phrases` (scene, token): the thing that the token's phrase
    mentions; `negatives` (scene, kind, token); `questions` (scene, kind, token) and `answers` (scene, kind).
    """

    hard: np.ndarray
    pixels: np.ndarray
    patches: np.ndarray
    patch_things: np.ndarray
    patch_shows: np.ndarray
    crops: np.ndarray
    boxes: np.ndarray
    regions: np.ndarray
    region_things: np.ndarray
    region_shows: np.ndarray
    things: np.ndarray
    large: np.ndarray
    words: np.ndarray
    roles: np.ndarray
    determined: np.ndarray
    phrases: np.ndarray
    negatives: np.ndarray
    questions: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.words)


def build_corpus(split: str, numbers: Iterable[int]) -> Corpus:
    """The arrays of these scenes of a split."""
    rows = [_row(draw_scene(split, number)) for number in numbers]
    return Corpus(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def token_ids(caption: Caption) -> np.ndarray:
    """The ids (token,) of a text between CLS and SEP, padded."""
    ids = np.zeros(LENGTH, np.uint8)
    ids[: len(caption.words) + 2] = [CLS, *(_IDS[word] for word in caption.words), SEP]
    return ids


def _row(scene: Scene) -> dict[str, np.ndarray]:
    caption = describe(scene)
    picture, labels = draw_picture(scene, PICTURE_SIZE)
    image = Image.fromarray(picture)
    classes = np.array([CLASSES.index(" ".join(thing.pair)) for thing in scene.things] + [GROUND], np.int8)
    parts = _patch_parts(labels, len(scene.things))
    patch_things = np.where(parts.max(0) >= _LEAST_PART, parts.argmax(0), -1).astype(np.int8)
    boxes = boxes_of(regions_of(caption, labels, scene.things), image.size, REGIONS)
    region_things = _box_things(boxes, labels, len(scene.things))
    negatives = contradict(scene, caption)
    questions = {question.kind: question for question in ask(scene)}
    none = Caption(())
    return {
        "hard": np.array(scene.hard),
        "pixels": np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)),
        "patches": classes[patch_things],
        "patch_things": patch_things,
        "patch_shows": _per_thing(parts > 0),
        "crops": crop_regions(image, boxes, REGION_SIDE),
        "boxes": (boxes / [*image.size, *image.size]).astype(np.float32),
        "regions": classes[region_things],
        "region_things": region_things,
        "region_shows": _per_thing(_shown_in(boxes, region_things, len(scene.things))),
        "things": np.pad(classes[:-1], (0, MOST_THINGS - len(scene.things)), constant_values=-1),
        "large": np.array([n < len(scene.things) and scene.things[n].size == "large" for n in range(MOST_THINGS)]),
        "words": token_ids(caption),
        **_roles(scene, caption),
        "negatives": np.stack([token_ids(negatives[k]) if k in negatives else 0 * token_ids(none) for k in NEGATIVES]),
        "questions": np.stack(
            [token_ids(questions[k].caption) if k in questions else 0 * token_ids(none) for k in QUESTIONS]
        ),
        "answers": np.array([_ANSWERS[questions[k].answer] if k in questions else -1 for k in QUESTIONS], np.int8),
    }


def _patch_parts(labels: np.ndarray, things: int) -> np.ndarray:
    """The part of each patch that each thing fills (thing, patch)."""
    side = len(labels) // GRID
    cells = labels.reshape(GRID, side, GRID, side).swapaxes(1, 2).reshape(GRID * GRID, -1)
    return np.stack([(cells == number).mean(1) for number in range(things)])


def _per_thing(shown: np.ndarray) -> np.ndarray:
    """(thing, unit) with rows of False for the things that other scenes have."""
    return np.concatenate([shown, np.zeros((MOST_THINGS - len(shown), shown.shape[1]), bool)])


def _shown_in(boxes: np.ndarray, region_things: np.ndarray, things: int) -> np.ndarray:
    """Whether more than half of a thing's box lies in each box (thing, region); nothing for a thing without a box."""
    shown = np.zeros((things, len(boxes)), bool)
    for number in range(things):
        own = boxes[region_things == number]
        if len(own):
            sides = np.minimum(boxes[:, 2:], own[0, 2:]) - np.maximum(boxes[:, :2], own[0, :2])
            shown[number] = sides.clip(0).prod(1) > 0.5 * (own[0, 2:] - own[0, :2]).prod()
    return shown


def _box_things(boxes: np.ndarray, labels: np.ndarray, things: int) -> np.ndarray:
    """The thing whose visible part a box encloses exactly (region,), -1 for other boxes."""
    found = np.full(len(boxes), -1, np.int8)
    for number in range(things):
        rows, columns = np.nonzero(labels == number)
        if len(rows):
            own = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found[(boxes == own).all(1)] = number
    return found


def _roles(scene: Scene, caption: Caption) -> dict[str, np.ndarray]:
    """The role of each token, whether it is determined, and the thing that its phrase mentions; CLS comes first."""
    roles, phrases = np.zeros(LENGTH, np.int8), np.full(LENGTH, -1, np.int8)
    determined = np.zeros(LENGTH, bool)
    for mention in caption.mentions:
        phrases[mention.words[0] + 1 : mention.words[1] + 1] = mention.thing
        for name, word in mention.attributes.items():
            roles[word + 1] = ROLES.index(name)
            determined[word + 1] = is_determined(scene, mention, name)
    for claim in caption.claims:
        # 'of' says nothing by itself.
        last = claim.words[1] if claim.kind == "place" else claim.words[0] + 1
        roles[claim.words[0] + 1 : last + 1] = ROLES.index(claim.kind)
        determined[claim.words[0] + 1 : last + 1] = True
    return {"roles": roles, "phrases": phrases, "determined": determined}
