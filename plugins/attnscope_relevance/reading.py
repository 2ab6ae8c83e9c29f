"""Reading a run: the maps of each sample, the row that its answer is read from, and what each method makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from attnscope import Run
from attnscope.reading import is_of_kind
from attnscope_relevance.walking import Event, Rows, Walk, accumulate, last_maps, roll_out

_MAP_BYTES = 2**28
OF_ANSWER = {
    "attention_relevance": "answer_relevance",
    "attention_gradcam": "answer_gradcam",
    "attention_gradient": "answer_gradient",
    "residual_gradient": "answer_residual",
}
"""What is read in the place of a quantity where each written token is a target."""
_BY_ANSWER = frozenset(OF_ANSWER.values())


def readout_rows(kind: np.ndarray, row: "int | Literal['auto', 'cls', 'mean']") -> np.ndarray:
    """The row that the answer is read from, as weights (sample, token) that sum to 1.

    'cls' takes the first CLS token, 'mean' all real tokens alike, 'auto' the CLS token where a sample has one and the
    mean elsewhere; a number counts the real tokens of each sample, from the end when negative.
    """
    real = ~is_of_kind(kind, "padding")
    is_cls = is_of_kind(kind, "cls")
    mean = real / np.maximum(real.sum(-1, keepdims=True), 1)
    if row == "mean":
        return mean
    if isinstance(row, int):
        order = np.cumsum(real, -1) - 1
        wanted = np.where(row < 0, row + real.sum(-1), row)[:, None]
        if (real.any(-1) & ((wanted[:, 0] < 0) | (wanted[:, 0] >= real.sum(-1)))).any():
            raise ValueError(f"row {row} lies outside the tokens of a sample, the shortest has {real.sum(-1).min()}")
        return (real & (order == wanted)).astype(float)
    if row == "cls" and not (is_cls.any(-1) | ~real.any(-1)).all():
        raise ValueError("row 'cls' asks for a CLS token, which not every sample has; use 'mean' or a token number")
    first = is_cls & (np.cumsum(is_cls, -1) == 1)
    return np.where(is_cls.any(-1, keepdims=True), first, mean)


def answering_row(last_map: np.ndarray) -> np.ndarray | None:
    """The rows of the last map that the target depends on, alike, (token,); None where it is all or none of them.

    The answer is read from what the last layer writes: elsewhere the target has no gradient, and the map is zero.
    """
    answers = np.asarray(last_map.any(-1))
    count = int(np.count_nonzero(answers))
    return answers / count if 0 < count < max(2, len(answers) / 2) else None


@dataclass(frozen=True)
class Method:
    """How one method goes along the streams, and the map that it reads of each layer."""

    quantity: str
    explain: Callable[[Walk, str, np.ndarray], Rows]
    meaning: str


METHODS = {
    "relevance": Method(
        "attention_relevance",
        accumulate,
        "relevance for the target through all layers, with gradient (Chefer et al. 2021)",
    ),
    "rollout": Method("attention_mean", roll_out, "attention rollout (Abnar and Zuidema 2020)"),
    "attention": Method("attention_mean", last_maps, "head mean of the last layer's attention"),
    "gradcam": Method("attention_gradcam", last_maps, "Grad-CAM on the last layer's attention, its positive part"),
    "gradient": Method(
        "attention_gradient", last_maps, "head mean of gradient times attention of the last layer, its positive part"
    ),
}


class Reader:
    """Reads the maps of some samples at a time, each once, and explains rows with them, sample by sample.

    Padding takes no part: maps and rows are of the real tokens of each sample alone.
    """

    def __init__(
        self,
        run: Run,
        events: Sequence[Event],
        row: "int | Literal['auto', 'cls', 'mean']",
        methods: Sequence[str],
        shares: str | None = None,
    ) -> None:
        self._run = run
        self._events = events
        self._row, self._methods, self._shares = row, methods, shares
        self._window = range(0)
        self._held: dict[tuple[str, Event], np.ndarray] = {}
        self._valid: dict[Event, np.ndarray] = {}
        self._kind = {s: run.tokens(s)["kind"].load() for s in run.streams}
        self._sample = -1
        self._dead: dict[str, int] = {}
        self._answer: int | None = None
        self.readouts: dict[str, str] = {}

    def explain(self, sample: int, root: str, method: Method, answer: int | None = None) -> Rows:
        """The rows that a method gives for the read-out of a stream, over the tokens of every stream it reaches.

        `answer` is the number of the written token whose logit is asked for; None for the target itself.
        """
        self._go_to(sample, answer)
        real = {s: self._real(s) for s in self._kind}
        sizes = {s: int(r.sum()) for s, r in real.items()}
        if not sizes[root]:
            return {}
        weighted = self._share if self._shares is not None and method.explain is accumulate else None
        walk = Walk(self._events, lambda event: self._map(event, method.quantity), sizes, weighted)
        found = {}
        for stream, row in method.explain(walk, root, self._readout(root)).items():
            if method.quantity == "attention_gradcam":
                # The authors take the mean over all entries of a map; a token is written with those before it alone.
                before = {root: self._before(root) or sizes[root]}
                row = row / (before[root] * before.get(stream, sizes[stream]))
            found[stream] = np.full(real[stream].size, np.nan)
            found[stream][real[stream]] = row
        self._dead[root] = max(self._dead.get(root, 0), walk.dead)
        return found

    def dead_rows(self, sample: int, stream: str) -> tuple[int, int]:
        """Query rows of a stream without a valid key, over its layers, and rows that could not be normalised."""
        self._go_to(sample, self._answer)
        events = [e for e in self._events if e.queries == stream]
        count = sum(int((~self._validity(e) & self._real(stream)).sum()) for e in events)
        return count, self._dead.get(stream, 0)

    def written(self, sample: int) -> int:
        """How many tokens of a sample the model wrote."""
        return max(int(is_of_kind(kind.values[sample], "generated").sum()) for kind in self._kind.values())

    def _go_to(self, sample: int, answer: int | None) -> None:
        if sample != self._sample:
            self._sample, self._dead = sample, {}
        if answer != self._answer:
            # Of the maps of single written tokens, those of one are held at a time.
            self._answer = answer
            self._held = {key: v for key, v in self._held.items() if key[0] not in _BY_ANSWER}
        if sample not in self._window:
            block = next(b for b in self._run.blocks() if sample in b)
            sites = self._run.plan.sites
            each = 4 * sum(sites[e.site].query_tokens * sites[e.site].key_tokens for e in self._events)
            count = max(1, _MAP_BYTES // max(1, each * len({METHODS[m].quantity for m in self._methods})))
            count = 1 if answer is not None else count
            self._window = range(sample, min(block.stop, sample + count))
            self._held, self._valid = {}, {}

    def _real(self, stream: str) -> np.ndarray:
        return ~is_of_kind(self._kind[stream].values[self._sample], "padding")

    def _readout(self, root: str) -> np.ndarray:
        """The row that the answer is read from, over the real tokens."""
        kind = self._kind[root].values[self._sample][self._real(root)][None]
        before = self._before(root)
        if self._row == "auto" and before is not None:
            # What is read from left to right tells a token one before it.
            self.readouts[root] = "the token before each written one"
            return np.eye(kind.size)[before - 1]
        if self._row == "auto" and "relevance" in self._methods:
            last = [e for e in self._events if e.queries == root][-1]
            found = answering_row(self._map(last, "attention_relevance"))
            if found is not None:
                what = self._kind[root].attrs["flag_meanings"].split()[int(kind[0, found.argmax()])]
                counted = int((found > 0).sum())
                said = f"the {what} token" if counted == 1 else f"{counted} tokens"
                self.readouts[root] = f"{said} that the target depends on"
                return found
        self.readouts[root] = self._said(bool(is_of_kind(kind, "cls").any()))
        return readout_rows(kind, self._row)[0]

    def _before(self, stream: str) -> int | None:
        """How many real tokens of a stream stand before the written token in hand; None where it isn't there."""
        real = self._kind[stream].values[self._sample][self._real(stream)]
        written = np.flatnonzero(is_of_kind(real, "generated"))
        return None if self._answer is None or self._answer >= len(written) else int(written[self._answer])

    def _said(self, has_cls: bool) -> str:
        row = self._row
        if isinstance(row, int):
            return f"token {row}"
        return "CLS token" if row == "cls" or (row == "auto" and has_cls) else "mean over real tokens"

    def _validity(self, event: Event) -> np.ndarray:
        if event not in self._valid:
            array = self._run.array(event.site, "query_valid")
            at = slice(self._window.start, self._window.stop)
            self._valid[event] = array.isel(sample=at, layer=event.position).values
        return self._valid[event][self._sample - self._window.start]

    def _share(self, event: Event) -> np.ndarray:
        """The weight of the residual of each real query; 1 where it isn't known."""
        name = str(self._shares)
        name = OF_ANSWER.get(name, name) if self._answer is not None else name
        values = self._held.get((name, event))
        if values is None:
            at = slice(self._window.start, self._window.stop)
            values = self._array(event, name).isel(sample=at).values
            self._held[name, event] = values
        values = values[self._sample - self._window.start, self._real(event.queries)].astype(float)
        return np.where(np.isfinite(values), values, 1.0)

    def _map(self, event: Event, quantity: str) -> np.ndarray:
        """The map of the sample in hand between real tokens, (query_token, key_token) float64."""
        quantity = OF_ANSWER.get(quantity, quantity) if self._answer is not None else quantity
        key = (quantity, event)
        values = self._held.get(key)
        if values is None:
            at = slice(self._window.start, self._window.stop)
            values = self._array(event, quantity).isel(sample=at).values
            # The maps of one sample may be more than is to be held.
            if len(self._window) > 1 or sum(v.nbytes for v in self._held.values()) + values.nbytes <= _MAP_BYTES:
                self._held[key] = values
        one = values[self._sample - self._window.start]
        queries, keys = self._real(event.queries), self._real(event.keys)
        if np.isnan(one).all(-1)[self._validity(event) & queries].any():
            raise ValueError(
                f"{self._run.location} was extracted without {quantity!r} for some samples of {event.site!r}"
            )
        return np.nan_to_num(one[queries][:, keys].astype(np.float64))

    def _array(self, event: Event, quantity: str) -> xr.DataArray:
        """A quantity of an event (sample, ...), lazily; for the written token in hand, where it is one for each."""
        array = self._run.array(event.site, quantity).isel(layer=event.position)
        return array.isel(answer=self._answer) if quantity in _BY_ANSWER else array


def reach(events: Sequence[Event], root: str) -> set[str]:
    """The streams whose tokens a stream sees, itself included, directly or through others."""
    found: set[str] = set()
    grown = {root}
    while grown - found:
        found |= grown
        grown = {e.keys for e in events if e.queries in found}
    return found
