"""Pictures of scenes, and which object each pixel shows.

Shapes are drawn from their signed distance, so that edges are smooth at any size and a mask is what is visible.
"""

from collections.abc import Callable

import numpy as np

from attnscope.reference.scenes import Scene, Stroke, Thing

# What a whole turn of the pattern of a ground takes of the picture's side.
_PERIOD = 0.125
_STROKE_WIDTH = 0.012


def draw_picture(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture (row, column, colour) uint8 and its labels (row, column) int8.

    A label is the number of the thing that most of the pixel shows, and -1 for the ground.
    """
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    picture = _ground(scene, axis)
    labels = np.full((size, size), -1, np.int8)
    for stroke in scene.strokes:
        _lay_stroke(picture, stroke, axis)
    for number, thing in enumerate(scene.things):
        _lay_thing(picture, labels, thing, number, axis)
    picture += scene.generator(1).standard_normal((size, size, 1), np.float32) * scene.noise + 0.5
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8), labels


def _ground(scene: Scene, axis: np.ndarray) -> np.ndarray:
    dark, bright = (np.array(tone, np.float32) for tone in scene.tones)
    share = _PATTERNS[scene.ground](axis / _PERIOD + scene.phase)
    # Light falls off from the top to the bottom, so that a plain ground isn't one value either.
    light = (1.1 - 0.2 * axis)[:, None, None]
    return (share[..., None] * (bright - dark) + dark) * light


def _striped(turns: np.ndarray) -> np.ndarray:
    return ((turns[:, None] + turns) % 2 < 1).astype(np.float32)


def _checked(turns: np.ndarray) -> np.ndarray:
    odd = np.floor(turns) % 2
    return (odd[:, None] == odd).astype(np.float32)


def _dotted(turns: np.ndarray) -> np.ndarray:
    within = turns % 1 - 0.5
    return ((within**2)[:, None] + within**2 < 0.09).astype(np.float32)


def _plain(turns: np.ndarray) -> np.ndarray:
    return np.full((len(turns), len(turns)), 0.5, np.float32)


_PATTERNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "striped": _striped,
    "checked": _checked,
    "dotted": _dotted,
}


def _lay_stroke(picture: np.ndarray, stroke: Stroke, axis: np.ndarray) -> None:
    (x, y), (end_x, end_y) = stroke.start, stroke.end
    dx, dy = end_x - x, end_y - y
    rows = _window((y + end_y) / 2, abs(dy) / 2 + _STROKE_WIDTH, len(axis))
    columns = _window((x + end_x) / 2, abs(dx) / 2 + _STROKE_WIDTH, len(axis))
    u, v = axis[columns] - x, (axis[rows] - y)[:, None]
    along = np.clip((u * dx + v * dy) / (dx * dx + dy * dy), 0, 1)
    distance = np.hypot(u - along * dx, v - along * dy)
    _blend(picture[rows, columns], stroke.rgb, _cover(distance - _STROKE_WIDTH / 2, len(axis)))


def _lay_thing(picture: np.ndarray, labels: np.ndarray, thing: Thing, number: int, axis: np.ndarray) -> None:
    rows, columns = _window(thing.y, thing.radius, len(axis)), _window(thing.x, thing.radius, len(axis))
    u = (axis[columns] - thing.x) / thing.radius
    v = ((axis[rows] - thing.y) / thing.radius)[:, None]
    cover = _cover(_DISTANCES[thing.shape](u, v) * thing.radius, len(axis))
    _blend(picture[rows, columns], thing.rgb, cover)
    labels[rows, columns][cover > 0.5] = number


def _window(centre: float, radius: float, size: int) -> slice:
    first, last = int((centre - 1.1 * radius) * size) - 1, int((centre + 1.1 * radius) * size) + 2
    return slice(min(max(0, first), size), min(max(0, last), size))


def _cover(distance: np.ndarray, size: int) -> np.ndarray:
    """The part of each pixel that lies inside, from the signed distance of its middle to the edge."""
    return np.clip(0.5 - distance * size, 0, 1)


def _blend(picture: np.ndarray, rgb: tuple[int, int, int], cover: np.ndarray) -> None:
    picture += (np.array(rgb, np.float32) - picture) * cover[..., None]


# Signed distances to the edge, in radii, from u (column,) and v (row, 1) in radii; negative inside.
def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.95


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.82


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Its tip at (0, -1), its base from (-1, 0.8) to (1, 0.8).
    return np.maximum(v - 0.8, (np.abs(u) * 1.8 - v - 1) / np.hypot(1.8, 1))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1, v - 0.33), np.maximum(v - 1, u - 0.33))


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) + np.abs(v) - 1.05) / np.sqrt(2)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.72) - 0.26


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
}
