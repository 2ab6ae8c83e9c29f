"""The stages of a study as plain functions: extract, analyse, report.

Everything that goes in and comes out is a plain value or a place, so that a command line, a flow on another machine
and a notebook call the very same functions. Each gives a receipt: a small dict that says what was done.
"""

import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from attnscope.analysis import Analyser, AnalyserError, analyse, is_fresh, make_analyser, requirements
from attnscope.plugins import load_plugins
from attnscope.run import EXTRACTED, LEFT_OUT, MISSING, MissingQuantity, Run, open_run
from attnscope.stores import StoreError, is_url

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import xarray as xr
    from distributed import Client

    from attnscope.extraction import Extraction, Progress

Receipt = dict[str, JsonValue]
Listener = Callable[["Progress"], None]
Extracts = Callable[[str, str, str, "list[AnalyserChoice]", "ExtractOptions", "ClusterChoice | None"], Receipt]

RUN_NAME = "run.zarr"
REPORT_NAME = "report.html"
COMPARISON_NAME = "comparison.html"
_REASONS_AT_MOST = 10
# What a worker loads a model by.
_OF_THE_MODEL = {"device", "dtype", "attn_implementation", "revision", "trust_remote_code", "batch_size"}
_under_way: "dict[str, tuple[Extraction, Iterator[range]]]" = {}
_one_at_a_time = threading.Lock()


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
    generate: int | None = Field(
        default=None,
        ge=1,
        description="How many tokens the model may write behind each prompt, to be recorded with it.",
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
    grow: bool | None = Field(
        default=None,
        description="Whether samples that the run doesn't know yet are added, and what is there already is left alone;"
        " no if left alone.",
    )
    deadline: float | None = Field(
        default=None, gt=0, description="Seconds after which extraction stops; the run can be resumed."
    )


class ClusterChoice(BaseModel):
    """A Dask cluster to work on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: str = Field(
        min_length=1,
        description="The address of a scheduler (tcp://host:8786), a number of processes on this machine, or a class"
        " such as dask_jobqueue.SLURMCluster. The run must lie where every worker reaches it.",
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Options of the class, such as cores, memory, n_workers."
    )


DEFAULT_CHOICES = (AnalyserChoice(name="qk_svd"), AnalyserChoice(name="relevance"))
"""What a study runs when no analyser is named."""


def extract_run(
    model: str,
    samples: str,
    out: str,
    analysers: Sequence[AnalyserChoice] = (),
    options: ExtractOptions | None = None,
    cluster: ClusterChoice | None = None,
    *,
    listener: Listener | None = None,
) -> Receipt:
    """Extract what the analysers require into a run, or finish one that was begun; `listener` hears of the progress."""
    if cluster is None:
        begun = _begin(model, samples, out, analysers, options, listener)
        for _ in begun.blocks():
            pass
        return _extracted(model, out, begun.run)
    with _client(cluster) as client:
        from attnscope.clusters import Job, extract_on

        model, samples, place = (_from_anywhere(name) for name in (model, samples, out))
        begun = _begin(model, samples, out, analysers, options, listener)
        chosen = (options or ExtractOptions()).model_dump(include=_OF_THE_MODEL)
        job = Job(run=place, model=model, samples=begun.run.sample_count, **chosen)
        return _extracted(model, out, extract_on(client, begun, job))


def extract_part(
    model: str,
    samples: str,
    out: str,
    analysers: Sequence[AnalyserChoice] = (),
    options: ExtractOptions | None = None,
    *,
    seconds: float,
    listener: Listener | None = None,
) -> Receipt:
    """Extract for about so many seconds, whole blocks; the receipt says whether the extraction is `finished`.

    The next call of this process with the same arguments goes on from there, with the same loaded model.
    """
    key = json.dumps([model, samples, out, [c.model_dump() for c in analysers], options and options.model_dump()])
    until = time.monotonic() + seconds
    with _one_at_a_time:
        begun, blocks = _under_way.pop(key, (None, None))
        _under_way.clear()
        if begun is None or blocks is None:
            begun = _begin(model, samples, out, analysers, options, listener)
            blocks = begun.blocks()
        begun.report.tell = listener
        for _ in blocks:
            if time.monotonic() >= until:
                _under_way[key] = (begun, blocks)
                return {"run": out, "done": begun.report.done, "samples": begun.report.total, "finished": False}
    return {**_extracted(model, out, begun.run), "finished": True}


def _begin(
    model: str,
    samples: str,
    out: str,
    analysers: Sequence[AnalyserChoice],
    options: ExtractOptions | None,
    listener: Listener | None,
) -> "Extraction":
    made = [choice.make() for choice in analysers]
    check_agreement(made)
    from attnscope.extraction import extract

    begun: list[Extraction] = []
    chosen = (options or ExtractOptions()).model_dump()
    extract(model, samples, made, out, **chosen, progress=listener, drive=begun.append)
    return begun[0]


def _extracted(model: str, out: str, run: Run) -> Receipt:
    return {"run": out, "model": model, **counts(run)}


def analyse_run(
    run: str, choice: AnalyserChoice, cluster: ClusterChoice | None = None, *, unless_fresh: bool = False
) -> Receipt:
    """Run one analyser on a run and save what it gives there, unless that is there already and `unless_fresh`."""
    opened = open_run(run, read_only=False)
    analyser = choice.make()
    if unless_fresh and is_fresh(opened, analyser):
        result = opened.analysis(analyser.name)
        fresh = True
    else:
        result = _analysed(opened, analyser, cluster)
        fresh = False
    return {
        "analyser": choice.name,
        "run": run,
        "variables": [str(name) for name in result.data_vars],
        "fresh": fresh,
        **counts(opened),
    }


def _analysed(run: Run, analyser: Analyser, cluster: ClusterChoice | None) -> "xr.Dataset":
    if cluster is None:
        return analyse(run, analyser)
    with _client(cluster) as client:
        from attnscope.clusters import analyse_on

        return analyse(run, analyser, compute=partial(analyse_on, client))


def write_report(run: str, out: str, analyses: Sequence[str] | None = None) -> Receipt:
    """Write the report of a run (of all its analyses, or of those named) as one HTML file."""
    _check_folder(out)
    opened = open_run(run)
    names = [name.replace("-", "_") for name in analyses] if analyses is not None else list(opened.analyses)
    from attnscope.rendering import render

    _write_whole(Path(out), render(opened, [opened.analysis(name) for name in names]))
    return {"report": out, "run": run, "analyses": names}  # type: ignore[dict-item]


def write_comparison(runs: Mapping[str, str], out: str) -> Receipt:
    """Write one HTML file on how the analyses of several runs, by their labels, differ."""
    _check_folder(out)
    opened = {label: open_run(run) for label, run in runs.items()}
    from attnscope.comparing import render_comparison

    _write_whole(Path(out), render_comparison(opened))
    return {"report": out, "runs": dict(runs)}


@dataclass(frozen=True)
class Stages:
    """What does the stages of a study: these functions themselves, or something else that calls them."""

    extract: Extracts = extract_run
    analyse: Callable[..., Receipt] = analyse_run
    report: Callable[[str, str], Receipt] = write_report
    compare: Callable[[dict[str, str], str], Receipt] = write_comparison


def study(
    model: str,
    samples: str,
    out: str,
    analysers: Sequence[AnalyserChoice] = DEFAULT_CHOICES,
    options: ExtractOptions | None = None,
    cluster: ClusterChoice | None = None,
    *,
    stages: Stages = Stages(),
) -> Receipt:
    """Extract, analyse and report into a folder: `run.zarr` and `report.html`.

    The stages may be given as something else that calls them, such as tasks. An analyser that fails costs the others
    nothing: the report shows what succeeded, and then the first failure is raised. A study whose run grows leaves
    alone what is there already: analyses of the same samples, and a report of the same analyses.
    """
    chosen = options or ExtractOptions()
    check_agreement([choice.make() for choice in analysers])
    _check_folder(out)
    run, page = join(out, RUN_NAME), join(out, REPORT_NAME)
    with held_cluster(cluster):
        extracted, analysed, failures = _run_stages(model, samples, run, analysers, chosen, cluster, stages)
    nothing_new = chosen.grow and all(receipt["fresh"] for receipt in analysed) and not failures
    names = sorted(choice.name for choice in analysers)
    if nothing_new and Path(page).exists() and sorted(open_run(run).analyses) == names:
        return {**extracted, "report": page, "analyses": names, "fresh": True}  # type: ignore[dict-item]
    reported = stages.report(run, page)
    if failures:
        raise failures[0]
    return {**extracted, **reported, "fresh": False}


def compare(
    models: Sequence[str],
    samples: str,
    out: str,
    analysers: Sequence[AnalyserChoice] = DEFAULT_CHOICES,
    options: ExtractOptions | None = None,
    cluster: ClusterChoice | None = None,
    *,
    stages: Stages = Stages(),
) -> Receipt:
    """The same study of several models, or checkpoints of one training, and a page that shows how they differ.

    Each has a run of its own in the folder; `comparison.html` lies beside them.
    """
    if len(set(models)) < 2 or len(set(models)) < len(models):
        raise AnalyserError(f"a comparison needs two different models or more, not {', '.join(models) or 'none'}")
    chosen = options or ExtractOptions()
    check_agreement([choice.make() for choice in analysers])
    _check_folder(out)
    runs: dict[str, str] = {}
    labels = _labels(models)
    with held_cluster(cluster):
        for label, model in labels.items():
            runs[label] = run = join(join(out, label), RUN_NAME)
            _, _, failures = _run_stages(model, samples, run, analysers, chosen, cluster, stages)
            if failures:
                raise failures[0]
    return stages.compare(runs, join(out, COMPARISON_NAME))


def _run_stages(
    model: str,
    samples: str,
    run: str,
    analysers: Sequence[AnalyserChoice],
    options: ExtractOptions,
    cluster: ClusterChoice | None,
    stages: Stages,
) -> tuple[Receipt, list[Receipt], list[Exception]]:
    """The receipts of extraction and analyses, and what failed of the latter."""
    extracted = stages.extract(model, samples, run, list(analysers), options, cluster)
    analysed, failures = [], []
    for choice in analysers:
        try:
            analysed.append(stages.analyse(run, choice, cluster, unless_fresh=bool(options.grow)))
        except Exception as error:
            failures.append(error)
    return extracted, analysed, failures


def _labels(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model that is also the name of a folder."""
    labels: dict[str, str] = {}
    ends = [re.split(r"[/\\:]", model.rstrip("/\\"))[-1] for model in models]
    for model, end in zip(models, ends, strict=True):
        told = end if ends.count(end) == 1 else model
        label = re.sub(r"[^\w.-]+", "-", told).strip("-.") or "model"
        while label in labels:
            label += "-"
        labels[label] = model
    return labels


@contextmanager
def held_cluster(cluster: ClusterChoice | None) -> Iterator[None]:
    """One cluster for all stages inside, which would each make their own."""
    if cluster is None:
        yield
        return
    with _client(cluster):
        yield


def _client(cluster: ClusterChoice) -> "AbstractContextManager[Client]":
    from attnscope.clusters import cluster_client

    return cluster_client(cluster.at, cluster.options)


def _from_anywhere(name: str) -> str:
    """A place as a worker in another folder finds it; names of other kinds stay as they are."""
    is_place = Path(name).exists() or (not is_url(name) and Path(name).parent != Path())
    return str(Path(name).resolve()) if is_place else name


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
