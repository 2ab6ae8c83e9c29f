"""Alignment scores trained into attention, a table per setting: what a model reaches, and what its attention shows.

Each score is trained with several seeds; task quality stands beside the agreement of attention with the truth and
beside deletion and insertion, with Student-t intervals over seeds and differences from the scaled dot product of the
same seed.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnscope.reference.alignments import ALIGNMENTS, OWN
from attnscope.reference.corpus import Corpus, build_corpus
from attnscope.reference.examining import Items, examine_joint_ranking
from attnscope.reference.inspecting import examine_attention
from attnscope.reference.judging import examine_painting
from attnscope.reference.learners import Lxmert, Vilt
from attnscope.reference.making import ReferenceError
from attnscope.reference.painter import Painter
from attnscope.reference.settings import SCORED
from attnscope.reference.tabulating import Variant, read_table
from attnscope.reference.training import LESSONS
from attnscope.reference.weights import read_learner, write_json

SCENES = 256
GALLERY = 64
"""Among how many scenes a joint stream's recalls are: it scores every image with every text."""
_ATTENTION = tuple(
    f"attention_{n}" for n in ("pointing", "mass", "overlap", "deletion_over_random", "insertion_over_random")
)
_RECALLS = tuple(f"{way}_at_{n}" for way in ("image_to_text", "text_to_image") for n in (1, 5, 10))
_JOINT = ("words_colour", "words_shape", "matching_balanced", *_RECALLS, "answers_attributes", *_ATTENTION)
SHOWN = {
    "vilt": _JOINT,
    "lxmert": _JOINT,
    "scan": (*_RECALLS, *_ATTENTION),
    "answering": (*(f"answers_{kind}" for kind in ("colour", "shape", "exists", "count", "attributes")), *_ATTENTION),
    "painter": ("drawn_colour", "drawn_shape", "drawn_both", "pixel_error", *_ATTENTION),
}
"""The figures that a page of a setting shows; a table holds more."""
MEASURE = "attnscope.reference.score_tables:measure_model"
"""What gives the figures of a model, as a table's `measure` names it."""


def measure_model(folder: Path) -> dict[str, float]:
    """The figures of a trained model on scenes of the test split that it never saw, by name."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    learner, corpus = read_learner(name, folder), _unseen()
    examined: dict[str, Items] = examine_attention(learner, corpus)
    if isinstance(learner, Painter):
        examined |= examine_painting(learner, corpus)
    if isinstance(learner, Lxmert | Vilt):
        ranked = examine_joint_ranking(learner, corpus, GALLERY)
        examined |= {key.replace("_r", "_at_"): items for key, items in ranked.items()}
    with torch.no_grad():
        quality = LESSONS[name].figures(learner, corpus)
    return {**quality, **{key: float(items.values.mean()) for key, items in examined.items()}}


@lru_cache(maxsize=1)
def _unseen() -> Corpus:
    return build_corpus("test", range(SCENES))


def score_variants(setting: str, alignments: Sequence[str], changes: Mapping[str, object]) -> list[Variant]:
    """A variant for each score, the scaled dot product first, as the others are compared with it.

    Raises
    ------
    ReferenceError
        When the setting's attention takes no other score, or it is to learn from samples.
    """
    if setting not in SCORED:
        raise ReferenceError(f"no scores are compared in {setting!r}; the settings are {', '.join(SCORED)}")
    if "samples" in changes:
        raise ReferenceError(
            "what attention ought to fall on is known of generated scenes alone; for scores on samples use"
            " `attnscope reference table`"
        )
    names = dict.fromkeys((OWN, *(alignments or ALIGNMENTS)))
    return [Variant(name, setting, {**changes, "alignment": name}) for name in names]  # type: ignore[dict-item]


def write_scores(setting: str, seeds: Sequence[int], out: str, changes: Mapping[str, object]) -> None:
    """Write `page.md` and `scores.json` beside a table of scores that was made, with the figures of SHOWN alone."""
    shown = [row for row in read_table(out) if row.figure in SHOWN[setting]]
    table = {
        "setting": setting,
        "changes": dict(changes),
        "seeds": list(seeds),
        "scenes": SCENES,
        "interval": "95 % Student-t over seeds",
        "figures": SHOWN[setting],
        "rows": [dataclasses.asdict(row) for row in shown],
    }
    write_json(Path(out) / "scores.json", table)
    (Path(out) / "page.md").write_text(f"# {setting}\n\n{summary(table)}\n{_READING}\n", encoding="utf-8")


_READING = (
    "Mean over seeds and half of its 95 % interval (Student's t). ▲ and ▼: above or below the scaled dot product of the"
    " same seed by more than noise; all other differences from it are noise: their interval holds 0. None is widened"
    " for the number of comparisons."
)


def summary(table: Mapping[str, Any]) -> str:
    """Markdown of what scores.json holds: scores down, figures across."""
    names = [name.removeprefix("attention_").replace("_", " ") for name in table["figures"]]
    by_place = {(row["variant"], row["figure"]): row for row in table["rows"]}
    lines = [f"| score | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for variant in dict.fromkeys(row["variant"] for row in table["rows"]):
        cells = [_cell(by_place.get((variant, figure))) for figure in table["figures"]]
        lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    value, difference = row["value"], row["difference"]
    words = f"{value['mean']:.3f}"
    if value["high"] is not None:
        words += f" ± {value['high'] - value['mean']:.3f}"
    return words if row["verdict"] != "apart" else f"{words} {'▲' if difference['mean'] > 0 else '▼'}"
