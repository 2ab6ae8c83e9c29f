"""What is built holds the import names and nothing else, and the layers import only what lies below them."""

import ast
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import attnscope

REPOSITORY = Path(__file__).parents[1]
ROOTS = ("pipeline", "plugins", "flows")
# What the core install has none of.
HEAVY = ("PIL", "matplotlib", "prefect", "safetensors", "torch", "transformers")

# The modules of attnscope, each below those that may import it. A package counts as one, but for the modules that are
# named here themselves. Importing for type checkers alone is free.
CORE = (
    "samples",
    "conditions",
    "quantities",
    "tokens",
    "object_stores",
    "stores",
    "plan",
    "chunks",
    "attention_array",
    "ragged",
    "arrays",
    "labels",
    "outputs",
    "claims",
    "whole_shards",
    "selection",
    "computed",
    "questions",
    "run",
    "tabling",
    "checking",
    "repairing",
)
ANALYSIS = ("statistics", "reading", "report", "plugins", "analysis", "rendering", "comparing")
EMBEDDED = ("embedded", "reference")
REFERENCE = tuple(
    f"reference.{name}"
    for name in (
        "corpus",
        "pairs",
        "sharing",
        "alignments",
        "mapper",
        "learners",
        "lessons",
        "examining",
        "readers",
        "scan",
        "answering",
        "painter",
        "settings",
        "simla",
        "simla_lessons",
        "kinds",
        "weights",
        "simla_examining",
        "pair_examining",
        "training",
        "encoders",
        "checking",
        "models",
        "judging",
        "inspecting",
        "spreading",
        "making",
        "tabulating",
        "score_tables",
    )
)
MODEL_LINE = (
    "recording",
    "families",
    *REFERENCE,
    "loading",
    "ablation",
    "recipes",
    "writing",
    "summaries",
    "planning",
    "growing",
    "proving",
    "batching",
    "capturing",
    "residuals",
    "hiding",
    "perturbing",
    "ready",
    "regions",
    "progress",
    "blocks",
    "beginning",
    "extraction",
    "inspection",
    "families.conformance",
    "compatibility",
)
ORDER = (*CORE, *ANALYSIS, *EMBEDDED, *MODEL_LINE, "testing", "clusters", "study", "cli")

# Heavy modules, and who may import them at run time.
ALLOWED = {
    "torch": set(MODEL_LINE),
    "transformers": set(MODEL_LINE),
    "safetensors": {*EMBEDDED, *MODEL_LINE},
    "matplotlib": {"report"},
    "prefect": set(),
    "dask": {"clusters"},
    "distributed": {"clusters"},
}


@dataclass(frozen=True)
class Import:
    """One imported name; `module` is where it is imported from."""

    module: str
    name: str | None
    lazy: bool
    line: int

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


def test_wheel_holds_the_import_names_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        files = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in files if ".dist-info/" not in name}
    assert "attnscope" in tops
    assert {top for top in tops if not (top == "attnscope" or top.startswith("attnscope_"))} == set()
    assert not [name for name in files if "__pycache__" in name or name.endswith(".pyc")]
    assert files >= {path.relative_to(REPOSITORY / root).as_posix() for root, path in source_files()}


def test_every_entry_point_is_in_the_wheel(built: Path) -> None:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    targets = [*project["scripts"].values(), *project["entry-points"]["attnscope"].values()]
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        files = set(wheel.namelist())
    for target in targets:
        path = target.partition(":")[0].replace(".", "/")
        assert files & {f"{path}.py", f"{path}/__init__.py"}, target


def test_source_distribution_can_be_built_and_tested(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        files = {name.partition("/")[2] for name in source.getnames()}
    assert files >= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"}
    assert files >= {"requirements-demo.txt", "tests/conftest.py", "tests/test_packaging.py"}
    assert files >= {path.relative_to(REPOSITORY).as_posix() for _, path in source_files()}
    assert not [name for name in files if name.startswith((".venv", "demo-out", "dist/"))]


def test_constraints_name_every_dependency_within_its_bounds() -> None:
    from packaging.requirements import Requirement

    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line[0] != "#"
    )
    listed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, listed):
        if requirement.name != "attnscope":
            assert requirement.name in pinned, f"constraints.txt has no {requirement.name}"
            assert pinned[requirement.name] in requirement.specifier, requirement
            operators = {specifier.operator for specifier in requirement.specifier}
            assert operators == {">=", "<"}, f"{requirement} needs a lower and an upper bound"


