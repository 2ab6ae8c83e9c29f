"""The trained models that attnscope carries: folders in transformers' own format, inside the package."""

import json
from pathlib import Path

PREFIX = "reference:"

# The class of each head by its name, the first where none is named: transformers' own, or of `reference.models`.
HEADS = {
    "vilt": {
        "matching": "ViltForImageAndTextRetrieval",
        "words": "ViltForWordsAndPatches",
        "answers": "ViltForQuestionAnswering",
    },
    "clip": {"similarity": "CLIPModel"},
    "lxmert": {"all": "LxmertWithObjects"},
    "text": {"words": "BertForMaskedLM"},
    "simla": {"matching": "BlipForImageTextRetrieval", "words": "SimlaForWordsAndPatches"},
    "mapper": {"answers": "MapperForQuestionAnswering", "captions": "MapperForConditionalGeneration"},
}


def path(name: str) -> Path:
    """The folder of a carried model, for `from_pretrained`, by its name in HEADS.

    Raises
    ------
    ValueError
        When there is no such model.
    """
    if name not in HEADS:
        raise ValueError(f"unknown reference model {name!r}; known: {', '.join(HEADS)}")
    return Path(__file__).parent / "carried" / name


def card(name: str) -> dict[str, object]:
    """What is known of a carried model: recipe, data, steps, seconds, figures with intervals, licence, digest."""
    return json.loads((path(name) / "card.json").read_text(encoding="utf-8"))


def locate(source: str) -> tuple[Path, str]:
    """Folder and class of `reference:NAME` or `reference:NAME:HEAD`.

    Raises
    ------
    ValueError
        When there is no such model, or it has no such head.
    """
    name, _, head = source.removeprefix(PREFIX).partition(":")
    if name not in HEADS:
        known = ", ".join(PREFIX + n for n in HEADS)
        raise ValueError(f"unknown model {source!r}; the reference models are {known}")
    heads = HEADS[name]
    chosen = head or next(iter(heads))
    if chosen not in heads:
        raise ValueError(f"{PREFIX}{name} has no head {head!r}; its heads are {', '.join(heads)}")
    return path(name), heads[chosen]
