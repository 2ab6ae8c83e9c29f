"""The stages of a study: receipts, reports that are whole, and what may be tried again."""

import errno
from pathlib import Path

import pytest

from attnscope import study as stages
from attnscope.analysis import AnalyserError
from attnscope.run import open_run
from attnscope.stores import StoreError
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

    def analyse(run: str, choice: AnalyserChoice) -> stages.Receipt:
        if choice.name == "relevance":
            raise ZeroDivisionError("no")
        return stages.analyse_run(run, choice)

    choices = [AnalyserChoice(name="relevance"), QK_SVD]
    with pytest.raises(ZeroDivisionError, match="no"):
        stages.study("model", "samples", str(tmp_path), choices, extract=extract, analyse=analyse)
    assert open_run(tmp_path / "run.zarr").analyses == ("qk_svd",)
    assert (tmp_path / "report.html").exists()


def test_analysers_are_checked_before_anything_is_done(tmp_path: Path) -> None:
    def extract(*_: object) -> stages.Receipt:
        raise AssertionError("extraction began")

    for choice in (AnalyserChoice(name="nothing"), AnalyserChoice(name="relevance", options={"colour": 1})):
        with pytest.raises(AnalyserError):
            stages.study("model", "samples", str(tmp_path), [choice], extract=extract)


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
    assert stages.can_pass(error) is passes