@pytest.mark.parametrize("use", ["import attnscope", "import attnscope; [getattr(attnscope, name) for name in {core}]"])
def test_the_core_loads_nothing_heavy(use: str) -> None:
    core = sorted(set(attnscope.__all__) - {"extract", "recording"})
    program = f"{use.format(core=core)}; import sys; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd="/", check=True, capture_output=True, text=True)
    assert result.stdout.strip() == ""


def test_each_module_of_the_library_has_its_place() -> None:
    placeless = {path.name for root, path in source_files(".py") if root == "pipeline" and place(path) is None}
    assert placeless <= {"__init__.py"}, f"give {sorted(placeless)} a place in ORDER"


def test_library_modules_import_only_what_lies_below_them() -> None:
    wrong = []
    for root, path in source_files(".py"):
        importer = place(path)
        if root != "pipeline" or importer is None:
            continue
        below = ORDER[: ORDER.index(importer) + 1]
        for one in imports(path):
            if one.module.startswith("attnscope.") and place_of(one.module) not in below:
                wrong.append(f"{path.name}:{one.line} imports {one.module}")
            if one.module == "attnscope" and one.name != "__version__":
                wrong.append(f"{path.name}:{one.line} imports {one.name} from attnscope: name its module")
    assert not wrong


def test_report_imports_nothing_of_ours() -> None:
    assert not [one for one in imports(REPOSITORY / "pipeline/attnscope/report.py") if one.top == "attnscope"]


def test_heavy_modules_are_imported_only_where_they_belong() -> None:
    wrong = []
    for root, path in source_files(".py"):
        for one in imports(path):
            owners = ALLOWED.get(one.top)
            if owners is None or (root == "flows" and one.top == "prefect"):
                continue
            if root != "pipeline" or place(path) not in owners:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{one.line} imports {one.top}")
    assert not wrong


def test_plugins_import_only_public_names_and_never_each_other() -> None:
    public = {
        "attnscope": set(attnscope.__all__),
        "attnscope.conditions": None,
        "attnscope.reading": None,
        "attnscope.report": None,
        "attnscope.statistics": None,
    }
    wrong = []
    for root, path in source_files(".py"):
        if root != "plugins":
            continue
        own = path.relative_to(REPOSITORY / root).parts[0].removesuffix(".py")
        for one in imports(path):
            if not one.top.startswith("attnscope") or one.top == own:
                continue
            names = public.get(one.module, set())
            if (names is not None and one.name not in {*names, None}) or one.module not in public:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{one.line} imports {one.name} from {one.module}")
    assert not wrong


def test_only_the_command_line_imports_flows_and_only_when_needed() -> None:
    wrong = []
    for root, path in source_files(".py"):
        for one in imports(path):
            if one.top == "attnscope_flows" and root != "flows" and not (place(path) == "cli" and one.lazy):
                wrong.append(f"{path.relative_to(REPOSITORY)}:{one.line}")
    assert not wrong


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", [("torch.nn", None, False)]),
        ("from attnscope import run, samples", [("attnscope", "run", False), ("attnscope", "samples", False)]),
        ("def f():\n    import torch", [("torch", None, True)]),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import sys", [("sys", None, False)]),
    ],
)
def test_imports_are_read_from_the_source(source: str, expected: list[tuple[str, str | None, bool]]) -> None:
    assert [(one.module, one.name, one.lazy) for one in walk(ast.parse(source), lazy=False)] == expected


def source_files(suffix: str = "") -> list[tuple[str, Path]]:
    """(root, path) of each file below the three source roots, without what Python leaves there."""
    return [
        (root, path)
        for root in ROOTS
        for path in sorted((REPOSITORY / root).rglob(f"*{suffix}"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


def place(path: Path) -> str | None:
    """The entry of ORDER that a file of the library comes under."""
    return place_of(".".join(path.relative_to(REPOSITORY).with_suffix("").parts[1:]))


def place_of(module: str) -> str | None:
    parts = module.removesuffix(".__init__").split(".")[1:]
    return next((name for end in (2, 1) if (name := ".".join(parts[:end])) in ORDER), None)


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import that runs, wherever in the file it stands."""
    return tuple(walk(ast.parse(path.read_text(encoding="utf-8")), lazy=False))


def walk(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, None, lazy, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (Import(node.module or "", alias.name, lazy, node.lineno) for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.orelse:
            yield from walk(child, lazy=lazy)
    else:
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy=inside)
