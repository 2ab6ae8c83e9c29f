"""The lazy attention variable: reads only the tiles that an index asks for, whichever form is stored.

`AttentionArray` takes an outer index over (sample, layer, head, query_token, key_token), splits it into contiguous
tiles, asks a source for each tile, and hides what no statistic may see: samples not yet extracted, padding, and query
rows without a valid key come back as NaN.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from attnscope.chunks import read_part
from attnscope.tokens import KIND_CODES

if TYPE_CHECKING:
    from attnscope.plan import Recipe

DIMS = ("sample", "layer", "head", "query_token", "key_token")
_TILE_BYTES = 2**26
Index = int | slice | np.ndarray
Tile = tuple[slice, slice, slice, slice, slice]

ATTENTION_OF_CODE = np.square(np.arange(256, dtype=np.float32) / 255)
"""The weight that each code of the compact encoding stands for: code = round(255 * sqrt(weight))."""
_HALF_TO_FLOAT = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def to_float32(values: np.ndarray) -> np.ndarray:
    """Any stored precision as float32: bfloat16 from its bits; half by torch or a table, not by numpy's slow cast.

    torch takes a fiftieth of the table's time, but more to be loaded than most questions to be answered.
    """
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    if values.dtype == np.float16:
        torch = sys.modules.get("torch")
        if torch is not None and values.flags.writeable:
            return torch.from_numpy(values).float().numpy()
        return _HALF_TO_FLOAT[values.view(np.uint16)]
    return values.astype(np.float32, copy=False)


class TileSource(Protocol):
    """What an attention form must offer: its shape, and the float32 values of one contiguous tile.

    `without_padding`: whether padding comes as NaN already.
    """

    shape: tuple[int, ...]
    without_padding: bool

    def read(self, tile: Tile) -> np.ndarray: ...


class DenseTiles:
    """Tiles of stored attention weights; `of_code` holds the weight of each code where codes are stored."""

    without_padding = False

    def __init__(self, array: zarr.Array, of_code: zarr.Array | None = None) -> None:
        self._array = array
        self._of_code = None if of_code is None else np.asarray(of_code[:])
        self.shape = array.shape

    def read(self, tile: Tile) -> np.ndarray:
        stored = _read(self._array, tile)
        return to_float32(stored) if self._of_code is None else self._of_code[stored]


class FactoredTiles:
    """Tiles computed from stored query, key and log-sum-exp: exp(score - log_sum_exp) where the rules allow it.

    Where a tile spans all keys, its rows are normalised by their own sum instead: the rounding of a large log-sum-exp
    (1e-7 of its size) then drops out.
    """

    without_padding = False

    def __init__(self, arrays: "Mapping[str, zarr.Array]", recipes: "Sequence[Recipe]") -> None:
        self._arrays = arrays
        self._recipes = recipes
        samples, layers, heads, queries, _ = arrays["query"].shape
        self.shape: tuple[int, ...] = (samples, layers, heads, queries, arrays["key"].shape[3])

    def read(self, tile: Tile) -> np.ndarray:
        samples, layers, heads, queries, keys = tile
        groups = self.shape[2] // self._arrays["key"].shape[2]
        key_heads = slice(heads.start // groups, (heads.stop - 1) // groups + 1)
        query = to_float32(self._values("query", (samples, layers, heads, queries)))
        key = to_float32(self._values("key", (samples, layers, key_heads, keys)))
        shared = np.arange(heads.start, heads.stop) // groups - key_heads.start
        scores = query @ key[:, :, shared].swapaxes(-1, -2)
        for position, layer in enumerate(range(layers.start, layers.stop)):
            _apply_scale(scores[:, position], self._recipes[layer])
        allowed = self._allowed(samples, layers, queries, keys)
        if not allowed.all():
            scores[np.broadcast_to(~allowed[:, :, None], scores.shape)] = -np.inf
        if keys == slice(0, self.shape[4]):
            return _softmax(scores, [self._recipes[layer].sinks for layer in range(layers.start, layers.stop)], heads)
        total = self._values("log_sum_exp", (samples, layers, heads, queries))
        # A row without a valid key has the sum -inf; it is hidden from every reader, and must not make NaN noisily.
        scores -= np.where(np.isneginf(total), 0, total)[..., None]
        return np.exp(scores, out=scores)

    def _values(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return _read(self._arrays[name], index)

    def _allowed(self, samples: slice, layers: slice, queries: slice, keys: slice) -> np.ndarray:
        """Which query may attend to which key: (sample, layer, query_token, key_token)."""
        allowed = self._values("mask", (samples, layers, queries, keys))
        allowed &= self._values("key_valid", (samples, layers, keys))[:, :, None]
        causal = self._values("causal", (samples, layers))
        for position, layer in enumerate(range(layers.start, layers.stop)):
            recipe = self._recipes[layer]
            place = np.arange(queries.start, queries.stop)[:, None] + recipe.causal_offset
            distance = place - np.arange(keys.start, keys.stop)[None]
            allowed[:, position] &= ~causal[:, position, None, None] | (distance >= 0)
            if recipe.window is not None:
                allowed[:, position] &= np.abs(distance) < recipe.window
        return allowed


def _softmax(scores: np.ndarray, sinks: "Sequence[tuple[float, ...] | None]", heads: slice) -> np.ndarray:
    """Softmax of whole rows, in place; a sink takes its share and is not returned. Rows without a key become 0."""
    extra = np.stack([np.full(scores.shape[2], -np.inf) if s is None else np.array(s)[heads] for s in sinks])
    extra = extra.astype(np.float32)[:, :, None, None]
    highest = np.maximum(scores.max(axis=-1, keepdims=True), extra)
    highest[np.isneginf(highest)] = 0
    scores -= highest
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True) + np.exp(extra - highest)
    scores /= np.where(total == 0, 1, total)
    return scores


def _apply_scale(scores: np.ndarray, recipe: "Recipe") -> None:
    scores *= np.float32(recipe.scale)
    if recipe.softcap is not None:
        scores /= np.float32(recipe.softcap)
        np.tanh(scores, out=scores)
        scores *= np.float32(recipe.softcap)


class DecodedArray(BackendArray):
    """A stored array of another encoding as lazily decoded float32."""

    def __init__(self, array: zarr.Array) -> None:
        self._array = array
        self.shape = array.shape
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, lambda k: to_float32(np.asarray(self._array.oindex[k]))
        )


class AttentionArray(BackendArray):
    """Attention of one site as a lazily indexed array for xarray."""

    def __init__(
        self,
        source: TileSource,
        status: zarr.Array,
        query_valid: zarr.Array,
        query_kind: zarr.Array,
        key_kind: zarr.Array,
    ) -> None:
        self._source = source
        self._status = status
        self._query_valid = query_valid
        self._query_kind = query_kind
        self._key_kind = key_kind
        self.shape = source.shape
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._outer)

    def _outer(self, key: tuple[Index, ...]) -> np.ndarray:
        positions = [_positions(k, n) for k, n in zip(key, self.shape, strict=True)]
        result = np.empty([len(p) for p in positions], np.float32)
        if result.size:
            spans = [_bounding(p) for p in positions[3:]]
            rows, columns = (_plain(p - s.start) for p, s in zip(positions[3:], spans, strict=True))
            tiles = list(itertools.product(*map(_contiguous, positions[:3])))
            for runs in tiles:
                tile = self._read((*(array for array, _ in runs), *spans))[..., rows, :][..., columns]  # type: ignore[arg-type]
                if len(tiles) == 1:
                    result = tile
                else:
                    result[tuple(at for _, at in runs)] = tile
        return result[tuple(0 if isinstance(k, int | np.integer) else slice(None) for k in key)]

    def _read(self, tile: Tile) -> np.ndarray:
        samples, layers, _, queries, keys = tile
        done = _read(self._status, samples) == 1
        if not done.any():
            return np.full([s.stop - s.start for s in tile], np.nan, np.float32)
        values = self._source.read(tile)
        padding = KIND_CODES["padding"]
        rows = _read(self._query_kind, (samples, queries)) == padding
        columns = _read(self._key_kind, (samples, keys)) == padding
        if self._source.without_padding:
            hidden = done[:, None, None] & ~rows[:, None] & ~_read(self._query_valid, (samples, layers, queries))
            columns = np.zeros_like(columns)
        else:
            hidden = rows[:, None] | ~_read(self._query_valid, (samples, layers, queries))
        for sample in range(len(values)):
            if not done[sample]:
                values[sample] = np.nan
            elif columns[sample].any():
                values[sample][..., columns[sample]] = np.nan
        for sample, layer in np.argwhere(hidden.any(axis=-1) & done[:, None]):
            values[sample, layer][:, hidden[sample, layer]] = np.nan
        return values


class HeadMean(BackendArray):
    """The mean over heads of one array of a site, or of the positive part of the product of several.

    Only what an index asks for is read, a layer at a time and as many samples as fill one tile.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, *factors: xr.Variable) -> None:
        self._factors = factors
        samples, layers, _, queries, keys = factors[0].shape
        self.shape = (samples, layers, queries, keys)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._outer)

    def _outer(self, key: tuple[Index, ...]) -> np.ndarray:
        samples, layers, queries, keys = (_positions(k, n) for k, n in zip(key, self.shape, strict=True))
        result = np.empty([len(p) for p in (samples, layers, queries, keys)], np.float32)
        heads = self._factors[0].shape[2]
        step = max(1, _TILE_BYTES // max(1, 4 * heads * len(queries) * len(keys)))
        for start in range(0, len(samples), step):
            at = slice(start, start + step)
            for place, layer in enumerate(layers):
                index = (_plain(samples[at]), int(layer), slice(None), _plain(queries), _plain(keys))
                parts = [f[index].values for f in self._factors]
                result[at, place] = _head_mean(parts)
        return result[tuple(0 if isinstance(k, int | np.integer) else slice(None) for k in key)]


def _plain(positions: np.ndarray) -> slice | np.ndarray:
    """Ascending neighbours as a slice, which stores read far faster than a list."""
    together = len(positions) > 0 and bool((np.diff(positions) == 1).all())
    return slice(int(positions[0]), int(positions[-1]) + 1) if together else positions


def _head_mean(parts: Sequence[np.ndarray]) -> np.ndarray:
    product = parts[0] if len(parts) == 1 else np.clip(np.prod(parts, axis=0), 0, None)
    return product.mean(1)


def _read(array: zarr.Array, index: slice | tuple[slice, ...]) -> np.ndarray:
    return read_part(array, index)


def _positions(index: Index, length: int) -> np.ndarray:
    if isinstance(index, slice):
        return np.arange(length)[index]
    positions = np.atleast_1d(np.asarray(index))
    return np.where(positions < 0, positions + length, positions)


def _bounding(positions: np.ndarray) -> slice:
    return slice(int(positions.min()), int(positions.max()) + 1)


def _contiguous(positions: np.ndarray) -> list[tuple[slice, slice]]:
    """Runs of ascending neighbours: (slice of the array, slice of the result)."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [
        (slice(int(positions[at[0]]), int(positions[at[-1]]) + 1), slice(int(at[0]), int(at[-1]) + 1))
        for at in np.split(np.arange(len(positions)), breaks)
    ]
