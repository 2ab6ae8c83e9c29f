"""SigLIP: two encoders without CLS tokens; a learned probe query pools the patches.

SigLIP2 takes images of any shape (NaFlex): its patches come flat, behind them padding.
"""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import patch_tokens, query_tokens, text_tokens
from attnscope.tokens import TokenLayout, ragged_grid_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def siglip_patches(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """A patch grid; each image's own grid where the processor keeps their shapes."""
    if "spatial_shapes" not in inputs:
        return patch_tokens(inputs, loaded, tokens)
    return ragged_grid_layout(np.asarray(inputs["spatial_shapes"].cpu()), tokens)


_STREAMS = {"vision": siglip_patches, "text": text_tokens(), "queries": query_tokens}
_PROBE = SiteRule(r"(^|\.)head\.attention", "queries.vision")

SIGLIP = ModelFamily(
    name="siglip",
    model_types=("siglip", "siglip2"),
    sites=(
        SiteRule(r"vision_model\.encoder\.layers\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"text_model\.encoder\.layers\.(?P<layer>\d+)\.", "text.self"),
        _PROBE,
    ),
    streams=_STREAMS,
)

SIGLIP_VISION = ModelFamily(
    name="siglip-vision",
    model_types=("siglip_vision_model", "siglip2_vision_model"),
    sites=(SiteRule(r"(^|\.)encoder\.layers\.(?P<layer>\d+)\.", "vision.self"), _PROBE),
    streams=_STREAMS,
)

SIGLIP_TEXT = ModelFamily(
    name="siglip-text",
    model_types=("siglip_text_model", "siglip2_text_model"),
    sites=(SiteRule(r"(^|\.)encoder\.layers\.(?P<layer>\d+)\.", "text.self"),),
    streams=_STREAMS,
)
