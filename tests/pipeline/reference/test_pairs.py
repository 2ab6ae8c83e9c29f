"""Images and texts of a user's own are read once, kept as they are learned from, and missed by name."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnscope.reference.lessons import draw_scenes, mask_words_at_random
from attnscope.reference.pairs import Shape, left_out, open_prepared, prepare, tokenizer_of
from attnscope.samples import SampleError

SHAPE = Shape(side=16, length=8, tokenizer="words", vocabulary=100, held_out=2)


def test_images_and_ids_are_those_of_the_files(photographs: Path, tmp_path: Path) -> None:
    prepared = prepare(str(photographs), tmp_path / "data", SHAPE)
    found = {}
    for split, count in (("train", 20), ("validation", 2), ("test", 2)):
        pairs = prepared.split(split)
        assert len(pairs) == len(pairs.pixels) == count
        for words, pixels in zip(pairs.words, pairs.pixels[:], strict=True):
            found[pixels.tobytes()] = words[words != 0].tolist()
    assert len(found) == 24
    tokenizer = tokenizer_of(prepared.vocabulary, 8)
    for record in map(json.loads, (photographs / "metadata.jsonl").read_text().splitlines()):
        with Image.open(photographs / record["file_name"]) as image:
            expected = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
        assert found[expected.tobytes()] == tokenizer(record["text"], truncation=True)["input_ids"]


def test_what_cannot_be_used_is_left_out_by_name(photographs: Path, tmp_path: Path) -> None:
    lines = (photographs / "metadata.jsonl").read_text()
    (photographs / "broken.png").write_bytes(b"no image at all")
    for record in (
        {"file_name": "broken.png", "text": "a broken one"},
        {"file_name": "absent.png", "text": "an absent one"},
        {"text": "no image"},
        {"file_name": "p0.png"},
    ):
        lines += json.dumps(record | {"id": f"bad {len(lines)}"}) + "\n"
    (photographs / "metadata.jsonl").write_text(lines + "{not json\n")
    prepared = prepare(str(photographs), tmp_path, SHAPE)
    assert (prepared.count, prepared.left_out) == (24, 5)
    problems = [problem for _, problem in left_out(prepared)]
    assert problems[0].startswith("image can't be decoded")
    assert problems[1:] == [
        "image file 'absent.png' is missing",
        "it has no image",
        "it has no text",
        "line 29 of metadata.jsonl is not valid JSON",
    ]
    # Texts alone need no image.
    texts = prepare(str(photographs), tmp_path / "texts", Shape(0, 8, "words", 100, 2))
    assert texts.count == 27


def test_prepared_samples_are_not_read_again_and_not_taken_for_others(photographs: Path, tmp_path: Path) -> None:
    first = prepare(str(photographs), tmp_path, SHAPE)
    (photographs / "metadata.jsonl").unlink()
    assert prepare(str(photographs), tmp_path, SHAPE) == first == open_prepared(tmp_path)
    with pytest.raises(SampleError, match="holds samples prepared otherwise"):
        prepare(str(photographs), tmp_path, Shape(32, 8, "words", 100, 2))


def test_regions_are_kept_where_they_are_asked_for(photographs: Path, tmp_path: Path) -> None:
    """Beside images or without them; nothing else changes by that, and folders without them are what they were."""
    plain = prepare(str(photographs), tmp_path / "plain", SHAPE)
    shape = replace(SHAPE, regions=True)
    both = prepare(str(photographs), tmp_path / "both", shape)
    alone = prepare(str(photographs), tmp_path / "alone", replace(shape, side=0))
    assert len({plain.digest, both.digest, alone.digest}) == 3
    first, second, third = (prepared.split("train") for prepared in (plain, both, alone))
    assert (first.pixels[:] == second.pixels[:]).all() and first.words.tolist() == second.words.tolist()
    assert second.crops[:].shape == third.crops[:].shape == (20, 9, 8, 8, 3)
    assert (second.crops[:] == third.crops[:]).all() and second.crops[:].std() > 10
    assert (second.boxes[:] == third.boxes[:]).all() and second.boxes[:1].shape == (1, 9, 4)
    # Who needs none doesn't mind any.
    assert prepare(str(photographs), tmp_path / "both", SHAPE) == both
    with pytest.raises(SampleError, match="holds samples prepared without the regions that the model sees"):
        prepare(str(photographs), tmp_path / "plain", shape)


def test_a_folder_that_was_prepared_before_regions_were_is_opened(photographs: Path, tmp_path: Path) -> None:
    prepared = prepare(str(photographs), tmp_path, SHAPE)
    record = json.loads((tmp_path / "prepared.json").read_text())
    del record["shape"]["regions"], record["boxless"]
    (tmp_path / "prepared.json").write_text(json.dumps(record))
    digest = hashlib.sha256((tmp_path / "pixels.bin").read_bytes())
    digest.update(np.load(tmp_path / "words.npy").tobytes())
    assert record["digest"] == digest.hexdigest()
    assert prepare(str(photographs), tmp_path, SHAPE) == prepared
    assert {file.name for file in tmp_path.iterdir()} == {
        *("prepared.json", "pixels.bin", "words.npy", "left-out.jsonl", "photographs")
    }


def test_a_box_outside_its_image_costs_its_sample(photographs: Path, tmp_path: Path) -> None:
    lines = (photographs / "metadata.jsonl").read_text().splitlines()
    record = json.loads(lines[0]) | {"regions": [{"box": [0, 0, 30, 20]}, {"box": [0, 0, 30.5, 20]}]}
    (photographs / "metadata.jsonl").write_text("\n".join([json.dumps(record), *lines[1:]]))
    prepared = prepare(str(photographs), tmp_path / "data", replace(SHAPE, regions=True))
    problem = "box [0.0, 0.0, 30.5, 20.0] reaches out of its image of 30 x 20 pixels"
    assert list(left_out(prepared)) == [("p0.png", problem)]
    assert prepare(str(photographs), tmp_path / "plain", SHAPE).left_out == 0


def test_preparing_that_was_cut_short_begins_anew(photographs: Path, tmp_path: Path) -> None:
    whole = prepare(str(photographs), tmp_path / "whole", SHAPE)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "pixels.bin").write_bytes(b"half of an image")
    assert prepare(str(photographs), tmp_path / "cut", SHAPE).digest == whole.digest


def test_samples_without_use_are_refused_in_one_sentence(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(SampleError, match=r"hold 0 usable of 1, and a training needs 10 or more.*it has no image"):
        prepare(str(tmp_path / "few.jsonl"), tmp_path / "a", SHAPE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match="hold no sample"):
        prepare(str(tmp_path / "empty"), tmp_path / "b", SHAPE)


def test_a_datasets_dataset_is_read_as_its_files_are(photographs: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [json.loads(line) for line in (photographs / "metadata.jsonl").read_text().splitlines()]
    images = [(photographs / record["file_name"]).read_bytes() for record in records]
    columns = {"image": [{"bytes": b, "path": None} for b in images], "text": [record["text"] for record in records]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "set"))
    found = prepare(f"datasets:{tmp_path / 'set'}", tmp_path / "a", SHAPE)
    assert found.digest == prepare(str(photographs), tmp_path / "b", SHAPE).digest


@pytest.mark.parametrize("tokenizer", ["words", "wordpiece"])
def test_a_vocabulary_is_made_of_the_texts_that_are_learned_from(
    tokenizer: str, photographs: Path, tmp_path: Path
) -> None:
    shape = Shape(0, 12, tokenizer, 60, 2)
    prepared = prepare(str(photographs), tmp_path / "a", shape)
    assert prepare(str(photographs), tmp_path / "b", shape).digest == prepared.digest
    assert prepared.vocabulary[:5] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert len(set(prepared.vocabulary)) == len(prepared.vocabulary) <= 60
    tokenizer_made = tokenizer_of(prepared.vocabulary, 12)
    for words in prepared.split("train").words:
        text = tokenizer_made.decode(words[(words != 0)][1:-1])
        ids = tokenizer_made(text)["input_ids"]
        assert ids == words[words != 0].tolist()
        assert 1 not in ids
    # Each file has a number of its own: those of held-out texts are not known as words.
    unknown = (prepared.split("test").words == 1).any(1)
    assert unknown.all() if tokenizer == "words" else not unknown.any()


def test_a_vocabulary_that_is_full_keeps_the_most_frequent(photographs: Path, tmp_path: Path) -> None:
    prepared = prepare(str(photographs), tmp_path, Shape(0, 12, "words", 11, 2))
    # Five that each text has, in the order of the alphabet, then the most frequent colour.
    assert prepared.vocabulary[5:10] == (",", ".", "a", "number", "photograph")
    assert prepared.vocabulary[10] in ("red", "green", "blue")


def test_texts_longer_than_the_model_reads_are_cut_and_counted(photographs: Path, tmp_path: Path) -> None:
    prepared = prepare(str(photographs), tmp_path, Shape(0, 5, "words", 100, 2))
    assert prepared.cut == 24
    words = prepared.split("train").words
    assert (words[:, 0] == 2).all() and (words[:, -1] == 3).all()


def test_no_pair_comes_twice_in_a_batch(photographs: Path, tmp_path: Path) -> None:
    pairs = prepare(str(photographs), tmp_path, SHAPE).split("train")
    drawn = [draw_scenes(pairs, 20, np.random.default_rng(seed), 0.25) for seed in range(3)]
    assert all(sorted(numbers) == list(range(20)) for numbers in drawn)
    assert not (drawn[0] == drawn[1]).all()


def test_words_are_masked_as_often_as_stated() -> None:
    rng = np.random.default_rng(0)
    words = np.concatenate([np.full((4000, 1), 2), rng.integers(5, 50, (4000, 20)), np.full((4000, 1), 3)], 1)
    shown, asked = mask_words_at_random(words, 50, rng)
    assert not asked[:, [0, -1]].any() and asked.any(1).all()
    assert (shown[~asked] == words[~asked]).all()
    assert asked[:, 1:-1].mean() == pytest.approx(0.15, abs=0.01)
    fate = shown[asked]
    assert (fate == 4).mean() == pytest.approx(0.8, abs=0.01)
    # A random word is the true one in one of 45 cases.
    assert (fate == words[asked]).mean() == pytest.approx(0.1 + 0.1 / 45, abs=0.01)
