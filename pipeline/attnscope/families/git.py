"""GIT: a language model that reads the image encoder's tokens in front of the text's."""

from types import SimpleNamespace
from typing import TYPE_CHECKING

from attnscope.families import ModelFamily, SiteRule
from attnscope.families.encoding import measure_text
from attnscope.families.layouts import patch_grid, patch_tokens, text_tokens
from attnscope.families.scores import last_token
from attnscope.samples import Sample
from attnscope.tokens import TokenLayout, grid_layout, joined_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def joint_tokens(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The image's CLS and patches, then the text; the text alone where there is no image."""
    if "pixel_values" not in inputs:
        return text_tokens()(inputs, loaded, tokens)
    pixels = inputs["pixel_values"]
    image = grid_layout(len(pixels), *patch_grid(pixels, loaded.config.vision_config))
    return joined_layout(image, text_tokens()(inputs, loaded, tokens - image.token_count))


def last_text_token(outputs: object, inputs: "dict[str, Tensor]", loaded: "LoadedModel") -> "Tensor":
    """The largest logit at the last real token of the text, in front of which the image's tokens stand."""
    logits: Tensor = outputs.logits  # type: ignore[attr-defined]
    text = SimpleNamespace(logits=logits[:, -inputs["input_ids"].shape[1] :])
    return last_token(text, inputs, loaded)


def measure(sample: Sample, loaded: "LoadedModel") -> dict[str, int]:
    """Tokens of the image and the text."""
    vision = loaded.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return {"joint": 1 + patches + measure_text(sample, loaded).get("text", 0)}


FAMILY = ModelFamily(
    name="git",
    model_types=("git",),
    sites=(
        SiteRule(r"image_encoder\..*layers\.(?P<layer>\d+)\.", "vision.self"),
        SiteRule(r"encoder\.layer\.(?P<layer>\d+)\.attention", "joint.self"),
    ),
    streams={"vision": patch_tokens, "joint": joint_tokens},
    scores={"last_token": last_text_token},
    measure=measure,
)
