"""Which learner and which configuration each kind of reference model has."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedConfig

from attnscope.reference.alignments import swap_scores
from attnscope.reference.learners import (
    Clip,
    Learner,
    Lxmert,
    Mapper,
    Sizes,
    Text,
    Vilt,
    clip_config,
    lxmert_config,
    mapper_config,
    text_config,
    vilt_config,
)
from attnscope.reference.settings import SETTINGS, setting_config
from attnscope.reference.simla import Simla, simla_config

LEARNERS: dict[str, type[Learner]] = {
    "vilt": Vilt,
    "clip": Clip,
    "lxmert": Lxmert,
    "text": Text,
    "simla": Simla,
    "mapper": Mapper,
    **SETTINGS,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "vilt": vilt_config,
    "clip": clip_config,
    "lxmert": lxmert_config,
    "text": text_config,
    "simla": simla_config,
    "mapper": mapper_config,
    **{name: partial(setting_config, name) for name in SETTINGS},
}


def build_learner(name: str, alignment: str = "", sizes: Sizes | None = None, encoders: Path | None = None) -> Learner:
    """A new learner of these sizes (or its own), its attention with another score where one is named.

    Behind the CLIP in the folder `encoders`, where one is named, stands a mapper of that one's sizes.
    """
    if encoders is not None:
        return Mapper.behind(encoders)
    return with_score(LEARNERS[name]() if sizes is None else LEARNERS[name].of(sizes), alignment)


def with_score(learner: Learner, alignment: str) -> Learner:
    """The learner, its attention with another score where one is named."""
    if alignment:
        swap_scores(learner, alignment)
    return learner
