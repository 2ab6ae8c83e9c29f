"""Questions over many samples: which queries put more than so much on which keys, and which heads do.

They are answered from the summaries that lie beside the attention. The summaries are of the attention as it is stored,
so the answer is that of the attention itself; what they don't settle is read, and the answer says how much that was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from attnscope.attention_array import to_float32
from attnscope.quantities import SITE_QUANTITIES
from attnscope.selection import Choice, SelectionError, chosen_positions, chosen_tokens
from attnscope.tokens import KIND_CODES

if TYPE_CHECKING:
    from attnscope.run import Run

_BLOCK_BYTES = 2**27
_TOKEN_NAMES = ("kind", "token_text", "row", "column")


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

    def read(self, name: str) -> np.ndarray:
        """A quantity of the chosen samples, layers and heads."""
        array = self.run.array(self.site, name)
        found = array.isel(sample=_plain(self.samples), layer=_plain(self.layers))
        return np.asarray(found.isel(head=_plain(self.heads)).values)

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
    plan = scope.run.plan.sites[scope.site]
    if "top_value" not in scope.run.quantities(scope.site):
        floor = -1.0 if above is None else above
        tiles = np.ndindex(len(scope.samples), len(scope.layers))
        found = [_edges_of_tile(scope, sample, layer, None, floor) for sample, layer in tiles]
        return _together(scope, found, count)
    top, keys = to_float32(scope.read("top_value")), scope.read("top_key")
    rows = scope.queries[:, None, None]
    if above is None:
        chosen = np.take_along_axis(scope.keys[:, None, None, None], np.maximum(keys, 0), axis=-1) & rows[..., None]
        above = _largest(top[chosen & (keys >= 0)], count)
    # Rows whose weakest stored weight still counts may have further ones; weights of 0 are not among the stored.
    weakest = top[..., -1]
    open_rows = ~(weakest <= above) if above < 0 else (weakest > above) & (top.shape[-1] < plan.key_tokens)
    open_rows &= rows
    at = np.nonzero((top > above) & (rows & ~open_rows)[..., None])
    places, values = np.stack([*at[:4], keys[at]], 1).astype(np.int64), top[at]
    on_keys = scope.keys[places[:, 0], places[:, 4]]
    found = [(places[on_keys], values[on_keys])]
    for sample, layer in np.argwhere(open_rows.any(axis=(2, 3))):
        found.append(_edges_of_tile(scope, sample, layer, open_rows[sample, layer], above))
    return _together(scope, found, count)


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
    places = np.concatenate([p for p, _ in found] or [np.zeros((0, 5), np.int64)])
    values = np.concatenate([v for _, v in found] or [np.zeros(0, np.float32)])
    order = np.lexsort(places.T[::-1])
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
    coordinates = _coordinates(run, site, places)
    for axis, side, stream in ((3, "query", plan.queries), (4, "key", plan.keys)):
        coordinates[f"{side}_token"] = places[:, axis]
        tokens = run.tokens(stream)
        samples, rows = np.unique(places[:, 0], return_inverse=True)
        for name in _TOKEN_NAMES:
            known = np.asarray(tokens[name].isel(sample=_plain(samples)).values)
            coordinates[f"{side}_{name.removeprefix('token_')}"] = known[rows, places[:, axis]]
    row = SITE_QUANTITIES["attention"]
    attrs = {"long_name": row.meaning, "units": row.units, **said}
    return _described("edge", "attention", values, coordinates, attrs)


def _coordinates(run: "Run", site: str, places: np.ndarray) -> dict[str, np.ndarray]:
    ids = np.array(run.sample_ids, object)
    return {
        "sample": ids[places[:, 0]],
        "layer": np.array(run.plan.sites[site].layers)[places[:, 1]],
        "head": places[:, 2],
    }


def _described(
    dim: str, name: str, values: np.ndarray, coordinates: Mapping[str, np.ndarray], attrs: Mapping[str, str | float]
) -> xr.DataArray:
    # By way of a Dataset: DataArray copies coordinates deeply, which takes longer than finding the edges.
    variables = {label: (dim, column) for label, column in coordinates.items()}
    return xr.Dataset({name: (dim, values, dict(attrs))}, coords=variables)[name]


def _plain(positions: np.ndarray) -> slice | np.ndarray:
    """Ascending neighbours as a slice, which stores read far faster than a list."""
    together = len(positions) > 0 and bool((np.diff(positions) == 1).all())
    return slice(int(positions[0]), int(positions[-1]) + 1) if together else positions
