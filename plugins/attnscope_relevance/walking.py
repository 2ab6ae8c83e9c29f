"""The rules: how relevance passes through the layers of streams that attend to themselves and to each other.

One sample at a time, with plain arrays: see `attnscope_relevance` for what the rules are and where they come from.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

Rows: TypeAlias = dict[str, np.ndarray]
"""A row of relevance for each stream: (token,) each."""


def add_relevance(row: np.ndarray, relevance_map: np.ndarray) -> np.ndarray:
    """One layer of equations 6 and 7 seen from a row of R: r (I + A), (token,), dimensionless.

    `row` is (token,), `relevance_map` (query_token, key_token) the positive head mean of gradient times attention.
    """
    return row + row @ relevance_map


def add_rollout(row: np.ndarray, attention_mean: np.ndarray) -> np.ndarray:
    """One layer of rollout seen from a row: r D^-1 (I + A), (token,), with D the row sums of I + A.

    Rows of attention that sum to 1 make D twice the identity; a query without a valid key (a row of zeros) passes its
    own relevance on unchanged.
    """
    scaled = row / (1 + attention_mean.sum(-1))
    return scaled + scaled @ attention_mean


def add_weighted(row: np.ndarray, relevance_map: np.ndarray, residual: np.ndarray, addition: np.ndarray) -> np.ndarray:
    """One layer in which residual and attention count unequally: r (diag(residual) + diag(addition) A), (token,).

    `residual` and `addition` are (token,) weights, one pair for each query. Equal weights of 1 give `add_relevance`;
    of 1/2, with the head mean of the attention, rollout; an addition of 0 leaves the identity.
    """
    return row * residual + (row * addition) @ relevance_map


@dataclass(frozen=True)
class Event:
    """One layer of one site: queries of a stream attend to keys of the same or of another."""

    site: str
    position: int
    queries: str
    keys: str

    @property
    def is_self(self) -> bool:
        return self.queries == self.keys


Maps: TypeAlias = Callable[[Event], np.ndarray]
"""Gives the map (query_token, key_token) of an event, float64, NaN-free."""


@dataclass
class Walk:
    """Relevance of one sample along events that stand in the order in which the model ran them.

    `sizes` are the tokens of each stream; `shares` the weight of the residual of each query of an event, (query_token,)
    from 0 to 2, beside which the attention has the rest to 2 (1 and 1 where there are none); `dead` counts rows whose
    relevance could not be normalised.
    """

    events: Sequence[Event]
    maps: Maps
    sizes: Mapping[str, int]
    shares: Callable[[Event], np.ndarray] | None = None
    dead: int = 0
    _state: dict[tuple[str, str], np.ndarray] | None = field(default=None, repr=False)

    def rows(self, stream: str, row: np.ndarray) -> Rows:
        """A row (token,) of a stream times its relevance for the tokens of every stream that it reached."""
        if self._is_mutual():
            matrices = self._matrices()
            return {q: row @ matrices[s, q] for s, q in matrices if s == stream and matrices[s, q].any()}
        return self._carried(stream, row, len(self.events))

    def _is_mutual(self) -> bool:
        across = {(e.queries, e.keys) for e in self.events if not e.is_self}
        return any((keys, queries) in across for queries, keys in across)

    # Vectors: where no two streams look at each other, rows are carried backwards and columns forwards.

    def _carried(self, stream: str, row: np.ndarray, until: int) -> Rows:
        found: Rows = {}
        for at in range(until - 1, -1, -1):
            event = self.events[at]
            if event.queries != stream:
                continue
            kept, gained = self._weights(event)
            if event.is_self:
                row = add_weighted(row, self.maps(event), kept, gained)
                continue
            looked = self._normalised_column(stream, row * gained, at) @ self.maps(event)
            for name, part in self._normalised_rows(event.keys, looked, at).items():
                found[name] = found[name] + part if name in found else part
        found[stream] = found[stream] + row if stream in found else row
        return found

    def _column(self, stream: str, column: np.ndarray, until: int) -> np.ndarray:
        """R times a column (token,), through a stream's own attention."""
        for event in self.events[:until]:
            if event.queries == event.keys == stream:
                kept, gained = self._weights(event)
                column = kept * column + gained * (self.maps(event) @ column)
        return column

    def _weights(self, event: Event) -> tuple[np.ndarray, np.ndarray]:
        """What the residual and the attention of each query count, (query_token,) each."""
        if self.shares is None:
            ones = np.ones(self.sizes[event.queries])
            return ones, ones
        kept = self.shares(event)
        return kept, 2 - kept

    def _totals(self, stream: str, until: int) -> np.ndarray:
        """Row sums of R - I, (token,)."""
        return self._column(stream, np.ones(self.sizes[stream]), until) - 1

    def _normalised_column(self, stream: str, row: np.ndarray, until: int) -> np.ndarray:
        """A row times the transpose of the normalised relevance (equation 10 transposes it), (token,)."""
        gained = self._column(stream, row, until) - row
        return self._scaled(gained, self._totals(stream, until), row != 0) + row

    def _normalised_rows(self, stream: str, row: np.ndarray, until: int) -> Rows:
        scaled = self._scaled(row, self._totals(stream, until), row != 0)
        found = self._carried(stream, scaled, until)
        found[stream] = found[stream] - scaled + row
        return found

    def _scaled(self, values: np.ndarray, totals: np.ndarray, asked: np.ndarray) -> np.ndarray:
        self.dead += int((asked & (totals <= 0)).sum())
        return np.divide(values, totals, out=np.zeros_like(values), where=totals > 0)

    # Matrices: streams that look at each other change each other's relevance; they are small, and one of each is held.

    def _matrices(self) -> dict[tuple[str, str], np.ndarray]:
        if self._state is None:
            names = list(self.sizes)
            self._state = {
                (s, q): np.eye(self.sizes[s]) if s == q else np.zeros((self.sizes[s], self.sizes[q]))
                for s, q in itertools.product(names, repeat=2)
            }
            for group in _together(self.events):
                self._advance(self._state, group)
        return self._state

    def _advance(self, state: dict[tuple[str, str], np.ndarray], group: Sequence[Event]) -> None:
        """Equations 6 and 7 for a stream's own attention; 10 and 11 for all of a group from what was before it."""
        added: list[tuple[tuple[str, str], np.ndarray]] = []
        for event in group:
            one, s, q = self.maps(event), event.queries, event.keys
            kept, gained = (weight[:, None] for weight in self._weights(event))
            if event.is_self:
                added += [((s, n), (kept - 1) * state[s, n] + gained * (one @ state[s, n])) for n in self.sizes]
                continue
            looked = self._normalised(state[s, s]).T @ one
            added.append(((s, q), gained * (looked @ self._normalised(state[q, q]))))
            added.append(((s, s), gained * (one @ state[q, s])))
            # What the stream that is looked at has of others passes on with its own, in the same proportion.
            added += [((s, n), gained * (looked @ self._per_gain(state, q, n))) for n in self.sizes if n not in (s, q)]
        for place, addition in added:
            state[place] = state[place] + addition

    def _normalised(self, relevance: np.ndarray) -> np.ndarray:
        gained = relevance - np.eye(len(relevance))
        totals = gained.sum(-1, keepdims=True)
        self.dead += int((totals <= 0).sum())
        return np.divide(gained, totals, out=np.zeros_like(gained), where=totals > 0) + np.eye(len(relevance))

    def _per_gain(self, state: Mapping[tuple[str, str], np.ndarray], stream: str, other: str) -> np.ndarray:
        """A stream's relevance for another per what it gained of itself, (token, other token)."""
        totals = state[stream, stream].sum(-1, keepdims=True) - 1
        return np.divide(state[stream, other], totals, out=np.zeros_like(state[stream, other]), where=totals > 0)


