"""The reference world says what is so: of its pictures, its captions, its splits, and of nothing else."""

import hashlib
import json
from itertools import islice

import numpy as np
import pytest

from attnscope.reference import (
    ANSWERS,
    COLOURS,
    SHAPES,
    ask,
    caption_sample,
    contradict,
    describe,
    draw_picture,
    draw_scene,
    question_samples,
    read_reference,
    vocabulary,
)
from attnscope.reference.captions import PLACES, RELATIONS, Caption, is_determined, place_of, relation_of
from attnscope.reference.scenes import SPLITS, Scene, bucket
from attnscope.samples import SampleError, encode_mask, regions_from

SCENES = [draw_scene(split, index) for split in ("test", "hard", "train") for index in range(150)]


def test_a_scene_is_the_same_everywhere() -> None:
    # What is drawn must not change under the trained models: raise WORLD_VERSION and train them again.
    total = hashlib.sha256()
    for split in SPLITS:
        for index in range(3):
            scene = draw_scene(split, index)
            places = [[round(v, 6) for v in (t.x, t.y, t.radius, *t.rgb)] for t in scene.things]
            said = [describe(scene).text, *(q.caption.text for q in ask(scene))]
            total.update(json.dumps([scene.ground, scene.tones, places, said]).encode())
    assert total.hexdigest()[:16] == "2f9278756ee3431d"


def test_no_set_of_objects_is_in_two_splits() -> None:
    held = {
        split: {frozenset(t.pair for t in draw_scene(split, i).things) for i in range(400)}
        for split in ("train", "validation", "test")
    }
    held["test"] |= {frozenset(t.pair for t in draw_scene("hard", i).things) for i in range(100)}
    assert all(len(sets) > 100 for sets in held.values())
    assert not held["train"] & held["validation"]
    assert not held["train"] & held["test"]
    assert not held["validation"] & held["test"]
    # Not by chance: each split has buckets of its own.
    buckets = {split: {bucket(sorted(pairs)) for pairs in sets} for split, sets in held.items()}
    assert buckets == {"train": {0, 1, 2, 3, 4, 5}, "validation": {6}, "test": {7}}


def test_labels_are_where_the_colour_is() -> None:
    for scene in SCENES:
        picture, labels = draw_picture(scene, 96)
        for number, thing in enumerate(scene.things):
            shown = picture[labels == number].astype(float)
            if len(shown) > 60:
                assert np.abs(np.median(shown, axis=0) - thing.rgb).max() < 25, (scene.name, thing)


def test_labels_cover_each_shapes_area_at_any_size() -> None:
    # Areas in units of the squared radius, by integration by hand.
    areas = {
        "circle": np.pi * 0.95**2,
        "square": 1.64**2,
        "triangle": 1.8 * 2 / 2,
        "cross": 2 * (2 * 0.66) - 0.66**2,
        "diamond": 2 * 1.05**2,
        "ring": np.pi * (0.98**2 - 0.46**2),
    }
    for size, tolerance in ((96, 0.02), (320, 0.005)):
        ratios: dict[str, list[float]] = {}
        for scene in SCENES[:100]:
            _, labels = draw_picture(scene, size)
            for number, thing in enumerate(scene.things):
                if thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y):
                    expected = areas[thing.shape] * (thing.radius * size) ** 2
                    ratios.setdefault(thing.shape, []).append((labels == number).sum() / expected)
        assert {shape: np.mean(found) for shape, found in ratios.items()} == pytest.approx(
            dict.fromkeys(SHAPES, 1), abs=tolerance
        )


def test_things_in_front_cover_those_behind() -> None:
    covered = near = 0
    for scene in SCENES[150:300]:
        _, labels = draw_picture(scene, 96)
        first, second = scene.things[:2]
        near += np.hypot(first.x - second.x, first.y - second.y) < first.radius + second.radius
        whole = draw_picture(Scene(**{**vars(scene), "things": scene.things[:1]}), 96)[1]
        covered += (labels == 0).sum() < (whole == 0).sum()
    assert near > 130 and covered > 100, (near, covered)


def test_a_hard_scene_holds_distractors() -> None:
    for scene in SCENES[150:300]:
        first, same_colour, same_shape = (t.pair for t in scene.things[:3])
        assert first[0] == same_colour[0] and first[1] == same_shape[1]
        assert len({t.pair for t in scene.things}) == len(scene.things) >= 5


