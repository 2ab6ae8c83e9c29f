"""LXMERT: text layers, layers over image regions, then layers in which both attend to each other.

The regions' features come as ready inputs (`visual_feats`, `visual_pos`), or are made here of what a sample's boxes
show where the config's `region_pixels` says how: {"count": regions, "side": pixels of each}. Each cross-modal layer
calls one module twice, first for text that attends to regions. Its self-attention continues the numbers of the layers
before it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.encoding import encode_samples, require_images
from attnscope.families.layouts import text_tokens
from attnscope.families.regions import boxes_of, crop_regions, region_tokens
from attnscope.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def encode_regions(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """Texts, and the pixels (from -1 to 1) of each region with its box in parts of the picture's sides."""
    import torch

    inputs = encode_samples(samples, loaded)
    shape = getattr(loaded.config, "region_pixels", None)
    if shape is None:
        return inputs
    features, positions = [], []
    for sample, image in zip(samples, require_images(samples, loaded), strict=True):
        boxes = boxes_of(sample.regions, image.size, shape["count"])
        crops = crop_regions(image, boxes, shape["side"]).astype(np.float32) / 127.5 - 1
        features.append(np.moveaxis(crops, -1, 1).reshape(len(boxes), -1))
        positions.append((boxes / [*image.size, *image.size]).astype(np.float32))
    inputs["visual_feats"] = torch.from_numpy(np.stack(features))
    inputs["visual_pos"] = torch.from_numpy(np.stack(positions))
    return inputs


FAMILY = ModelFamily(
    name="lxmert",
    model_types=("lxmert",),
    sites=(
        SiteRule(r"encoder\.layer\.(?P<layer>\d+)\.", "text.self"),
        SiteRule(r"r_layers\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"x_layers\.(?P<layer>\d+)\.lang_self_att", "text.self", first_layer="l_layers"),
        SiteRule(r"x_layers\.(?P<layer>\d+)\.visn_self_att", "vision.self", first_layer="r_layers"),
        SiteRule(r"x_layers\.(?P<layer>\d+)\.visual_attention", "text.vision", call=0),
        SiteRule(r"x_layers\.(?P<layer>\d+)\.visual_attention", "vision.text", call=1),
    ),
    streams={"text": text_tokens(), "vision": region_tokens("visual_feats", "visual_attention_mask")},
    encode=encode_regions,
)
