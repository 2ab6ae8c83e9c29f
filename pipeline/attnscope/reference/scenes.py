"""Scenes of the reference world: which coloured shapes lie where, on what ground.

A scene is drawn from its split and number alone, so that scene 17 of the test split is the same on every machine. Which
split a scene may belong to follows from what it holds: the set of its objects (colour and shape of each) falls into a
bucket of its own, so that no set of objects of one split occurs in another.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

# Part of every seed: raise it when scenes, captions or pixels change, and train the models anew.
WORLD_VERSION = 1

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 215, 50),
    "purple": (145, 60, 185),
    "pink": (250, 150, 190),
    "cyan": (60, 205, 215),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
GROUNDS = ("plain", "striped", "checked", "dotted")
SPLITS = ("train", "validation", "test", "hard")

Generator: TypeAlias = np.random.Generator

_BUCKETS = 8
# The last bucket is the test's and the hard split's, the one before it validation's, the others are for training.
_BUCKETS_OF = {"train": range(6), "validation": range(6, 7), "test": range(7, 8), "hard": range(7, 8)}
_HARD_EVERY = 4
_CELLS = 4


@dataclass(frozen=True)
class Difficulty:
    """What makes scenes of one kind hard: how many objects, how small, how near each other, on how busy a ground.

    Lengths are fractions of the picture's side. `nearest` is the least distance of two objects in sums of their radii;
    below 1 they may cover each other. None puts each into a cell of a 4 x 4 grid of its own.
    """

    counts: tuple[int, ...]
    count_weights: tuple[float, ...]
    small: tuple[float, float]
    large: tuple[float, float]
    small_share: float
    nearest: float | None
    contrast: tuple[float, float]
    noise: float
    strokes: int


NORMAL = Difficulty((1, 2, 3, 4), (0.1, 0.35, 0.35, 0.2), (0.075, 0.09), (0.105, 0.125), 0.4, None, (8, 30), 8, 0)
HARD = Difficulty((5, 6, 7), (0.4, 0.3, 0.3), (0.055, 0.07), (0.085, 0.105), 0.6, 0.75, (25, 55), 14, 8)


@dataclass(frozen=True)
class Thing:
    """One object; `x`, `y` (from the left and from the top) and `radius` are fractions of the picture's side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape, which no two objects of a scene share."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Stroke:
    """A thin line of clutter from one point to another, in fractions of the picture's side."""

    start: tuple[float, float]
    end: tuple[float, float]
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """Everything that is in one picture; a later thing lies in front of an earlier one."""

    split: str
    index: int
    hard: bool
    things: tuple[Thing, ...]
    ground: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    phase: float
    noise: float
    strokes: tuple[Stroke, ...] = field(default=())

    @property
    def name(self) -> str:
        """Name of the scene: its split and number."""
        return f"{self.split}-{self.index}"

    def generator(self, purpose: int) -> Generator:
        """Random numbers of this scene for one purpose, such as its captions."""
        return _generator(self.split, self.index, purpose)


def draw_scene(split: str, index: int) -> Scene:
    """The scene of this number in a split: 'train', 'validation', 'test' or 'hard'.

    Every fourth scene of the training split is as hard as those of the hard split.
    """
    rng = _generator(split, index, 0)
    hard = split == "hard" or (split == "train" and index % _HARD_EVERY == _HARD_EVERY - 1)
    level = HARD if hard else NORMAL
    pairs = _pairs(rng, level, split)
    sizes = ["small" if rng.random() < level.small_share else "large" for _ in pairs]
    radii = [rng.uniform(*(level.small if size == "small" else level.large)) for size in sizes]
    places = _in_cells(rng, len(pairs)) if level.nearest is None else _anywhere(rng, radii, level.nearest)
    things = tuple(
        Thing(colour, shape, size, x, y, radius, _tinted(rng, COLOURS[colour]))
        for (colour, shape), size, (x, y), radius in zip(pairs, sizes, places, radii, strict=True)
    )
    base = rng.uniform(45, 115)
    contrast = rng.uniform(*level.contrast)
    tones = tuple(_grey(rng, base + sign * contrast / 2) for sign in (-1, 1))
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    strokes = tuple(_stroke(rng) for _ in range(level.strokes))
    return Scene(split, index, hard, things, ground, tones, rng.random(), level.noise, strokes)  # type: ignore[arg-type]


