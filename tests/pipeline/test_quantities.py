"""The schema: the page about it says what the table says, and runs hold what both say."""

import json
import re
from pathlib import Path

import pytest

from attnscope.arrays import DENSE_BOUND
from attnscope.plan import _DENSE_DTYPE
from attnscope.quantities import ENCODINGS, QUANTITIES, RULES, SCHEMA_VERSION, SUMMARIES, ExtractSpec, union
from attnscope.testing import make_run
from attnscope.tokens import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "schema.md").read_text(encoding="utf-8")
TITLES = {
    "samples": "samples",
    "stream": "<stream>",
    "site": "<site>",
    "outputs": "outputs",
    "weights": "weights/<site>",
}


@pytest.mark.parametrize("group", TITLES)
def test_the_page_lists_every_quantity_as_the_table_has_it(group: str) -> None:
    section = PAGE.split(f"### `{TITLES[group]}/`")[1].split("\n#")[0]
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|")) for line in re.findall(r"^\| `.*$", section, re.M)
    ]
    expected = [
        (f"`{q.name}`", ", ".join(q.dims), q.dtype, q.units or "-", q.meaning) for q in QUANTITIES if q.group == group
    ]
    assert rows == expected


def test_the_page_names_kinds_rules_encodings_and_the_version() -> None:
    for code, kind in enumerate(KINDS):
        assert f"{kind} {code}" in " ".join(PAGE.split())
    assert all(f"`{name}`" in PAGE for name in RULES | SUMMARIES)
    assert f"this is version {SCHEMA_VERSION}" in PAGE
    for encoding in ENCODINGS:
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{encoding}`"))
        assert row.endswith(f"| {DENSE_BOUND[_DENSE_DTYPE[encoding]]} |")


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(location=str(tmp_path / "run.zarr"))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["tree"]["vision.self/attention"].shape == (3, 2, 2, 10, 10)  # type: ignore[index]


def test_specs_are_read_as_they_were_written_and_nothing_else() -> None:
    spec = ExtractSpec(frozenset({"attention"}), layers=frozenset({1, 3}), encoding="compact", summaries=False)
    assert ExtractSpec.from_json(spec.to_json()) == spec
    plain = {**json.loads(spec.to_json()), "colour": "red"}
    with pytest.raises(ValueError, match="unknown fields"):
        ExtractSpec.from_json(json.dumps(plain))
    for field in ({"quantities": frozenset({"atention"})}, {"encoding": "uint8"}, {"form": "sparse"}):
        with pytest.raises(ValueError, match="unknown"):
            ExtractSpec(**field)  # type: ignore[arg-type]


def test_summaries_come_with_attention_where_one_asks_for_them() -> None:
    assert ExtractSpec(summaries=True).covers(ExtractSpec(SUMMARIES))
    assert not ExtractSpec().covers(ExtractSpec(SUMMARIES))
    assert union([ExtractSpec(), ExtractSpec(summaries=True)]).summaries
    assert union([ExtractSpec(encoding="compact"), ExtractSpec(encoding="compact")]).encoding == "compact"
    assert union([ExtractSpec(encoding="compact"), ExtractSpec(encoding="exact")]).encoding == "exact"
