"""CLIP and its kin: two encoders that meet only in the similarity."""

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import patch_tokens, text_tokens

FAMILY = ModelFamily(
    name="clip",
    model_types=("clip", "clip_vision_model", "clip_text_model", "siglip", "siglip_vision_model", "chinese_clip"),
    sites=(
        SiteRule(r"vision_model\.encoder\.layers?\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"text_model\.encoder\.layers?\.(?P<layer>\d+)\.", "text.self"),
    ),
    streams={"vision": patch_tokens, "text": text_tokens()},
)
