"""Questions over many samples: which queries put more than so much on which keys, and which heads do.

They are answered from the summaries that lie beside the attention. The summaries are of the attention as it is stored,
so the answer is that of the attention itself; what they don't settle is read, and the answer says how much that was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from attnscope.attention_array import to_float32
from attnscope.chunks import read_part
from attnscope.labels import Named, OfToken
from attnscope.quantities import SITE_QUANTITIES
from attnscope.selection import Choice, SelectionError, chosen_positions, chosen_tokens
from attnscope.tokens import KIND_CODES

if TYPE_CHECKING:
    from attnscope.run import Run

_BLOCK_BYTES = 2**27


@dataclass
class _Reading:
    """How many layers of how many samples had to be read of the attention itself."""

    tiles: int = 0
    attention: xr.Variable | None = None

    def words(self, of: int, summary: str) -> str:
        if self.tiles == 0:
            return f"{summary} alone"
        return f"the attention of {self.tiles:,} of {of:,} layers of samples, and {summary} for the others"


@dataclass(frozen=True)
class _Scope:
    """The chosen part of a site: positions, and which tokens of each chosen sample, (sample, token) bool."""

    run: "Run"
    site: str
    samples: np.ndarray
    layers: np.ndarray
    heads: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    reading: _Reading = field(default_factory=_Reading)

    @classmethod
    def of(cls, run: "Run", site: str, choices: Mapping[str, Choice]) -> "_Scope":
        samples, layers, heads = (chosen_positions(run, site, n, choices.get(n)) for n in ("sample", "layer", "head"))
        queries, keys = (chosen_tokens(run, site, n, choices.get(n), samples) for n in ("query", "key"))
        return cls(run, site, samples, layers, heads, queries, keys)

    @property
    def tiles(self) -> int:
        return len(self.samples) * len(self.layers)

    def blocks(self) -> Iterator["_Scope"]:
        """The same for some extracted samples at a time, whose summaries take about 128 MiB."""
        plan = self.run.plan.sites[self.site]
        done = self.run.status[self.samples] == 1
        row = len(self.layers) * len(self.heads) * plan.query_tokens * 64
        step = max(1, _BLOCK_BYTES // max(1, row))
        places = np.flatnonzero(done)
        for start in range(0, len(places), step):
            at = places[start : start + step]
            part = (self.samples[at], self.layers, self.heads, self.queries[at], self.keys[at])
            yield _Scope(self.run, self.site, *part, reading=self.reading)

    def read(self, name: str, rank: int | None = None) -> np.ndarray:
        """A quantity of the chosen samples, layers and heads, as it is stored; of one rank, where it has such."""
        array = self.run.stored(self.site, name)
        behind = (slice(None), slice(rank, rank + 1)) if rank is not None else ()
        layers, heads = (_plain(p) for p in (self.layers, self.heads))
        ahead = tuple(p if isinstance(p, slice) else slice(None) for p in (layers, heads))
        runs = np.split(self.samples, np.flatnonzero(np.diff(self.samples) != 1) + 1)
        parts = [read_part(array, (slice(int(r[0]), int(r[-1]) + 1), *ahead, *behind)) for r in runs if len(r)]
        found = np.concatenate(parts) if len(parts) > 1 else parts[0]
        found = found if isinstance(layers, slice) else found[:, layers]
        found = found if isinstance(heads, slice) else found[:, :, heads]
        return found if rank is None else found[..., 0]

    def tile(self, sample: int, layer: int) -> np.ndarray:
        """The attention (head, query_token, key_token) of one sample and layer (places in this scope)."""
        self.reading.tiles += 1
        if self.reading.attention is None:
            self.reading.attention = self.run.attention(self.site).variable
        array = self.reading.attention
        return np.asarray(array[int(self.samples[sample]), int(self.layers[layer]), _plain(self.heads)].values)


def strong_edges(run: "Run", site: str, above: float, choices: Mapping[str, Choice]) -> xr.DataArray:
    """Every attention weight above a threshold, one after another: (edge), with what it belongs to as coordinates.

    A row of attention sums to 1, so at most 1 / above of its weights are larger: with the eight strongest keys of
    each query that settles every threshold from 1/9 = 0.112 on. Below, rows whose eighth weight is still above the
    threshold are read.
    """
    if not above >= 0:
        raise SelectionError(f"a threshold of attention weights is 0 to 1, got {above!r}")
    scope = _Scope.of(run, site, choices)
    parts = [_edges(part, above) for part in scope.blocks()]
    places = np.concatenate([p for p, _ in parts] or [np.zeros((0, 5), np.int64)])
    values = np.concatenate([v for _, v in parts] or [np.zeros(0, np.float32)])
    return _labelled(run, site, places, values, {"above": above, "read": scope.reading.words(scope.tiles, "top_value")})


def strongest_edges(run: "Run", site: str, count: int, choices: Mapping[str, Choice]) -> xr.DataArray:
    """The `count` largest attention weights, largest first; among equals those that stand first in the run.

    As `strong_edges` gives them.
    """
    scope = _Scope.of(run, site, choices)
    places, values = np.zeros((0, 5), np.int64), np.zeros(0, np.float32)
    for part in scope.blocks():
        # Nothing below the weakest of the best so far can be among them; an equal one could, if it stood before.
        floor = float(np.nextafter(values[count - 1], -1)) if len(values) >= count else None
        more, weights = _edges(part, floor, count)
        places, values = np.concatenate([places, more]), np.concatenate([values, weights])
        order = np.argsort(-values, kind="stable")[:count]
        places, values = places[order], values[order]
    return _labelled(run, site, places, values, {"read": scope.reading.words(scope.tiles, "top_value")})


def strong_heads(run: "Run", site: str, above: float, choices: Mapping[str, Choice]) -> xr.DataArray:
    """The heads in which some chosen query puts more than `above` on all chosen keys together, sample by sample.

    One value for each: (case), with sample, layer and head as coordinates; the value is the most that a query puts on
    them. Answered from `kind_mass_max` where query and key are kinds of tokens; else the attention is read.
    """
    scope = _Scope.of(run, site, choices)
    kinds = [choices.get(side) for side in ("query", "key")]
    summed = all(isinstance(k, str) and k in KIND_CODES for k in kinds) and "kind_mass_max" in run.quantities(site)
    places, values = [], []
    for part in scope.blocks():
        if summed:
            of, to = (KIND_CODES[str(kind)] for kind in kinds)
            mass = part.read("kind_mass_max")[..., of, to]
        else:
            mass = np.stack([_most_mass(part, sample) for sample in range(len(part.samples))])
        found = np.argwhere(mass > above)
        values.append(mass[tuple(found.T)])
        places.append(np.stack([part.samples[found[:, 0]], part.layers[found[:, 1]], part.heads[found[:, 2]]], 1))
    where = np.concatenate(places or [np.zeros((0, 3), np.int64)])
    coordinates = _coordinates(run, site, where)
    said = {"long_name": "most attention that a chosen query gives to all chosen keys together", "units": "1"}
    attrs: dict[str, str | float] = {**said, "above": above, "read": scope.reading.words(scope.tiles, "kind_mass_max")}
    mass = np.concatenate(values or [np.zeros(0, np.float32)])
    return _described("case", "mass", mass, coordinates, attrs)


def _most_mass(scope: _Scope, sample: int) -> np.ndarray:
    """The most that a chosen query of a sample puts on the chosen keys, (layer, head); NaN where there is none."""
    found = np.full((len(scope.layers), len(scope.heads)), np.nan, np.float32)
    queries, keys = scope.queries[sample], scope.keys[sample]
    if queries.any() and keys.any():
        for layer in range(len(scope.layers)):
            chosen = scope.tile(sample, layer)[:, queries][:, :, keys]
            there = ~np.isnan(chosen).all(axis=-1)
            mass = np.where(there, np.nansum(chosen, axis=-1), -1).max(axis=-1)
            found[layer] = np.where(there.any(axis=-1), mass, np.nan)
    return found


def _edges(scope: _Scope, above: float | None, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Places (edge, 5) in the run and weights of what is above a threshold; the `count` largest of them, if given.

    In the order of the run.
    """
    if "top_value" not in scope.run.quantities(scope.site):
        floor = -1.0 if above is None else above
        tiles = np.ndindex(len(scope.samples), len(scope.layers))
        found = [_edges_of_tile(scope, sample, layer, None, floor) for sample, layer in tiles]
        return _together(scope, found, count)
    if above is None:
        above = _floor(scope, count)
    top, open_rows = _ranks_above(scope, above)
    found = [(places[on], weights[on]) for places, weights in top for on in [scope.keys[places[:, 0], places[:, 4]]]]
    for sample, layer in np.argwhere(open_rows.any(axis=(2, 3))):
        found.append(_edges_of_tile(scope, sample, layer, open_rows[sample, layer], above))
    return _together(scope, found, count)


