"""Ready inputs: batches of tensors that a caller made, cut into samples and put together again."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch

from attnscope.families import Inputs
from attnscope.families.layouts import GRIDS, MEASURES
from attnscope.samples import SampleError

# Patches of all images end to end: (patches, sizes of the images, and how `mm_token_type_ids` marks their tokens).
_PACKED = (("pixel_values", "image_grid_thw", 1), ("pixel_values_videos", "video_grid_thw", 2))
_PATCHES = tuple(name for name, *_ in _PACKED)
# Sizes of images that `pixel_values` holds, padded or with the patches of all of them side by side.
_TOLD_SIZES = ("image_sizes", "target_sizes")
# What says which part of an image tensor is padding.
_IMAGE_MASKS = ("pixel_mask", "pixel_attention_mask", "visual_attention_mask", "aspect_ratio_mask", "image_sizes")


def cut_batch(batch: Mapping[str, torch.Tensor]) -> list[Inputs]:
    """The samples of a batch, each with a leading axis of length 1; where images are packed, with its own patches.

    Raises
    ------
    SampleError
        When tensors have different leading axes, and nothing tells which part belongs to which sample.
    """
    named = {name: batch[name] for name in sorted(batch, key=lambda name: name not in MEASURES)}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            raise SampleError(f"ready inputs are tensors with a leading batch axis, but {name!r} is {value!r}")
    lengths = {name: len(tensor) for name, tensor in named.items()}
    if len(set(lengths.values())) == 1:
        return [{n: t[i : i + 1] for n, t in named.items()} for i in range(next(iter(lengths.values())))]
    if lengths.get("input_ids") == 1:
        return [named]
    if (images := _images(named)) is not None:
        return images
    packed = {name for names in _PACKED for name in names[:2]}
    if "mm_token_type_ids" not in named or len({n for k, n in lengths.items() if k not in packed}) != 1:
        raise SampleError(
            f"ready inputs have different batch sizes ({', '.join(f'{k}: {n}' for k, n in lengths.items())});"
            " give a dict of tensors for each sample"
        )
    plain = [{n: t[i : i + 1] for n, t in named.items() if n not in packed} for i in range(lengths["input_ids"])]
    for patches, grids, mark in _PACKED:
        if patches in named:
            for row, own in zip(plain, _unpacked(named, patches, grids, mark), strict=True):
                row |= own
    return plain


def _images(batch: Inputs) -> list[Inputs] | None:
    """The samples of a batch of packed images and nothing else: each image with its own patches; None for another."""
    grid = next((batch[name] for name in GRIDS if name in batch), None)
    if grid is None or grid.ndim != 2 or any(name in batch for name in MEASURES):
        return None
    ends = [0, *accumulate(grid.prod(dim=1).tolist())]
    if any(len(tensor) not in (len(grid), ends[-1]) for tensor in batch.values()):
        return None
    return [
        {n: t[i : i + 1] if len(t) == len(grid) else t[ends[i] : ends[i + 1]] for n, t in batch.items()}
        for i in range(len(grid))
    ]


def _unpacked(batch: Inputs, patches: str, grids: str, mark: int) -> Iterator[Inputs]:
    """The patches and grids of each sample, whose images are in order, by the image tokens that the sample has."""
    tokens = (batch["mm_token_type_ids"] == mark).sum(dim=1).tolist()
    sizes = batch[grids].prod(dim=1).tolist()
    merged = len(batch[patches]) // max(1, sum(tokens))
    ends, images = [0, *accumulate(sizes)], 0
    for count in accumulate(tokens):
        first = images
        while images < len(sizes) and ends[images] < count * merged:
            images += 1
        if ends[images] != count * merged:
            raise SampleError(
                f"the image tokens of a sample don't agree with {grids!r} of its images;"
                " give a dict of tensors for each sample"
            )
        if images > first:
            yield {patches: batch[patches][ends[first] : ends[images]], grids: batch[grids][first:images]}
        else:
            yield {}


def text_lengths(rows: Sequence[Inputs]) -> np.ndarray:
    """Tokens of each sample's text; 0 for one without."""
    return np.array([x["input_ids"].shape[1] if "input_ids" in x else 0 for x in rows], np.int64)


def alike(rows: Sequence[Inputs], chosen: Sequence[int]) -> Iterator[list[int]]:
    """The chosen samples in order, cut where two can't share a batch.

    They can where their tensors have the same sizes, or where a mask says what is padding.
    """
    group: list[int] = []
    for i in chosen:
        if group and not _fit(rows[group[0]], rows[i]):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _fit(one: Inputs, other: Inputs) -> bool:
    if one.keys() != other.keys():
        return False
    return all(one[name].shape[1:] == other[name].shape[1:] or _is_masked(name, one) for name in one)


def _is_masked(name: str, row: Inputs) -> bool:
    """Whether the inputs say which part of this tensor is padding."""
    if name.startswith("decoder_"):
        return "decoder_attention_mask" in row
    if name.startswith(("pixel", "image", "visual", "aspect")):
        return any(mask in row for mask in _IMAGE_MASKS)
    return "attention_mask" in row


def collated(rows: Sequence[Inputs]) -> Inputs:
    """One batch from samples, copied; shorter ones are padded at the end with zeros, as their mask then says."""
    padded = [widened(row, rows) for row in rows]
    return {name: torch.cat([row[name] for row in padded]) for name in rows[0]}


def widened(row: Inputs, rows: Sequence[Inputs]) -> Inputs:
    """A sample, each tensor padded at the end with zeros to the largest sizes that it has among all samples."""
    padded = {}
    for name, tensor in row.items():
        longest = [max(sizes) for sizes in zip(*(r[name].shape for r in rows if name in r), strict=True)]
        pad = [n for d in range(tensor.ndim - 1, 0, -1) for n in (0, longest[d] - tensor.shape[d])]
        # Patches side by side are no more and no less than the sizes of their images say.
        exact = name in _PATCHES and any(sizes in row for sizes in ("target_sizes", "grid_thw"))
        padded[name] = torch.nn.functional.pad(tensor, pad) if any(pad) and not exact else tensor
    return padded


def _amount(name: str, row: Inputs) -> int:
    """How much of an image a sample has, by its patches or by the sizes that it tells."""
    if name not in row:
        return 0
    return len(row[name]) if name in _PATCHES else int(row[name].prod(dim=-1).sum())


def largest_inputs(rows: Sequence[Inputs]) -> list[Inputs]:
    """Samples that together have the most of everything: the longest text, widened, then the most or largest images."""
    lengths = text_lengths(rows)
    # Without a text, packed patches are all that one sample may have more of.
    chosen = [int((lengths if lengths.any() else np.array([sum(map(len, x.values())) for x in rows])).argmax())]
    for name in (*_PATCHES, *_TOLD_SIZES, *GRIDS):
        found = [_amount(name, row) for row in rows]
        best = int(np.argmax(found))
        if found[best] > found[chosen[0]] and best not in chosen:
            chosen.append(best)
    # Copies, as a model may change its inputs in place.
    return [{n: t.clone() for n, t in widened(rows[i], rows).items()} for i in chosen]
