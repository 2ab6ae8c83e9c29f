"""ViLT: one stream of text, a CLS token of the image, and image patches in an order drawn at random.

The model shuffles an image's patches (or fills them up with some of the padding) in every forward. The layout draws the
same order again, from the random state that the forward began with.
"""

from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.encoding import measure_text
from attnscope.families.layouts import text_tokens
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES, TokenLayout, joined_layout, plain_layout, unknown_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def joint_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """Text, the image's CLS token, and the patches in the order of this forward."""
    ids = inputs["input_ids"]
    if inputs["pixel_values"].ndim != 4:
        return unknown_layout(len(ids), tokens)
    mask, order = _drawn_order(inputs, loaded)
    kind = np.where(mask > 0, KIND_CODES["image"], KIND_CODES["padding"])
    kind[:, 0] = KIND_CODES["cls"]
    place = np.full((*kind.shape, 2), -1)
    place[:, 1:] = np.where(mask[:, 1:, None] > 0, order, -1)
    image = plain_layout(kind, row=place[..., 0], column=place[..., 1])
    return joined_layout(text_tokens()(inputs, loaded, ids.shape[1]), image)


def _drawn_order(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> tuple[np.ndarray, np.ndarray]:
    """The mask of the image's tokens, (sample, 1 + patch), and each patch's row and column, (sample, patch, 2)."""
    import torch

    name = next(n for n in loaded.module_names if n.endswith("embeddings") and "text" not in n)
    pixels = inputs["pixel_values"].to(loaded.device, loaded.dtype)
    pixel_mask = inputs.get("pixel_mask", torch.ones_like(pixels[:, 0], dtype=torch.long)).to(loaded.device)
    embeddings = loaded.model.get_submodule(name)
    with torch.no_grad():
        _, mask, (order, _) = embeddings.visual_embed(pixels, pixel_mask, loaded.config.max_image_length)  # type: ignore[operator]
    return mask.cpu().numpy(), order.cpu().numpy()


def measure_joint(sample: Sample, loaded: "LoadedModel") -> dict[str, int]:
    """The most tokens of a batch with this image: the longest text that the model takes may come with it."""
    found = measure_text(sample, loaded)
    if loaded.image_processor is None:
        return {}
    image = sample.load_image()
    if image is None:
        return {}
    pixels = loaded.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    patch = loaded.config.patch_size
    patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    longest = loaded.text_limit or found.get("text", 0)
    return {"joint": longest + 1 + patches}


FAMILY = ModelFamily(
    name="vilt",
    model_types=("vilt",),
    sites=(SiteRule(r"encoder\.layer\.(?P<layer>\d+)\.attention", "joint.self"),),
    streams={"joint": joint_tokens},
    measure=measure_joint,
)
