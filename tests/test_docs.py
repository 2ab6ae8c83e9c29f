"""The pages of docs/ say what the code says."""

import inspect
import json
import re
import shlex
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


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformers

    monkeypatch.chdir(tmp_path)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=6, intermediate_size=48, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {"model": model, "inputs": inputs, "samples": [inputs]}
    exec(block, names)
    assert "Relevance" in str(names["html"])
    assert len(names["rec"]) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("page", ["training.md", "reference-world.md"])
def test_commands_that_train_are_commands_with_recipes_that_can_be_followed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnscope.cli import main, reference
    from attnscope.reference.learners import Clip, Sizes
    from attnscope.reference.making import recipe_of
    from attnscope.reference.weights import write_model

    # The clip that a page's mapper stands behind.
    write_model("clip", Clip.of(Sizes(length=32, side=112, patch=16)), tmp_path / "seen")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^\$ attnscope (reference (?:train|table) .*?)(?:  +#.*)?$", (DOCS / page).read_text(), re.M)
    assert lines
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        command = main.commands["reference"].commands[name]  # type: ignore[attr-defined]
        given = command.make_context(name, arguments).params
        if name == "table":
            variants = [reference._variant(text) for text in given["variants"]]
        else:
            changes = dict(reference._change(text) for text in given["assignments"])
            variants = [{"model": given["name"], "changes": changes | {"samples": given["samples"] or ""}}]
        for variant in variants:
            changes = variant["changes"]
            # As the samples of that page are prepared.
            changes |= {"side": 112} if changes.get("samples") else {}
            recipe_of(variant["model"], changes)


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_tables_of_trained_scores_are_those_of_their_measurements() -> None:
    from attnscope.reference.score_tables import summary

    page = (DOCS / "alignment-training.md").read_text()
    tables = sorted((DOCS / "alignment-training").glob("*.json"))
    assert tables
    for file in tables:
        table = json.loads(file.read_text())
        assert summary(table).strip() in page, file.name
        assert f"### `{table['setting']}`" in page
