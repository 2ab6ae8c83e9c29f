"""T5, BART and their kin: an encoder reads the text, a decoder writes and looks back at it.

The decoder is given the sample's target text, `targets['output']`; without one, its start token alone.
"""

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.encoding import encode_with_decoder, measure_with_decoder
from attnscope.families.layouts import decoder_tokens, text_tokens

_STREAMS = {"text": text_tokens(), "decoder": decoder_tokens}

BART = ModelFamily(
    name="bart",
    model_types=(
        "bart",
        "mbart",
        "pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "m2m_100",
        "plbart",
        "mvp",
    ),
    sites=(
        SiteRule(r"(^|\.)encoder\.layers\.(?P<layer>\d+)\.self_attn", "text.self"),
        SiteRule(r"(^|\.)decoder\.layers\.(?P<layer>\d+)\.self_attn", "decoder.self"),
        SiteRule(r"(^|\.)decoder\.layers\.(?P<layer>\d+)\.encoder_attn", "decoder.text"),
    ),
    streams=_STREAMS,
    encode=encode_with_decoder,
    measure=measure_with_decoder,
)

T5 = ModelFamily(
    name="t5",
    model_types=("t5", "mt5", "umt5", "switch_transformers"),
    sites=(
        SiteRule(r"(^|\.)encoder\.block\.(?P<layer>\d+)\..*SelfAttention", "text.self"),
        SiteRule(r"(^|\.)decoder\.block\.(?P<layer>\d+)\..*SelfAttention", "decoder.self"),
        SiteRule(r"(^|\.)decoder\.block\.(?P<layer>\d+)\..*EncDecAttention", "decoder.text"),
    ),
    streams=_STREAMS,
    encode=encode_with_decoder,
    measure=measure_with_decoder,
)
