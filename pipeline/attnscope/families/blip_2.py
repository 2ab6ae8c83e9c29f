"""BLIP-2 and InstructBLIP: an image encoder, a Q-Former whose queries look at it, and a language model that reads them.

InstructBLIP's Q-Former reads the instruction beside its queries. BLIP-2's retrieval model runs it a second time, over
the text alone.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.encoding import start_token
from attnscope.families.layouts import patch_tokens, text_tokens
from attnscope.families.placeholders import joint_tokens
from attnscope.families.prompts import encode_prompts, measured_by
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES, TokenLayout, joined_layout, plain_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def query_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The Q-Former's queries, and behind them the instruction where it reads one."""
    samples, queries = len(inputs["pixel_values"]), loaded.config.num_query_tokens
    layout = plain_layout(np.full((samples, queries), KIND_CODES["query"]))
    if tokens == queries:
        return layout
    read = text_tokens("qformer_input_ids", "qformer_attention_mask")
    return joined_layout(layout, read(inputs, loaded, tokens - queries))


def read_text(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The text of the retrieval model, which leaves the queries' placeholders out."""
    last = {name: inputs[name][:, -tokens:] for name in ("input_ids", "attention_mask") if name in inputs}
    return text_tokens()(last, loaded, tokens)


def encode(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """By the processor, which puts the queries' placeholders in front; with a start token for a T5's decoder."""
    inputs = encode_prompts(samples, loaded, placeholder="")
    if getattr(loaded.config, "use_decoder_only_language_model", True):
        return inputs
    inputs["decoder_input_ids"] = inputs["input_ids"].new_full((len(samples), 1), start_token(loaded))
    return inputs


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the language model (of the text, for a model without one), and of the Q-Former where it reads text."""
    tokens, queries = inputs["input_ids"].shape[1], loaded.config.num_query_tokens
    found = {"joint": tokens, "text": tokens - queries}
    if "qformer_input_ids" in inputs:
        found["queries"] = queries + inputs["qformer_input_ids"].shape[1]
    return found


FAMILY = ModelFamily(
    name="blip-2",
    model_types=("blip-2", "blip_2", "instructblip"),
    sites=(
        SiteRule(r"vision_model\.encoder\.layers\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"qformer\.encoder\.layer\.(?P<layer>\d+)\.attention", "queries.self", call=0),
        SiteRule(r"qformer\.encoder\.layer\.(?P<layer>\d+)\.attention", "text.self", call=1),
        SiteRule(r"qformer\.encoder\.layer\.(?P<layer>\d+)\.crossattention", "queries.vision"),
        SiteRule(r"language_model\..*layers\.(?P<layer>\d+)\.", "joint.self"),
        SiteRule(r"language_model\.encoder\.block\.(?P<layer>\d+)\.", "joint.self"),
        SiteRule(r"language_model\.decoder\.block\.(?P<layer>\d+)\..*SelfAttention", "decoder.self"),
        SiteRule(r"language_model\.decoder\.block\.(?P<layer>\d+)\..*EncDecAttention", "decoder.joint"),
    ),
    streams={
        "vision": patch_tokens,
        "queries": query_tokens,
        "text": read_text,
        "joint": joint_tokens(lambda inputs, loaded: (), kind="query"),
        "decoder": text_tokens("decoder_input_ids", "decoder_attention_mask"),
    },
    encode=encode,
    measure=measured_by(encode, lengths),
)