def holds(scene: Scene, caption: Caption) -> bool:
    """Whether all that a caption's words say is so, read from the words alone."""
    words = caption.text.replace(" on a ", " | ").replace(" ground", "").split(" | ")
    if len(words) == 2 and words[1] != scene.ground:
        return False
    said: list[list[str]] = [[]]
    for word in words[0].split():
        if word == "a":
            said.append([])
        else:
            said[-1].append(word)
    things = [thing_of(scene, phrase) for phrase in said[1:]]
    if None in things:
        return False
    for number, phrase in enumerate(said[1:]):
        rest = " ".join(word for word in phrase if word not in (*COLOURS, *SHAPES, "small", "large", ",", "and"))
        thing = scene.things[things[number]]  # type: ignore[index]
        if rest.startswith("at the") and rest.removeprefix("at the ") != place_of(thing):
            return False
        if rest in RELATIONS and rest != relation_of(thing, scene.things[things[number + 1]]):  # type: ignore[index]
            return False
    return True


def thing_of(scene: Scene, phrase: list[str]) -> int | None:
    named = {word for word in phrase if word in (*COLOURS, *SHAPES, "small", "large")}
    found = [i for i, t in enumerate(scene.things) if named <= {t.colour, t.shape, t.size}]
    return found[0] if len(found) == 1 else None


def test_captions_are_true_and_negatives_are_not() -> None:
    kinds = set()
    for scene in SCENES:
        caption = describe(scene)
        assert holds(scene, caption), (scene.name, caption.text)
        negatives = contradict(scene, caption)
        kinds |= set(negatives)
        assert "attribute" in negatives
        for kind, wrong in negatives.items():
            assert not holds(scene, wrong), (scene.name, kind, wrong.text)
            changed = [i for i, (a, b) in enumerate(zip(caption.words, wrong.words, strict=True)) if a != b]
            assert 1 <= len(changed) <= 2, (kind, changed)
    assert kinds == {"attribute", "order", "relation", "place"}


def test_relations_and_places_are_what_they_say() -> None:
    for scene in SCENES:
        for a in scene.things:
            place = place_of(a)
            assert place is None or (("top" in place) == (a.y < 0.5) and ("left" in place) == (a.x < 0.5))
            for b in scene.things:
                relation = relation_of(a, b)
                assert relation is None or relation_of(b, a) == RELATIONS[relation]
                assert relation != "left of" or a.x < b.x - 0.1
                assert relation != "above" or a.y < b.y - 0.1


def test_questions_have_one_right_answer() -> None:
    seen = set()
    for scene in SCENES:
        for question in ask(scene):
            seen.add((question.kind, question.answer))
            words = [w for w in question.caption.words if w in (*COLOURS, *SHAPES)]
            fitting = [t for t in scene.things if set(words[:2]) <= {t.colour, t.shape}]
            expected = {
                "colour": lambda f=fitting: [t.colour for t in f],
                "shape": lambda f=fitting: [t.shape for t in f],
                "exists": lambda f=fitting: ["yes" if f else "no"],
                "place": lambda f=fitting: [place_of(t) for t in f],
            }
            if question.kind in expected:
                assert expected[question.kind]() == [question.answer], (scene.name, question)
            assert question.answer in ANSWERS
    answered = {answer for _, answer in seen}
    assert answered == set(ANSWERS)


def test_an_attribute_is_determined_where_the_rest_of_the_phrase_settles_it() -> None:
    scene = next(s for s in SCENES[150:300] if s.things[0].size == s.things[1].size)
    caption = Caption(("a", *scene.things[0].pair))
    from attnscope.reference.captions import Mention

    mention = Mention(0, (0, 3), {"colour": 1, "shape": 2})
    assert caption.phrase((1, 2)) == scene.things[0].colour
    # The second thing shares its colour, so that 'a red ...' may be either; the third its shape.
    assert not is_determined(scene, mention, "shape")
    assert not is_determined(scene, mention, "colour")


