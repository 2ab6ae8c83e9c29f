"""From recorded calls to stored blocks: encode, gather a block, write it while the model goes on."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from attnscope.attention_array import ATTENTION_OF_CODE
from attnscope.plan import SitePlan
from attnscope.quantities import SITE_QUANTITIES, SUMMARIES
from attnscope.ragged import end_to_end
from attnscope.recording import AttentionCall
from attnscope.run import Run
from attnscope.stores import full_disk_told
from attnscope.tokens import TokenLayout
from attnscope.whole_shards import OpenShard

# Of float32 attention that is computed at once. A GPU has the room, and is busy with a larger tile only; of a processor
# it is what the C library hands out again without having the system clear it (measured: four times as fast as 64 MiB).
_TILE_BYTES = {"cpu": 2**24, "cuda": 2**29}
# And of a processor the samples that are computed one after another, so that each stays in the caches of its cores
# from the product to the cast (measured at batch 8: half the time for a ViT-B/16's, and for a BERT-base's).
_CACHED_BYTES = 2**21
# What may wait to be written; and what is gathered before the model makes room for the writers.
_QUEUE_BYTES = 2**26
_QUEUE_JOBS = 64
_TURN_BYTES = 2**25

Place: TypeAlias = int | tuple[int, int]
"""The position of a layer, or those of a layer and a written token."""


def encoded_attention(call: AttentionCall, encoding: str, rows: torch.Tensor) -> np.ndarray:
    """Rows of the attention of a call as they are stored: (batch, head, row, key_token), cast on the device."""
    return on_host(torch.cat([encoded(call.attention(rows, heads=h), encoding) for h in head_tiles(call)], dim=1))


def gathered(whole: torch.Tensor | None, tile: torch.Tensor, heads: slice, count: int) -> torch.Tensor:
    """All heads (batch, head, ...), of which a tile of some more has come; None before the first of `count` heads."""
    if tile.shape[1] == count:
        return tile
    if whole is None:
        whole = tile.new_empty(tile.shape[0], count, *tile.shape[2:])
    whole[:, heads] = tile
    return whole


def on_host(whole: torch.Tensor) -> np.ndarray:
    """A tensor in the host's memory."""
    if whole.device.type != "cuda":
        return whole.cpu().numpy()
    # Page-locked, so that the device writes it by itself; torch keeps such memory for the next layer.
    target = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
    return target.copy_(whole).numpy()


def encoded(attention: torch.Tensor, encoding: str) -> torch.Tensor:
    """Attention weights as they are stored: half precision, float32, or codes of their square root."""
    if encoding == "compact":
        return attention.sqrt().mul_(255).round_().to(torch.uint8)
    return attention.half() if encoding == "float16" else attention


def decoded(stored: torch.Tensor) -> torch.Tensor:
    """What `encoded` gave, as the float32 weights that a reader of the run sees."""
    if stored.dtype == torch.uint8:
        return torch.from_numpy(ATTENTION_OF_CODE).to(stored.device)[stored.int()]
    return stored.float()


def head_tiles(call: AttentionCall, arrays: int = 1) -> list[slice]:
    """Slices of heads for which so many float32 arrays of the attention's size take about 16 MiB, or 512 on a GPU."""
    return _head_tiles(call.shape, call.device.type, arrays)


