"""Roles guessed from module names and shapes, for models that no family answers for."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

_STREAM_WORDS = (
    ("queries", ("qformer", "perceiver", "resampler")),
    ("vision", ("vision", "visual", "image", "img", "vit", "patch", "pixel")),
    ("audio", ("audio", "speech", "wav")),
    ("text", ("text", "language", "bert", "lm", "token")),
    ("decoder", ("decoder",)),
)
_CROSS_WORDS = ("crossattention", "cross_attn", "cross_attention", "encoder_attn", "encdecattention", "x_attn")
_MAIN_STREAM = {"pixel_values": "vision", "input_ids": "text", "input_features": "audio", "input_values": "audio"}


def guess_placement(call: "AttentionCall", loaded: "LoadedModel") -> tuple[str, str, str, int]:
    """Site, query stream, key stream and layer of a call, by its module's name and its shape.

    Calls of equal role but different size, or several calls of one module, come to sites with distinct names, so that
    nothing is overwritten.
    """
    words = call.module.lower()
    queries = next((s for s, marks in _STREAM_WORDS if any(m in words for m in marks)), main_stream(loaded))
    cross = any(w in words for w in _CROSS_WORDS)
    keys = ("vision" if queries != "vision" else "text") if cross else queries
    numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)", call.module)]
    layer = numbers[0] if numbers else 0
    return f"{queries}.{keys if cross else 'self'}", queries, keys, layer


def main_stream(loaded: "LoadedModel") -> str:
    """The stream of a model's main input: vision, text or audio."""
    return _MAIN_STREAM.get(str(getattr(loaded.model, "main_input_name", "")), "tokens")
