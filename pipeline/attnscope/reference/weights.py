"""Trained learners as folders in transformers' own format, and back."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from attnscope.reference.alignments import CONFIG_KEY
from attnscope.reference.carrying import path
from attnscope.reference.corpus import LENGTH, PATCH, SIDE, VOCABULARY
from attnscope.reference.learners import (
    UnitClassifier,
    clip_config,
    lxmert_config,
    text_config,
    vilt_config,
)
from attnscope.reference.settings import SETTINGS, build_learner, scored_config, setting_config

WEIGHTS = "model.safetensors"

_CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "vilt": vilt_config,
    "clip": clip_config,
    "lxmert": lxmert_config,
    "text": text_config,
    **{name: partial(setting_config, name) for name in SETTINGS},
}
_UNITS = "patch_classifier"
_PIXELS = {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def write_model(name: str, learner: nn.Module, folder: Path, alignment: str = "") -> None:
    """Write config, weights, tokenizer and processor of a learner whose attention has this score (or its own)."""
    folder.mkdir(parents=True, exist_ok=True)
    scored_config(_CONFIGS[name](), alignment).save_pretrained(folder)
    named = {n: p.detach().contiguous() for n, p in learner.named_parameters() if not n.startswith(_UNITS)}
    if isinstance(units := getattr(learner, _UNITS, None), UnitClassifier):
        named |= {f"{_UNITS}.{n}": p.detach() for n, p in units.whole().named_parameters()}
    save_file(named, folder / WEIGHTS, {"format": "pt"})
    # Written for its owner alone, but carried for everybody.
    (folder / WEIGHTS).chmod(0o644)
    _write_processor(name, folder)


def _write_processor(name: str, folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    if name == "vilt":
        images = transformers.ViltImageProcessorPil(size={"shortest_edge": SIDE}, size_divisor=PATCH, **_PIXELS)
        transformers.ViltProcessor(images, tokenizer).save_pretrained(folder)
    elif name == "clip":
        size = {"height": SIDE, "width": SIDE}
        images = transformers.CLIPImageProcessorPil(size=size, do_center_crop=False, **_PIXELS)
        transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)


def read_learner(name: str, folder: Path | None = None) -> nn.Module:
    """A learner with the weights of a folder, of the carried one unless named, in evaluation mode."""
    folder = folder or path(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    learner = build_learner(name, config.get(CONFIG_KEY, ""))
    weights = load_file(folder / WEIGHTS)
    if hasattr(learner, _UNITS):
        setattr(learner, _UNITS, unit_classifier(name, folder))
    with torch.no_grad():
        for parameter_name, parameter in learner.named_parameters():
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
