"""Kills at random moments, and several processes on one run: nothing that was finished is lost or done again."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import attnscope.plan
from attnscope.checking import check_run
from attnscope.cli import main
from attnscope.extraction import DeadlineReached, extract
from attnscope.run import MISSING, open_run
from attnscope.testing import make_run

SAMPLES, UNIT = 60, 2

# Forks a child for each extraction, since most of a small one's time goes into imports. Every block that a child
# extracts is noted in a log.
_NURSERY = """
import os, signal, sys
import torch
from transformers import BertModel
import attnscope.blocks, attnscope.claims, attnscope.extraction, attnscope.plan
from attnscope.quantities import ExtractSpec

folder, samples, unit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
attnscope.plan._UNIT_LIMIT = unit
model = BertModel.from_pretrained(folder)
generator = torch.Generator().manual_seed(0)
inputs = [{"input_ids": torch.randint(5, 20, (1, 6 + i % 5), generator=generator)} for i in range(samples)]
spec = ExtractSpec(frozenset({"attention", "attention_relevance", "score", "weights"}), target="cls_norm")

def extract(out):
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    whole = attnscope.blocks._extract_block
    def noted(job, block):
        os.write(log, b"%d\\n" % block.start)
        return whole(job, block)
    attnscope.blocks._extract_block = noted
    attnscope.extraction.extract(model, inputs, out=out, spec=spec, batch_size=1)

def stop_in_the_third_block():
    whole, seen = attnscope.blocks._run_batch, set()
    def stopping(job, buffer, *rest):
        seen.add(id(buffer))
        if len(seen) == 3:
            seen.add(None)
            job.writer.flush()
            os.kill(os.getpid(), signal.SIGSTOP)
        return whole(job, buffer, *rest)
    attnscope.blocks._run_batch = stopping

for line in sys.stdin:
    count, out, *stops = line.split()
    children = []
    for number in range(int(count)):
        child = os.fork()
        if child == 0:
            try:
                if stops:
                    attnscope.claims.STALE_AFTER, attnscope.claims.RENEW_EVERY = 2.0, 0.3
                    if number == 0:
                        stop_in_the_third_block()
                extract(out)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    print(*children, flush=True)
    print(*(os.waitpid(child, 0)[1] for child in children), flush=True)
"""


@dataclass
class Nursery:
    """Starts extractions as processes of their own."""

    process: "subprocess.Popen[str]"

    def begin(self, out: Path, count: int = 1, stops: bool = False) -> list[int]:
        """Where one `stops`, the first suspends itself in its third block."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count} {out}{' stops' if stops else ''}\n")
        self.process.stdin.flush()
        return self._numbers()

    def end(self) -> list[int]:
        """How they ended: 0 or, where killed, 9."""
        return self._numbers()

    def whole(self, out: Path, count: int = 1) -> float:
        """Extract undisturbed; the seconds that it took."""
        started = time.monotonic()
        self.begin(out, count)
        assert self.end() == [0] * count
        return time.monotonic() - started

    def _numbers(self) -> list[int]:
        assert self.process.stdout is not None
        return [int(word) for word in self.process.stdout.readline().split()]