def _ranks_above(scope: _Scope, above: float) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Places in the scope and weights of the strongest keys above a threshold, whether they are chosen keys or not.

    And the rows that may have further ones, (sample, layer, head, query_token): those whose last rank is above, too.
    None of their weights are among the others. A rank is read only where the one before it has a weight above.
    """
    plan = scope.run.plan.sites[scope.site]
    ranks = scope.run.stored(scope.site, "top_value").shape[-1]
    chosen = scope.queries[:, None, None]
    values, masks = [], []
    for rank in range(ranks):
        values.append(scope.read("top_value", rank))
        masks.append(_above(values[-1], above) & chosen)
        if not masks[-1].any():
            break
    open_rows = np.zeros(values[0].shape, bool)
    if above < 0:
        # Weights of 0 are not among the stored.
        full = _above(scope.read("top_value", ranks - 1), above)
        open_rows = np.broadcast_to(chosen, full.shape) & ~(full & (ranks == plan.key_tokens))
    elif len(values) == ranks and ranks < plan.key_tokens:
        open_rows = masks[-1]
    found = []
    for rank, (weights, mask) in enumerate(zip(values, masks, strict=True)):
        at = np.nonzero(mask & ~open_rows if open_rows.any() else mask)
        if len(at[0]):
            keys = scope.read("top_key", rank)[at]
            found.append((np.stack([*at, keys], 1).astype(np.int64), to_float32(weights[at])))
    return found, open_rows


def _above(values: np.ndarray, threshold: float) -> np.ndarray:
    """Where weights are above a threshold; of half precision without a detour over float32, since bits are ordered."""
    if values.dtype != np.float16 or threshold < 0:
        return to_float32(values) > threshold
    least = np.float16(threshold)
    if float(least) <= threshold:
        least = np.nextafter(least, np.float16(np.inf))
    bits = values.view(np.uint16)
    return (bits >= least.view(np.uint16)) & (bits <= np.float16(np.inf).view(np.uint16))


def _floor(scope: _Scope, count: int | None) -> float:
    """A threshold that leaves the `count` largest weights, from as few ranks as tell so many."""
    known = np.zeros(0, np.float32)
    for rank in range(scope.run.stored(scope.site, "top_value").shape[-1]):
        values, keys = to_float32(scope.read("top_value", rank)), scope.read("top_key", rank)
        chosen = np.take_along_axis(scope.keys[:, None, None], np.maximum(keys, 0), axis=-1)
        chosen &= scope.queries[:, None, None] & (keys >= 0)
        known = np.concatenate([known, values[chosen]])
        if count is not None and len(known) >= count:
            return _largest(known, count)
    return -1.0


def _largest(values: np.ndarray, count: int | None) -> float:
    """A threshold that leaves the `count` largest values, and those equal to the last of them."""
    if count is None or len(values) < count:
        return -1.0
    return float(np.nextafter(np.partition(values, -count)[-count], np.float32(-1)))


def _edges_of_tile(
    scope: _Scope, sample: int, layer: int, rows: np.ndarray | None, above: float
) -> tuple[np.ndarray, np.ndarray]:
    """Places in the scope and weights of one sample's layer, in all rows or in those marked (head, query_token)."""
    values = scope.tile(int(sample), int(layer))
    chosen = (values > above) & scope.queries[sample][None, :, None] & scope.keys[sample]
    if rows is not None:
        chosen &= rows[..., None]
    at = np.nonzero(chosen)
    ahead = [np.full(len(at[0]), sample), np.full(len(at[0]), layer)]
    return np.stack([*ahead, *at], 1).astype(np.int64), values[at]


