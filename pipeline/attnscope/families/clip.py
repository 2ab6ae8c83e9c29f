"""CLIP and its kin: two encoders that meet only in the similarity."""

from typing import TYPE_CHECKING

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import patch_tokens, text_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def largest_box_logit(outputs: object, inputs: object, loaded: "LoadedModel") -> "Tensor":
    """The logit of the box that fits the text best: what a detector finds."""
    return outputs.logits.flatten(1).amax(dim=1)  # type: ignore[attr-defined]


_STREAMS = {"vision": patch_tokens, "text": text_tokens()}

CLIP = ModelFamily(
    name="clip",
    model_types=("clip", "altclip", "chinese_clip", "clipseg", "owlvit", "owlv2", "metaclip_2"),
    sites=(
        SiteRule(r"vision_model\.encoder\.layers?\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"text_model\.(roberta\.)?encoder\.layers?\.(?P<layer>\d+)\.", "text.self"),
    ),
    streams=_STREAMS,
    scores={"detection": largest_box_logit},
)

CLIP_VISION = ModelFamily(
    name="clip-vision",
    model_types=("clip_vision_model", "altclip_vision_model", "chinese_clip_vision_model", "metaclip_2_vision_model"),
    sites=(SiteRule(r"encoder\.layers\.(?P<layer>\d+)\.", "vision.self"),),
    streams=_STREAMS,
)

CLIP_TEXT = ModelFamily(
    name="clip-text",
    model_types=("clip_text_model", "metaclip_2_text_model"),
    sites=(SiteRule(r"encoder\.layers\.(?P<layer>\d+)\.", "text.self"),),
    streams=_STREAMS,
)
