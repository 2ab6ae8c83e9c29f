"""Samples: every source gives the same samples; what is wrong with one is said and shifts nobody."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from attnscope.samples import Region, Sample, SampleError, read_samples, unique_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.jpg"):
        Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(tmp_path / name)
    return tmp_path


RECORDS = [
    {
        "id": "one",
        "file_name": "a.png",
        "text": "a cat",
        "regions": [{"phrase": "cat", "box": [0, 0, 4, 4], "span": [2, 5]}],
    },
    {"id": "two", "file_name": "b.jpg", "text": "two\ncats", "targets": {"class": 3}},
]


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_a_folder_with_metadata_gives_its_records(folder: Path) -> None:
    write_jsonl(folder / "metadata.jsonl", RECORDS)
    one, two = read_samples(folder)
    assert (one.id, one.text, one.image) == ("one", "a cat", folder / "a.png")
    assert one.regions == (Region("cat", (0, 0, 4, 4), (2, 5)),)
    assert two.targets == {"class": 3}
    assert two.load_image().size == (8, 8)


def test_a_folder_of_images_gives_each_image(folder: Path) -> None:
    assert [s.id for s in read_samples(folder)] == ["a.png", "b.jpg"]


def test_jsonl_csv_and_parquet_give_the_same_samples(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    flat = [{k: v for k, v in r.items() if k in ("id", "file_name", "text")} for r in RECORDS]
    write_jsonl(folder / "s.jsonl", flat)
    pandas.DataFrame(flat).to_csv(folder / "s.csv", index=False)
    pandas.DataFrame(flat).to_parquet(folder / "s.parquet")
    from_jsonl = read_samples(folder / "s.jsonl")
    assert read_samples(folder / "s.csv") == from_jsonl
    assert read_samples(folder / "s.parquet") == from_jsonl


def test_a_dataset_gives_its_records_and_keeps_images_encoded(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": (folder / "a.png").read_bytes()}, {"bytes": b"broken"}],
        "caption": ["a cat", "two cats"],
        "id": ["one", "two"],
    }
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "caption": text, "id": text})
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"validation": whole}).save_to_disk(str(folder / "saved"))
    one, two = read_samples(f"datasets:{folder / 'saved'}@validation")
    assert (one.id, one.text, one.load_image().size) == ("one", "a cat", (8, 8))
    with pytest.raises(SampleError, match="can't be decoded"):
        two.load_image()
    assert len(read_samples(f"datasets:{folder / 'saved'}@validation", limit=1)) == 1
    with pytest.raises(SampleError, match="has no split 'train'; it has validation"):
        read_samples(f"datasets:{folder / 'saved'}")
    with pytest.raises(SampleError, match="can't be read"):
        read_samples(f"datasets:{folder}")


def test_regions_in_a_csv_are_json(folder: Path) -> None:
    (folder / "s.csv").write_text('id,file_name,regions\nx,a.png,"[{""phrase"": ""cat"", ""box"": [0, 0, 1, 2]}]"\n')
    assert read_samples(folder / "s.csv")[0].regions == (Region("cat", (0, 0, 1, 2)),)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("{not json", "line 2 of s.jsonl is not valid JSON"),
        ("[1, 2]", "line 2 of s.jsonl is not a JSON object"),
        ({"id": "bad"}, "neither an image"),
        ({"id": "bad", "text": "  "}, "text is empty"),
        ({"id": "bad", "file_name": "../secret.png"}, "leads outside the folder"),
        ({"id": "bad", "file_name": "/etc/passwd"}, "leads outside the folder"),
        ({"id": "bad", "file_name": 3}, "not a file name"),
        ({"id": "bad", "text": "x", "regions": [{"box": [4, 0, 4, 2]}]}, "is empty"),
        ({"id": "bad", "text": "x", "regions": [{"box": [0, 0, float("nan"), 2]}]}, "is empty"),
        ({"id": "bad", "text": "x", "regions": [{"box": [0, 1]}]}, "not four numbers"),
        ({"id": "bad", "text": "x", "regions": [{"span": ["a", 2]}]}, "not two numbers"),
        ({"id": "bad", "text": "x", "regions": [{"span": [0, 9]}]}, "outside the text"),
        ({"id": "bad", "text": "x", "regions": 5}, "not a list"),
        ({"id": "bad", "text": "x", "regions": [5]}, "not a mapping"),
        ({"id": "bad", "text": "x", "targets": [1]}, "not a mapping"),
        ({"id": "one", "text": "x"}, "was used before"),
    ],
)
def test_a_bad_record_keeps_its_place_with_a_problem(folder: Path, record: object, problem: str) -> None:
    found = read_samples(write_jsonl(folder / "s.jsonl", [RECORDS[0], record, RECORDS[1]]))
    assert [s.id for s in found][::2] == ["one", "two"]
    assert problem in (found[1].problem or "")
    assert found[0].problem is None
    assert found[2].problem is None


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(secret)
    (folder / "link.png").symlink_to(secret)
    assert "outside" in (read_samples(write_jsonl(folder / "s.jsonl", [{"file_name": "link.png"}]))[0].problem or "")
    assert [s.id for s in read_samples(folder)] == ["a.png", "b.jpg"]


def test_images_are_upright_and_rgb(folder: Path) -> None:
    wide = Image.fromarray(np.zeros((4, 8), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    wide.save(folder / "turned.jpg", exif=exif)
    image = Sample("x", image=folder / "turned.jpg").load_image()
    assert image is not None
    assert (image.mode, image.size) == ("RGB", (4, 8))


def test_images_that_cannot_be_read_say_why(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n")
    broken = ((folder / "broken.png", "can't be decoded"), (folder / "no.png", "is missing"), (b"", "can't be decoded"))
    for image, reason in broken:
        with pytest.raises(SampleError, match=reason):
            Sample("x", image=image).load_image()


def test_sources_without_a_sample_are_errors(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="neither a folder nor a file"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(SampleError, match="hold no sample"):
        read_samples(tmp_path)
    (tmp_path / "s.txt").write_text("x")
    with pytest.raises(SampleError, match=r"unknown kind '\.txt'; known are \.jsonl, \.csv, \.parquet"):
        read_samples(tmp_path / "s.txt")
    (tmp_path / "s.parquet").write_bytes(b"not parquet")
    pytest.importorskip("pyarrow")
    with pytest.raises(SampleError, match="can't be read"):
        read_samples(tmp_path / "s.parquet")


def test_ids_become_unique_and_keep_the_first() -> None:
    ids = [(s.id, bool(s.problem)) for s in unique_ids([Sample("a", text="x"), Sample("a", text="y"), Sample("b")])]
    assert ids == [("a", False), ("a#1", True), ("b", False)]
