"""SQL over a run: the tables hold what the arrays hold, only those that are named are made, nothing is changed."""

import csv
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result

from attnscope.cli import main
from attnscope.run import Run, open_run
from attnscope.tabling import Tables
from attnscope.testing import make_run
from attnscope.tokens import KIND_CODES

PAGE = (Path(__file__).parents[2] / "docs" / "querying.md").read_text(encoding="utf-8")
SITE = "vision.self"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run.zarr"
    run = make_run(location=str(folder), layers=3)
    variable = (("sample", "layer"), np.arange(9.0).reshape(3, 3), {"long_name": "a", "units": "1"})
    run.save_analysis("mine", xr.Dataset({"score": variable}, coords={"sample": run.sample_ids, "layer": [0, 1, 2]}))
    return folder


@pytest.fixture(scope="module")
def run(made: Path) -> Run:
    return open_run(made)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="attnscope")


def rows(made: Path, statement: str, *options: object) -> list[dict[str, str]]:
    pytest.importorskip("duckdb")
    result = invoke("sql", made, statement, "--format", "csv", *options)
    assert result.exit_code == 0, result.output
    return list(csv.DictReader(io.StringIO(result.stdout)))


@pytest.mark.parametrize("above", [0.125, 0.02])
def test_edges_are_the_weights_above_the_threshold(made: Path, run: Run, above: float) -> None:
    found = rows(
        made, "select * from edges order by sample, layer, head, query_token, key_token", "--edges-above", above
    )
    attention = run.attention(SITE).values
    expected = np.argwhere(attention > above)
    got = [[int(r["sample"][-1]), *(int(r[n]) for n in ("layer", "head", "query_token", "key_token"))] for r in found]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal([np.float32(r["p"]) for r in found], attention[attention > above])
    kinds = {r["query_kind"] for r in found if r["query_token"] == "0"}
    assert kinds == {"cls"}


def test_heads_are_means_and_maxima_of_the_attention(made: Path, run: Run) -> None:
    found = rows(made, "select * from heads order by sample, layer, head")
    attention = run.attention(SITE).values.astype(np.float64)
    entropy = -(attention * np.log(attention)).sum(-1).mean(-1)
    np.testing.assert_allclose([float(r["entropy"]) for r in found], entropy.ravel(), rtol=1e-5)
    np.testing.assert_allclose([float(r["max"]) for r in found], attention.max((-2, -1)).ravel(), rtol=1e-6)


def test_kinds_are_masses_between_kinds_of_tokens(made: Path, run: Run) -> None:
    found = rows(
        made, "select * from kinds where query_kind = 'image' and key_kind = 'cls' order by sample, layer, head"
    )
    attention = run.attention(SITE).values[..., 1:, :1].sum(-1)
    np.testing.assert_allclose([float(r["mass"]) for r in found], attention.mean(-1).ravel(), rtol=1e-5)
    np.testing.assert_allclose([float(r["mass_max"]) for r in found], attention.max(-1).ravel(), rtol=1e-5)


def test_samples_tokens_and_results_are_joined(made: Path) -> None:
    found = rows(
        made,
        "select s.text, count(*) as tokens, max(m.score) as score from samples s join tokens t using (sample)"
        " join mine.score m using (sample) where m.layer = 2 group by s.text order by s.text",
    )
    assert found == [{"text": f"thing {i}", "tokens": "10", "score": str(2.0 + 3 * i)} for i in range(3)]


