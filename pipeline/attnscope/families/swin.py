"""Swin and its kin: attention inside shifted windows, on a grid that shrinks from stage to stage.

Every stage is a stream of its own ('vision', 'vision.2', ...), as its tokens are. Windows are put back on the grid, so
that a patch attends to the patches of its window and not at all to the others. A window that reaches over the edge of
the grid attends to padding as well, which the models don't mask: there rows sum to less than one.
"""

import re
from typing import TYPE_CHECKING

from attnscope.families import Fold, ModelFamily, SiteRule
from attnscope.families.windows import stage_layout, window_fold
from attnscope.tokens import TokenLayout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall


def stage_grids(pixels: "Tensor", config: object) -> list[tuple[int, int]]:
    """Rows and columns of patches in each stage."""
    height, width = pixels.shape[-2:]
    if config.model_type == "swin2sr":  # type: ignore[attr-defined]
        window = config.window_size  # type: ignore[attr-defined]
        size = tuple(-(-n // window) * window // config.patch_size for n in (height, width))  # type: ignore[attr-defined]
        return [size] * len(config.depths)  # type: ignore[attr-defined]
    steps = [config.patch_size * 2**stage for stage in range(len(config.depths))]  # type: ignore[attr-defined]
    return [(-(-height // step), -(-width // step)) for step in steps]


def stage_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The patch grid of the stage with so many tokens."""
    return stage_layout(inputs["pixel_values"], stage_grids(inputs["pixel_values"], loaded.config), tokens)


def fold(call: "AttentionCall", inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> Fold:
    """Where a call's windows lie; the block that made them knows their size and shift."""
    match = re.search(r"(?:layers|stages)\.(\d+)\.(?:blocks|layers)\.\d+", call.module)
    assert match is not None
    block = loaded.model.get_submodule(call.module[: match.end()])
    pixels = inputs["pixel_values"]
    grid = stage_grids(pixels, loaded.config)[int(match[1])]
    return window_fold(len(pixels), grid, int(block.window_size), int(block.shift_size))  # type: ignore[arg-type]


FAMILY = ModelFamily(
    name="swin",
    model_types=("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr"),
    sites=(SiteRule(r"(layers|stages)\.(?P<stage>\d+)\.(blocks|layers)\.(?P<layer>\d+)\.attention", "vision.self"),),
    streams={"vision": stage_tokens},
    fold=fold,
)
