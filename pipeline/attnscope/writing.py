"""From recorded calls to stored blocks: encode, gather a block, write it while the model goes on."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from attnscope.attention_array import ATTENTION_OF_CODE
from attnscope.plan import SitePlan
from attnscope.quantities import SITE_QUANTITIES, SUMMARIES
from attnscope.recording import AttentionCall
from attnscope.run import Run
from attnscope.stores import full_disk_told
from attnscope.tokens import TokenLayout

_TILE_BYTES = 2**26
_QUEUE_LENGTH = 4


def encoded_attention(call: AttentionCall, encoding: str) -> np.ndarray:
    """The attention of a call as it is stored: (batch, head, query_token, key_token), cast on the device."""
    parts = [encoded(call.attention(heads=h), encoding).cpu() for h in head_tiles(call)]
    return torch.cat(parts, dim=1).numpy()


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


def head_tiles(call: AttentionCall) -> list[slice]:
    """Slices of heads whose float32 attention takes about 64 MiB."""
    batch, heads, queries, keys = call.shape
    step = max(1, _TILE_BYTES // max(1, 4 * batch * queries * keys))
    return [slice(h, min(h + step, heads)) for h in range(0, heads, step)]


class BlockWriter:
    """A thread that writes what is put into its bounded queue, in order.

    A failure there comes out of the next `put` or `flush`; a full disk as one sentence.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUE_LENGTH)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="attnscope-writer", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """Write later; waits while the queue is full."""
        self._raise_failure()
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until everything is written."""
        self._jobs.join()
        self._raise_failure()

    def close(self) -> None:
        """End the thread; what is in the queue is written first."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._failure is None:
                    job()
            except BaseException as error:
                self._failure = error
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        failure, self._failure = self._failure, None
        with full_disk_told():
            raise failure


class BlockBuffer:
    """The site quantities of one block; a layer is handed to the writer once every wanted row of it has come.

    Of summaries, which are small, all layers are handed over together.
    """

    def __init__(self, run: Run, block: range, rows: Sequence[int], writer: BlockWriter) -> None:
        self._run = run
        self._block = block
        self._wanted = len(rows)
        self._writer = writer
        self._open: dict[tuple[str, str, int], tuple[np.ndarray, int]] = {}
        self.bytes = 0

    def put(self, site: str, name: str, layer: int, rows: Sequence[int], values: np.ndarray) -> None:
        """Add the values (batch, ...) of one batch at a layer position; shorter tokens leave the rest unfilled."""
        plan = self._run.plan.sites[site]
        together = name in SUMMARIES
        place = (site, name, 0 if together else layer)
        array, filled = self._open.pop(place, (None, 0))
        if array is None:
            array = self._empty(plan, name, values.dtype)
        places: tuple[Any, ...] = (list(rows), *(slice(0, n) for n in values.shape[1:]))
        (array[:, layer] if together else array)[places] = values
        filled += len(rows)
        if filled < self._wanted * (len(plan.layers) if together else 1):
            self._open[place] = (array, filled)
            return
        self.bytes += array.nbytes
        if together:
            self._writer.put(lambda: self._run.write_layers(site, name, self._block, array))
        else:
            self._writer.put(lambda: self._run.write_layer(site, name, self._block, layer, array))

    def unfinished(self) -> list[str]:
        """What did not come for every row: names of quantity and layer."""
        return [f"{site}/{name} at layer position {layer}" for site, name, layer in self._open]

    def _empty(self, site: SitePlan, name: str, dtype: np.dtype) -> np.ndarray:
        row = SITE_QUANTITIES[name]
        sizes = self._run.plan.sizes(site)
        alone = {"sample"} if name in SUMMARIES else {"sample", "layer"}
        shape = [len(self._block), *(sizes[d] for d in row.dims if d not in alone)]
        # Codes can't be NaN as numbers; what stays unfilled is hidden by the token kinds in any case.
        return np.full(shape, 0 if dtype.kind == "u" else row.fill, dtype)


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
