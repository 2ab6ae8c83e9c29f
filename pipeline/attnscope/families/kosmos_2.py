"""Kosmos-2: learned queries read the image's patches, and stand for the image in the language model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.layouts import patch_grid, query_tokens, text_tokens
from attnscope.families.prompts import encode_prompts, measured_by
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES, TokenLayout, grid_layout, joined_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def vision_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """CLS and the patches; behind them, where the queries read themselves as well, the queries."""
    pixels = inputs["pixel_values"]
    patches = grid_layout(len(pixels), *patch_grid(pixels, loaded.config.vision_config))
    return joined_layout(patches, query_tokens(inputs, loaded, tokens - patches.token_count))


def joint_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """Text, with queries at the image's places."""
    layout = text_tokens()(inputs, loaded, tokens)
    if "image_embeds_position_mask" in inputs:
        at_image = inputs["image_embeds_position_mask"].cpu().numpy() > 0
        layout.kind[at_image], layout.text[at_image] = KIND_CODES["query"], ""
    return layout


def encode(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """By the processor, with a place for each query."""
    return encode_prompts(samples, loaded, options={"num_image_tokens": loaded.config.latent_query_num})


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the language model."""
    return {"joint": inputs["input_ids"].shape[1]}


FAMILY = ModelFamily(
    name="kosmos-2",
    model_types=("kosmos-2",),
    sites=(
        SiteRule(r"vision_model\..*layers\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"image_to_text_projection\.x_attn", "queries.vision"),
        SiteRule(r"text_model\..*layers\.(?P<layer>\d+)\.", "joint.self"),
    ),
    streams={"vision": vision_tokens, "queries": query_tokens, "joint": joint_tokens},
    encode=encode,
    measure=measured_by(encode, lengths),
)
