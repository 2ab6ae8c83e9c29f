"""Whisper: an encoder hears, a decoder writes and listens back."""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import text_tokens
from attnscope.tokens import KIND_CODES, TokenLayout, plain_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def sound_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """Frames in time order; `column` counts them."""
    features = inputs["input_features"]
    kind = np.full((len(features), tokens), KIND_CODES["audio"])
    return plain_layout(kind, column=np.arange(tokens))


FAMILY = ModelFamily(
    name="whisper",
    model_types=("whisper",),
    sites=(
        SiteRule(r"(^|\.)encoder\.layers\.(?P<layer>\d+)\.self_attn", "audio.self"),
        SiteRule(r"(^|\.)decoder\.layers\.(?P<layer>\d+)\.self_attn", "text.self"),
        SiteRule(r"(^|\.)decoder\.layers\.(?P<layer>\d+)\.encoder_attn", "text.audio"),
    ),
    streams={"audio": sound_tokens, "text": text_tokens("decoder_input_ids", "decoder_attention_mask")},
)