def cached_tiles(call: AttentionCall) -> list[tuple[slice, slice]]:
    """Slices of samples and heads whose float32 attention is computed at once.

    Those of a processor take about 2 MiB, but have all heads of a sample where these take no more than 16.
    """
    batch, *each = call.shape
    kind = call.device.type
    step = max(1, _CACHED_BYTES // max(1, 4 * math.prod(each))) if kind == "cpu" else max(1, batch)
    heads = _head_tiles((min(step, batch), *each), kind, 1)
    return [(slice(b, min(b + step, batch)), h) for b in range(0, batch, step) for h in heads]


def _head_tiles(shape: Sequence[int], kind: str, arrays: int) -> list[slice]:
    batch, heads, queries, keys = shape
    room = _TILE_BYTES.get(kind, _TILE_BYTES["cpu"]) // arrays
    step = max(1, room // max(1, 4 * batch * queries * keys))
    return [slice(h, min(h + step, heads)) for h in range(0, heads, step)]


class BlockWriter:
    """Threads that write what is put into a bounded queue, block by block.

    Jobs of a block may run side by side; its last one runs after all of them. A failure comes out of the next `put` or
    `flush`, a full disk as one sentence; a block that failed never sees its last job.

    Beside a model on a GPU, jobs run as they come. Where the model itself has all cores busy (`takes_turns`), some
    32 MiB are gathered, and the model waits until all threads have done them: one thread beside it would make the
    model's threads wait for each other at every step, and cost twice its own time (measured).
    """

    def __init__(self, threads: int = 1, takes_turns: bool = False) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="attnscope-writer")
        self._changed = threading.Condition()
        self._takes_turns = takes_turns
        self._gathered: list[tuple[Callable[[], None], int]] = []
        self._gathered_bytes = 0
        self._jobs_waiting = 0
        self._bytes_waiting = 0
        self._failure: BaseException | None = None

    def block(self, wanted: Callable[[], bool] = lambda: True) -> "BlockJobs":
        """A queue for the jobs of one block, each of which is left out unless it is still `wanted`."""
        return BlockJobs(self, wanted)

    def put(self, job: Callable[[], None], after: Callable[[bool], None], size: int = 0) -> None:
        """Run a job that holds so many bytes later, and then `after` with whether it succeeded.

        Waits while the queue is full, of bytes or of jobs.
        """
        self._raise_failure()
        self._gathered.append((partial(self._run, job, after, size), size))
        self._gathered_bytes += size
        if not self._takes_turns:
            self.start()
        elif self._gathered_bytes >= _TURN_BYTES:
            self.start()
            self._wait()

    def end_block(self) -> None:
        """Begin with the last jobs of a block; a model that takes turns has waited for those of the block before.

        However small blocks are, no more of them are under way than a kill or a full disk may cost.
        """
        if self._takes_turns:
            self._wait()
        self.start()

    def start(self) -> None:
        """Begin with what was gathered."""
        for job, size in self._gathered:
            with self._changed:
                self._changed.wait_for(partial(self._has_room, size))
                self._bytes_waiting += size
                self._jobs_waiting += 1
            self._pool.submit(job)
        self._gathered = []
        self._gathered_bytes = 0

    def flush(self) -> None:
        """Wait until everything is written."""
        self.start()
        self._wait()
        self._raise_failure()

    def close(self) -> None:
        """End the threads; what is in the queue is written first."""
        self.start()
        self._pool.shutdown(wait=True)

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs_waiting)

    def _has_room(self, size: int) -> bool:
        fits = not self._bytes_waiting or self._bytes_waiting + size <= _QUEUE_BYTES
        return fits and self._jobs_waiting < _QUEUE_JOBS

    def _run(self, job: Callable[[], None], after: Callable[[bool], None], size: int) -> None:
        failed = False
        try:
            if self._failure is None:
                job()
            failed = self._failure is not None
            after(not failed)
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._jobs_waiting -= 1
                self._bytes_waiting -= size
                self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        failure, self._failure = self._failure, None
        with full_disk_told():
            raise failure


class BlockJobs:
    """The jobs of one block, of which the last waits for the others."""

    def __init__(self, writer: BlockWriter, wanted: Callable[[], bool]) -> None:
        self._writer = writer
        self._wanted = wanted
        self._lock = threading.Lock()
        self._open = 1
        self._last: Callable[[], None] | None = None

    def put(self, job: Callable[[], None], size: int) -> None:
        """Write so many bytes later; waits while the queue is full."""
        with self._lock:
            self._open += 1
        self._writer.put(partial(self._run, job), self._done, size)

    def close(self, last: Callable[[], None]) -> None:
        """Say that no job follows but the last one, which runs when all others have succeeded."""
        self._last = last
        self._writer.put(lambda: None, self._done)
        self._writer.end_block()

    def _run(self, job: Callable[[], None]) -> None:
        if not self._wanted():
            return
        try:
            job()
        except FileNotFoundError:
            # Who takes over a block that another process seems to have left deletes what is half written of it.
            if self._wanted():
                raise

    def _done(self, succeeded: bool) -> None:
        with self._lock:
            # A job that failed is never counted as done.
            self._open -= succeeded
            finished = self._open == 0
        if finished and self._last is not None:
            self._last()


