"""FLAVA: an image encoder, a text encoder, and a multimodal encoder over the tokens of both behind a CLS of its own."""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.encoding import measure_text
from attnscope.families.layouts import patch_grid, text_tokens
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES, TokenLayout, grid_layout, joined_layout, plain_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def vision_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """CLS and the patch grid."""
    pixels = inputs["pixel_values"]
    return grid_layout(len(pixels), *patch_grid(pixels, loaded.config.image_config))


def joint_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The multimodal CLS where there is one, the image's tokens, the text's tokens."""
    text = text_tokens()(inputs, loaded, inputs["input_ids"].shape[1])
    own_cls = int(loaded.config.multimodal_config.use_cls_token)
    first = plain_layout(np.full((len(text.kind), own_cls), KIND_CODES["cls"]))
    return joined_layout(first, vision_tokens(inputs, loaded, tokens), text)


def measure(sample: Sample, loaded: "LoadedModel") -> dict[str, int]:
    """Tokens of the text, and of the text behind the image's."""
    found = measure_text(sample, loaded)
    image = loaded.config.image_config
    own_cls = int(loaded.config.multimodal_config.use_cls_token)
    patches = (image.image_size // image.patch_size) ** 2
    return found | {"joint": own_cls + 1 + patches + found.get("text", 0)}


FAMILY = ModelFamily(
    name="flava",
    model_types=("flava",),
    sites=(
        SiteRule(r"image_model\.encoder\.layer\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"text_model\.encoder\.layer\.(?P<layer>\d+)\.", "text.self"),
        SiteRule(r"multimodal_model\.encoder\.layer\.(?P<layer>\d+)\.", "joint.self"),
    ),
    streams={"vision": vision_tokens, "text": text_tokens(), "joint": joint_tokens},
    measure=measure,
)
