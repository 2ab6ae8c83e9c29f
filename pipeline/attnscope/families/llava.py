"""LLaVA and its kin: an image encoder whose patches become tokens of a language model, one for one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnscope.families import ModelFamily
from attnscope.families.layouts import patch_grid, patch_tokens
from attnscope.families.placeholders import POOLING, TOWERS, ImageTokens, grid, joint_tokens, pooling_query, separator
from attnscope.families.prompts import encode_prompts, measured_by

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def images(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """One patch grid for each sample, behind its CLS token where the model keeps it."""
    if "pixel_values" not in inputs:
        return []
    pixels = inputs["pixel_values"]
    patches = grid(*patch_grid(pixels, loaded.config.vision_config))
    if getattr(loaded.config, "vision_feature_select_strategy", "") == "full":
        patches = ImageTokens.joined([separator(), patches])
    return [patches] * len(pixels)


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the language model."""
    return {"joint": inputs["input_ids"].shape[1]}


FAMILY = ModelFamily(
    name="llava",
    model_types=("llava", "vipllava", "paligemma"),
    sites=(*POOLING, *TOWERS),
    streams={"vision": patch_tokens, "joint": joint_tokens(images), "queries": pooling_query},
    encode=encode_prompts,
    measure=measured_by(encode_prompts, lengths),
)
