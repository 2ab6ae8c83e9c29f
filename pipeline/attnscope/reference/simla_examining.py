"""What SIMLA reached on scenes that it never saw: retrieval by matching, grounding of phrases, reconstruction."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from attnscope.reference.corpus import CLS, MASK, SEP, SIDE, Corpus, build_corpus
from attnscope.reference.examining import GALLERY, Items, batches, examine_retrieval, examine_words, rank_pairs
from attnscope.reference.learners import Seen
from attnscope.reference.lessons import Texts, trimmed
from attnscope.reference.simla import Simla
from attnscope.reference.weights import read_learner

_LEAST_OVERLAP = 0.5


@torch.no_grad()
def examine_ranking(learner: Simla, corpus: Corpus) -> dict[str, Items]:
    """R@1, 5, 10 both ways among galleries of 256 scenes (or all, if fewer), every pair scored by matching."""
    return rank_pairs(partial(_match_all, learner, corpus), len(corpus), GALLERY)


def _match_all(learner: Simla, corpus: Corpus, scenes: np.ndarray) -> np.ndarray:
    """Log-odds of every image with every text (image, text)."""
    words = trimmed(corpus.words[scenes])
    images = learner.look(learner.see(corpus, scenes).pixels)
    rows = [learner.itm_head(learner.join(words, image.expand(len(words), -1, -1))[:, 0]) for image in images]
    scores = torch.stack(rows)
    return (scores[..., 1] - scores[..., 0]).numpy()


def grad_cam(learner: Simla, words: Tensor, seen: Seen) -> Tensor:
    """Maps of each layer's cross-attention (layer, sample, patch), for the logit that text and image belong together.

    Section 3.5: attention times the positive part of its gradient, without the image's CLS, meant over heads and over
    the text's tokens.
    """
    with torch.enable_grad():
        # So that there is a graph also where the parameters are frozen.
        image = learner.look(seen.pixels).detach().requires_grad_()
        joined = learner.join_with_attention(words, image)
        match = learner.itm_head(joined.states[:, 0])[:, 1].sum()
        gradients = torch.autograd.grad(match, joined.cross)
    there = (words > 0)[:, None, :, None].float()
    maps = [(a * g.clamp_min(0) * there).sum((1, 2))[:, 1:] for a, g in zip(joined.cross, gradients, strict=True)]
    return torch.stack(maps).detach() / (there.sum((1, 2, 3)) * joined.own.shape[1])[:, None]


def box_scores(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Sums of maps (map, row, column) in boxes (box, 4), in parts of the side, over the root of the area (map, box)."""
    side = maps.shape[-1]
    edges = np.rint(boxes * side).astype(int)
    sums = np.zeros((len(maps), len(boxes)))
    for number, (left, top, right, bottom) in enumerate(edges):
        area = max(1, (right - left) * (bottom - top))
        sums[:, number] = maps[:, top:bottom, left:right].sum((1, 2)) / np.sqrt(area)
    return sums


def overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union (box,) of boxes (box, 4) with one."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = sides.clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return shared / (areas - shared)


def examine_grounding(learner: Simla, corpus: Corpus) -> dict[str, Items]:
    """Phrases alone against the boxes of their scene: whether the best box, and the strongest patch, are the thing's.

    Boxes are ranked as in section 3.5, on maps enlarged by bicubic interpolation, among all regions of the corpus
    (those of the objects, and parts of the picture that are the same everywhere); one is right from an overlap of one
    half. The chance is that of a box, or a patch, drawn blindly.
    """
    scenes, things = _mentioned(corpus)
    found: dict[str, list[float]] = {}
    for at in batches(len(scenes)):
        words = trimmed(Texts.of(corpus, scenes[at]).cut(things[at]).words)
        maps = grad_cam(learner, words, learner.see(corpus, scenes[at]))
        large = enlarged(maps)
        for row, (scene, thing) in enumerate(zip(scenes[at], things[at], strict=True)):
            boxes = corpus.boxes[scene]
            right = overlaps(boxes, boxes[corpus.region_things[scene] == thing][0]) >= _LEAST_OVERLAP
            shows = corpus.patch_shows[scene, thing]
            best = box_scores(large[:, row], boxes).argmax(1)
            peak = maps[:, row].argmax(1).numpy()
            for layer in range(len(maps)):
                found.setdefault(f"box_layer{layer + 1}", []).append(float(right[best[layer]]))
                found.setdefault(f"pointing_layer{layer + 1}", []).append(float(shows[peak[layer]]))
            found.setdefault("box_chance", []).append(right.mean())
            found.setdefault("pointing_chance", []).append(shows.mean())
    return {name: Items(np.array(values), scenes) for name, values in found.items()}