class BlockBuffer:
    """The site quantities of one block.

    What a sample has for itself in the store goes to the writer with every batch. Of what is stored for several samples
    together, a layer is gathered, and goes once every wanted row of it has come; of summaries, which are small, all
    layers go together.
    """

    def __init__(self, run: Run, block: range, rows: Sequence[int], jobs: BlockJobs) -> None:
        self._run = run
        self._block = block
        self._wanted = len(rows)
        self._jobs = jobs
        self._shards: dict[tuple[str, str, Place], OpenShard | None] = {}
        self._to_come: dict[tuple[str, str, Place], int] = {}
        self._gathered: dict[tuple[str, str, Place], np.ndarray] = {}
        self._pieces: dict[tuple[str, str, int], dict[int, np.ndarray]] = {}
        self.bytes = 0

    def put(self, site: str, name: str, at: Place, rows: Sequence[int], values: np.ndarray | None) -> None:
        """Add the values (batch, ...) of one batch at a layer position; shorter tokens leave the rest unfilled.

        Of what is recorded for each written token, `at` are the positions of layer and token; samples that wrote fewer
        have no values there (None).
        """
        if name in SUMMARIES:
            self._put_together(site, name, at, rows, values)
            return
        place = (site, name, at)
        begins = place not in self._to_come
        to_come = self._to_come.setdefault(place, self._wanted) - len(rows)
        self._to_come[place] = to_come
        dtype = np.dtype(SITE_QUANTITIES[name].dtype) if values is None else values.dtype
        if begins:
            self._shards[place] = self._run.open_layer(site, name, self._block, at, self._wanted, dtype)
        shard = self._shards[place]
        if shard is not None:
            if values is None:
                self._jobs.put(partial(shard.add, rows, None), 0)
                return
            self.bytes += values.nbytes
            # Sample by sample, so that no thread waits for another's batch.
            for row, value in zip(rows, values, strict=True):
                self._jobs.put(partial(shard.add, [row], value[None]), value.nbytes)
            return
        plan = self._run.plan.sites[site]
        if begins and values is not None and self._is_whole(plan, name, rows, values):
            array = values
        else:
            array = self._empty(plan, name, dtype) if begins else self._gathered.pop(place)
            if values is not None:
                _lay(array, rows, values)
        if to_come:
            self._gathered[place] = array
        else:
            self._write(partial(self._run.write_layer, site, name, self._block, at, array), array)

    def _put_together(self, site: str, name: str, at: Place, rows: Sequence[int], values: np.ndarray | None) -> None:
        plan = self._run.plan.sites[site]
        place = (site, name, 0)
        to_come = self._to_come.setdefault(place, self._wanted * len(plan.layers)) - len(rows)
        self._to_come[place] = to_come
        if place not in self._gathered:
            dtype = np.dtype(SITE_QUANTITIES[name].dtype) if values is None else values.dtype
            self._gathered[place] = self._empty(plan, name, dtype)
        array = self._gathered[place]
        if values is not None:
            _lay(array[:, at], rows, values)
        if not to_come:
            del self._gathered[place]
            self._write(partial(self._run.write_layers, site, name, self._block, array), array)

    def put_ragged(self, site: str, layer: int, pieces: Mapping[int, np.ndarray]) -> None:
        """Add attention weights without padding at a layer position: (head, element) by row of the block."""
        place = (site, "attention", layer)
        found = self._pieces.setdefault(place, {})
        found |= pieces
        self._to_come[place] = self._wanted - len(found)
        if not self._to_come[place]:
            del self._pieces[place]
            values, begins = end_to_end([found.get(row) for row in range(len(self._block))])
            self._write(partial(self._run.write_ragged, site, self._block, layer, values, begins), values)

    def unfinished(self) -> list[str]:
        """What did not come for every row: names of quantity and layer."""
        places = [place for place, to_come in self._to_come.items() if to_come]
        return [f"{site}/{name} at layer position {layer}" for site, name, layer in places]

    def abandon(self) -> None:
        """Leave nothing half written behind."""
        for shard in self._shards.values():
            if shard is not None:
                shard.abandon()

    def _write(self, job: Callable[[], None], values: np.ndarray) -> None:
        self.bytes += values.nbytes
        self._jobs.put(job, values.nbytes)

    def _is_whole(self, site: SitePlan, name: str, rows: Sequence[int], values: np.ndarray) -> bool:
        """Whether one batch brings a whole block, in its order, so that nothing has to be gathered."""
        return list(rows) == list(range(len(self._block))) and values.shape == self._shape(site, name)

    def _shape(self, site: SitePlan, name: str) -> tuple[int, ...]:
        sizes = self._run.plan.sizes(site)
        alone = {"sample"} if name in SUMMARIES else {"sample", "layer", "answer"}
        return len(self._block), *(sizes[d] for d in SITE_QUANTITIES[name].dims if d not in alone)

    def _empty(self, site: SitePlan, name: str, dtype: np.dtype) -> np.ndarray:
        # Codes can't be NaN as numbers; what stays unfilled is hidden by the token kinds in any case.
        return np.full(self._shape(site, name), 0 if dtype.kind == "u" else SITE_QUANTITIES[name].fill, dtype)


def _lay(array: np.ndarray, rows: Sequence[int], values: np.ndarray) -> None:
    """Lay values (batch, ...) into rows of an array that may be longer along the other axes."""
    places: tuple[Any, ...] = (list(rows), *(slice(0, n) for n in values.shape[1:]))
    array[places] = values


class TokenBuffer:
    """The token layout of one stream for a block, gathered batch by batch."""

    def __init__(self, samples: int, tokens: int) -> None:
        shape = (samples, tokens)
        row, column = np.full((2, *shape), -1, np.int16)
        self.layout = TokenLayout(np.zeros(shape, np.int8), np.full(shape, "", object), row, column)

    def put(self, rows: Sequence[int], layout: TokenLayout) -> None:
        """Add the layout of one batch."""
        for mine, given in zip(_parts(self.layout), _parts(layout), strict=True):
            mine[list(rows), : given.shape[1]] = given


def _parts(layout: TokenLayout) -> tuple[np.ndarray, ...]:
    return layout.kind, layout.text, layout.row, layout.column
