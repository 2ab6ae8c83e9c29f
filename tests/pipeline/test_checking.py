"""A check finds what is broken in a run, and names it; and it finds nothing in a sound one."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from attnscope.checking import check_run
from attnscope.compatibility import EXAMPLES
from attnscope.extraction import extract
from attnscope.quantities import ExtractSpec
from attnscope.run import EXTRACTED, MISSING, open_run
from attnscope.testing import make_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_run(location=str(tmp_path / "run.zarr"))
    return tmp_path / "run.zarr"


def sentences(folder: Path) -> list[str]:
    run = open_run(folder)
    return check_run(run).sentences(["sample-0", "sample-1", "sample-2"])


def test_a_made_run_is_sound(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = check_run(open_run(folder), lambda done, total: seen.append((done, total)))
    assert found.faults == ()
    assert (found.extracted, found.left_out, found.missing) == (3, 0, 0)
    assert seen[-1] == (found.chunks, found.chunks)


@pytest.mark.parametrize(
    "stored", [{"form": "dense"}, {"form": "factored"}, {"encoding": "exact"}, {"encoding": "compact"}]
)
def test_an_extracted_run_is_sound(tiny_clip: Path, captioned_images: Path, stored: dict[str, str]) -> None:
    run = extract(tiny_clip, captioned_images, **stored)
    assert check_run(run).faults == ()


def test_rows_that_leave_a_share_to_a_sink_are_sound() -> None:
    example = EXAMPLES["inkling2"]
    run = extract(example.build("eager"), [example.inputs()], spec=ExtractSpec(encoding="exact"))
    sums = np.nansum(run.attention("text.self").values, axis=-1)
    assert sums[sums > 0].min() < 0.9
    assert run.plan.sites["text.self"].leaky == (0, 1)
    assert check_run(run).faults == ()


def test_every_flipped_bit_is_found(folder: Path) -> None:
    generator = random.Random(7)
    chunks = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "zarr.json"]
    unseen = []
    for _ in range(200):
        path = generator.choice(chunks)
        good = path.read_bytes()
        bit = generator.randrange(len(good) * 8)
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        if not check_run(open_run(folder)).faults:
            unseen.append((path.relative_to(folder), bit))
        path.write_bytes(good)
    assert unseen == []


def test_a_broken_chunk_is_named_with_its_samples(folder: Path) -> None:
    path = folder / "vision.self/attention/c/0/1/0/0/0"
    path.write_bytes(path.read_bytes()[:-20])
    (told,) = sentences(folder)
    assert told.startswith("vision.self/attention can't be decoded at layer position 1")
    assert told.endswith(': sample "sample-0", "sample-1"')


def test_an_absent_chunk_of_an_extracted_sample_is_found(folder: Path) -> None:
    (folder / "vision.self/attention_relevance/c/1/0/0/0").unlink()
    assert sentences(folder) == [
        'vision.self/attention_relevance holds no values in layer 0, though marked as extracted: sample "sample-2"'
    ]


def test_what_is_not_marked_is_missing_and_no_fault(folder: Path) -> None:
    zarr.open_array(folder / "samples/status")[2:] = MISSING
    (folder / "vision.self/attention/c/1/0/0/0/0").unlink()
    found = check_run(open_run(folder))
    assert found.faults == ()
    assert (found.extracted, found.missing) == (2, 1)


def test_rows_that_do_not_sum_to_one_are_found(folder: Path) -> None:
    attention = zarr.open_array(folder / "vision.self/attention")
    attention[1, 0, 1, 4] = np.asarray(attention[1, 0, 1, 4]) * 1.001
    assert sentences(folder) == [
        "vision.self/attention has rows that do not sum to 1 within 1.0e-05 in layer 0, though marked as extracted:"
        ' sample "sample-1"'
    ]


def test_rows_of_factored_attention_are_summed_too(tiny_bert: Path, captioned_images: Path, tmp_path: Path) -> None:
    run = extract(tiny_bert, captioned_images, out=tmp_path / "run.zarr", form="factored")
    changed = zarr.open_array(tmp_path / "run.zarr/text.self/log_sum_exp")
    changed[4, 1] = np.asarray(changed[4, 1]) + 0.01
    (fault,) = check_run(open_run(tmp_path / "run.zarr")).faults
    assert (fault.place, fault.samples) == ("text.self/query", (4,))
    assert run.status[4] == EXTRACTED


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (("vision.self/attention/zarr.json", None), "vision.self/attention is gone"),
        (("vision.self/attention/zarr.json", b"{"), "vision.self/attention has metadata that can't be read"),
        (("vision/row/c/0/0", None), 'vision/row lacks a chunk that was written: sample "sample-0", "sample-1"'),
        (("samples/reason/c/1", None), 'samples/reason lacks a chunk that was written: sample "sample-2"'),
        (("samples/text/c/0", None), "samples/text lacks a chunk that was written"),
        (("outputs/score/c/0/1", b"x"), "outputs/score can't be decoded"),
        (("outputs/score/c/0/1", None), 'outputs/score lacks a chunk that was written: sample "sample-2"'),
        (("vision/kind/c/0/0", None), "vision/kind knows no tokens, though marked as extracted"),
        (("vision.self/query_valid/c/0/0/0", None), "vision.self/query_valid marks no query row as valid in layer 0"),
        (("vision.self/layer/c/0", None), "vision.self/layer holds other numbers than the run was planned with"),
        (("weights/vision.self/key/c/1/0/0/0", None), "weights/vision.self/key lacks weights of a layer"),
        (("samples/id/c/0", None), "samples/id is empty"),
        (("samples/status/c/0", b"x"), "samples/status can't be decoded"),
    ],
)
def test_each_kind_of_damage_has_its_sentence(folder: Path, damage: tuple[str, bytes | None], told: str) -> None:
    path, content = damage
    if content is None:
        (folder / path).unlink()
    else:
        (folder / path).write_bytes(content)
    assert any(sentence.startswith(told) for sentence in sentences(folder)), sentences(folder)


def test_an_array_of_another_size_is_found(folder: Path) -> None:
    zarr.open_array(folder / "vision.self/attention").resize((3, 2, 2, 10, 9))
    assert sentences(folder)[0] == "vision.self/attention has 9 along key_token where the run has 10"


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [
        ("fill_value", 0.0, "fill_value"),
        ("data_type", "float64", "data_type"),
        ("codecs", [{"name": "bytes"}], "codecs"),
    ],
)
def test_edited_metadata_is_found(folder: Path, name: str, value: object, changed: str) -> None:
    path = folder / "vision.self/attention/zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    (told,) = [sentence for sentence in sentences(folder) if "attention " in sentence]
    assert told == f"vision.self/attention has another {changed} than the run was planned with"


def test_a_lost_chunk_of_an_analysis_is_found(folder: Path) -> None:
    zeros = xr.Dataset({"none": ("layer", np.zeros(3), {"long_name": "nothing", "units": "1"})})
    open_run(folder, read_only=False).save_analysis("nothing", zeros)
    assert sentences(folder) == []
    (folder / "analyses/nothing/none/c/0").unlink()
    assert sentences(folder) == ["analyses/nothing/none lacks a chunk that was written"]


def test_half_written_files_are_counted(folder: Path) -> None:
    (folder / "vision/kind/c/0/0.abc.partial").write_bytes(b"half")
    assert check_run(open_run(folder)).half_written == 1
