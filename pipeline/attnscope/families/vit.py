"""ViT and its kin: one image stream, CLS (and registers) before a patch grid."""

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import patch_tokens

FAMILY = ModelFamily(
    name="vit",
    model_types=(
        "vit",
        "deit",
        "vit_msn",
        "ijepa",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "beit",
        "data2vec-vision",
    ),
    sites=(SiteRule(r"(^|\.)layers?\.(?P<layer>\d+)\.attention", "vision.self"),),
    streams={"vision": patch_tokens},
)
