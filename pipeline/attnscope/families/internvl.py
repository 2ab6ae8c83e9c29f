"""InternVL: an image is read in tiles and whole; neighbouring patches are shuffled into one image token."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import Fold, ModelFamily
from attnscope.families.placeholders import (
    TOWERS,
    ImageTokens,
    image_token_id,
    joint_tokens,
    tile_fold,
    tiled_tokens,
    tiles,
)
from attnscope.families.prompts import encode_expanded, measured_by
from attnscope.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

_SHAPES = "_tile_shapes"


def tile_shapes(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[tuple[int, int]]:
    """Rows and columns of tiles of each sample's image, as they were cut; in one row where nobody knows."""
    if _SHAPES in inputs:
        return [(r, c) for r, c in inputs[_SHAPES].tolist()]
    tokens = side(loaded, merged=True) ** 2
    counts = (inputs["input_ids"] == image_token_id(loaded)).sum(dim=1).tolist()
    return [(1, max(n // tokens - 1, 1)) for n in counts]


def side(loaded: "LoadedModel", merged: bool = False) -> int:
    """Patches along the side of a tile; image tokens where they are merged."""
    config = loaded.config.vision_config
    (height, _), (patch, _) = (np.broadcast_to(n, 2).tolist() for n in (config.image_size, config.patch_size))
    return int(height // patch * (loaded.config.downsample_ratio if merged else 1))


def seen(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The patches that the image encoder reads."""
    return [_tiles(shape, side(loaded)) for shape in tile_shapes(inputs, loaded)]


def shuffled(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The image tokens that the language model reads."""
    return [_tiles(shape, side(loaded, merged=True)) for shape in tile_shapes(inputs, loaded)]


def _tiles(shape: tuple[int, int], length: int) -> ImageTokens:
    return tiles(shape, (length, length), "last" if shape != (1, 1) else None)


def _count(shape: tuple[int, int]) -> int:
    return 1 if shape == (1, 1) else shape[0] * shape[1] + 1


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """Tiles of one image behind each other, the whole image last."""
    if "vision_tower" not in call.module:
        return None
    return tile_fold([_count(s) for s in tile_shapes(inputs, loaded)], call.shape[2], call.shape[3])


def encode(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """Prompts in which each tile has its placeholders, and a note of how the images were cut."""
    tokenizer, processor = loaded.tokenizer, loaded.image_processor
    token = str(tokenizer.convert_ids_to_tokens(loaded.config.image_token_id))  # type: ignore[union-attr]
    start, end = (getattr(tokenizer, f"{n}_image_token", None) or d for n, d in (("start", "<img>"), ("end", "</img>")))
    tokens = side(loaded, merged=True) ** 2

    def expand(made: "Mapping[str, Tensor]", sample: int) -> str:
        return f"{start}{token * tokens * int(made['num_patches'][sample])}{end}"

    inputs = encode_expanded(samples, loaded, token, expand, options={"crop_to_patches": True})
    return inputs | {_SHAPES: _cut_shapes(samples, processor)}


def _cut_shapes(samples: Sequence[Sample], processor: object) -> "Tensor":
    """Rows and columns of the tiles, by the image processor's own rule."""
    import torch
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    size = processor.size  # type: ignore[attr-defined]
    limits = processor.min_patches, processor.max_patches  # type: ignore[attr-defined]
    shapes = []
    for sample in samples:
        image = sample.load_image()
        assert image is not None
        columns, rows = get_optimal_tiled_canvas(image.size[::-1], (size["height"], size["width"]), *limits)
        shapes.append((rows, columns))
    return torch.tensor(shapes)


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the language model, and of the image encoder over all tiles."""
    tokens = _count(tile_shapes(inputs, loaded)[0]) * (side(loaded) ** 2 + 1)
    return {"joint": inputs["input_ids"].shape[1], "vision": tokens}


FAMILY = ModelFamily(
    name="internvl",
    model_types=("internvl",),
    sites=TOWERS,
    streams={"vision": tiled_tokens(seen, ("cls",)), "joint": joint_tokens(shuffled)},
    encode=encode,
    measure=measured_by(encode, lengths),
    fold=fold,
)
