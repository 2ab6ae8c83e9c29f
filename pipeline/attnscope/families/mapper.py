"""The reference world's mapper: CLIP's encoders, layers in which both streams attend to each other, and a decoder.

Where captions are written, the text is the caption's, and the mapper's side of the text is a stream of its own, the
fixed `prompt`. A sample's text is then how its caption begins; without one it begins with its first word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import ModelFamily, Placement, SiteRule
from attnscope.families.encoding import encode_samples, measure_text
from attnscope.families.layouts import patch_tokens, text_tokens, token_strings
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES, TokenLayout, text_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall


def writes(loaded: "LoadedModel") -> bool:
    """Whether the model has the head that writes captions."""
    return hasattr(loaded.model, "decoder")


class MapperFamily(ModelFamily):
    """Tells the text that is mapped from the text that is written."""

    def place(self, call: "AttentionCall", loaded: "LoadedModel") -> Placement:
        """As the rules say; where captions are written, the text before the decoder is the prompt."""
        found = super().place(call, loaded)
        if not writes(loaded) or call.module.startswith("decoder."):
            return found
        return replace(
            found, **{name: getattr(found, name).replace("text", "prompt") for name in ("site", "queries", "keys")}
        )


def encode(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """Image and question; or image and how its caption begins, behind the start token."""
    if not writes(loaded):
        return encode_samples(samples, loaded)
    import torch

    # Without a word there is still the start token, which the tokenizer can't be asked for alone.
    inputs = encode_samples([replace(s, text=s.text or "a") for s in samples], loaded)
    lengths = torch.tensor([len(_beginning(s, loaded)) for s in samples])
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = inputs["input_ids"][:, : real.shape[1]]
    inputs["input_ids"] = ids.masked_fill(~real, loaded.config.pad_token_id)
    inputs["attention_mask"] = real.long()
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def measure(sample: Sample, loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the text: a question's, or those of the caption's beginning."""
    if not writes(loaded):
        return measure_text(sample, loaded)
    if sample.text:
        measure_text(sample, loaded)
    return {"text": len(_beginning(sample, loaded))}


def _beginning(sample: Sample, loaded: "LoadedModel") -> list[int]:
    """The start token and the words of a sample's text, without the end token."""
    assert loaded.tokenizer is not None
    return loaded.tokenizer(sample.text or "")["input_ids"][:-1]


def prompt_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The prompt, the same for each sample: none of its tokens is content."""
    samples = len(inputs["input_ids"])
    strings = token_strings(loaded.config.prompt_ids, loaded)
    return text_layout([strings] * samples, np.full((samples, tokens), KIND_CODES["special"]))


FAMILY = MapperFamily(
    name="mapper",
    model_types=("clip_mapper",),
    sites=(
        SiteRule(r"vision_model\.encoder\.layers\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"text_model\.encoder\.layers\.(?P<layer>\d+)\.", "text.self"),
        SiteRule(
            r"mapper\.layers\.(?P<layer>\d+)\.text_attention", "text.self", first_layer="text_config.num_hidden_layers"
        ),
        SiteRule(
            r"mapper\.layers\.(?P<layer>\d+)\.image_attention",
            "vision.self",
            first_layer="vision_config.num_hidden_layers",
        ),
        SiteRule(r"mapper\.layers\.(?P<layer>\d+)\.text_image_attention", "text.vision"),
        SiteRule(r"mapper\.layers\.(?P<layer>\d+)\.image_text_attention", "vision.text"),
        SiteRule(r"decoder\.layers\.(?P<layer>\d+)\.self_attention", "text.self"),
        SiteRule(r"decoder\.layers\.(?P<layer>\d+)\.image_attention", "text.vision"),
    ),
    streams={"vision": patch_tokens, "text": text_tokens(), "prompt": prompt_tokens},
    encode=encode,
    measure=measure,
)
