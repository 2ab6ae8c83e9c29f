"""The stages of a study as plain functions: extract, analyse, report.

Everything that goes in and comes out is a plain value or a place, so that a command line, a flow on another machine
and a notebook call the very same functions. Each gives a receipt: a small dict that says what was done.
"""

import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from attnscope.analysis import Analyser, AnalyserError, analyse, make_analyser, requirements
from attnscope.plugins import load_plugins
from attnscope.run import EXTRACTED, LEFT_OUT, MISSING, MissingQuantity, Run, open_run
from attnscope.stores import StoreError, Unreachable, is_url

if TYPE_CHECKING:
    from attnscope.extraction import Progress

Receipt = dict[str, JsonValue]
Listener = Callable[["Progress"], None]

RUN_NAME = "run.zarr"
REPORT_NAME = "report.html"
_REASONS_AT_MOST = 10
# What waiting does not mend: the same call fails in the same way.
_LASTING = (StoreError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_LASTING_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EPIPE}


class AnalyserChoice(BaseModel):
    """An analyser by name, with its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Name of an installed analyser, as `attnscope plugins` lists them.")
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Options of the analyser by name; what is not named keeps its default."
    )

    def make(self) -> Analyser:
        """The analyser itself; AnalyserError when there is no such analyser or option."""
        return make_analyser(self.name, self.options)


class ExtractOptions(BaseModel):
    """How to extract. Every option may be left alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: int | str | None = Field(
        default=None,
        description="What gradients are taken of: a class number, 'predicted', 'similarity' or 'cls_norm'.",
    )
    encoding: Literal["float16", "exact", "compact"] | None = Field(
        default=None,
        description="How attention is stored: float16 (bound 2.5e-4), exact (float32), or compact (one byte, bound"
        " 3.92e-3).",
    )
    form: Literal["auto", "dense", "factored", "ragged"] | None = Field(
        default=None,
        description="Whether attention is stored as such, or as query and key from which it is computed again.",
    )
    summaries: bool | None = Field(
        default=None,
        description="Whether entropy, strongest keys, and mass by kind of token are stored beside the attention; no"
        " if left alone.",
    )
    device: str | None = Field(
        default=None, description="Where the model runs, such as cpu or cuda:0; a GPU if there is one."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Precision of the model; that of its weights if left alone."
    )
    batch_size: int | None = Field(default=None, ge=1, description="Samples that the model sees at once.")
    attn_implementation: str | None = Field(
        default=None, description="Attention kernel, such as sdpa or eager; the model's own if left alone."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of the model on its hub.")
    trust_remote_code: bool = Field(
        default=False, description="Run code that comes with the model; only if you trust it."
    )
    limit: int | None = Field(default=None, ge=1, description="Use only this many samples, from the first one on.")
    grow: bool = Field(
        default=False, description="Add samples that the run doesn't know yet; analyses are then run again."
    )
    deadline: float | None = Field(
        default=None, gt=0, description="Seconds after which extraction stops; the run can be resumed."
    )


DEFAULT_CHOICES = (AnalyserChoice(name="qk_svd"), AnalyserChoice(name="relevance"))
"""What a study runs when no analyser is named."""


def extract_run(
    model: str,
    samples: str,
    out: str,
    analysers: Sequence[AnalyserChoice] = (),
    options: ExtractOptions | None = None,
    *,
    listener: Listener | None = None,
) -> Receipt:
    """Extract what the analysers require into a run, or finish one that was begun; `listener` hears of the progress."""
    made = [choice.make() for choice in analysers]
    check_agreement(made)
    from attnscope.extraction import extract

    chosen = options or ExtractOptions()
    run = extract(model, samples, made, out, **chosen.model_dump(), progress=listener)
    return {"run": out, "model": model, **counts(run)}


def analyse_run(run: str, choice: AnalyserChoice) -> Receipt:
    """Run one analyser on a run and save what it gives there."""
    opened = open_run(run, read_only=False)
    result = analyse(opened, choice.make())
    return {
        "analyser": choice.name,
        "run": run,
        "variables": [str(name) for name in result.data_vars],
        **counts(opened),
    }


def write_report(run: str, out: str, analyses: Sequence[str] | None = None) -> Receipt:
    """Write the report of a run (of all its analyses, or of those named) as one HTML file."""
    _check_folder(out)
    opened = open_run(run)
    names = [name.replace("-", "_") for name in analyses] if analyses is not None else list(opened.analyses)
    from attnscope.rendering import render

    _write_whole(Path(out), render(opened, [opened.analysis(name) for name in names]))
    return {"report": out, "run": run, "analyses": names}  # type: ignore[dict-item]


def study(
    model: str,
    samples: str,
    out: str,
    analysers: Sequence[AnalyserChoice] = DEFAULT_CHOICES,
    options: ExtractOptions | None = None,
    *,
    extract: Callable[[str, str, str, list[AnalyserChoice], ExtractOptions], Receipt] = extract_run,
    analyse: Callable[[str, AnalyserChoice], Receipt] = analyse_run,
    report: Callable[[str, str], Receipt] = write_report,
) -> Receipt:
    """Extract, analyse and report into a folder: `run.zarr` and `report.html`.

    The stages may be given as something else that calls them, such as tasks. An analyser that fails costs the others
    nothing: the report shows what succeeded, and then the first failure is raised.
    """
    check_agreement([choice.make() for choice in analysers])
    _check_folder(out)
    run, page = join(out, RUN_NAME), join(out, REPORT_NAME)
    extracted = extract(model, samples, run, list(analysers), options or ExtractOptions())
    failures: list[Exception] = []
    for choice in analysers:
        try:
            analyse(run, choice)
        except Exception as error:
            failures.append(error)
    reported = report(run, page)
    if failures:
        raise failures[0]
    return {**extracted, **reported}


def check_agreement(analysers: Sequence[Analyser]) -> None:
    """Raise AnalyserError unless one extraction can meet what all of these analysers require."""
    try:
        requirements(analysers)
    except ValueError as error:
        names = ", ".join(analyser.name for analyser in analysers)
        raise AnalyserError(f"analysers {names} can't share one run: {error}") from None


def fitting_analysers(run: Run) -> list[AnalyserChoice]:
    """Every installed analyser whose requirements a run meets with the analyser's defaults."""
    found = []
    for name in sorted(load_plugins().analysers):
        choice = AnalyserChoice(name=name)
        try:
            run.require(choice.make().requires())
        except (MissingQuantity, AnalyserError):
            continue
        found.append(choice)
    return found


def counts(run: Run) -> Receipt:
    """How many samples of a run are extracted, left out (with the reasons of the first), and missing."""
    status = run.status
    left_out = [int(at) for at in (status == LEFT_OUT).nonzero()[0][:_REASONS_AT_MOST]]
    described = run.samples
    return {
        "samples": len(status),
        "extracted": int((status == EXTRACTED).sum()),
        "left_out": int((status == LEFT_OUT).sum()),
        "missing": int((status == MISSING).sum()),
        "reasons": {str(described["id"].values[at]): str(described["reason"].values[at]) for at in left_out},
    }


def can_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later: trouble of a network or store, but nothing that a user must mend."""
    if isinstance(error, Unreachable):
        return True
    if isinstance(error, _LASTING) or getattr(error, "errno", None) in _LASTING_NUMBERS:
        return False
    return isinstance(error, OSError)


def join(folder: str, name: str) -> str:
    """A place inside a folder or URL."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def _check_folder(out: str) -> None:
    if is_url(out):
        raise StoreError(f"a report is written into a folder, not to {out!r}; runs alone may lie at a URL")


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(unfinished).chmod(0o666 & ~_umask())
        Path(unfinished).replace(path)
    except OSError as error:
        raise StoreError(f"{str(path)!r} can't be written ({error.strerror})") from None


def _umask() -> int:
    # There is no way to ask for it but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
