"""BridgeTower: two encoders, bridged layer by layer into cross-modal layers of either stream.

The self-attention of cross-modal layers continues the numbers of the encoders' layers.
"""

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import patch_tokens, text_tokens

_TEXT, _IMAGE = "text_config.num_hidden_layers", "vision_config.num_hidden_layers"

FAMILY = ModelFamily(
    name="bridgetower",
    model_types=("bridgetower",),
    sites=(
        SiteRule(r"vision_model\..*resblocks\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"text_model\..*layer\.(?P<layer>\d+)\.", "text.self"),
        SiteRule(r"cross_modal_text_layers\.(?P<layer>\d+)\.crossattention", "text.vision"),
        SiteRule(r"cross_modal_image_layers\.(?P<layer>\d+)\.crossattention", "vision.text"),
        SiteRule(r"cross_modal_text_layers\.(?P<layer>\d+)\.attention", "text.self", first_layer=_TEXT),
        SiteRule(r"cross_modal_image_layers\.(?P<layer>\d+)\.attention", "vision.self", first_layer=_IMAGE),
    ),
    streams={"vision": patch_tokens, "text": text_tokens()},
)