def _together(events: Sequence[Event]) -> Iterator[list[Event]]:
    """The events one by one, but attention in both directions between two streams as one step."""
    waiting: list[Event] = []
    for event in events:
        pair = {event.queries, event.keys}
        if waiting and (event.is_self or pair != {waiting[0].queries, waiting[0].keys} or len(waiting) == 2):
            yield waiting
            waiting = []
        if event.is_self:
            yield [event]
        else:
            waiting = [*waiting, event]
    if waiting:
        yield waiting


def roll_out(walk: Walk, stream: str, row: np.ndarray) -> Rows:
    """Rollout of a row: along the stream's own attention, and across as rollout^T A rollout with the last such map."""
    found = {stream: _own(walk, stream, row, add_rollout)}
    column = row
    for event in walk.events:
        if event.queries == event.keys == stream:
            one = walk.maps(event)
            column = (column + one @ column) / (1 + one.sum(-1))
    for event in _last_across(walk.events, stream):
        found[event.keys] = _own(walk, event.keys, column @ walk.maps(event), add_rollout)
    return found


def last_maps(walk: Walk, stream: str, row: np.ndarray) -> Rows:
    """A row times the last map of the stream's own attention, and of its attention to every other stream."""
    own = [e for e in walk.events if e.queries == e.keys == stream][-1:]
    found = {e.keys: row @ walk.maps(e) for e in (*own, *_last_across(walk.events, stream))}
    return {name: np.clip(values, 0, None) for name, values in found.items()}


def _own(walk: Walk, stream: str, row: np.ndarray, step: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    for event in reversed(walk.events):
        if event.queries == event.keys == stream:
            row = step(row, walk.maps(event))
    return row


def _last_across(events: Sequence[Event], stream: str) -> list[Event]:
    last = {e.keys: e for e in events if e.queries == stream and not e.is_self}
    return list(last.values())


def accumulate(walk: Walk, stream: str, row: np.ndarray) -> Rows:
    """Relevance of a row by equations 6 to 11."""
    return walk.rows(stream, row)
