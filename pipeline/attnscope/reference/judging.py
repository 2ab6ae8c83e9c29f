"""Colour and shape of what a painter draws, by a fixed judge."""

from functools import cache

import numpy as np
import torch

from attnscope.reference.corpus import GROUND, ROLES, Corpus
from attnscope.reference.examining import Items
from attnscope.reference.learners import Clip, normalised
from attnscope.reference.painter import Painter, draw_all
from attnscope.reference.scenes import SHAPES
from attnscope.reference.weights import read_learner


@torch.no_grad()
def examine_painting(learner: Painter, corpus: Corpus) -> dict[str, Items]:
    """Colour and shape of each named thing that it drew, and of the same things in the true pictures, by the judge.

    A thing is judged where the caption names its colour and shape and a patch shows it (see `judged`). By chance one of
    eight colours and one of six shapes is right.
    """
    scenes, things = judged_things(corpus)
    drawn = draw_all(learner, corpus)
    result = {}
    for name, pixels in (("drawn", drawn), ("judge", corpus.pixels)):
        chances = judge(pixels[scenes], corpus, scenes, things)
        classes = thing_classes(corpus, scenes, things)
        for what, parts, truth in (
            ("colour", chances.sum(2), classes // len(SHAPES)),
            ("shape", chances.sum(1), classes % len(SHAPES)),
        ):
            result[f"{name}_{what}"] = Items((parts.argmax(1) == truth).astype(float), scenes)
        result[f"{name}_both"] = Items(result[f"{name}_colour"].values * result[f"{name}_shape"].values, scenes)
    return result


def judged_things(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Scene and thing (item,) of what captions name by colour and shape and a patch shows."""
    numbers = np.arange(corpus.patch_shows.shape[1])
    of_thing = corpus.phrases[..., None] == numbers
    named = [(of_thing & (corpus.roles == ROLES.index(role))[..., None]).any(1) for role in ("colour", "shape")]
    shown = (corpus.patch_things[..., None] == numbers).any(1)
    scenes, things = np.nonzero(named[0] & named[1] & shown)
    return scenes, things


def thing_classes(corpus: Corpus, scenes: np.ndarray, things: np.ndarray) -> np.ndarray:
    """The true class (in CLASSES) of things that patches show, (item,)."""
    at = (corpus.patch_things[scenes] == things[:, None]).argmax(1)
    return corpus.patches[scenes, at].astype(int)


@torch.no_grad()
def judge(pixels: np.ndarray, corpus: Corpus, scenes: np.ndarray, things: np.ndarray) -> np.ndarray:
    """The chances (item, colour, shape) that a fixed judge gives a thing in pictures (item, row, column, colour).

    The judge is the carried CLIP's class of patches, the mean over those that show the thing, without the ground. It
    never saw what a painter draws; its figures on true pictures stand beside.
    """
    clip = _judge()
    chances = []
    for start in range(0, len(pixels), 256):
        out = clip.vision_model(pixel_values=normalised(pixels[start : start + 256]))
        chances.append(clip.patch_classifier(out.last_hidden_state[:, 1:]).softmax(-1)[..., :GROUND])
    shows = torch.from_numpy(corpus.patch_things[scenes] == things[:, None])
    mean = (torch.cat(chances) * shows[..., None]).sum(1)
    mean = mean / mean.sum(-1, keepdim=True)
    return mean.unflatten(-1, (-1, len(SHAPES))).numpy()


@cache
def _judge() -> Clip:
    learner = read_learner("clip")
    assert isinstance(learner, Clip)
    return learner
