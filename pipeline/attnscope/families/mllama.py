"""Mllama (Llama 3.2 Vision): a language model; some of its layers look at an image's tiles instead of the text."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import Fold, ModelFamily, SiteRule
from attnscope.families.layouts import text_tokens
from attnscope.families.placeholders import tile_fold
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
    """CLS and patches of each tile on the image's grid.

    The image encoder fills tiles up to a multiple of eight tokens, and reads those as well as the tiles that an image
    leaves empty: they are special tokens. The language model reads the empty tiles only for a text in front of the
    image, whose every key is masked; else they are padding.
    """
    config, length = loaded.config.vision_config, side(loaded)
    used = inputs["aspect_ratio_mask"].flatten(1).cpu().numpy() > 0  # (sample, tile)
    # Identifier 0 stands for no image.
    shapes = np.array([(0, 1), *config.supported_aspect_ratios])[inputs["aspect_ratio_ids"].cpu().numpy()]
    per_tile = tokens // used.shape[1]
    number, patch = np.arange(tokens) // per_tile, np.arange(tokens) % per_tile - 1
    tile, columns = number % config.max_num_tiles, shapes[:, number // config.max_num_tiles, 1]
    row, column = tile // columns * length + patch // length, tile % columns * length + patch % length
    real = used[:, number] & (patch < length**2)
    on_grid = real & (patch >= 0)
    is_read = (per_tile > length**2 + 1) | _has_text_in_front(inputs)[:, None]
    unused = np.where(is_read, KIND_CODES["special"], KIND_CODES["padding"])
    kind = np.select([on_grid, real], [KIND_CODES["image"], KIND_CODES["cls"]], unused).astype(np.int8)
    names = [[f"tile {t // c},{t % c}" for t, c in zip(tile, across, strict=True)] for across in columns]
    text = np.where(real, np.array(names, object), "")
    return TokenLayout(kind, text, *(np.where(on_grid, p, -1).astype(np.int16) for p in (row, column)))


def _has_text_in_front(inputs: "dict[str, Tensor]") -> np.ndarray:
    """Whether a text token of the sample may look at no tile, (sample,)."""
    if "cross_attention_mask" not in inputs:
        return np.zeros(len(inputs["input_ids"]), bool)
    blind = (inputs["cross_attention_mask"] == 0).flatten(2).all(dim=2)
    return (blind & (inputs["attention_mask"] > 0)).any(dim=1).cpu().numpy()


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """Several images of one sample behind each other."""
    if "vision_model" not in call.module or call.shape[0] == (samples := len(inputs["pixel_values"])):
        return None
    return tile_fold([call.shape[0] // samples] * samples, call.shape[2], call.shape[3])


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the text."""
    return {"text": inputs["input_ids"].shape[1]}


# The processor writes the BOS token itself, behind the image's.
encode = partial(encode_prompts, nested=True, options={"add_special_tokens": False})

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
