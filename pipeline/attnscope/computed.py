"""Summaries that a run doesn't hold, computed from its attention when they are asked for.

They are those of the attention as it is stored, to the rounding of a sum, and take the reading of all of it.
"""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from attnscope.quantities import SITE_QUANTITIES
from attnscope.tokens import KIND_CODES, KINDS

if TYPE_CHECKING:
    from attnscope.run import Run

COMPUTABLE = ("entropy", "kind_mass", "kind_mass_max", "kind_max")


def computed_summary(run: "Run", site: str, name: str) -> xr.DataArray:
    """A summary of a site, lazily, with the dimensions and coordinates of a stored one; one of `COMPUTABLE`."""
    row = SITE_QUANTITIES[name]
    attention = run.attention(site)
    attrs = {"long_name": row.meaning, "units": row.units}
    variable = xr.Variable(row.dims, indexing.LazilyIndexedArray(_Summary(attention, name)), attrs)
    if "query_kind" in row.dims:
        labels = {d: attention[d] for d in ("sample", "layer", "head")}
        return xr.DataArray(variable, coords=labels | {"query_kind": list(KINDS), "key_kind": list(KINDS)}, name=name)
    return xr.DataArray(variable, coords={n: c for n, c in attention.coords.items() if set(c.dims) <= set(row.dims)})


def entropy(attention: np.ndarray) -> np.ndarray:
    """-sum p ln p over the last dimension, in nats; NaN for a row of NaN alone."""
    terms = np.where(attention > 0, attention * np.log(np.where(attention > 0, attention, 1)), 0)
    return np.where(np.isnan(attention).all(axis=-1), np.nan, -terms.sum(axis=-1))


def by_kind(attention: np.ndarray, query_kind: np.ndarray, key_kind: np.ndarray, name: str) -> np.ndarray:
    """A summary (head, kind of query, kind of key) of attention (head, query_token, key_token); NaN for no tokens.

    'kind_mass' is the mean over the queries of a kind of what all keys of a kind get together, 'kind_mass_max' the
    largest of these, 'kind_max' the largest single weight.
    """
    found = np.full((len(attention), len(KINDS), len(KINDS)), np.nan, np.float32)
    dead = np.isnan(attention).all(axis=(0, 2))
    weights = np.nan_to_num(attention)
    for to in set(key_kind.tolist()) - {KIND_CODES["padding"]}:
        keys = weights[..., key_kind == to]
        of_row = keys.max(axis=-1) if name == "kind_max" else keys.sum(axis=-1)
        for of in set(query_kind[~dead].tolist()) - {KIND_CODES["padding"]}:
            rows = of_row[:, (query_kind == of) & ~dead]
            found[:, of, to] = rows.mean(axis=-1) if name == "kind_mass" else rows.max(axis=-1)
    return found


class _Summary(BackendArray):
    """One summary, computed a sample's layer at a time."""

    dtype = np.dtype(np.float32)

    def __init__(self, attention: xr.DataArray, name: str) -> None:
        self._attention = attention
        self._name = name
        ahead = attention.shape[:3]
        self.shape = (*ahead, attention.shape[3]) if name == "entropy" else (*ahead, len(KINDS), len(KINDS))

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._outer)

    def _outer(self, key: tuple[int | slice | np.ndarray, ...]) -> np.ndarray:
        samples, layers = (np.arange(n)[k] for k, n in zip(key[:2], self.shape[:2], strict=True))
        tiles = [[self._of(int(s), int(n)) for n in np.atleast_1d(layers)] for s in np.atleast_1d(samples)]
        whole = np.array(tiles, np.float32).reshape(np.size(samples), np.size(layers), *self.shape[2:])
        for axis, k in enumerate(key[2:], start=2):
            whole = whole[(slice(None),) * axis + (np.atleast_1d(k) if isinstance(k, int | np.integer) else k,)]
        return whole[tuple(0 if isinstance(k, int | np.integer) else slice(None) for k in key)]

    def _of(self, sample: int, layer: int) -> np.ndarray:
        tile = self._attention[sample, layer]
        if self._name == "entropy":
            return entropy(tile.values)
        return by_kind(tile.values, tile["query_kind"].values, tile["key_kind"].values, self._name)
