"""Layouts of image regions that an object detector found."""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.tokens import KIND_CODES, TokenLayout, plain_layout

if TYPE_CHECKING:
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
