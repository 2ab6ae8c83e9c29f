"""LLaVA-NeXT: an image is read whole and in tiles; the tiles' patches form one grid, less the padding around it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import Fold, ModelFamily
from attnscope.families.placeholders import (
    POOLING,
    TOWERS,
    ImageTokens,
    grid,
    joint_tokens,
    pooling_query,
    tile_fold,
    tiled_tokens,
    tiles,
)
from attnscope.families.prompts import encode_prompts, measured_by

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall


def tile_shapes(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[tuple[int, int]]:
    """Rows and columns of tiles that each sample's image is cut into."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    config = loaded.config
    sizes = inputs["image_sizes"].tolist()
    return [get_anyres_image_grid_shape(s, config.image_grid_pinpoints, config.vision_config.image_size) for s in sizes]


def side(loaded: "LoadedModel") -> int:
    """Patches along the side of a tile."""
    config = loaded.config.vision_config
    return config.image_size // config.patch_size


def seen(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The patches that the image encoder reads."""
    return [tiles(s, (side(loaded),) * 2, "first") for s in tile_shapes(inputs, loaded)]


def kept(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The patches that the language model reads: the overview, then row by row without padding, each with a newline."""
    shapes = tile_shapes(inputs, loaded)
    sizes = inputs["image_sizes"].tolist()
    return [_unpadded(shape, tuple(size), side(loaded)) for shape, size in zip(shapes, sizes, strict=True)]


def _unpadded(shape: tuple[int, int], size: tuple[int, int], length: int) -> ImageTokens:
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    rows, columns = (n * length for n in shape)
    cells = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    place = torch.nn.functional.pad(unpad_image(cells, size), (0, 1), value=-1).flatten(1).numpy()
    names = [f"tile {r // length},{c // length}" if c >= 0 else "" for r, c in place.T]
    patches = ImageTokens(np.where(place[1] < 0, -1, place[0]), place[1], np.array(names, object))
    return ImageTokens.joined([grid(length, length, tile="overview", step=shape), patches])


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """Tiles of one image behind each other, the overview first."""
    if "vision_tower" not in call.module:
        return None
    return tile_fold(
        [1 + rows * columns for rows, columns in tile_shapes(inputs, loaded)], call.shape[2], call.shape[3]
    )


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the language model, and of the image encoder over all tiles."""
    rows, columns = tile_shapes(inputs, loaded)[0]
    return {"joint": inputs["input_ids"].shape[1], "vision": (1 + rows * columns) * (side(loaded) ** 2 + 1)}


FAMILY = ModelFamily(
    name="llava_next",
    model_types=("llava_next",),
    sites=(*POOLING, *TOWERS),
    streams={"vision": tiled_tokens(seen, ("cls",)), "joint": joint_tokens(kept), "queries": pooling_query},
    encode=encode_prompts,
    measure=measured_by(encode_prompts, lengths),
    fold=fold,
)