def _together(
    scope: _Scope, found: list[tuple[np.ndarray, np.ndarray]], count: int | None
) -> tuple[np.ndarray, np.ndarray]:
    plan = scope.run.plan.sites[scope.site]
    places = np.concatenate([p for p, _ in found] or [np.zeros((0, 5), np.int64)])
    values = np.concatenate([v for _, v in found] or [np.zeros(0, np.float32)])
    sizes = (len(scope.samples), len(scope.layers), len(scope.heads), plan.query_tokens, plan.key_tokens)
    order = np.argsort(np.ravel_multi_index(tuple(places.T), sizes), kind="stable")
    places, values = places[order], values[order]
    if count is not None:
        best = np.sort(np.argsort(-values, kind="stable")[:count])
        places, values = places[best], values[best]
    for axis, positions in enumerate((scope.samples, scope.layers, scope.heads)):
        places[:, axis] = positions[places[:, axis]]
    return places, values


def _labelled(
    run: "Run", site: str, places: np.ndarray, values: np.ndarray, said: Mapping[str, str | float]
) -> xr.DataArray:
    """Weights with samples, layers, heads and tokens as coordinates along `edge`."""
    plan = run.plan.sites[site]
    coordinates: dict[str, np.ndarray | BackendArray] = dict(_coordinates(run, site, places))
    for axis, side, stream in ((3, "query", plan.queries), (4, "key", plan.keys)):
        coordinates[f"{side}_token"] = places[:, axis]
        for name, label in run.token_labels(stream):
            known = OfToken(label, places[:, 0], places[:, axis])
            coordinates[f"{side}_{name.removeprefix('token_')}"] = known
    row = SITE_QUANTITIES["attention"]
    attrs = {"long_name": row.meaning, "units": row.units, **said}
    return _described("edge", "attention", values, coordinates, attrs)


def _coordinates(run: "Run", site: str, places: np.ndarray) -> dict[str, np.ndarray | BackendArray]:
    return {
        "sample": Named(np.array(run.sample_ids, object), places[:, 0]),
        "layer": np.array(run.plan.sites[site].layers)[places[:, 1]],
        "head": places[:, 2],
    }


def _described(
    dim: str,
    name: str,
    values: np.ndarray,
    coordinates: Mapping[str, np.ndarray | BackendArray],
    attrs: Mapping[str, str | float],
) -> xr.DataArray:
    # By way of a Dataset: DataArray copies coordinates deeply, which takes longer than finding the edges.
    variables = {
        label: (dim, indexing.LazilyIndexedArray(column) if isinstance(column, BackendArray) else column)
        for label, column in coordinates.items()
    }
    return xr.Dataset({name: (dim, values, dict(attrs))}, coords=variables)[name]


def _plain(positions: np.ndarray) -> slice | np.ndarray:
    """Ascending neighbours as a slice, which stores read far faster than a list."""
    together = len(positions) > 0 and bool((np.diff(positions) == 1).all())
    return slice(int(positions[0]), int(positions[-1]) + 1) if together else positions
