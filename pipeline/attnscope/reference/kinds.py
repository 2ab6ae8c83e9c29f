"""Which learner and which configuration each kind of reference model has."""

from collections.abc import Callable

from transformers import PreTrainedConfig

from attnscope.reference.learners import (
    Clip,
    Learner,
    Lxmert,
    Mapper,
    Text,
    Vilt,
    clip_config,
    lxmert_config,
    mapper_config,
    text_config,
    vilt_config,
)
from attnscope.reference.simla import Simla, simla_config

LEARNERS: dict[str, type[Learner]] = {
    "vilt": Vilt,
    "clip": Clip,
    "lxmert": Lxmert,
    "text": Text,
    "simla": Simla,
    "mapper": Mapper,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "vilt": vilt_config,
    "clip": clip_config,
    "lxmert": lxmert_config,
    "text": text_config,
    "simla": simla_config,
    "mapper": mapper_config,
}
