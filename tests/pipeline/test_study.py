"""The stages of a study: receipts, reports that are whole, and what may be tried again."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest

from attnscope import study as stages
from attnscope.analysis import AnalyserError
from attnscope.run import open_run
from attnscope.stores import StoreError, can_pass
from attnscope.study import AnalyserChoice, ExtractOptions
from attnscope.testing import make_run

QK_SVD = AnalyserChoice(name="qk_svd")


def test_a_study_gives_what_its_stages_give(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    choices = [QK_SVD, AnalyserChoice(name="relevance", options={"target": 3})]
    receipt = stages.study(str(tiny_vit), str(captioned_images), str(tmp_path), choices, ExtractOptions(limit=4))
    run = open_run(tmp_path / "run.zarr")
    assert run.analyses == ("qk_svd", "relevance")
    assert run.spec.target == 3
    assert receipt["extracted"] == receipt["samples"] == 4
    assert receipt["report"] == str(tmp_path / "report.html")
    assert "<html" in (tmp_path / "report.html").read_text()[:200]


def test_an_analyser_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    def extract(*_: object) -> stages.Receipt:
        make_run(location=str(tmp_path / "run.zarr"))
        return {"run": "run.zarr"}

    def analyse(run: str, choice: AnalyserChoice, *_: object, **__: object) -> stages.Receipt:
        if choice.name == "relevance":
            raise ZeroDivisionError("no")
        return stages.analyse_run(run, choice)

    choices = [AnalyserChoice(name="relevance"), QK_SVD]
    with pytest.raises(ZeroDivisionError, match="no"):
        stages.study("model", "samples", str(tmp_path), choices, stages=stages.Stages(extract, analyse))
    assert open_run(tmp_path / "run.zarr").analyses == ("qk_svd",)
    assert (tmp_path / "report.html").exists()


def test_analysers_are_checked_before_anything_is_done(tmp_path: Path) -> None:
    def extract(*_: object) -> stages.Receipt:
        raise AssertionError("extraction began")

    for choice in (AnalyserChoice(name="nothing"), AnalyserChoice(name="relevance", options={"colour": 1})):
        with pytest.raises(AnalyserError):
            stages.study("model", "samples", str(tmp_path), [choice], stages=stages.Stages(extract))


def test_analysers_of_different_targets_are_refused() -> None:
    choices = [AnalyserChoice(name="relevance", options={"target": n}) for n in (1, 2)]
    with pytest.raises(AnalyserError, match="analysers relevance, relevance can't share one run: one run holds one"):
        stages.check_agreement([choice.make() for choice in choices])


def test_analysers_fit_when_their_needs_are_met() -> None:
    with_weights = make_run(quantities=frozenset({"attention", "weights"}))
    assert "qk_svd" in [choice.name for choice in stages.fitting_analysers(with_weights)]
    without = make_run(quantities=frozenset({"attention"}))
    assert "qk_svd" not in [choice.name for choice in stages.fitting_analysers(without)]


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(location=str(tmp_path / "run.zarr"))
    page = tmp_path / "report.html"
    page.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="can't be written"):
        stages.write_report(str(tmp_path / "run.zarr"), str(page))
    assert page.read_text() == "old"


def test_reports_and_studies_are_not_written_to_urls() -> None:
    with pytest.raises(StoreError, match="a report is written into a folder"):
        stages.study("model", "samples", "s3://bucket/study", [QK_SVD])
    assert stages.join("s3://bucket/study/", "run.zarr") == "s3://bucket/study/run.zarr"


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError("peer"), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (StoreError("'x' can't be written"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (AnalyserError("unknown analyser"), False),
        (ValueError("bad"), False),
        (KeyError("x"), False),
    ],
)
def test_only_trouble_of_networks_and_stores_can_pass(error: BaseException, passes: bool) -> None:
    assert can_pass(error) is passes


def test_a_study_that_grows_does_what_is_new_and_leaves_the_rest_alone(
    tiny_vit: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    shutil.copytree(captioned_images, images, ignore=shutil.ignore_patterns("metadata*"))
    held_back = sorted(images.glob("*.png"))[0]
    held_back.rename(tmp_path / held_back.name)
    asked = (str(tiny_vit), str(images), str(tmp_path / "out"), [QK_SVD], ExtractOptions(grow=True))
    first = stages.study(*asked)
    assert first["fresh"] is False
    written = (tmp_path / "out/report.html").stat().st_mtime_ns
    monkeypatch.setattr("attnscope.blocks._extract_block", refuse)
    again = stages.study(*asked)
    monkeypatch.undo()
    assert again == first | {"fresh": True}
    assert (tmp_path / "out/report.html").stat().st_mtime_ns == written
    (tmp_path / held_back.name).rename(held_back)
    grown = stages.study(*asked)
    assert grown["fresh"] is False
    assert grown["extracted"] == int(str(first["extracted"])) + 1
    analysis = open_run(tmp_path / "out/run.zarr").analysis("qk_svd")
    assert analysis.attrs["samples_used"] == grown["extracted"]
    assert f"{grown['extracted']} used" in (tmp_path / "out/report.html").read_text()


def refuse(*_: object) -> tuple[int, int]:
    raise AssertionError("a block was extracted again")


def test_an_extraction_in_parts_loads_its_model_once(
    tiny_vit: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope import extraction

    monkeypatch.setattr("attnscope.plan._UNIT_LIMIT", 2)
    loads: list[str] = []
    load = extraction.load_model
    monkeypatch.setattr(extraction, "load_model", lambda name, **options: loads.append(name) or load(name, **options))
    asked = (str(tiny_vit), str(captioned_images), str(tmp_path / "run.zarr"), [QK_SVD], ExtractOptions(batch_size=2))
    receipts = [stages.extract_part(*asked, seconds=0)]
    while not receipts[-1]["finished"]:
        receipts.append(stages.extract_part(*asked, seconds=0))
    run = open_run(tmp_path / "run.zarr")
    assert [receipt["done"] for receipt in receipts[:-1]] == [block.stop for block in run.blocks()]
    assert len(loads) == 1
    whole = tmp_path / "whole.zarr"
    stages.extract_run(*asked[:2], str(whole), *asked[3:])
    (site,) = run.sites
    np.testing.assert_array_equal(run.attention(site), open_run(whole).attention(site))
    assert stages._under_way == {}
