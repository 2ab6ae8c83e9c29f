"""Claims: exactly one owner, taken over only from the dead; and what they keep apart, extraction by many at once."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from zarr.storage import LocalStore, MemoryStore

from attnscope import claims
from attnscope.claims import FOLDER, Claims
from attnscope.stores import keys, read, write, write_once


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def owner_of_another_machine() -> bytes:
    return json.dumps({"owner": "other", "machine": "far away", "process": 1, "born": "1"}).encode()


def owner_that_died() -> bytes:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = {"owner": "other", "machine": claims._machine(), "process": ended.pid, "born": "1"}
    return json.dumps(owner).encode()


def test_one_owner_at_a_time(store: LocalStore) -> None:
    with Claims(store) as one, Claims(store) as other:
        assert one.take("0")
        assert not other.take("0")
        assert other.take("1")
        one.release("0")
        assert other.take("0")


def test_everything_is_released_in_the_end_and_after_a_failure(store: LocalStore) -> None:
    def fail() -> None:
        with Claims(store) as mine:
            mine.take("0")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(keys(store, FOLDER)) == []


@pytest.mark.parametrize("make", [LocalStore, lambda _: MemoryStore()], ids=["folder", "memory"])
def test_of_many_threads_one_wins(tmp_path: Path, make: type[LocalStore]) -> None:
    store, wins = make(tmp_path), []
    start = threading.Barrier(8)

    def compete(number: int) -> None:
        start.wait()
        if write_once(store, "key", str(number).encode()) == str(number).encode():
            wins.append(number)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1


def test_a_dead_process_of_this_machine_is_succeeded_at_once_and_by_one(store: LocalStore) -> None:
    write(store, f"{FOLDER}/0.0", owner_that_died())
    with Claims(store) as one, Claims(store) as other:
        assert one.take("0")
        assert not other.take("0")
        one.release("0")
        assert list(keys(store, FOLDER)) == []


def test_a_number_that_another_process_has_now_is_no_sign_of_life(store: LocalStore) -> None:
    reused = {"owner": "other", "machine": claims._machine(), "process": os.getpid(), "born": "1"}
    write(store, f"{FOLDER}/0.0", json.dumps(reused).encode())
    with Claims(store) as mine:
        assert mine.take("0")


def test_an_owner_elsewhere_is_succeeded_when_it_renews_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, f"{FOLDER}/0.0", owner_of_another_machine())
    now = [0.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    with Claims(store) as mine:
        assert not mine.take("0")
        now[0] = 59.0
        assert not mine.take("0")
        write(store, f"{FOLDER}/0.0", owner_of_another_machine() + b" ")
        now[0] = 61.0
        assert not mine.take("0")
        now[0] = 122.0
        assert mine.take("0")


def test_a_living_owner_renews_its_claim(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEW_EVERY", 0.01)
    with Claims(store) as mine:
        mine.take("0")
        first = read(store, f"{FOLDER}/0.0")
        deadline = time.monotonic() + 20
        while read(store, f"{FOLDER}/0.0") == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read(store, f"{FOLDER}/0.0") != first


def test_half_written_files_go_unless_another_is_at_work(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "analyses").mkdir()
    for path in (tmp_path / "0.abc.partial", tmp_path / "analyses/0.abc.partial", tmp_path / "1.abc.partial"):
        path.write_bytes(b"half")
    os.utime(tmp_path / "1.abc.partial", (0, 0))
    with Claims(store) as mine:
        with Claims(store) as other:
            other.take("0")
            assert mine.remove_partial_files() == 1
        assert mine.remove_partial_files() == 1
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.partial")] == ["analyses/0.abc.partial"]


def test_what_others_abandoned_is_cleared_and_nothing_else(store: LocalStore) -> None:
    write(store, f"{FOLDER}/0.0", owner_that_died())
    write(store, f"{FOLDER}/1.0", owner_of_another_machine())
    with Claims(store) as mine:
        mine.take("2")
        mine.clear()
        assert sorted(keys(store, FOLDER)) == [f"{FOLDER}/1.0", f"{FOLDER}/2.0"]


def test_a_file_system_without_hard_links_has_one_winner_too(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Claims(store) as one, Claims(store) as other:
        assert one.take("0")
        assert not other.take("0")
