"""Roles guessed from module names and shapes, for models that no family answers for."""

import inspect
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

# Longer words are looked for anywhere in a module's name; those of three letters and less must stand alone.
_STREAM_WORDS = (
    ("queries", ("qformer", "perceiver", "resampler", "latent")),
    ("vision", ("vision", "visual", "visn", "image", "img", "vit", "patch", "pixel", "vqmodel")),
    ("audio", ("audio", "speech", "wav", "sound")),
    ("text", ("text", "lang", "bert", "lm", "token")),
    ("decoder", ("decoder",)),
)
_CROSS_WORDS = (
    *("crossattention", "cross_attn", "cross_attention", "encoder_attn", "encoder_attention", "encdecattention"),
    *("x_attn", "xattn", "multihead_attn", "encoder_decoder_attention"),
)
# Cross-attention that says at the end of its name what it looks at.
_NAMED_KEYS = r"(encoder|cross)_(attn|attention)_(?P<keys>text|image|vision|audio)$"
_POOL_WORDS = ("pool", "head", "probe", "query", "latent")
_SEEN = ("pixel", "image", "visual", "video", "img", "patches")
_CLASS_WORDS = (("vision", ("vision", "image")), ("audio", ("audio", "speech")), ("text", ("text",)))
_MAIN_STREAM = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_ids": "text",
    "input_features": "audio",
    "input_values": "audio",
    "flattened_patches": "vision",
}


def guess_placement(call: "AttentionCall", loaded: "LoadedModel") -> tuple[str, str, str, int]:
    """Site, query stream, key stream and layer of a call, by its module's name and its shape.

    Calls of equal role but different size, or several calls of one module, come to sites with distinct names, so that
    nothing is overwritten.
    """
    words = call.module.lower()
    named = re.search(_NAMED_KEYS, words)
    queries = _query_stream(words if named is None else words[: named.start()], loaded)
    keys = queries
    _, _, query_tokens, key_tokens = call.shape
    if named is not None:
        keys = "vision" if named["keys"] == "image" else named["keys"]
    elif any(word in words for word in _CROSS_WORDS):
        keys = _other_stream(queries, loaded)
    elif query_tokens < key_tokens and any(word in words for word in _POOL_WORDS):
        queries = "queries"
    numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)", call.module)]
    layer = numbers[0] if numbers else 0
    return f"{queries}.{'self' if keys == queries else keys}", queries, keys, layer


def main_stream(loaded: "LoadedModel") -> str:
    """The stream of a model's main input: vision, text or audio."""
    given = getattr(loaded.model, "main_input_name", "")
    name = str(given[0] if isinstance(given, list | tuple) else given)
    if name in ("", *_MAIN_STREAM) and not _takes(loaded, name):
        # transformers says input_ids of a model whose author said nothing.
        name = next((n for n in _MAIN_STREAM if _takes(loaded, n)), "")
    return _MAIN_STREAM.get(name) or _named_stream(loaded)


def _named_stream(loaded: "LoadedModel") -> str:
    """What a part of a model, whose inputs say nothing, is called after."""
    words = type(loaded.model).__name__.lower()
    found = (stream for stream, marks in _CLASS_WORDS if any(mark in words for mark in marks))
    return next(found, "tokens")


def _query_stream(words: str, loaded: "LoadedModel") -> str:
    parts = set(re.split(r"[._]", words))
    for stream, marks in _STREAM_WORDS:
        if any(mark in parts or (len(mark) > 3 and mark in words) for mark in marks) and not (
            stream == "vision" and _is_blind(loaded)
        ):
            return _decoder_stream(loaded) if stream == "decoder" else stream
    return main_stream(loaded)


def _decoder_stream(loaded: "LoadedModel") -> str:
    """What a decoder reads: its own text, queries for an image, or the model's only text."""
    if _takes(loaded, "decoder_input_ids"):
        return "decoder"
    return "queries" if main_stream(loaded) == "vision" else main_stream(loaded)


def _other_stream(queries: str, loaded: "LoadedModel") -> str:
    """What cross-attention of a stream looks at: another input of the model, or what it's given as encoded already."""
    for name, stream in _MAIN_STREAM.items():
        if stream != queries and _takes(loaded, name):
            return stream
    return "encoder"


def _is_blind(loaded: "LoadedModel") -> bool:
    """Whether a model reads text or series and nothing to see: what it calls patches are of bytes or of time."""
    names = inspect.signature(loaded.model.forward).parameters
    return ("input_ids" in names or "past_values" in names) and not any(
        mark in name for name in names for mark in _SEEN
    )


def _takes(loaded: "LoadedModel", name: str) -> bool:
    return name in inspect.signature(loaded.model.forward).parameters
