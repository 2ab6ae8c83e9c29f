"""DETR and its kin: an encoder over a backbone's feature map, object queries that read from it.

Images of a batch are padded to a common size. Each sample's own part of the feature map is put on a grid of its own, so
that no padding is stored and a sample's tokens don't depend on its neighbours.
"""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import Fold, ModelFamily, SiteRule
from attnscope.families.encoding import encode_samples
from attnscope.families.layouts import query_tokens
from attnscope.samples import Sample
from attnscope.tokens import TokenLayout, ragged_grid_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

_STRIDES = (32, 16, 8, 4, 64)


def feature_mask(inputs: "dict[str, Tensor]", tokens: int) -> np.ndarray:
    """Which places of the feature map belong to the image, (sample, row, column) bool."""
    from torch.nn.functional import interpolate

    pixels = inputs["pixel_values"]
    sizes = [tuple(-(-n // stride) for n in pixels.shape[-2:]) for stride in _STRIDES]
    size = next((s for s in sizes if s[0] * s[1] == tokens), None)
    if size is None:
        raise ValueError(f"no feature map of images of {tuple(pixels.shape[-2:])} pixels has {tokens} places")
    mask = inputs.get("pixel_mask")
    if mask is None:
        return np.ones((len(pixels), *size), bool)
    return np.asarray(interpolate(mask[None].float(), size=size)[0].cpu() > 0)


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """The image's places numbered row by row; the padding of the batch belongs nowhere."""
    if ".decoder." in f".{call.module}" and "self_attn" in call.module:
        return None
    batch, _, queries, keys = call.shape
    real = feature_mask(inputs, keys).reshape(batch, keys)
    places = np.where(real, real.cumsum(axis=1) - 1, -1)
    all_queries = np.tile(np.arange(queries), (batch, 1))
    return Fold(np.arange(batch), places if ".encoder." in f".{call.module}" else all_queries, places)


def image_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """Each image's own part of the feature map, row by row."""
    pixels = inputs["pixel_values"]
    for stride in _STRIDES:
        size = [-(-n // stride) for n in pixels.shape[-2:]]
        real = feature_mask(inputs, size[0] * size[1])
        shapes = np.stack([real.any(axis=2).sum(axis=1), real.any(axis=1).sum(axis=1)], axis=1)
        if shapes.prod(axis=1).max() == tokens:
            return ragged_grid_layout(shapes, tokens)
    raise ValueError(f"no feature map of images of {tuple(pixels.shape[-2:])} pixels has {tokens} places")


def measure_image(sample: Sample, loaded: "LoadedModel") -> dict[str, int]:
    """The most places that an image takes on the feature map, in whatever batch: padding may shift its edge by one."""
    pixels = encode_samples([sample], loaded)["pixel_values"]
    rows, columns = (-(-n // _STRIDES[0]) + 1 for n in pixels.shape[-2:])
    return {"vision": rows * columns}


FAMILY = ModelFamily(
    name="detr",
    model_types=("detr", "table-transformer", "conditional_detr"),
    sites=(
        SiteRule(r"(^|\.)encoder\.layers\.(?P<layer>\d+)\.self_attn", "vision.self"),
        SiteRule(r"(^|\.)decoder\.layers\.(?P<layer>\d+)\.self_attn", "queries.self"),
        SiteRule(r"(^|\.)decoder\.layers\.(?P<layer>\d+)\.encoder_attn", "queries.vision"),
    ),
    streams={"vision": image_tokens, "queries": query_tokens},
    measure=measure_image,
    fold=fold,
)
