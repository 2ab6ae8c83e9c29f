"""LXMERT: text layers, layers over image regions, then layers in which both attend to each other.

The regions' features come as ready inputs (`visual_feats`, `visual_pos`). Each cross-modal layer calls one module
twice, first for text that attends to regions. Its self-attention continues the numbers of the layers before it.
"""

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import text_tokens
from attnscope.families.regions import region_tokens

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
)
