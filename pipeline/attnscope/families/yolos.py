"""YOLOS: a ViT that reads its detections off query tokens behind the patches."""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.encoding import encode_samples
from attnscope.families.layouts import patch_grid
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES, TokenLayout, grid_layout, joined_layout, plain_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def detection_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """CLS, the patch grid, and the detection tokens."""
    pixels = inputs["pixel_values"]
    grid = grid_layout(len(pixels), *patch_grid(pixels, loaded.config))
    queries = np.full((len(pixels), loaded.config.num_detection_tokens), KIND_CODES["query"])
    return joined_layout(grid, plain_layout(queries))


def measure_image(sample: Sample, loaded: "LoadedModel") -> dict[str, int]:
    """Tokens of the image at the size that its processor gives it."""
    rows, columns = patch_grid(encode_samples([sample], loaded)["pixel_values"], loaded.config)
    return {"vision": 1 + rows * columns + loaded.config.num_detection_tokens}


FAMILY = ModelFamily(
    name="yolos",
    model_types=("yolos",),
    sites=(SiteRule(r"(^|\.)layer\.(?P<layer>\d+)\.attention", "vision.self"),),
    streams={"vision": detection_tokens},
    measure=measure_image,
    # It has no mask: it would attend to the padding that larger images of a batch bring.
    one_by_one=True,
)
