"""Mllama (Llama 3.2 Vision): a language model; some of its layers look at an image's tiles instead of the text."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import Fold, ModelFamily, SiteRule
from attnscope.families.layouts import text_tokens
from attnscope.families.prompts import encode_prompts, measured_by
from attnscope.tokens import KIND_CODES, TokenLayout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall


def side(loaded: "LoadedModel") -> int:
    """Patches along the side of a tile."""
    config = loaded.config.vision_config
    return config.image_size // config.patch_size


def vision_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """CLS and patches of each tile on the image's grid; tiles that an image doesn't fill are padding."""
    length, per_tile = side(loaded), side(loaded) ** 2 + 1
    ratios = loaded.config.vision_config.supported_aspect_ratios
    real = inputs["aspect_ratio_mask"].flatten(1).cpu().numpy() > 0
    # Identifier 0 stands for no image.
    shapes = np.array([(0, 1), *ratios])[inputs["aspect_ratio_ids"].cpu().numpy()]
    number = np.arange(tokens) // per_tile
    tile, patch = number % loaded.config.vision_config.max_num_tiles, np.arange(tokens) % per_tile - 1
    columns = shapes[:, number // loaded.config.vision_config.max_num_tiles, 1]
    row = tile // columns * length + patch // length
    column = tile % columns * length + patch % length
    on_grid = real[:, number] & (patch >= 0)
    kind = np.where(on_grid, KIND_CODES["image"], KIND_CODES["cls"])
    kind = np.where(real[:, number], kind, KIND_CODES["padding"]).astype(np.int8)
    names = np.array(
        [[f"tile {t // c},{t % c}" for t, c in zip(tile, row_columns, strict=True)] for row_columns in columns]
    )
    text = np.where(real[:, number], names, "").astype(object)
    return TokenLayout(kind, text, *(np.where(on_grid, p, -1).astype(np.int16) for p in (row, column)))


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """Tiles of one image are read together, each filled up to a multiple of eight tokens, which belong nowhere."""
    if "vision_model" not in call.module:
        return None
    per_tile, tiles = side(loaded) ** 2 + 1, loaded.config.vision_config.max_num_tiles
    filled = np.arange(call.shape[2]) % (call.shape[2] // tiles)
    tile = np.arange(call.shape[2]) // (call.shape[2] // tiles)
    place = np.where(filled < per_tile, tile * per_tile + filled, -1)
    samples = len(inputs["pixel_values"])
    media = call.shape[0] // samples
    first = (np.arange(call.shape[0]) % media)[:, None] * tiles * per_tile
    places = np.where(place >= 0, place + first, -1)
    return Fold(np.arange(call.shape[0]) // media, places, places)


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the text."""
    return {"text": inputs["input_ids"].shape[1]}


encode = partial(encode_prompts, nested=True)

FAMILY = ModelFamily(
    name="mllama",
    model_types=("mllama",),
    sites=(
        SiteRule(r"vision_model\.transformer\.layers\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(
            r"vision_model\.global_transformer\.layers\.(?P<layer>\d+)\.",
            "vision.self",
            first_layer="vision_config.num_hidden_layers",
        ),
        SiteRule(r"language_model\..*layers\.(?P<layer>\d+)\.self_attn", "text.self"),
        SiteRule(r"language_model\..*layers\.(?P<layer>\d+)\.cross_attn", "text.vision"),
    ),
    streams={"vision": vision_tokens, "text": text_tokens()},
    encode=encode,
    measure=measured_by(encode, lengths),
    fold=fold,
)
