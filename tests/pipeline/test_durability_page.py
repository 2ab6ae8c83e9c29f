"""docs/durability.md: what it shows runs."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from attnscope import claims
from attnscope.cli import main
from attnscope.object_stores import BUCKETS
from attnscope.testing import make_run

PAGE = (Path(__file__).parents[2] / "docs/durability.md").read_text(encoding="utf-8")


def test_what_the_page_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(location=str(tmp_path / "run.zarr"))
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/durability.md", "exec"), {})
    assert capsys.readouterr().out == "0 of 2 blocks are missing\n"
    for line in re.findall(r"^\$ attnscope (.*)$", PAGE, re.MULTILINE):
        assert CliRunner().invoke(main, line.split(), prog_name="attnscope").exit_code == 0


def test_the_page_names_what_the_code_has() -> None:
    assert claims.FOLDER in PAGE
    assert (claims.RENEW_EVERY, claims.STALE_AFTER) == (10, 60)
    assert {"s3", "gs", "az"} <= set(BUCKETS)
