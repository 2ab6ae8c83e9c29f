"""A training over several processes of this machine, started, heard and ended by one that trains nothing itself."""

import os
import threading
from collections.abc import Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed

from attnscope.reference.sharing import Share
from attnscope.reference.training import Listener, Recipe, Training, TrainingProgress, device_of


class ProcessDied(OSError):
    """One of several processes was ended from outside; the message is one sentence."""


def train_spread(recipe: Recipe, seed: int, folder: Path, listener: Listener | None = None) -> None:
    """Train until done over `recipe.processes` processes, with checkpoints in a folder.

    They meet by gloo on processors and by nccl on CUDA devices, one each. When one ends early, so do all.

    Raises
    ------
    ProcessDied
        When one was killed; training again goes on from the last checkpoint.
    """
    context = get_context("spawn")
    with TemporaryDirectory() as meeting:
        started: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for number in range(recipe.processes):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (recipe, seed, folder, Share(number, recipe.processes), str(Path(meeting) / "meet"), sender)
                process: BaseProcess = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                # Closed here, its end is the end of the process.
                sender.close()
                started.append(process)
                pipes.append(receiver)
            _listen(started, pipes, listener)
        finally:
            for process in started:
                process.kill()
                process.join()


def _listen(started: Sequence[BaseProcess], pipes: Sequence[Connection], listener: Listener | None) -> None:
    """Pass progress on until all processes are done; when one has failed, raise why."""
    running = list(pipes)
    while running:
        for pipe in wait(running):
            assert isinstance(pipe, Connection)
            said = _next_word(pipe)
            if isinstance(said, TrainingProgress):
                if listener is not None:
                    listener(said)
                continue
            running.remove(pipe)
            process = started[pipes.index(pipe)]
            process.join(_GRACE)
            if process.exitcode or isinstance(said, Exception):
                raise _cause(started, said, running)


def _next_word(pipe: Connection) -> TrainingProgress | Exception | None:
    """What a process says next; None at its end."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _cause(started: Sequence[BaseProcess], said: object, running: Sequence[Connection]) -> Exception:
    """Why processes failed: one was killed, or has raised; what others raise because one is gone comes last."""
    for process in started:
        process.join(_GRACE)
    for number, process in enumerate(started):
        if process.exitcode not in (0, None, _TOLD):
            return ProcessDied(
                f"process {number} of {len(started)} ended with code {process.exitcode};"
                " train again to go on from the last checkpoint"
            )
    words = [said, *(_next_word(pipe) for pipe in running if pipe.poll())]
    errors = [word for word in words if isinstance(word, Exception)]
    return min(errors, key=lambda error: isinstance(error, RuntimeError))


_GRACE = 2.0
"""Seconds that a process has to end after another one has failed."""
_TOLD = 3
"""The exit code of a process that has said why."""


def _work(recipe: Recipe, seed: int, folder: Path, share: Share, meeting: str, sender: Connection) -> None:
    """What each process does; only the first one tells of progress."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    listener = sender.send if share.number == 0 else None
    try:
        device = device_of(recipe, share.number)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{meeting}",
            rank=share.number,
            world_size=share.of,
        )
        training = Training(recipe, seed, folder, listener, share)
        training.resume()
        training.advance()
        torch.distributed.destroy_process_group()
    except Exception as error:
        sender.send(error)
        sender.close()
        # Without waiting for the others, which wait for this one.
        os._exit(_TOLD)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however that ended."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
