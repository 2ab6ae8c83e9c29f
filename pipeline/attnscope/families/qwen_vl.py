"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any shape, packed end to end, read image by image or in windows.

The image encoder keeps the patches together that become one token of the language model, and Qwen2.5-VL sorts those by
window; the layout gives each its place on the image's grid.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import Fold, ModelFamily, SiteRule
from attnscope.families.placeholders import TOWERS, ImageTokens, grid, image_token_id, joint_tokens, tiled_tokens
from attnscope.families.prompts import encode_expanded, measured_by
from attnscope.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

_BLOCK = SiteRule(r"visual\.blocks\.(?P<layer>\d+)\.attn", "vision.self")


def patches(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The patches of each sample's images in the order of the pixels: those of one merged token together."""
    merge = loaded.config.vision_config.spatial_merge_size

    def in_blocks(rows: int, columns: int) -> ImageTokens:
        whole = grid(rows, columns)
        blocks = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
        order = blocks.swapaxes(1, 2).reshape(-1)
        return ImageTokens(whole.row[order], whole.column[order], whole.tile[order])

    return _by_sample(inputs, loaded, in_blocks)


def merged(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The image tokens of the language model, on the grid of merged patches."""
    merge = loaded.config.vision_config.spatial_merge_size
    return _by_sample(inputs, loaded, lambda rows, columns: grid(rows // merge, columns // merge))


def _by_sample(
    inputs: "dict[str, Tensor]", loaded: "LoadedModel", place: Callable[[int, int], ImageTokens]
) -> list[ImageTokens]:
    shapes = inputs["image_grid_thw"].tolist()
    owner = _owners(inputs, loaded)
    return [
        ImageTokens.joined(
            [place(s[1], s[2]) for s, o in zip(shapes, owner, strict=True) if o == i for _ in range(s[0])]
        )
        for i in range(len(inputs["input_ids"]))
    ]


def _owners(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> np.ndarray:
    """The sample of each image: samples take as many images as fill their placeholders."""
    sizes = inputs["image_grid_thw"].prod(dim=1).cpu().numpy() // loaded.config.vision_config.spatial_merge_size**2
    wanted = (inputs["input_ids"] == image_token_id(loaded)).sum(dim=1).cpu().numpy()
    return np.searchsorted(np.cumsum(wanted), np.cumsum(sizes), side="left")


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """The patches of one image or window; those of all images where a kernel takes them in one row."""
    place = _BLOCK.place(call.module, call.number)
    if place is None:
        return None
    order, ends = _segments(inputs, loaded, place.layer)
    packed = order[ends[call.number] : ends[call.number + 1]] if call.shape[2] < len(order) else order
    counts = np.bincount(_owners(inputs, loaded), inputs["image_grid_thw"].prod(dim=1).cpu().numpy())
    first = np.concatenate([[0], np.cumsum(counts)]).astype(int)
    sample = int(np.searchsorted(first, packed[0], side="right")) - 1
    if packed.max() >= first[sample + 1]:
        raise ValueError(f"{call.kernel} reads the images of several samples in one row; extract with batch_size=1")
    places = (packed - first[sample])[None, :]
    return Fold(np.array([sample]), places, places)


def _segments(inputs: "dict[str, Tensor]", loaded: "LoadedModel", layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which a layer reads the patches, and where each of its calls ends."""
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

    shapes, config = inputs["image_grid_thw"].cpu(), loaded.config.vision_config
    order, ends = np.arange(int(shapes.prod(dim=1).sum())), get_vision_cu_seqlens(shapes)
    if getattr(config, "window_size", None):
        merge = config.spatial_merge_size
        units, window_ends = get_vision_window_index(shapes, merge, config.window_size, config.patch_size)
        order = order.reshape(-1, merge**2)[units.numpy()].reshape(-1)
        ends = ends if layer in config.fullatt_block_indexes else window_ends
    return order, ends.numpy()


def encode(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """Prompts in which as many placeholders stand as the image has merged patches."""
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
    start, token, end = (str(loaded.tokenizer.convert_ids_to_tokens(getattr(loaded.config, n))) for n in names)  # type: ignore[union-attr]
    unit = loaded.config.vision_config.spatial_merge_size**2

    def expand(seen: "Mapping[str, Tensor]", sample: int) -> str:
        return token * (int(seen["image_grid_thw"][sample].prod()) // unit)

    inputs = encode_expanded(samples, loaded, token, expand, before=f"{start}{token}{end}")
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token_id(loaded)).int()
    return inputs


def lengths(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Mapping[str, int]:
    """Tokens of the language model, and patches."""
    return {"joint": inputs["input_ids"].shape[1], "vision": int(inputs["image_grid_thw"].prod(dim=1).sum())}


FAMILY = ModelFamily(
    name="qwen_vl",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    sites=(_BLOCK, *TOWERS),
    streams={"vision": tiled_tokens(patches), "joint": joint_tokens(merged)},
    encode=encode,
    measure=measured_by(encode, lengths),
    fold=fold,
)
