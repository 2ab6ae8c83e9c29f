"""Scenes as samples: pictures with captions or questions, and a region with box, span and mask for every phrase."""

import json
from collections.abc import Iterator

import numpy as np

from attnscope.reference.captions import ATTRIBUTE_QUESTIONS, Caption, ask, contradict, describe, is_determined
from attnscope.reference.pictures import draw_picture
from attnscope.reference.scenes import SPLITS, Scene, draw_scene
from attnscope.samples import Mask, Region, Sample, SampleError, encode_mask

PICTURE_SIZE = 96
"""Pixels of a sample's side unless asked for otherwise."""

_PREFIX = "reference:"
_FORMS = "reference:N, reference:SPLIT:N or reference:SPLIT:questions:N"


def read_reference(source: str, limit: int | None = None) -> list[Sample]:
    """The samples that a source names: `reference:N`, `reference:SPLIT:N` or `reference:SPLIT:questions:N`.

    SPLIT is 'train', 'validation', 'test' (unless named) or 'hard'; N is how many, from the first scene on.

    Raises
    ------
    SampleError
        When the name is of no such form.
    """
    split, questions, count = _parsed(source)
    wanted = count if limit is None else min(count, limit)
    if questions:
        return list(_first(question_samples(split), wanted))
    return [caption_sample(draw_scene(split, index)) for index in range(wanted)]


def _parsed(source: str) -> tuple[str, bool, int]:
    parts = source.removeprefix(_PREFIX).split(":")
    questions = len(parts) == 3 and parts[1] == "questions"
    split = parts[0] if len(parts) > 1 else "test"
    known = len(parts) in (1, 2) or questions
    if not (known and split in SPLITS and parts[-1].isdecimal() and int(parts[-1]) > 0):
        raise SampleError(f"samples {source!r} are not {_FORMS} with a split of {', '.join(SPLITS)} and N above 0")
    return split, questions, int(parts[-1])


def _first(samples: Iterator[Sample], count: int) -> Iterator[Sample]:
    return (sample for sample, _ in zip(samples, range(count), strict=False))


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
    return _sample(scene.name, picture, caption, _regions(caption, labels, len(scene.things)), targets)


# Which kinds of question a caption's sample may bring, by turns; each list ends in one that every scene allows.
_PREFERRED = (("colour", "exists"), ("shape", "exists"), ("exists",))
assert {kind for kinds in _PREFERRED for kind in kinds} == set(ATTRIBUTE_QUESTIONS)


def question_samples(split: str, size: int = PICTURE_SIZE) -> Iterator[Sample]:
    """Every question about every scene of a split, without end; targets are `answer` and `question_kind`."""
    index = 0
    while True:
        scene = draw_scene(split, index)
        picture, labels = draw_picture(scene, size)
        for question in ask(scene):
            regions = _regions(question.caption, labels, len(scene.things))
            targets = {"answer": question.answer, "question_kind": question.kind}
            yield _sample(f"{scene.name}-{question.kind}", picture, question.caption, regions, targets)
        index += 1


def _sample(
    name: str, picture: np.ndarray, caption: Caption, regions: tuple[Region, ...], targets: dict[str, str]
) -> Sample:
    from PIL import Image

    return Sample(id=name, image=Image.fromarray(picture), text=caption.text, regions=regions, targets=targets)


def _regions(caption: Caption, labels: np.ndarray, things: int) -> tuple[Region, ...]:
    seen = {number: _visible(labels == number) for number in range(-1, things)}
    regions = []
    for mention in caption.mentions:
        box, mask = seen[mention.thing]
        regions.append(Region(caption.phrase(mention.words), box, caption.span(mention.words), mask))
    for claim in caption.claims:
        if claim.kind == "ground":
            words = (claim.words[0], claim.words[1] + 1)  # 'striped ground'
            box, mask = seen[-1]
            regions.append(Region(caption.phrase(words), box, caption.span(words), mask))
    mentioned = {mention.thing for mention in caption.mentions}
    regions += [Region(None, *seen[n][:1], None, seen[n][1]) for n in range(things) if n not in mentioned]
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
