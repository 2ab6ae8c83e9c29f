"""Florence-2: an image encoder of windows and channels, whose tokens a BART reads before the text.

The image encoder alternates attention inside windows ('vision', a stream for each of its stages) with attention
between the channels of a group ('channels': there heads are groups, and tokens are channels). The BART's encoder reads
one stream, 'joint': the pooled image, its grid, and the text.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnscope.families import Fold, ModelFamily, SiteRule
from attnscope.families.encoding import decoder_ids, encode_with_decoder
from attnscope.families.layouts import decoder_tokens, text_tokens
from attnscope.families.windows import stage_layout, window_fold
from attnscope.samples import Sample, SampleError
from attnscope.tokens import KIND_CODES, TokenLayout, plain_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall


def stage_grids(inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> list[tuple[int, int]]:
    """Rows and columns of patches in each stage, by its strided convolution."""
    config = loaded.config.vision_config
    rows, columns = inputs["pixel_values"].shape[-2:]
    grids = []
    for size, stride, edge in zip(config.patch_size, config.patch_stride, config.patch_padding, strict=True):
        rows, columns = ((n + 2 * edge - size) // stride + 1 for n in (rows, columns))
        grids.append((rows, columns))
    return grids


def stage_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The patch grid of the stage with so many tokens."""
    return stage_layout(inputs["pixel_values"], stage_grids(inputs, loaded), tokens)


def channel_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The channels of a group."""
    return plain_layout(np.full((len(inputs["pixel_values"]), tokens), KIND_CODES["channel"]))


def joint_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The text, where its image placeholders are the pooled image and then the last stage's grid, row by row."""
    layout = text_tokens()(inputs, loaded, tokens)
    if "pixel_values" not in inputs:
        return layout
    rows, columns = stage_grids(inputs, loaded)[-1]
    kind, text, row, column = (a.copy() for a in (layout.kind, layout.text, layout.row, layout.column))
    for sample, ids in enumerate(inputs["input_ids"].cpu().numpy()):
        places = np.flatnonzero(ids == loaded.config.image_token_id)
        text[sample, places] = ""
        kind[sample, places] = KIND_CODES["image"]
        kind[sample, places[:1]] = KIND_CODES["special"]
        row[sample, places[1:]] = np.arange(rows * columns) // columns
        column[sample, places[1:]] = np.arange(rows * columns) % columns
    return TokenLayout(kind, text, row, column)


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold | None:
    """Where the windows of a stage lie."""
    match = re.search(r"blocks\.(\d+)\.\d+\.spatial_block", call.module)
    if match is None:
        return None
    window = loaded.model.get_submodule(call.module).window_size
    return window_fold(len(inputs["pixel_values"]), stage_grids(inputs, loaded)[int(match[1])], int(window))  # type: ignore[arg-type]


def encode(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """Images with their prompts by the model's own processor, and what the decoder is given."""
    return encode_with_decoder(samples, loaded, _encode_prompts)


def measure(sample: Sample, loaded: "LoadedModel") -> dict[str, int]:
    """Tokens of the joint stream and of the decoder's."""
    inputs = _encode_prompts([sample], loaded)
    return {"joint": inputs["input_ids"].shape[1], "decoder": len(decoder_ids(sample, loaded))}


def _encode_prompts(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    if loaded.processor is None:
        raise SampleError(f"{loaded.name!r} has no processor to encode samples with")
    images = [s.load_image() for s in samples]
    for sample, image in zip(samples, images, strict=True):
        if image is None or not sample.text:
            raise SampleError(f"sample {sample.id!r} has no {'image' if image is None else 'text'}")
    texts = [s.text for s in samples]
    return dict(loaded.processor(images=images, text=texts, padding=True, return_tensors="pt"))


_LAYER = r"layers\.(?P<layer>\d+)"
FAMILY = ModelFamily(
    name="florence2",
    model_types=("florence2",),
    sites=(
        SiteRule(r"(^|\.)blocks\.(?P<stage>\d+)\.(?P<layer>\d+)\.spatial_block", "vision.self"),
        SiteRule(r"(^|\.)blocks\.(?P<stage>\d+)\.(?P<layer>\d+)\.channel_block", "channels.self"),
        SiteRule(rf"language_model\.encoder\.{_LAYER}\.self_attn", "joint.self"),
        SiteRule(rf"language_model\.decoder\.{_LAYER}\.self_attn", "decoder.self"),
        SiteRule(rf"language_model\.decoder\.{_LAYER}\.encoder_attn", "decoder.joint"),
    ),
    streams={"vision": stage_tokens, "channels": channel_tokens, "joint": joint_tokens, "decoder": decoder_tokens},
    encode=encode,
    measure=measure,
    fold=fold,
)
