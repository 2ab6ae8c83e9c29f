"""The threads that write blocks while the model goes on."""

import threading
import time
from collections.abc import Callable

import pytest

from attnscope.stores import StoreError
from attnscope.writing import BlockWriter


@pytest.fixture(params=[(1, False), (4, False), (1, True), (4, True)], ids=["one", "four", "one-in-turns", "in-turns"])
def writer(request: pytest.FixtureRequest) -> BlockWriter:
    return BlockWriter(*request.param)


def slow(done: list[str], name: str, seconds: float) -> Callable[[], None]:
    def job() -> None:
        time.sleep(seconds)
        done.append(name)

    return job


def test_the_last_job_of_a_block_runs_after_all_its_others(writer: BlockWriter) -> None:
    done: list[str] = []
    first, second = writer.block(), writer.block()
    for number in range(3):
        first.put(slow(done, f"first {number}", 0.05 / (number + 1)), 0)
        second.put(slow(done, f"second {number}", 0.02), 0)
    first.close(lambda: done.append("first is whole"))
    second.close(lambda: done.append("second is whole"))
    writer.flush()
    writer.close()
    for name in ("first", "second"):
        assert sorted(d for d in done[: done.index(f"{name} is whole")] if d.startswith(name)) == [
            f"{name} {number}" for number in range(3)
        ]


def test_a_block_of_no_jobs_is_closed(writer: BlockWriter) -> None:
    done: list[str] = []
    writer.block().close(lambda: done.append("whole"))
    writer.flush()
    assert done == ["whole"]
    writer.close()


def test_a_block_with_a_failure_is_never_closed_and_the_failure_comes_out_once(writer: BlockWriter) -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    block = writer.block()
    block.put(fail, 0)
    with pytest.raises(StoreError, match="disk is full"):
        writer.flush()
    block.put(slow(done, "later", 0), 0)
    block.close(lambda: done.append("whole"))
    writer.flush()
    writer.close()
    assert done == ["later"]


def begun_until_it_waits(writer: BlockWriter, begin: Callable[[Callable[[], object], int], None], times: int) -> int:
    """How often a thread got through before it waited for a job that waits for a gate; it goes on to the end then."""
    gate, begun = threading.Event(), []

    def work() -> None:
        for number in range(times):
            begin(gate.wait, number)
            begun.append(number)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    waiting = len(begun)
    gate.set()
    thread.join()
    writer.flush()
    writer.close()
    assert len(begun) == times
    return waiting


def test_putting_waits_while_the_queue_is_full(writer: BlockWriter) -> None:
    block = writer.block()
    assert begun_until_it_waits(writer, lambda wait, _: block.put(wait, 2**23), 40) <= 8


def test_jobs_run_side_by_side_while_the_model_waits() -> None:
    """As many at once as there are threads, none before enough are there, and none goes on behind the model's back."""
    writer = BlockWriter(2, takes_turns=True)
    meet = threading.Barrier(2, timeout=10)
    block, done = writer.block(), []

    def job() -> None:
        meet.wait()
        done.append(threading.current_thread().name)

    for _ in range(3):
        block.put(job, 2**23)
    time.sleep(0.05)
    assert not done
    block.put(job, 2**23)
    assert len(done) == 4
    assert threading.current_thread().name not in done
    writer.close()


def test_the_jobs_of_a_closed_block_do_not_wait_for_another_block() -> None:
    writer = BlockWriter(2, takes_turns=True)
    block, whole = writer.block(), threading.Event()
    block.put(lambda: None, 0)
    block.close(whole.set)
    assert whole.wait(10)
    writer.close()


def test_what_is_larger_than_the_queue_is_written_as_well(writer: BlockWriter) -> None:
    done: list[str] = []
    block = writer.block()
    for number in range(3):
        block.put(slow(done, f"{number}", 0.01), 2**30)
    block.close(lambda: done.append("whole"))
    writer.flush()
    writer.close()
    assert sorted(done[:3]) == ["0", "1", "2"]
    assert done[3:] == ["whole"]


def test_what_others_deleted_of_a_block_that_is_theirs_now_is_no_failure() -> None:
    def deleted() -> None:
        nonlocal mine
        mine = False
        raise FileNotFoundError

    mine = True
    writer = BlockWriter()
    writer.block(lambda: mine).put(deleted, 0)
    writer.flush()
    writer.block().put(deleted, 0)
    with pytest.raises(FileNotFoundError):
        writer.flush()
    writer.close()


def test_small_blocks_do_not_pile_up(writer: BlockWriter) -> None:
    """What is not finished is lost when the process is killed, or the disk is full."""
    closed: list[int] = []

    def begin(wait: Callable[[], object], number: int) -> None:
        block = writer.block()
        block.put(wait, 0)
        block.close(lambda: closed.append(number))

    # 64 jobs wait, two of each block, and a thread may have been at a second one before it came to the gate.
    assert begun_until_it_waits(writer, begin, 100) <= 32 + 4
    assert sorted(closed) == list(range(100))


def test_a_model_that_takes_turns_is_at_most_one_block_ahead() -> None:
    writer, done = BlockWriter(2, takes_turns=True), []
    for number in range(3):
        block = writer.block()
        block.put(slow([], "", 0.05), 0)
        block.close(lambda number=number: done.append(number))
        assert done[:number] == list(range(number))
    writer.close()
