"""Scenes as samples: pictures with captions or questions, and a region with box, span and mask for every phrase."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice

import numpy as np

from attnscope.reference.captions import ATTRIBUTE_QUESTIONS, Caption, ask, contradict, describe, is_determined
from attnscope.reference.pictures import draw_picture
from attnscope.reference.scenes import SPLITS, Scene, Thing, draw_scene
from attnscope.samples import Mask, Region, Sample, SampleError, encode_mask

PICTURE_SIZE = 96
"""Pixels of a sample's side unless asked for otherwise."""

_PREFIX = "reference:"
_FORMS = "reference:N, reference:SPLIT:N, reference:SPLIT:questions:N or reference:SPLIT:masked:N"
_MASK = "[MASK]"


def read_reference(source: str, limit: int | None = None) -> list[Sample]:
    """The samples that a source names: `reference:N`, `reference:SPLIT:N`, or `reference:SPLIT:questions:N`.

    SPLIT is 'train', 'validation', 'test' (unless named) or 'hard'; N is how many, from the first scene on. In the
    place of `questions` may stand `masked`: captions with one word masked.

    Raises
    ------
    SampleError
        When the name is of no such form.
    """
    split, kind, number = _parsed(source)
    return list(islice(_SAMPLES[kind](split), number if limit is None else min(number, limit)))


def _parsed(source: str) -> tuple[str, str, int]:
    parts = source.removeprefix(_PREFIX).split(":")
    split = parts[0] if len(parts) > 1 else "test"
    kind = parts[1] if len(parts) == 3 else "captions"
    known = len(parts) <= 3 and split in SPLITS and kind in _SAMPLES
    if not (known and parts[-1].isdecimal() and int(parts[-1]) > 0):
        raise SampleError(f"samples {source!r} are not {_FORMS} with a split of {', '.join(SPLITS)} and N above 0")
    return split, kind, int(parts[-1])


def caption_samples(split: str, size: int = PICTURE_SIZE) -> Iterator[Sample]:
    """Every scene of a split with its caption, without end."""
    return (caption_sample(draw_scene(split, index), size) for index in count())


def caption_sample(scene: Scene, size: int = PICTURE_SIZE) -> Sample:
    """A scene with its caption.

    Regions: each mention with its phrase, span, box and mask; the ground where the caption names it; then the things
    that no phrase mentions. Targets: `question`, `answer` and `question_kind` (one that asks for an attribute),
    `negative` (a wrong caption) and `negative_KIND` for each kind that there is, and `words` (JSON): for each word that
    names an attribute, a relation, a place or the ground its span, role, and whether the picture and the rest of the
    phrase determine it.
    """
    caption = describe(scene)
    picture, labels = draw_picture(scene, size)
    question = next(q for q in ask(scene) if q.kind in _PREFERRED[scene.index % len(_PREFERRED)])
    negatives = {kind: wrong.text for kind, wrong in contradict(scene, caption).items()}
    targets = {
        "question": question.caption.text,
        "answer": question.answer,
        "question_kind": question.kind,
        "negative": negatives["attribute"],
        **{f"negative_{kind}": text for kind, text in negatives.items()},
        "words": json.dumps(_words(scene, caption)),
    }
    return _sample(scene.name, picture, caption, regions_of(caption, labels, scene.things), targets)


# Which kinds of question a caption's sample may bring, by turns; each list ends in one that every scene allows.
_PREFERRED = (("colour", "exists"), ("shape", "exists"), ("exists",))
assert {kind for kinds in _PREFERRED for kind in kinds} == set(ATTRIBUTE_QUESTIONS)


def question_samples(split: str, size: int = PICTURE_SIZE) -> Iterator[Sample]:
    """Every question about every scene of a split, without end; targets are `answer` and `question_kind`."""
    for index in count():
        scene = draw_scene(split, index)
        picture, labels = draw_picture(scene, size)
        for question in ask(scene):
            regions = regions_of(question.caption, labels, scene.things)
            targets = {"answer": question.answer, "question_kind": question.kind}
            yield _sample(f"{scene.name}-{question.kind}", picture, question.caption, regions, targets)


def masked_samples(split: str, size: int = PICTURE_SIZE) -> Iterator[Sample]:
    """Captions of a split with one colour or shape masked that the picture determines, each word by turns, without end.

    Targets are `masked` (the word) and `role`; the first region is that of the phrase with the mask.
    """
    for index in count():
        scene = draw_scene(split, index)
        caption = describe(scene)
        picture, labels = draw_picture(scene, size)
        for mention in caption.mentions:
            for role in ("colour", "shape"):
                if is_determined(scene, mention, role):
                    word = mention.attributes[role]
                    first = (mention, *(m for m in caption.mentions if m is not mention))
                    masked = replace(caption.changed({word: _MASK}), mentions=first)
                    targets = {"masked": caption.words[word], "role": role}
                    regions = regions_of(masked, labels, scene.things)
                    yield _sample(f"{scene.name}-{word}", picture, masked, regions, targets)


_SAMPLES: dict[str, Callable[[str], Iterator[Sample]]] = {
    "captions": caption_samples,
    "questions": question_samples,
    "masked": masked_samples,
}


def _sample(
    name: str, picture: np.ndarray, caption: Caption, regions: tuple[Region, ...], targets: dict[str, str]
) -> Sample:
    from PIL import Image

    return Sample(id=name, image=Image.fromarray(picture), text=caption.text, regions=regions, targets=targets)


def regions_of(caption: Caption, labels: np.ndarray, things: Sequence[Thing]) -> tuple[Region, ...]:
    """What a caption says of a picture, and the things that it doesn't mention; colour and shape label each thing."""
    seen = {number: _visible(labels == number) for number in range(-1, len(things))}
    named = [f"{thing.colour} {thing.shape}" for thing in things]
    regions = []
    for mention in caption.mentions:
        box, mask = seen[mention.thing]
        phrase, span = caption.phrase(mention.words), caption.span(mention.words)
        regions.append(Region(phrase, box, span, mask, named[mention.thing]))
    for claim in caption.claims:
        if claim.kind == "ground":
            words = (claim.words[0], claim.words[1] + 1)  # 'striped ground'
            box, mask = seen[-1]
            regions.append(Region(caption.phrase(words), box, caption.span(words), mask))
    mentioned = {mention.thing for mention in caption.mentions}
    regions += [Region(None, seen[n][0], None, seen[n][1], name) for n, name in enumerate(named) if n not in mentioned]
    return tuple(region for region in regions if region.box is not None)


def _visible(shown: np.ndarray) -> tuple[tuple[float, float, float, float] | None, Mask | None]:
    """The box (left, top, right, bottom) and the mask of what is visible; nothing for what is covered wholly."""
    if not shown.any():
        return None, None
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return box, encode_mask(shown)


def _words(scene: Scene, caption: Caption) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = []
    for mention in caption.mentions:
        for role, word in mention.attributes.items():
            sure = is_determined(scene, mention, role)
            listed.append({"span": caption.span((word, word + 1)), "role": role, "determined": sure})
    for claim in caption.claims:
        first = claim.words[0]
        # 'left of' and 'top left' have words that say nothing by themselves, or that only another word makes clear.
        words = range(first, first + (2 if claim.kind == "place" else 1))
        listed += [{"span": caption.span((word, word + 1)), "role": claim.kind, "determined": True} for word in words]
    return listed
