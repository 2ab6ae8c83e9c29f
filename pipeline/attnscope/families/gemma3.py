"""Gemma 3: a SigLIP encoder whose patches are averaged to a small grid of image tokens."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from attnscope.families import ModelFamily
from attnscope.families.layouts import patch_tokens
from attnscope.families.placeholders import POOLING, TOWERS, ImageTokens, grid, joint_tokens, pooling_query
from attnscope.families.prompts import encode_prompts, measured_by

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def images(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Sequence[ImageTokens]:
    """One grid of averaged patches for each sample."""
    side = int(loaded.config.mm_tokens_per_image**0.5)
    return [grid(side, side)] * len(inputs["input_ids"])


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the language model."""
    return {"joint": inputs["input_ids"].shape[1]}


encode = partial(encode_prompts, nested=True)

FAMILY = ModelFamily(
    name="gemma3",
    model_types=("gemma3",),
    sites=(*POOLING, *TOWERS),
    streams={"vision": patch_tokens, "joint": joint_tokens(images), "queries": pooling_query},
    encode=encode,
    measure=measured_by(encode, lengths),
)
