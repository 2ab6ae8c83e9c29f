"""Every family: recorded attention equals the softmax of the model's own eager code, and so does what is stored."""

from functools import cache
from pathlib import Path

import pytest

from attnscope.compatibility import EXAMPLES
from attnscope.compatibility.matrix import TITLES, Row, measure, versions

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CASES = [(name, kernel) for name, example in EXAMPLES.items() for kernel in example.kernels]
ERRORS = ("error", "stored error")

# Attention without a product of query and key, or one that is cut into blocks: only the probabilities are known.
PROBABILITIES_ONLY = {
    **{"convbert": 2, "longformer": 2, "big_bird": 2, "led": 2, "mobilevitv2": 9, "groupvit_vision": 2},
    **{"deformable_detr": 4, "mask2former": 1, "grounding_dino": 4, "gemma4": 2, "lw_detr": 2},
    **{"rt_detr": 2, "reformer": 1},
}


@cache
def page_rows() -> dict[tuple[str, str], dict[str, str]]:
    """The cells of the page's table by title, of each example and kernel."""
    lines = [line.strip("| \n") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    titles, _, *rows = ([cell.strip() for cell in f"{line} ".split(" | ")] for line in lines)
    assert tuple(titles) == TITLES
    return {(row[0], row[2]): dict(zip(titles, row, strict=False)) for row in rows}


def shown(row: Row) -> dict[str, str]:
    return dict(zip(TITLES, row.cells(), strict=True))


# WavLM gives torch masks of two types.
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_recorded_and_stored_attention_equal_the_models_own(name: str, kernel: str) -> None:
    row = measure(name, kernel)
    assert row.identical
    assert row.ran == row.recorded
    assert row.calls >= 1
    assert row.error <= 2e-6
    assert row.output_error <= 1e-5
    assert row.stored_error <= 2e-6
    assert row.probabilities == PROBABILITIES_ONLY.get(name, 0)
    measured, stated = shown(row), page_rows()[name, kernel]
    assert {t: c for t, c in measured.items() if t not in ERRORS} == {
        t: stated.get(t, "") for t in measured if t not in ERRORS
    }


def test_the_page_has_every_example_and_says_that_all_is_recorded() -> None:
    assert list(page_rows()) == CASES
    assert len(EXAMPLES) >= 60
    for row in page_rows().values():
        recorded, _, ran = row["recorded"].split()[:3]
        assert recorded == ran
        assert row["outputs"] == "identical"
        assert float(row["error"].removesuffix(" (output)")) <= 2e-6
        assert float(row["stored error"]) <= 2e-6


def test_the_page_names_the_versions_that_are_tested() -> None:
    assert versions() in PAGE.read_text(encoding="utf-8")
