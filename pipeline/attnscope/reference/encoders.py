"""The folder of a clip that a mapper stands behind: what it decides, and whether it learned from the same samples."""

import json
from pathlib import Path

import transformers

from attnscope.reference.pairs import Prepared
from attnscope.reference.training import Recipe, ReferenceError
from attnscope.reference.weights import WEIGHTS

_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"


def encoder_sizes(folder: str) -> dict[str, int]:
    """The fields of a recipe that the encoders in a folder decide.

    Raises
    ------
    ReferenceError
        When the folder holds no trained clip.
    """
    place = Path(folder)
    there = all((place / file).is_file() for file in (_CONFIG, _TOKENIZER, WEIGHTS))
    if not there or json.loads((place / _CONFIG).read_text(encoding="utf-8")).get("model_type") != "clip":
        raise ReferenceError(f"'encoders' {folder!r} is no folder of a trained clip")
    config = transformers.CLIPConfig.from_pretrained(place)
    text, vision = config.text_config, config.vision_config
    return {
        "side": vision.image_size,
        "patch": vision.patch_size,
        "width": vision.hidden_size,
        "heads": vision.num_attention_heads,
        "layers": vision.num_hidden_layers,
        "text_layers": text.num_hidden_layers,
        "length": text.max_position_embeddings,
    }


def check_sizes(recipe: Recipe) -> None:
    """Refuse a recipe with other sizes than its encoders'.

    Raises
    ------
    ReferenceError
        For the first one, or when there are no encoders in their folder.
    """
    for name, own in encoder_sizes(recipe.encoders).items():
        if getattr(recipe, name) != own:
            raise ReferenceError(
                f"{name!r} of the encoders in {recipe.encoders!r} is {own}, not {getattr(recipe, name)};"
                f" {recipe.model} takes theirs"
            )


def check_vocabulary(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse encoders that learned other words than those of the samples.

    Raises
    ------
    ReferenceError
        When the words or their numbers differ.
    """
    tokenizer = json.loads((Path(recipe.encoders) / _TOKENIZER).read_text(encoding="utf-8"))
    if tokenizer["model"]["vocab"] != {word: number for number, word in enumerate(prepared.vocabulary)}:
        raise ReferenceError(
            f"the encoders in {recipe.encoders!r} learned another vocabulary than that of samples {recipe.samples!r};"
            " train their clip on the same prepared samples"
        )
