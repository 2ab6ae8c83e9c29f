"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any shape, packed end to end, read image by image or in windows.

Videos come behind the images, frame by frame.

The image encoder keeps the patches together that become one token of the language model, and Qwen2.5-VL sorts those by
window; the layout gives each its place on the image's grid.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from attnscope.families import Fold, ModelFamily, SiteRule
from attnscope.families.placeholders import (
    TOWERS,
    Images,
    ImageTokens,
    grid,
    image_token_id,
    joint_tokens,
    tiled_tokens,
    video_token_id,
)
from attnscope.families.prompts import encode_expanded, measured_by
from attnscope.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

# Where the grids of images or videos stand in the inputs, and which placeholder stands for them.
_Kind: TypeAlias = "tuple[str, Callable[[LoadedModel], int]]"
_IMAGES: _Kind = ("image_grid_thw", image_token_id)
_VIDEOS: _Kind = ("video_grid_thw", video_token_id)

_BLOCK = SiteRule(r"visual\.blocks\.(?P<layer>\d+)\.attn", "vision.self")


def patches(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
    """The patches of each sample's images, then videos, in the order of the pixels: merged ones side by side."""
    merge = loaded.config.vision_config.spatial_merge_size

    def in_blocks(rows: int, columns: int) -> ImageTokens:
        whole = grid(rows, columns)
        blocks = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
        order = blocks.swapaxes(1, 2).reshape(-1)
        return ImageTokens(whole.row[order], whole.column[order], whole.tile[order])

    read = [_by_sample(inputs, loaded, kind, in_blocks) for kind in _present(inputs)]
    return [ImageTokens.joined(parts) for parts in zip(*read, strict=True)]


def merged(kind: _Kind) -> Images:
    """The image or video tokens of the language model, on the grid of merged patches."""

    def images(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[ImageTokens]:
        merge = loaded.config.vision_config.spatial_merge_size
        return _by_sample(inputs, loaded, kind, lambda rows, columns: grid(rows // merge, columns // merge))

    return images


def _present(inputs: "dict[str, Tensor]") -> list[_Kind]:
    """What the inputs have, in the order in which the image encoder reads it."""
    return [kind for kind in (_IMAGES, _VIDEOS) if kind[0] in inputs]


def _by_sample(
    inputs: "dict[str, Tensor]", loaded: "LoadedModel", kind: _Kind, place: Callable[[int, int], ImageTokens]
) -> list[ImageTokens]:
    shapes = inputs[kind[0]].tolist()
    owner = _owners(inputs, loaded, kind)
    return [
        ImageTokens.joined(
            [place(s[1], s[2]) for s, o in zip(shapes, owner, strict=True) if o == i for _ in range(s[0])]
        )
        for i in range(len(inputs["input_ids"]))
    ]


def _owners(inputs: "dict[str, Tensor]", loaded: "LoadedModel", kind: _Kind) -> np.ndarray:
    """The sample of each image: samples take as many images as fill their placeholders."""
    grids, token_id = kind
    sizes = inputs[grids].prod(dim=1).cpu().numpy() // loaded.config.vision_config.spatial_merge_size**2
    wanted = (inputs["input_ids"] == token_id(loaded)).sum(dim=1).cpu().numpy()
    return np.searchsorted(np.cumsum(wanted), np.cumsum(sizes), side="left")


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """The patches of one image, frame or window; those of all images, or videos, where a kernel takes them in one row.

    The encoder reads all images first, then all videos, and so do the patches of a sample stand.
    """
    place = _BLOCK.place(call.module, call.number)
    if place is None:
        return None
    read = _read(inputs, loaded, place.layer)
    packed = _packed(call, read)
    kinds = _present(inputs)
    owners = [np.repeat(_owners(inputs, loaded, k), inputs[k[0]].prod(dim=1).cpu().numpy()) for k in kinds]
    owner = np.concatenate(owners)
    samples = set(owner[packed].tolist())
    if len(samples) > 1:
        raise ValueError(f"{call.kernel} reads the images of several samples in one row; extract with batch_size=1")
    sample = samples.pop()
    places = np.searchsorted(np.flatnonzero(owner == sample), packed)[None, :]
    return Fold(np.array([sample]), places, places)


def _packed(call: "AttentionCall", read: "Sequence[tuple[np.ndarray, np.ndarray]]") -> np.ndarray:
    """The patches of a call, counted over all images and then all videos."""
    apart, rows, start = [], [], 0
    for order, ends in read:
        rows.append(start + order)
        apart += [rows[-1][first:end] for first, end in pairwise(ends)]
        start += len(order)
    # A kernel that takes all images in one row is called once for them, and once for the videos.
    taken = rows if "flash" in call.kernel or [len(each) for each in apart].count(call.shape[2]) == 0 else apart
    if call.number >= len(taken) or len(taken[call.number]) != call.shape[2]:
        raise ValueError(f"call {call.number} of {call.module!r} agrees with no image or frame of the inputs")
    return taken[call.number]


def _read(inputs: "dict[str, Tensor]", loaded: "LoadedModel", layer: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For images, and for videos: the order in which a layer reads the patches, and where each of its calls ends."""
    return [_segments(inputs[grids].cpu(), loaded.config.vision_config, layer) for grids, _ in _present(inputs)]


def _segments(shapes: "Tensor", config: "PretrainedConfig", layer: int) -> tuple[np.ndarray, np.ndarray]:
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

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
    streams={"vision": tiled_tokens(patches), "joint": joint_tokens(merged(_IMAGES), videos=merged(_VIDEOS))},
    encode=encode,
    measure=measured_by(encode, lengths),
    fold=fold,
)
