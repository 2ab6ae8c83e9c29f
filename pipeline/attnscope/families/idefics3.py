"""Idefics3 and SmolVLM: an image is read in tiles and whole; neighbouring patches are shuffled into one image token."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attnscope.families import Fold, ModelFamily
from attnscope.families.placeholders import TOWERS, ImageTokens, joint_tokens, tile_fold, tiled_tokens, tiles
from attnscope.families.prompts import encode_expanded, measured_by
from attnscope.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

_TILE = re.compile(r"<row_(\d+)_col_(\d+)>")


def tile_counts(inputs: "dict[str, Tensor]") -> list[int]:
    """Tiles of each sample, the whole image among them; images of zeros alone fill the batch up."""
    real = (inputs["pixel_values"] != 0).flatten(2).any(dim=2)
    return real.sum(dim=1).tolist()


def tile_shapes(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[tuple[int, int]]:
    """Rows and columns of tiles of each sample's image, as the marks in its prompt say; (0, 0) for none."""
    if loaded.tokenizer is None:
        return [(int(n > 1), n - 1) for n in tile_counts(inputs)]
    texts = [loaded.tokenizer.decode(row) for row in inputs["input_ids"].tolist()]
    marks = [[(int(r), int(c)) for r, c in _TILE.findall(text)] for text in texts]
    return [max(found, default=(0, 0)) for found in marks]


def seen(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The patches that the image encoder reads."""
    height, width = inputs["pixel_values"].shape[-2:]
    size = loaded.config.vision_config.patch_size
    return [_tiles(shape, (height // size, width // size)) for shape in tile_shapes(inputs, loaded)]


def shuffled(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The image tokens that the language model reads."""
    height, width = inputs["pixel_values"].shape[-2:]
    size = loaded.config.vision_config.patch_size * loaded.config.scale_factor
    return [_tiles(shape, (height // size, width // size)) for shape in tile_shapes(inputs, loaded)]


def _tiles(shape: tuple[int, int], side: tuple[int, int]) -> ImageTokens:
    return tiles(shape, side, "last") if shape[0] else tiles((1, 1), side)


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """Tiles of one image behind each other, the whole image last."""
    if "vision_model" not in call.module:
        return None
    return tile_fold(tile_counts(inputs), call.shape[2], call.shape[3])


def encode(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """Prompts in which each tile has its mark and its placeholders."""
    tokenizer, config = loaded.tokenizer, loaded.config
    names = {"fake": "fake_image_token", "whole": "global_image_token"}
    defaults = {"fake": "<fake_token_around_image>", "whole": "<global-img>"}
    fake, whole = (getattr(tokenizer, names[k], None) or defaults[k] for k in names)
    token = str(tokenizer.convert_ids_to_tokens(config.image_token_id))  # type: ignore[union-attr]
    vision = config.vision_config
    image = token * (vision.image_size // vision.patch_size // config.scale_factor) ** 2

    def expand(made: "Mapping[str, Tensor]", sample: int) -> str:
        rows, columns = (int(made[name][sample][0]) for name in ("rows", "cols"))
        cut = [
            "".join(f"{fake}<row_{r}_col_{c}>{image}" for c in range(1, columns + 1)) + "\n" for r in range(1, rows + 1)
        ]
        return "".join([*cut, "\n" if rows else "", fake, whole, image, fake])

    return encode_expanded(samples, loaded, token, expand, options={"return_row_col_info": True})


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the language model, and of the image encoder over all tiles."""
    height, width = inputs["pixel_values"].shape[-2:]
    size = loaded.config.vision_config.patch_size
    tokens = tile_counts(inputs)[0] * (height // size) * (width // size)
    return {"joint": inputs["input_ids"].shape[1], "vision": tokens}


FAMILY = ModelFamily(
    name="idefics3",
    model_types=("idefics3", "smolvlm"),
    sites=TOWERS,
    streams={"vision": tiled_tokens(seen), "joint": joint_tokens(shuffled)},
    encode=encode,
    measure=measured_by(encode, lengths),
    fold=fold,
)
