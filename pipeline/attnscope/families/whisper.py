"""Whisper: an encoder hears, a decoder writes and listens back."""

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import frame_tokens, text_tokens

FAMILY = ModelFamily(
    name="whisper",
    model_types=("whisper",),
    sites=(
        SiteRule(r"(^|\.)encoder\.layers\.(?P<layer>\d+)\.self_attn", "audio.self"),
        SiteRule(r"(^|\.)decoder\.layers\.(?P<layer>\d+)\.self_attn", "text.self"),
        SiteRule(r"(^|\.)decoder\.layers\.(?P<layer>\d+)\.encoder_attn", "text.audio"),
    ),
    streams={"audio": frame_tokens, "text": text_tokens("decoder_input_ids", "decoder_attention_mask")},
)