def bucket(pairs: Sequence[tuple[str, str]]) -> int:
    """The bucket that a set of objects, each a colour and a shape, falls into."""
    return zlib.crc32(",".join(sorted(" ".join(pair) for pair in pairs)).encode()) % _BUCKETS


def _generator(split: str, index: int, purpose: int) -> Generator:
    return np.random.Generator(np.random.PCG64([WORLD_VERSION, SPLITS.index(split), index, purpose]))


def _pairs(rng: Generator, level: Difficulty, split: str) -> list[tuple[str, str]]:
    """Colour and shape of each object, of a set that belongs to the split."""
    ends = np.cumsum(level.count_weights)
    count = level.counts[int(np.searchsorted(ends, rng.random() * ends[-1]))]
    while True:
        pairs = _all_different(rng, count) if level is NORMAL else _sharing_attributes(rng, count)
        if bucket(pairs) in _BUCKETS_OF[split]:
            return pairs


def _all_different(rng: Generator, count: int) -> list[tuple[str, str]]:
    """Objects of which no two share a colour or a shape."""
    colours, shapes = rng.permutation(len(COLOURS)), rng.permutation(len(SHAPES))
    return [(_COLOUR_NAMES[colours[i]], SHAPES[shapes[i]]) for i in range(count)]


def _sharing_attributes(rng: Generator, count: int) -> list[tuple[str, str]]:
    """Different objects, of which the second shares its colour with the first, and the third its shape."""
    colours, shapes = rng.permutation(len(COLOURS)), rng.permutation(len(SHAPES))
    places = [(colours[0], shapes[0]), (colours[0], shapes[1]), (colours[1], shapes[0])]
    while len(places) < count:
        place = (rng.integers(len(COLOURS)), rng.integers(len(SHAPES)))
        if place not in places:
            places.append(place)
    return [(_COLOUR_NAMES[colour], SHAPES[shape]) for colour, shape in places]


def _in_cells(rng: Generator, count: int) -> list[tuple[float, float]]:
    cells = rng.permutation(_CELLS * _CELLS)[:count]
    jitter = rng.uniform(-0.025, 0.025, (count, 2))
    return [
        ((cell % _CELLS + 0.5) / _CELLS + dx, (cell // _CELLS + 0.5) / _CELLS + dy)
        for cell, (dx, dy) in zip(cells.tolist(), jitter.tolist(), strict=True)
    ]


def _anywhere(rng: Generator, radii: Sequence[float], nearest: float) -> list[tuple[float, float]]:
    """Places anywhere in the picture; the second object lies partly over the first."""
    places: list[tuple[float, float]] = []
    for number, radius in enumerate(radii):
        best, room = (0.5, 0.5), -np.inf
        for _ in range(40):
            x, y = rng.uniform(0.1, 0.9, 2).tolist()
            if number == 1:
                angle, reach = rng.uniform(0, 2 * np.pi), 0.8 * (radius + radii[0])
                x, y = (float(p + reach * f(angle)) for p, f in zip(places[0], (np.cos, np.sin), strict=True))
            distances = [np.hypot(x - a, y - b) / (radius + r) for (a, b), r in zip(places, radii, strict=False)]
            found = min([*distances, np.inf]) if min(x, y) >= 0.07 and max(x, y) <= 0.93 else -1.0
            if found > room:
                best, room = (x, y), found
            if room >= nearest:
                break
        places.append(best)
    return places


def _tinted(rng: Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(int(min(255, max(0, c + t))) for c, t in zip(rgb, rng.integers(-14, 15, 3), strict=True))  # type: ignore[return-value]


def _grey(rng: Generator, tone: float) -> tuple[int, int, int]:
    return tuple(int(min(255, max(0, tone + t))) for t in rng.integers(-8, 9, 3))  # type: ignore[return-value]


def _stroke(rng: Generator) -> Stroke:
    x, y = rng.uniform(0, 1, 2).tolist()
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.3)
    end = (float(x + length * np.cos(angle)), float(y + length * np.sin(angle)))
    rgb = tuple(int(c) for c in rng.integers(40, 200, 3))
    return Stroke((x, y), end, rgb)  # type: ignore[arg-type]


_COLOUR_NAMES = tuple(COLOURS)
