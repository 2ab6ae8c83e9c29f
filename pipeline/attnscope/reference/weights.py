"""Trained learners as folders in transformers' own format, and back."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from attnscope.reference.alignments import CONFIG_KEY
from attnscope.reference.carrying import path
from attnscope.reference.corpus import LENGTH, PATCH, SIDE, VOCABULARY
from attnscope.reference.kinds import CONFIGS, LEARNERS, with_score
from attnscope.reference.learners import UnitClassifier
from attnscope.reference.pairs import tokenizer_of
from attnscope.reference.settings import scored_config

WEIGHTS = "model.safetensors"

_UNITS = "patch_classifier"
WORLD_HEADS = (_UNITS, "classifier.")
"""What the heads are called that generated scenes alone can teach: classes of units, and answers."""
KEPT_HEADS = ("obj_predict_head.", "answer_head.")
"""LXMERT's own heads of this kind: its class has them, so they are in its file as they began where none taught them."""
_PIXELS = {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def write_model(
    name: str,
    learner: nn.Module,
    folder: Path,
    *,
    vocabulary: Sequence[str] = VOCABULARY,
    of_samples: bool = False,
    alignment: str = "",
) -> None:
    """Write config, weights, tokenizer and processor of a learner.

    `vocabulary` are the words of its ids; `alignment` is the score of its attention where that is not its own. One
    that learned `of_samples` has no heads for units' classes and answers but LXMERT's own, and squares of its images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = getattr(learner, "config", None) or CONFIGS[name]()
    scored_config(config, alignment).save_pretrained(folder)
    apart = WORLD_HEADS if of_samples else _UNITS
    named = {n: p.detach().contiguous() for n, p in learner.named_parameters() if not n.startswith(apart)}
    if not of_samples and isinstance(head := getattr(learner, _UNITS, None), UnitClassifier):
        named |= {f"{_UNITS}.{n}": p.detach() for n, p in head.whole().named_parameters()}
    save_file(named, folder / WEIGHTS, {"format": "pt"})
    # Written for its owner alone, but carried for everybody.
    (folder / WEIGHTS).chmod(0o644)
    _write_processor(name, folder, config, vocabulary, of_samples)


def _write_processor(
    name: str, folder: Path, config: transformers.PreTrainedConfig, words: Sequence[str], of_samples: bool
) -> None:
    text = getattr(config, "text_config", None) or config
    # The config of a setting says nothing of sizes.
    tokenizer = tokenizer_of(words, getattr(text, "max_position_embeddings", LENGTH))
    tokenizer.save_pretrained(folder)
    if name == "vilt" and of_samples:
        # ViLT's own keeps the aspect of an image, which samples are not learned with.
        transformers.ViltProcessor(_square(config.image_size), tokenizer).save_pretrained(folder)
    elif name == "vilt":
        images = transformers.ViltImageProcessorPil(size={"shortest_edge": SIDE}, size_divisor=PATCH, **_PIXELS)
        transformers.ViltProcessor(images, tokenizer).save_pretrained(folder)
    elif name in ("clip", "simla", "mapper"):
        transformers.CLIPProcessor(_square(config.vision_config.image_size), tokenizer).save_pretrained(folder)


def _square(side: int) -> transformers.CLIPImageProcessorPil:
    size = dict.fromkeys(("height", "width"), side)
    return transformers.CLIPImageProcessorPil(size=size, do_center_crop=False, **_PIXELS)


def read_learner(name: str, folder: Path | None = None) -> nn.Module:
    """A learner with the weights of a folder, of the carried one unless named, in evaluation mode."""
    folder = folder or path(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    learner = with_score(LEARNERS[name].like(folder), config.get(CONFIG_KEY, ""))
    weights = load_file(folder / WEIGHTS)
    if f"{_UNITS}.weight" in weights and hasattr(learner, _UNITS):
        setattr(learner, _UNITS, unit_classifier(name, folder))
    with torch.no_grad():
        for parameter_name, parameter in learner.named_parameters():
            # A head that has not learned is not in the folder.
            if parameter_name in weights or not parameter_name.startswith(WORLD_HEADS):
                parameter.copy_(weights.pop(parameter_name))
    if weights:
        raise ValueError(f"weights of {str(folder)!r} have parts that {name} lacks: {', '.join(weights)}")
    return learner.eval().requires_grad_(False)


def unit_classifier(name: str, folder: Path | None = None) -> nn.Linear:
    """The head that gives the class of each patch from its last hidden state: (..., channel) to (..., class).

    Its classes are `corpus.CLASSES`: colour and shape of an object, and the ground. LXMERT has such a head of its own
    (`obj_predict_head`).
    """
    weights = load_file((folder or path(name)) / WEIGHTS)
    classes, channels = weights[f"{_UNITS}.weight"].shape
    head = nn.Linear(channels, classes)
    head.load_state_dict({n: weights[f"{_UNITS}.{n}"] for n in ("weight", "bias")})
    return head.eval().requires_grad_(False)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the folder's weight files, in the order of their names."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