def enlarged(maps: Tensor) -> np.ndarray:
    """Maps (layer, sample, patch) as pictures (layer, sample, row, column) of the images' size."""
    grid = int(maps.shape[-1] ** 0.5)
    squares = maps.unflatten(-1, (grid, grid))
    return nn.functional.interpolate(squares, size=(SIDE, SIDE), mode="bicubic", align_corners=False).numpy()


def _mentioned(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Scene and thing of each phrase whose thing has a box and a patch."""
    numbers = np.arange(corpus.patch_shows.shape[1])
    named = (corpus.phrases[..., None] == numbers).any(1)
    boxed = (corpus.region_things[..., None] == numbers).any(1)
    return (named & boxed & corpus.patch_shows.any(-1)).nonzero()


@torch.no_grad()
def examine_reconstruction(learner: Simla, corpus: Corpus) -> dict[str, Items]:
    """Of each mentioned thing with all of its patches masked: the codes of its patches, found, and bits.

    With the words, and with all of them masked. Nothing else is masked, so that the words can tell what was there.
    """
    scenes, things = _mentioned(corpus)
    found: dict[str, list[np.ndarray]] = {}
    where = []
    for at in batches(len(scenes)):
        numbers = scenes[at]
        asked = corpus.patch_things[numbers] == things[at][:, None]
        seen = learner.see(corpus, numbers)
        hidden = learner.hide(seen, torch.from_numpy(corpus.patch_shows[numbers, things[at]]))
        truth, image = learner.code(seen.pixels)[torch.from_numpy(asked)], learner.look(hidden.pixels)
        where.append(numbers[asked.nonzero()[0]])
        for name, words in _with_and_without(corpus.words[numbers]):
            logits = learner.code_classifier(
                learner.join_image(image, trimmed(words))[torch.from_numpy(asked)]
            ).double()
            bits = nn.functional.cross_entropy(logits, truth, reduction="none") / np.log(2)
            found.setdefault(f"codes{name}_accuracy", []).append((logits.argmax(-1) == truth).double().numpy())
            found.setdefault(f"codes{name}_bits", []).append(bits.numpy())
    return {name: Items(np.concatenate(values), np.concatenate(where)) for name, values in found.items()}


def _with_and_without(words: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    yield "", words
    yield "_without_words", np.where(np.isin(words, (0, CLS, SEP)), words, MASK)


def table_figures(folder: Path) -> dict[str, float]:
    """What the paper's table of losses compares, of a trained model in a folder: retrieval, grounding, reconstruction.

    On 256 scenes of the test split. Grounding is that of the second of three layers, as the paper takes the ninth of
    twelve.
    """
    learner = read_learner("simla", folder)
    assert isinstance(learner, Simla)
    corpus = build_corpus("test", range(GALLERY))
    words = examine_words(learner, corpus)
    found = {
        **{f"matching_{name}": items for name, items in examine_ranking(learner, corpus).items()},
        **{f"similarity_{name}": items for name, items in examine_retrieval(learner, corpus).items()},
        **{f"grounding_{name}": items for name, items in examine_grounding(learner, corpus).items()},
        **{f"words_{role}": words[role]["accuracy"] for role in ("colour", "shape")},
        **examine_reconstruction(learner, corpus),
    }
    return {name: float(items.values.mean()) for name, items in found.items()}