def test_only_the_named_tables_are_made(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("edges", "heads", "kinds", "tokens"):
        monkeypatch.setattr(Tables, name, lambda _: pytest.fail("made for nothing"))
    assert rows(made, "with s as (select * from samples) select count(*) as n from s") == [{"n": "3"}]


def test_other_formats_and_nulls(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    statement = "select * from (values (1, 'a', 0.5), (null, null, null)) as t(n, s, x)"
    answered = json.loads(invoke("sql", made, statement, "--format", "json").stdout)
    assert answered["rows"] == [{"n": 1, "s": "a", "x": 0.5}, {"n": None, "s": None, "x": None}]
    assert invoke("sql", made, statement, "--format", "csv").stdout.splitlines()[1:] == ["1,a,0.5", ",,"]
    shown = invoke("sql", made, "select sample from samples", "--rows", 2).stdout
    assert shown.splitlines() == [
        "sample",
        "sample-0",
        "sample-1",
        "the first 2 of 3 rows; --format csv gives them all",
    ]
    parquet = pytest.importorskip("pyarrow.parquet")
    invoke("sql", made, "select sample, p from edges", "--out", tmp_path / "e.parquet")
    assert parquet.read_table(tmp_path / "e.parquet").column_names == ["sample", "p"]


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("drop table samples", "a run is asked by one SELECT"),
        ("select 1; select 2", "a run is asked by one SELECT"),
        ("copy samples to 'x.csv'", "a run is asked by one SELECT"),
        (
            "select * from nothing",
            "there is no table 'nothing'; there are samples, tokens, edges, heads, kinds, mine.score",
        ),
        ("select colour from samples", "Binder Error"),
        ("selekt", "the query can't be read: syntax error"),
        ("select * from read_csv('/etc/passwd')", "Permission Error"),
    ],
)
def test_what_can_not_be_asked_is_one_sentence(made: Path, statement: str, told: str) -> None:
    pytest.importorskip("duckdb")
    result = invoke("sql", made, statement)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"attnscope: {told}")
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_duckdb_is_one_sentence(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    result = invoke("sql", made, "select 1")
    assert result.stderr == "attnscope: this needs duckdb, which is not installed; run: pip install 'attnscope[sql]'\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--stat", "entropy", "--query", "cls"), lambda a: -(a * np.log(a)).sum(-1)[..., 0]),
        (("--stat", "mass", "--query", "image", "--key", "cls"), lambda a: a[..., 1:, 0].mean(-1)),
        (("--stat", "max", "--query", "cls", "--key", "image"), lambda a: a[..., 0, 1:].max(-1)),
    ],
)
def test_stat_gives_summaries_by_head(made: Path, run: Run, options: tuple[str, ...], expected: object) -> None:
    found = list(csv.DictReader(io.StringIO(invoke("query", made, SITE, *options, "--format", "csv").stdout)))
    values = [float(row[next(reversed(row))]) for row in found]
    np.testing.assert_allclose(values, expected(run.attention(SITE).values).ravel(), rtol=1e-5)  # type: ignore[operator]
    assert [row["head"] for row in found[:2]] == ["0", "1"]


def test_stat_without_kinds_is_by_both_kinds(made: Path) -> None:
    found = list(csv.DictReader(io.StringIO(invoke("query", made, SITE, "--stat", "mass", "--format", "csv").stdout)))
    assert {(row["query_kind"], row["key_kind"]) for row in found} == {
        (a, b) for a in ("cls", "image") for b in ("cls", "image")
    }
    assert len(found) == 3 * 3 * 2 * 4
    refused = invoke("query", made, SITE, "--stat", "mass", "--query", "0:3")
    assert refused.stderr.startswith("attnscope: 'kind_mass' is by kind of token, got '0:3'; kinds are padding")
    assert "name the site alone" in invoke("query", made, f"{SITE}/entropy", "--stat", "max").stderr


def test_top_reads_the_strongest_keys_and_shows_what_a_scan_shows(made: Path, run: Run) -> None:
    shown = invoke("query", made, SITE, "--top", "9", "--head", "1", "--format", "csv").stdout
    found = list(csv.DictReader(io.StringIO(shown)))
    values = run.attention(SITE).values[:, :, 1]
    np.testing.assert_array_equal([np.float32(r["attention"]) for r in found], np.sort(values.ravel())[::-1][:9])
    assert list(found[0])[:4] == ["sample", "layer", "head", "query_token"]
    assert all(KIND_CODES[row["key_kind"]] for row in found)


@pytest.mark.slow
def test_the_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("duckdb")
    make_run(location=str(tmp_path / "run.zarr"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, block in re.findall(r"```(python|console)\n(.*?)```", PAGE, re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        for line in block.splitlines():
            result = invoke(*shlex.split(line.removeprefix("$ attnscope ")))
            assert result.exit_code == 0, result.output
    assert (tmp_path / "edges.csv").read_text().startswith("site,sample,layer,head")


def test_the_page_names_the_columns_of_every_table(run: Run) -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", PAGE, re.MULTILINE))
    makers = Tables(run).makers
    assert {name: ", ".join(makers[name]()) for name in told} == told
