"""A repaired run is finished by the command that made it, and is then what it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from attnscope.checking import check_run
from attnscope.claims import Claims
from attnscope.cli import main
from attnscope.extraction import extract
from attnscope.quantities import ExtractSpec
from attnscope.repairing import repair_run
from attnscope.run import MISSING, RunError, open_run

SPEC = ExtractSpec(frozenset({"attention", "attention_relevance", "score", "weights"}), encoding="exact")


@pytest.fixture(scope="module")
def sound(tiny_clip: Path, captioned_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "run.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnscope.plan._UNIT_LIMIT", 2)
        extract(tiny_clip, captioned_images, out=out, spec=SPEC, batch_size=1)
    return out


@pytest.fixture
def broken(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run.zarr"))


def arrays(run: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(run, mode="r", use_consolidated=False)
    return {path: np.asarray(a[...]) for path, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def edit(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fill_value": 7}))


@pytest.mark.parametrize(
    ("place", "damage", "missing"),
    [
        ("vision.self/attention/c/1/0/0/0/0", cut, [2, 3]),
        ("vision.self/attention/c/1/1/0/0/0", remove, [2, 3]),
        ("text/kind/c/4/0", cut, [8]),
        ("text/row/c/0/0", remove, [0, 1]),
        ("outputs/score/c/0/2", cut, [4, 5]),
        ("samples/status/c/3", cut, [6, 7]),
        ("samples/id/c/0", cut, []),
        ("samples/text/c/0", remove, []),
        ("weights/text.self/key/c/0/0/0/0", cut, []),
        ("weights/text.self/key/zarr.json", cut, []),
        ("vision.self/attention/zarr.json", cut, []),
        ("text.self/attention_values/zarr.json", edit, []),
        ("text.self/attention_offset/zarr.json", remove, []),
        ("text.self/attention_values/c/1/0/2", cut, [4, 5]),
        ("text.self/zarr.json", cut, []),
        ("text.self/layer/c/0", cut, []),
        ("samples/status/zarr.json", cut, []),
        ("outputs/zarr.json", cut, []),
    ],
)
def test_what_is_broken_comes_back(
    broken: Path,
    sound: Path,
    tiny_clip: Path,
    captioned_images: Path,
    place: str,
    damage: Callable[[Path], None],
    missing: list[int],
) -> None:
    damage(broken / place)
    run = open_run(broken, read_only=False)
    found = check_run(run)
    assert found.faults
    assert repair_run(run, found)
    repaired = open_run(broken)
    assert np.flatnonzero(repaired.status == MISSING).tolist() == missing
    if not repaired.lost:
        assert check_run(repaired).faults == ()
    extract(tiny_clip, captioned_images, out=broken, spec=SPEC, batch_size=1)
    again = open_run(broken)
    assert check_run(again).faults == ()
    assert again.lost == []
    mine, theirs = arrays(broken), arrays(sound)
    assert set(mine) == set(theirs)
    for path, values in theirs.items():
        np.testing.assert_array_equal(mine[path], values, err_msg=path)
    assert again.tokens("text").attrs == open_run(sound).tokens("text").attrs


def test_the_command_repairs_and_says_what_is_missing(broken: Path) -> None:
    cut(broken / "vision.self/attention/c/1/0/0/0/0")
    told = CliRunner().invoke(main, ["check", str(broken)], prog_name="attnscope")
    assert told.exit_code == 1
    assert "check --repair" in told.stderr
    repaired = CliRunner().invoke(main, ["check", "--repair", str(broken)], prog_name="attnscope")
    assert repaired.exit_code == 0
    assert repaired.stdout.splitlines()[-1] == (
        "repaired: 2 samples in 1 blocks are missing again: the next extraction does them"
    )
    assert "2 still missing" in CliRunner().invoke(main, ["check", str(broken)], prog_name="attnscope").stdout


def test_a_broken_analysis_is_deleted_alone(broken: Path) -> None:
    from attnscope.analysis import analyse, make_analyser

    run = open_run(broken, read_only=False)
    for name in ("relevance", "qk_svd"):
        analyse(run, make_analyser(name))
    cut(next(p for p in (broken / "analyses/relevance").rglob("c/*") if p.is_file()))
    told = repair_run(run, check_run(run))
    assert told == ["analysis 'relevance' is deleted: run it again"]
    assert open_run(broken).analyses == ("qk_svd",)
    assert check_run(open_run(broken)).faults == ()


def test_a_run_in_work_is_not_repaired(broken: Path) -> None:
    cut(broken / "vision.self/attention/c/1/0/0/0/0")
    run = open_run(broken, read_only=False)
    with Claims(run.store) as other:
        other.take("0")
        with pytest.raises(RunError, match="another process is extracting"):
            repair_run(run, check_run(run))


@pytest.mark.parametrize(
    "content", [b"{", b"", b'{"zarr_format": 3, "node_type": "group", "attributes": {"schema": 1}}']
)
def test_a_corrupt_header_is_the_fault_of_the_data(
    broken: Path, tiny_clip: Path, captioned_images: Path, content: bytes
) -> None:
    (broken / "zarr.json").write_bytes(content)
    extracting = ["extract", str(tiny_clip), str(captioned_images), "--out", str(broken)]
    for command in (["check", str(broken)], ["query", str(broken)], extracting):
        told = CliRunner().invoke(main, command, prog_name="attnscope")
        assert told.exit_code == 1, told.output
        assert "has a zarr.json that can't be read" in told.stderr
