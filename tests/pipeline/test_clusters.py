"""Work on real Dask clusters of local processes: the run that one process makes, whatever dies meanwhile."""

import importlib
import json
import os
import signal
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import xarray as xr

from attnscope import clusters
from attnscope.analysis import analyse
from attnscope.checking import check_run
from attnscope.clusters import ClusterError, analyse_on, cluster_client
from attnscope.extraction import Progress
from attnscope.run import EXTRACTED, LEFT_OUT, Run, open_run
from attnscope.study import AnalyserChoice, ClusterChoice, ExtractOptions, Receipt, extract_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

UNIT = 2
TEXTS = 24
CHOICES = [AnalyserChoice(name="qk_svd")]
OPTIONS = ExtractOptions(encoding="exact", batch_size=2)
# An analyser in a module that workers can import, as an installed plugin's is.
_ANALYSER = """
from dataclasses import dataclass
import numpy as np
import xarray as xr
from attnscope.quantities import ExtractSpec

@dataclass(frozen=True)
class MeanOfSamples:
    name = "mean_of_samples"

    def requires(self):
        return ExtractSpec()

    def analyse(self, run):
        (site,) = run.sites
        mine = np.flatnonzero(run.status == 1)
        mean = run.attention(site)[mine].mean(("layer", "head", "query_token", "key_token")).values
        attrs = {"long_name": "mean attention", "units": "1"}
        found = xr.Dataset({"each": ("sample", mean, attrs), "total": ((), mean.astype(float).sum(), attrs)})
        return found.assign_coords(sample=np.array(run.sample_ids, object)[mine])

    def combine(self, parts):
        parts = list(parts)
        joined = xr.concat([part[["each"]] for part in parts], "sample")
        total = sum(part["total"] for part in parts)
        return joined.assign(total=total.assign_attrs(parts[0]["total"].attrs))

    def report(self, result):
        return ()
"""
# What a worker runs before it works: one sample kills it, and each block takes a moment.
_PRELOAD = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
from attnscope import clusters
# Dask runs this twice in one worker.
whole = getattr(clusters, "whole", clusters.extract_block)
clusters.whole = whole
def extract_block(job, block, samples):
    time.sleep(0.05)
    if any(sample.id == "poison" for sample in samples):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(job, block, samples)
