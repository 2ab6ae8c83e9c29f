"""BLIP: an image encoder, and a text encoder or decoder whose layers look at the image.

The question answerer has both, and its decoder looks at the question, of which it is not told what is padding: samples
go one by one. The decoder is given the start of an answer, as the model's own `generate` does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnscope.families import ModelFamily, Placement, SiteRule
from attnscope.families.encoding import encode_samples
from attnscope.families.layouts import patch_tokens, text_tokens
from attnscope.families.prompts import taken
from attnscope.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

_DECODER = SiteRule(r"text_decoder\..*layer\.(?P<layer>\d+)\.attention", "decoder.self")
_DECODER_CROSS = SiteRule(r"text_decoder\..*layer\.(?P<layer>\d+)\.crossattention", "decoder.text")


class BlipFamily(ModelFamily):
    """Tells the decoder that answers a question from the one that captions an image."""

    def place(self, call: "AttentionCall", loaded: "LoadedModel") -> Placement:
        """As the rules say; a decoder beside a text encoder is a stream of its own."""
        if any(name.startswith("text_encoder") for name in loaded.module_names):
            for rule in (_DECODER, _DECODER_CROSS):
                placement = rule.place(call.module, call.number)
                if placement is not None:
                    return placement
        return super().place(call, loaded)


def encode(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """Image and text, and the start token of an answer for a model that writes one beside its text encoder."""
    import inspect

    inputs = taken(encode_samples(samples, loaded), loaded)
    if "decoder_input_ids" in inspect.signature(loaded.model.forward).parameters:
        start = loaded.config.text_config.bos_token_id
        inputs["decoder_input_ids"] = inputs["input_ids"].new_full((len(samples), 1), start)
    return inputs


FAMILY = BlipFamily(
    name="blip",
    model_types=("blip",),
    sites=(
        SiteRule(r"vision_model\.encoder\.layers\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"text_(en|de)coder\..*layer\.(?P<layer>\d+)\.attention", "text.self"),
        SiteRule(r"text_(en|de)coder\..*layer\.(?P<layer>\d+)\.crossattention", "text.vision"),
        SiteRule(r"text_model\..*layer\.(?P<layer>\d+)\.attention", "text.self"),
    ),
    streams={
        "vision": patch_tokens,
        "text": text_tokens(),
        "decoder": text_tokens("decoder_input_ids", "decoder_attention_mask"),
    },
    encode=encode,
    one_by_one=True,
)
