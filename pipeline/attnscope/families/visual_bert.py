"""VisualBERT: one stream of text tokens and of image regions, whose features an object detector found.

The features come as ready inputs (`visual_embeds`); regions have no place on a grid.
"""

from typing import TYPE_CHECKING

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import text_tokens
from attnscope.families.regions import region_tokens
from attnscope.tokens import TokenLayout, joined_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def joint_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """Text tokens, then regions, where there are any."""
    if "visual_embeds" not in inputs:
        return text_tokens()(inputs, loaded, tokens)
    text = text_tokens()(inputs, loaded, inputs["input_ids"].shape[1])
    regions = region_tokens("visual_embeds", "visual_attention_mask")
    return joined_layout(text, regions(inputs, loaded, tokens - text.token_count))


FAMILY = ModelFamily(
    name="visual_bert",
    model_types=("visual_bert",),
    sites=(SiteRule(r"encoder\.layer\.(?P<layer>\d+)\.attention", "joint.self"),),
    streams={"joint": joint_tokens},
)