clusters.extract_block = extract_block
"""


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preload")
    (folder / "mean_of_samples.py").write_text(_ANALYSER)
    (folder / "preload.py").write_text(_PRELOAD.replace("{folder!r}", repr(str(folder))))
    return folder / "preload.py"


@pytest.fixture(scope="module")
def two_workers(preload: Path) -> Iterator[ClusterChoice]:
    """A cluster of two worker processes that is kept open for all tests here."""
    import dask

    choice = ClusterChoice(at="2")
    with dask.config.set({"distributed.worker.preload": [str(preload)]}), cluster_client(choice.at, choice.options):
        yield choice


def texts(folder: Path, poison: int | None = None) -> Path:
    words = ("the", "dog", "sees", "a", "cat")
    records = [
        {"id": "poison" if i == poison else f"t{i}", "text": " ".join(words[(i + j) % 5] for j in range(4))}
        for i in range(TEXTS)
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "texts.jsonl"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnscope.plan._UNIT_LIMIT", UNIT)


@pytest.fixture(scope="module")
def undisturbed(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that one process makes alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnscope.plan._UNIT_LIMIT", UNIT)
        extract_run(str(tiny_bert), str(texts(folder)), str(folder / "run.zarr"), CHOICES, OPTIONS)
    return folder / "run.zarr"


def assert_same(mine: Run, theirs: Run, samples: slice = slice(None)) -> None:
    for site in theirs.sites:
        for name in theirs.quantities(site):
            xr.testing.assert_equal(mine.array(site, name)[samples].load(), theirs.array(site, name)[samples].load())
        xr.testing.assert_equal(mine.weights(site).load(), theirs.weights(site).load())
    xr.testing.assert_equal(
        mine.tokens("text")[{"sample": samples}].load(), theirs.tokens("text")[{"sample": samples}].load()
    )


def on_two(tiny_bert: Path, folder: Path, choice: ClusterChoice, poison: int | None = None, **more: object) -> Receipt:
    return extract_run(
        str(tiny_bert), str(texts(folder, poison)), str(folder / "run.zarr"), CHOICES, OPTIONS, choice, **more
    )  # type: ignore[arg-type]


def test_a_killed_worker_costs_nothing(
    tiny_bert: Path, undisturbed: Path, two_workers: ClusterChoice, tmp_path: Path
) -> None:
    client = clusters._clients[two_workers.at]
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        if progress.done >= 4 and not killed:
            killed.append(next(iter(client.run(os.getpid).values())))
            os.kill(killed[0], signal.SIGKILL)

    receipt = on_two(tiny_bert, tmp_path, two_workers, listener=kill_one)
    assert killed
    assert (receipt["extracted"], receipt["left_out"], receipt["missing"]) == (TEXTS, 0, 0)
    run = open_run(tmp_path / "run.zarr")
    assert_same(run, open_run(undisturbed))
    assert check_run(run).faults == ()
    assert not list((tmp_path / "run.zarr/samples/status/claims").glob("*"))


def test_a_block_that_kills_every_worker_is_named_and_skipped(
    tiny_bert: Path, undisturbed: Path, two_workers: ClusterChoice, tmp_path: Path
) -> None:
    receipt = on_two(tiny_bert, tmp_path, two_workers, poison=7)
    run = open_run(tmp_path / "run.zarr")
    assert [int(at) for at in np.flatnonzero(run.status == LEFT_OUT)] == [6, 7]
    assert int((run.status == EXTRACTED).sum()) == TEXTS - 2
    reasons = receipt["reasons"]
    assert isinstance(reasons, dict)
    assert list(reasons) == ["t6", "poison"]
    assert all("its block killed every worker that took it" in str(reason) for reason in reasons.values())
    assert check_run(run).faults == ()
    assert_same(run, open_run(undisturbed), slice(0, 6))
    # Nobody tries it again unasked.
    assert run.missing() == []


def test_workers_listen_on_this_machine_alone(two_workers: ClusterChoice) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_parts_that_are_combined_give_what_the_whole_gives(
    two_workers: ClusterChoice, undisturbed: Path, preload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(preload.parent)
    analyser = importlib.import_module("mean_of_samples").MeanOfSamples()
    run = open_run(undisturbed)
    whole = analyse(run, analyser, save=False)
    parts: list[int] = []
    combine = type(analyser).combine

    def noted(self: object, given: Iterable[xr.Dataset]) -> xr.Dataset:
        listed = list(given)
        parts.append(len(listed))
        return combine(self, listed)

    monkeypatch.setattr(type(analyser), "combine", noted)
    client = clusters._clients[two_workers.at]
    combined = analyse(run, analyser, save=False, compute=partial(analyse_on, client))
    # Four for each worker thread; one worker may be about to start again.
    assert parts in ([4], [8])
    xr.testing.assert_equal(combined, whole)
    np.testing.assert_allclose(whole["total"], whole["each"].sum(), rtol=1e-6)


def test_an_analyser_of_ours_combines_parts(two_workers: ClusterChoice, undisturbed: Path) -> None:
    run = open_run(undisturbed)
    analyser = AnalyserChoice(name="attention_entropy", options={"draws": 20}).make()
    compute = partial(analyse_on, clusters._clients[two_workers.at])
    combined = analyse(run, analyser, save=False, compute=compute)
    whole = analyse(run, analyser, save=False)
    assert set(combined.data_vars) == set(whole.data_vars)
    xr.testing.assert_allclose(combined, whole, rtol=1e-6)


def test_an_analyser_that_cannot_combine_runs_here(two_workers: ClusterChoice, undisturbed: Path) -> None:
    run = open_run(undisturbed)
    analyser = AnalyserChoice(name="qk_svd", options={"null_draws": 2}).make()
    client = clusters._clients[two_workers.at]
    xr.testing.assert_equal(
        analyse(run, analyser, save=False, compute=partial(analyse_on, client)), analyse(run, analyser, save=False)
    )


def test_what_is_no_cluster_is_told_in_one_sentence(tmp_path: Path) -> None:
    for at, told in (
        ("nothing", "is neither a number of processes"),
        ("0", "is neither a number of processes"),
        ("os.path", "is neither a number"),
        ("dask_nowhere.SLURMCluster", "can't be made"),
        ("tcp://127.0.0.1:1", "no Dask scheduler answers"),
    ):
        with pytest.raises(ClusterError, match=told), cluster_client(at, {}):
            pass
