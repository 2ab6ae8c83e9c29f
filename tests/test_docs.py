"""The pages of docs/ say what the code says."""

import inspect
import re
from pathlib import Path

import pytest

from attnscope import plugins

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def included_files(page: str) -> list[tuple[str, str]]:
    """(path, shown text) of every block behind a comment that names a file of the repository."""
    return re.findall(r"<!-- ([\w/.-]+\.\w+) -->\n```\w+\n(.*?)```", page, flags=re.DOTALL)


def test_the_example_plugin_is_shown_as_it_stands() -> None:
    shown = included_files((DOCS / "analysers.md").read_text())
    assert [path for path, _ in shown] == [
        "tests/example_plugin/attnscope_example.py",
        "tests/example_plugin/pyproject.toml",
    ]
    for path, text in shown:
        assert text == (ROOT / path).read_text(), f"{path} changed: put it into docs/analysers.md"


def test_every_hook_is_documented_with_its_signature() -> None:
    page = (DOCS / "analysers.md").read_text()
    hooks = {n: f for n, f in vars(plugins).items() if n.startswith("attnscope_register")}
    assert hooks
    for name, hook in hooks.items():
        arguments = ", ".join(inspect.signature(hook).parameters)
        assert f"`{name}({arguments})`" in page


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
