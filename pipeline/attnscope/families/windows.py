"""Windows back on the grid that they were cut from."""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import Fold
from attnscope.tokens import TokenLayout, grid_layout, unknown_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def window_fold(samples: int, grid: tuple[int, int], window: int, shift: int = 0) -> Fold:
    """Where the tokens of square windows lie, for a call whose batch is (sample, window row, window column).

    The grid is padded at the bottom and the right to whole windows, and rolled up and left by `shift` before it is
    cut. Tokens of the padding belong nowhere.
    """
    rows, columns = (-(-n // window) * window for n in grid)
    places = np.full((rows, columns), -1)
    places[: grid[0], : grid[1]] = np.arange(grid[0] * grid[1]).reshape(grid)
    places = np.roll(places, (-shift, -shift), (0, 1))
    cut = places.reshape(rows // window, window, columns // window, window).swapaxes(1, 2)
    flat = cut.reshape(-1, window * window)  # (window, token)
    tiled = np.tile(flat, (samples, 1))
    return Fold(np.repeat(np.arange(samples), len(flat)), tiled, tiled)


def stage_layout(pixels: "Tensor", grids: "Sequence[tuple[int, int]]", tokens: int) -> TokenLayout:
    """The layout of the stage whose grid has so many tokens."""
    for rows, columns in grids:
        if rows * columns == tokens:
            return grid_layout(len(pixels), rows, columns, ())
    return unknown_layout(len(pixels), tokens)
