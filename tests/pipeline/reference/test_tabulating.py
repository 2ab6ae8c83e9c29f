"""A table of trained variants says what its figures say, and nothing is trained or measured twice."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from attnscope.cli import main
from attnscope.reference import tabulating
from attnscope.reference.making import ReferenceError, recipe_of
from attnscope.reference.tabulating import Variant, compare, estimate, page, t_quantile, tabulate, verdict

SHORT = {"scenes": 30, "steps": 2, "decay": 2, "examine_every": 4, "validation_scenes": 8}
VARIANTS = [Variant("plain", "text", SHORT), Variant("slow", "text", SHORT | {"peak_rate": 1e-5})]


def measure(folder: Path) -> Mapping[str, float]:
    """The mean square of all weights, and how often this was asked."""
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    with (folder / "asked").open("a") as file:
        file.write("x")
    size = sum(w.size for w in weights.values())
    return {"square": float(sum((w.astype(float) ** 2).sum() for w in weights.values())) / size, "none": math.nan}


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 30, 200])
def test_quantiles_cut_off_a_fortieth_of_the_density(freedom: int) -> None:
    # The density integrated from 0, with t = sqrt(freedom) tan(angle), whose weight is cos^(freedom - 1).
    angles = np.linspace(0, np.arctan(t_quantile(freedom) / np.sqrt(freedom)), 200_001)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    area = constant * np.trapezoid(np.cos(angles) ** (freedom - 1), angles)
    assert area == pytest.approx(0.475, abs=2e-6)


def test_an_interval_computed_by_hand() -> None:
    # Mean 2, s = 1: half a width is 4.302653 / sqrt(3).
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-5)
    assert found.seeds == 3


def test_one_seed_has_no_interval() -> None:
    found = estimate([0.7])
    assert (found.mean, found.low, found.high) == (0.7, None, None)
    assert verdict(found) == "one seed"
    assert page(compare({"a": {0: {"x": 0.5}}}), [0]).startswith("Seed 0 alone, so no intervals.")


def test_pairing_by_seed_finds_what_means_do_not() -> None:
    # Seeds differ far more than variants do.
    measured = {
        "base": {0: {"x": 0.1}, 1: {"x": 0.5}, 2: {"x": 0.9}},
        "better": {0: {"x": 0.12}, 1: {"x": 0.52}, 2: {"x": 0.921}},
        "same": {0: {"x": 0.12}, 1: {"x": 0.47}, 2: {"x": 0.91}},
    }
    base, better, same = compare(measured)
    assert base.difference is None and base.verdict == ""
    assert better.value.low < base.value.high  # type: ignore[operator]
    assert better.difference is not None and better.difference.mean == pytest.approx(0.061 / 3)
    assert (better.verdict, same.verdict) == ("apart", "noise")
    text = page([base, better, same], [0, 1, 2])
    assert "| better | +0.020 (+0.019 to +0.022), apart |" in text
    assert "| base | 0.500 (-0.494 to 1.494) |" in text


def test_a_figure_that_is_missing_is_left_out_of_its_pair_alone() -> None:
    measured = {
        "base": {0: {"x": 1.0, "y": 1.0}, 1: {"x": math.nan, "y": 2.0}, 2: {"y": 3.0}},
        "other": {0: {"x": 3.0}, 1: {"x": 4.0, "y": 2.0}, 2: {"x": 5.0, "y": 5.0}},
    }
    rows = {(row.variant, row.figure): row for row in compare(measured)}
    assert rows["other", "x"].value.seeds == 3
    assert rows["other", "x"].difference == tabulating.Estimate(2.0, None, None, 1)
    assert rows["other", "y"].difference.mean == 1.0  # type: ignore[union-attr]
    assert ("base", "z") not in rows


def test_a_table_is_written_and_only_what_is_missing_is_made(tmp_path: Path) -> None:
    rows = tabulate(VARIANTS[:1], [0, 1], str(tmp_path), measure)
    assert [(row.variant, row.figure, row.value.seeds) for row in rows] == [("plain", "square", 2)]
    before = (tmp_path / "plain-0" / "model.safetensors").stat().st_mtime_ns
    rows = tabulate(VARIANTS, [0, 1], str(tmp_path), measure)
    assert (tmp_path / "plain-0" / "model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "plain-0" / "asked").read_text() == (tmp_path / "slow-1" / "asked").read_text() == "x"
    assert rows[1].difference is not None
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["rows"][1]["difference"]["mean"] == rows[1].difference.mean
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0].startswith("variant,figure,mean,low,high,seeds,difference_mean")
    assert len(lines) == 3
    assert "paired by seed" in (tmp_path / "table.md").read_text()
    # Another recipe under the old name is another model.
    tabulate([Variant("plain", "text", SHORT | {"steps": 1})], [0], str(tmp_path), measure)
    assert (tmp_path / "plain-0" / "asked").read_text() == "xx"


@pytest.mark.slow
def test_several_processes_make_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other processes import it from here.
    (tmp_path / "measuring.py").write_text(
        "from safetensors.numpy import load_file\n"
        "def sizes(folder):\n"
        "    return {k: float(abs(v).sum()) for k, v in load_file(folder / 'model.safetensors').items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sizes = tabulating.measure_of("measuring:sizes")
    one = tabulate(VARIANTS, [0], str(tmp_path / "one"), sizes)
    two = tabulate(VARIANTS, [0], str(tmp_path / "two"), sizes, processes=2)
    assert one == two and len(one) > 40
    assert (tmp_path / "one" / "table.json").read_bytes() == (tmp_path / "two" / "table.json").read_bytes()


@pytest.mark.slow
def test_without_a_measure_the_figures_are_those_of_the_card(tmp_path: Path) -> None:
    rows = tabulate(VARIANTS[:1], [0], str(tmp_path))
    card = json.loads((tmp_path / "plain-0" / "card.json").read_text())
    found = {row.figure: row.value.mean for row in rows}
    assert found["hard_words_colour_bits"] == card["figures"]["hard"]["words_colour_bits"]["value"]
    assert len(found) == sum(len(figures) for figures in card["figures"].values())


@pytest.mark.parametrize(
    ("variants", "seeds", "message"),
    [
        ([], [0], "at least one variant and one seed"),
        (VARIANTS, [], "at least one variant and one seed"),
        ([*VARIANTS, VARIANTS[0]], [0], "variant 'plain' is given twice"),
        (VARIANTS, [0, 0], "seed 0 is given twice"),
        ([Variant("a/b", "text")], [0], "variant 'a/b' can't name a folder"),
        ([Variant("a", "nobody")], [0], "unknown reference model 'nobody'"),
        ([Variant("a", "text", {"without": ["itm"]})], [0], "text has no loss 'itm'"),
        ([Variant("a", "text", {"without": ["words"]})], [0], "text has no loss left to learn from"),
    ],
)
def test_what_cannot_become_a_table_is_refused_first(
    variants: list[Variant], seeds: list[int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ReferenceError, match=message):
        tabulate(variants, seeds, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_measure_is_found_by_its_name() -> None:
    assert tabulating.measure_of("attnscope.reference.tabulating:estimate") is estimate
    with pytest.raises(ReferenceError, match="can't be imported"):
        tabulating.measure_of("attnscope.reference.nothing:at_all")


def test_the_command_prints_the_figures_that_are_asked_for(tmp_path: Path) -> None:
    fields = ",".join(f"{k}={v}" for k, v in SHORT.items())
    names = [f"plain:text,{fields}", f"slow:text,{fields},peak-rate=1e-5"]
    (tmp_path / "out").mkdir()
    for name in ("plain", "slow"):
        for seed in (0, 1):
            # As if measured before: nothing is trained here.
            variant = next(v for v in VARIANTS if v.name == name)
            folder = tabulating.folder_of(variant, seed, str(tmp_path / "out"))
            folder.mkdir()
            key = {"recipe": repr(recipe_of("text", variant.changes)), "seed": seed}
            figures = {"card": {"x": seed + (name == "slow"), "y": 0.0}}
            (folder / "figures.json").write_text(json.dumps({**key, "figures": figures}))
    command = ["reference", "table", *names, "--seeds", "0,1", "--engine", "inline", "--figure", "x"]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "| slow | +1.000 (+1.000 to +1.000), apart |" in result.output
    assert "| y |" not in result.output
    wrong = CliRunner().invoke(main, ["reference", "table", "text", "--out", "x"])
    assert wrong.exit_code == 2 and "'text' is not NAME:MODEL[,FIELD=VALUE...]" in wrong.output