@pytest.fixture(scope="module")
def nursery(tiny_bert: Path) -> Iterator[Nursery]:
    command = [sys.executable, "-c", _NURSERY, str(tiny_bert), str(SAMPLES), str(UNIT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    nursery.whole(out)
    return out


def arrays(run: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(run, mode="r", use_consolidated=False)
    return {path: np.asarray(a[...]) for path, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}


def assert_equal_and_clean(run: Path, other: Path) -> None:
    mine, theirs = arrays(run), arrays(other)
    assert set(mine) == set(theirs)
    for path, values in theirs.items():
        np.testing.assert_array_equal(mine[path], values, err_msg=path)
    assert check_run(open_run(run)).faults == ()
    assert [p for p in run.rglob("*") if p.is_file() and (p.suffix == ".partial" or "claims" in p.parts)] == []


def test_a_suspended_process_leaves_alone_what_another_took_over(
    nursery: Nursery, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    stopped, _ = nursery.begin(out, 2, stops=True)

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_for(lambda: Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    try:
        wait_for(lambda: bool((open_run(out).status != MISSING).all()))
        finished = {path: path.stat().st_mtime_ns for path in out.rglob("c/*") if path.is_file()}
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert nursery.end() == [0, 0]
    # The block that it had in hand when it was suspended was done by the other, and is as the other wrote it.
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert_equal_and_clean(out, undisturbed)


def written_at(run: Path) -> dict[int, tuple[int, int]]:
    """For each block, when its mark and its attention were written; 0 where they weren't."""

    def changed(path: Path) -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    blocks = range(SAMPLES // UNIT)
    return {
        i: (changed(run / f"samples/status/c/{i}"), changed(run / f"text.self/attention/c/{i}/1/0/0/0")) for i in blocks
    }


def extracted_blocks(run: Path) -> list[int]:
    return sorted(int(line) for line in Path(f"{run}.log").read_text().split())


@pytest.mark.slow
def test_fifty_kills_lose_only_what_was_in_flight(nursery: Nursery, undisturbed: Path, tmp_path: Path) -> None:
    seconds = nursery.whole(tmp_path / "timed.zarr")
    generator = random.Random(time.time_ns())
    runs, kills, out = 0, 0, tmp_path / "0.zarr"
    before: dict[int, tuple[int, int]] = {}
    while kills < 50 or before:
        if kills < 50:
            (child,) = nursery.begin(out)
            time.sleep(generator.uniform(0, 0.4 * seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            ended = nursery.end()
        else:
            nursery.begin(out)
            ended = nursery.end()
        now = written_at(out)
        for block, times in before.items():
            assert times[0] == 0 or now[block] == times, f"block {block} was finished, and written again"
        begun = [i for i, (mark, values) in now.items() if mark or values]
        in_flight = [i for i, (mark, values) in now.items() if values and not mark]
        assert begun == list(range(len(begun)))
        # The block that the model is at, and the one whose last jobs the writer still does.
        assert len(in_flight) <= 2 and in_flight == begun[len(begun) - len(in_flight) :]
        before = now
        kills += ended == [9]
        if ended == [0]:
            assert_equal_and_clean(out, undisturbed)
            runs, before = runs + 1, {}
            out = tmp_path / f"{runs}.zarr"
        else:
            assert ended == [9]
    assert runs


def test_two_processes_share_a_run_and_no_block_is_done_twice(
    nursery: Nursery, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    nursery.whole(out, count=2)
    assert extracted_blocks(out) == list(range(0, SAMPLES, UNIT))
    assert_equal_and_clean(out, undisturbed)


def test_what_a_killed_process_had_claimed_another_finishes(
    nursery: Nursery, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    children = nursery.begin(out, 3)
    log = Path(f"{out}.log")
    for child in children[:2]:
        size = log.stat().st_size if log.exists() else 0
        while not log.exists() or log.stat().st_size <= size:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    assert nursery.end() == [9, 9, 0]
    again = len(extracted_blocks(out)) - SAMPLES // UNIT
    assert 0 <= again <= 2
    assert not (open_run(out).status == MISSING).any()
    assert_equal_and_clean(out, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def command_line(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments, prog_name="attnscope")
    return result.exit_code, result.stderr


def test_a_full_disk_is_one_sentence_and_leaves_a_run_that_is_finished_later(
    small_disk: Path, tiny_bert: Path, captioned_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnscope.plan, "_UNIT_LIMIT", 1)
    out = small_disk / "run.zarr"
    arguments = ["extract", str(tiny_bert), str(captioned_images), "--batch-size", "1", "--out"]
    with pytest.raises(DeadlineReached):
        extract(tiny_bert, captioned_images, out=out, batch_size=1, deadline=0.0)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - 100 * 4096)
    code, told = command_line(*arguments, str(out))
    assert code == 2
    assert told == ("attnscope: the disk is full; make room and repeat the command: it goes on where it stopped\n")
    assert 0 < len(open_run(out).missing()) < len(open_run(out).blocks())
    filler.unlink()
    assert check_run(open_run(out)).faults == ()
    assert command_line(*arguments, str(out)) == (0, "")
    assert command_line(*arguments, str(tmp_path / "whole.zarr")) == (0, "")
    assert_equal_and_clean(out, tmp_path / "whole.zarr")


def test_a_folder_that_cannot_be_written_can_be_read(small_disk: Path, tiny_bert: Path, captioned_images: Path) -> None:
    out = str(small_disk / "run.zarr")
    make_run(location=out)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for place in (out, str(small_disk / "other.zarr")):
        code, told = command_line("extract", str(tiny_bert), str(captioned_images), "--out", place)
        assert code == 2
        assert told.startswith(f"attnscope: {place!r} can't be written (")
        assert told.count("\n") == 1
    assert command_line("check", out) == (0, "")
    code, told = command_line("check", "--repair", out)
    assert (code, told.count("\n")) == (2, 1)
