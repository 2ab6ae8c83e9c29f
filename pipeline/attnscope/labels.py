"""What the samples and tokens along an array's dimensions are, looked up only when it is asked for.

Most questions are answered without the kinds, texts and places of their tokens; opening the arrays that hold these
takes longer than reading a row of attention.
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.abc.store import Store

from attnscope.arrays import ArrayPlan
from attnscope.quantities import quantity

TOKEN_LABELS = ("kind", "token_text", "row", "column")
Outer = tuple[int | slice | np.ndarray, ...]


class _Label(BackendArray):
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._outer)

    def _outer(self, key: Outer) -> np.ndarray:
        raise NotImplementedError


class StoredLabel(_Label):
    """An array at a path of a store, opened when it is first read, and no longer than `shape` says."""

    def __init__(self, store: Store, path: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._store = store
        self._path = path
        self.shape = shape
        self.dtype = dtype

    def _outer(self, key: Outer) -> np.ndarray:
        array = zarr.open_array(self._store, path=self._path, mode="r", zarr_format=3)
        within = tuple(_within(k, n) if isinstance(k, slice) else k for k, n in zip(key, self.shape, strict=True))
        return np.asarray(array.oindex[within])


class Named(_Label):
    """Names by number."""

    def __init__(self, names: np.ndarray, numbers: np.ndarray) -> None:
        self._names = names
        self._numbers = numbers
        self.shape = numbers.shape
        self.dtype = names.dtype

    def _outer(self, key: Outer) -> np.ndarray:
        return np.asarray(self._names[self._numbers[key]])


class OfToken(_Label):
    """What a label (sample, token) says of some tokens, one after another: token `tokens[i]` of sample `samples[i]`."""

    def __init__(self, label: xr.Variable, samples: np.ndarray, tokens: np.ndarray) -> None:
        self._label = label
        self._samples = samples
        self._tokens = tokens
        self.shape = samples.shape
        self.dtype = label.dtype

    def _outer(self, key: Outer) -> np.ndarray:
        samples, tokens = self._samples[key], self._tokens[key]
        wanted, rows = np.unique(samples, return_inverse=True)
        if not len(wanted):
            return np.zeros(samples.shape, self.dtype)
        # Few samples are wanted as they are, many by way of all between the first and the last.
        known = self._label[int(wanted[0]) : int(wanted[-1]) + 1].values
        return np.asarray(known[(wanted - wanted[0])[rows.reshape(samples.shape)], tokens])


def token_labels(store: Store, stream: str, shape: tuple[int, int]) -> Iterator[tuple[str, xr.Variable]]:
    """Kind, text, row and column of the tokens of a stream, (sample, token) each, by the names of their arrays."""
    for name in TOKEN_LABELS:
        row = quantity("stream", name)
        plan = ArrayPlan(f"{stream}/{name}", row, shape, row.dtype)
        dtype = np.dtypes.StringDType() if row.dtype == "string" else np.dtype(row.dtype)
        label = StoredLabel(store, plan.path, shape, dtype)
        yield name, xr.Variable(row.dims, indexing.LazilyIndexedArray(label), plan.attrs)


def _within(span: slice, length: int) -> slice:
    start, stop, step = span.indices(length)
    return slice(start, stop if stop >= 0 else None, step)