def test_samples_carry_spans_boxes_and_masks() -> None:
    grounds = 0
    for sample in read_reference("reference:60") + read_reference("reference:hard:20"):
        split, _, index = sample.id.partition("-")
        scene = draw_scene(split, int(index))
        picture, labels = draw_picture(scene, 96)
        image = sample.load_image()
        assert image is not None and (np.asarray(image) == picture).all()
        for region in sample.regions:
            assert region.box is not None and region.mask is not None
            left, top, right, bottom = map(int, region.box)
            pixels = region.mask.pixels()
            assert pixels[top:bottom, left:right].sum() == pixels.sum() > 0
            number = labels[pixels].max()
            assert (pixels == (labels == number)).all()
            assert (region.phrase is None) == (region.span is None)
            if region.span is not None and region.phrase is not None and sample.text is not None:
                assert sample.text[slice(*region.span)] == region.phrase
                if number >= 0:
                    assert {*scene.things[number].pair} <= set(region.phrase.split())
                else:
                    grounds += 1
                    assert region.phrase == f"{scene.ground} ground"
    assert grounds > 3


def test_masked_words_are_listed_with_their_role() -> None:
    roles = set()
    for sample in read_reference("reference:train:60"):
        for word in json.loads(str(sample.targets["words"])):
            said = str(sample.text)[slice(*word["span"])]
            values = {"colour": COLOURS, "shape": SHAPES, "size": ("small", "large")}.get(word["role"])
            assert values is None or said in values
            roles.add(word["role"])
    assert roles == {"colour", "shape", "size", "relation", "place", "ground"}


def test_regions_survive_a_run() -> None:
    from dataclasses import asdict

    sample = caption_sample(draw_scene("hard", 3))
    assert regions_from(json.dumps([asdict(r) for r in sample.regions])) == sample.regions


def test_every_word_is_known() -> None:
    words = set(vocabulary())
    assert len(words) == len(vocabulary())
    for scene in SCENES:
        for caption in (describe(scene), *(q.caption for q in ask(scene))):
            assert set(caption.words) <= words
    assert {w for answer in ANSWERS for w in answer.split()} <= words


def test_sources_name_splits_and_questions() -> None:
    assert [s.id for s in read_reference("reference:3")] == ["test-0", "test-1", "test-2"]
    assert [s.id for s in read_reference("reference:hard:9", limit=2)] == ["hard-0", "hard-1"]
    asked = read_reference("reference:validation:questions:7")
    assert [s.id for s in asked] == [s.id for s in islice(question_samples("validation"), 7)]
    assert all(s.text and s.text.endswith("?") and s.targets["answer"] in ANSWERS for s in asked)


def test_masked_captions_ask_for_what_the_picture_determines() -> None:
    samples = read_reference("reference:hard:masked:40")
    assert {s.targets["role"] for s in samples} == {"colour", "shape"}
    for sample in samples:
        assert sample.text is not None and sample.text.count("[MASK]") == 1
        phrase = sample.regions[0]
        assert phrase.phrase is not None and phrase.span is not None and "[MASK]" in phrase.phrase
        assert sample.text[slice(*phrase.span)] == phrase.phrase
        scene = draw_scene("hard", int(sample.id.split("-")[1]))
        said = set(phrase.phrase.split()) - {"a", "[MASK]"}
        fitting = {getattr(t, str(sample.targets["role"])) for t in scene.things if said <= {t.colour, t.shape, t.size}}
        assert fitting == {sample.targets["masked"]}


@pytest.mark.parametrize(
    "name", ["reference:", "reference:0", "reference:all:3", "reference:hard:x", "reference:a:b:c"]
)
def test_a_source_that_is_none_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(SampleError, match=r"are not reference:N, reference:SPLIT:N, reference:SPLIT:questions:N or"):
        read_reference(f"reference:{name}")


@pytest.mark.parametrize("pixels", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, 7, 2, bool)])
def test_a_mask_reads_as_it_was_encoded(pixels: np.ndarray) -> None:
    mask = encode_mask(pixels)
    assert sum(mask.counts) == pixels.size
    assert sum(mask.counts[1::2]) == pixels.sum()
    assert (mask.pixels() == pixels).all()


def test_a_mask_runs_down_the_columns_from_the_left() -> None:
    pixels = np.array([[0, 0, 1], [1, 0, 1]], bool)
    assert encode_mask(pixels).counts == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("mask", "told"),
    [([1], "not a mapping of size"), ({"size": [2, 2], "counts": [1]}, "1 pixels in runs does not fill its 2 x 2")],
)
def test_a_mask_that_does_not_fit_is_refused(mask: object, told: str) -> None:
    with pytest.raises(SampleError, match=told):
        regions_from(json.dumps([{"mask": mask}]))


def test_places_are_opposite_across_the_middle() -> None:
    assert PLACES[::-1] == ("bottom right", "bottom left", "top right", "top left")
