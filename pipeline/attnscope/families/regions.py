"""Image regions that an object detector found, or that a sample's boxes name: their features and their layout."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnscope.samples import Region, SampleError
from attnscope.tokens import KIND_CODES, TokenLayout, plain_layout

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from attnscope.families import LayoutFunction
    from attnscope.loading import LoadedModel


def region_tokens(features_name: str, mask_name: str) -> "LayoutFunction":
    """The layout of regions from their features and padding mask: image tokens without a place on a grid."""

    def layout(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
        kind = np.full((len(inputs[features_name]), tokens), KIND_CODES["image"])
        if mask_name in inputs:
            kind[inputs[mask_name].cpu().numpy() == 0] = KIND_CODES["padding"]
        return plain_layout(kind)

    return layout


_POSITIONS = "visual_pos"


def boxed_streams(inputs: "dict[str, Tensor]", streams: Iterable[str]) -> tuple[str, ...]:
    """Those of the streams whose tokens are regions of which the inputs say where they lie."""
    return tuple(s for s in streams if s == "vision" and _POSITIONS in inputs and inputs[_POSITIONS].shape[-1] >= 4)


def given_boxes(inputs: "dict[str, Tensor]", row: int, size: tuple[int, int]) -> np.ndarray | None:
    """The boxes of a sample's regions, (region, 4) in pixels of an image of this size (width, height).

    None where the inputs don't say where they lie.
    """
    places = inputs.get(_POSITIONS)
    if places is None or places.shape[-1] < 4:
        return None
    return places[row, :, :4].float().cpu().numpy() * np.array([*size, *size])


# What fills up a picture's regions, in parts of its sides: the whole, its quarters, its middle, its halves.
_FILLING = (
    (0, 0, 1, 1),
    (0, 0, 0.5, 0.5),
    (0.5, 0, 1, 0.5),
    (0, 0.5, 0.5, 1),
    (0.5, 0.5, 1, 1),
    (0.25, 0.25, 0.75, 0.75),
    (0, 0, 0.5, 1),
    (0.5, 0, 1, 1),
    (0, 0, 1, 0.5),
    (0, 0.5, 1, 1),
)


def boxes_of(regions: Sequence[Region], size: tuple[int, int], count: int) -> np.ndarray:
    """As many boxes (region, 4) in pixels of an image of this size (width, height) as are wanted.

    First the different boxes of a sample's regions, ordered by place, so that the order says nothing of the text; then
    the whole picture and parts of it that are the same for every picture.

    Raises
    ------
    SampleError
        When a box reaches out of the image.
    """
    named = sorted({region.box for region in regions if region.box is not None})
    for box in named:
        if min(box) < 0 or box[2] > size[0] or box[3] > size[1]:
            raise SampleError(f"box {[*box]} reaches out of its image of {size[0]} x {size[1]} pixels")
    filling = np.array(_FILLING) * [*size, *size]
    return np.concatenate([np.array(named[:count], float).reshape(-1, 4), np.resize(filling, (count, 4))])[:count]


def crop_regions(image: "Image", boxes: np.ndarray, side: int) -> np.ndarray:
    """What each box holds, shrunk or stretched to a square of this side: (region, row, column, colour) uint8."""
    from PIL import Image

    return np.stack(
        [np.asarray(image.resize((side, side), Image.Resampling.BOX, tuple(box))) for box in boxes.tolist()]
    )
