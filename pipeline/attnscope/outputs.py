"""What the model gave under conditions, as a run holds it: sets of conditions, each made and filled by one extraction.

A set lies under `outputs/<digest>` with arrays of its final size and marks of its own; asking for further conditions
makes a further set, so that nothing that stands is ever rewritten.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
import zarr

from attnscope.arrays import COMPRESSORS
from attnscope.conditions import Condition, set_name
from attnscope.stores import delete_below

GROUP = "outputs"
DONE = 1
_NAN = float("nan")
OUTPUTS: Mapping[str, tuple[str, float, str, str]] = {
    "score": ("float32", _NAN, "1", "the target score of the model; of what it predicts, for the intact input's class"),
    "loss": ("float32", _NAN, "nat", "mean cross entropy of the words asked for, or divergence of the region's class"),
    "correct": ("float32", _NAN, "1", "share of what was asked for that the model puts first"),
    "asked": ("int32", 0, "1", "number of tokens that the loss is a mean over"),
    "changed": ("int32", -1, "1", "number of tokens that were taken away; -1 where the condition doesn't apply"),
    "content": ("int32", 0, "1", "number of content tokens that could have been taken away"),
}
"""Arrays of a set: stored type, fill value, unit, meaning; all (condition, sample), with `phrase` where by phrase."""


EMBEDDINGS = {
    "image_embedding": "unit vector of the image in the space that it shares with texts",
    "text_embedding": "unit vector of the text in the space that it shares with images",
}


@dataclass(frozen=True)
class OutputSet:
    """Some conditions whose outputs are stored together; all of them by sample, or all by phrase."""

    conditions: tuple[Condition, ...]
    phrases: int

    @cached_property
    def path(self) -> str:
        """Where the set lies in the run."""
        return f"{GROUP}/{set_name(self.conditions)}"

    @property
    def by_phrase(self) -> bool:
        """Whether the arrays have a dimension of phrases."""
        return self.conditions[0].by_phrase

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of the arrays."""
        return ("condition", "sample", "phrase") if self.by_phrase else ("condition", "sample")

    def shape(self, samples: int) -> tuple[int, ...]:
        """The sizes of the arrays for so many samples."""
        return (len(self.conditions), samples, *([max(1, self.phrases)] if self.by_phrase else []))


def stored_sets(root: zarr.Group) -> list[OutputSet]:
    """The sets that a run holds, finished or not."""
    outputs = root.get(GROUP)
    if not isinstance(outputs, zarr.Group):
        return []
    found = []
    for name in _listed(outputs, "sets"):
        group = outputs[name]
        assert isinstance(group, zarr.Group)
        conditions = tuple(Condition.from_json(c) for c in json.loads(str(group.attrs["conditions"])))
        found.append(OutputSet(conditions, int(str(group.attrs["phrases"]))))
    return found


def make_set(root: zarr.Group, made: OutputSet, unit: int) -> None:
    """The arrays of a set at full size; nothing where it stands already."""
    outputs = root.require_group(GROUP)
    name = made.path.rpartition("/")[2]
    known = _listed(outputs, "sets")
    if name in known and len(status_of(root, made)) == root["samples/status"].shape[0]:  # type: ignore[union-attr]
        return
    # What a maker that was killed left is of no use.
    delete_below(root.store, made.path)
    group = outputs.create_group(name)
    samples = root["samples/status"].shape[0]  # type: ignore[union-attr]
    shape = made.shape(samples)
    chunks = tuple(min(unit, n) if d == "sample" else n for d, n in zip(made.dims, shape, strict=True))
    for array, (dtype, fill, units, meaning) in OUTPUTS.items():
        _create(group, array, shape, chunks, dtype, fill, made.dims, {"units": units, "long_name": meaning})
    attrs = {"units": "", "long_name": "0 missing, 1 done; written last"}
    _create(group, "status", (samples,), (min(unit, samples),), "uint8", 0, ("sample",), attrs)
    group.attrs.update(
        {
            "conditions": json.dumps([c.to_json() for c in made.conditions]),
            "names": [c.name for c in made.conditions],
            "phrases": made.phrases,
            "members": sorted([*OUTPUTS, "status"]),
        }
    )
    # Entered last: a set counts from here on.
    members = sorted({*_listed(outputs, "members"), name})
    outputs.attrs.update({"sets": sorted({*known, name}), "members": members})


def write_set(root: zarr.Group, made: OutputSet, block: range, values: Mapping[str, np.ndarray]) -> None:
    """Write a whole block of a set, and its marks last; values are (condition, sample, ...)."""
    for name, array in values.items():
        stored = root[f"{made.path}/{name}"].with_config({"write_empty_chunks": True})  # type: ignore[union-attr]
        stored[:, block.start : block.stop] = array
    root[f"{made.path}/status"][block.start : block.stop] = np.uint8(DONE)  # type: ignore[index]


def write_embeddings(root: zarr.Group, made: OutputSet, block: range, values: Mapping[str, np.ndarray]) -> None:
    """Write the vectors of a block, (sample, channel) each; the arrays are made with the first block that comes."""
    group = root[made.path]
    assert isinstance(group, zarr.Group)
    samples = status_of(root, made).shape[0]
    for name, array in values.items():
        if name not in group:
            attrs = {"units": "1", "long_name": EMBEDDINGS[name]}
            shape = (samples, array.shape[1])
            chunks = (root[f"{made.path}/score"].chunks[1], array.shape[1])  # type: ignore[union-attr]
            _create(group, name, shape, chunks, "float32", _NAN, ("sample", "channel"), attrs)
            group.attrs["members"] = sorted({*_listed(group, "members"), name})
        group[name][block.start : block.stop] = array  # type: ignore[index]


def read_embeddings(root: zarr.Group, ids: Sequence[str]) -> xr.Dataset | None:
    """The vectors of image and text, (sample, channel) each; None where no finished set has them."""
    for made in complete_sets(root):
        group = root[made.path]
        if isinstance(group, zarr.Group) and set(EMBEDDINGS) <= set(_listed(group, "members")):
            found = {
                name: (("sample", "channel"), np.asarray(group[name][:]), {"long_name": words, "units": "1"})  # type: ignore[index]
                for name, words in EMBEDDINGS.items()
            }
            return xr.Dataset(found, {"sample": np.array(list(ids), object)})
    return None


def status_of(root: zarr.Group, made: OutputSet) -> np.ndarray:
    """(sample,) 0 where the set still has to be done."""
    return np.asarray(root[f"{made.path}/status"][:])  # type: ignore[index]


def is_complete(root: zarr.Group, made: OutputSet) -> bool:
    """Whether a set is done for every sample that the run has by now."""
    status = status_of(root, made)
    return len(status) == root["samples/status"].shape[0] and bool(status.all())  # type: ignore[union-attr]


def read_outputs(root: zarr.Group, conditions: Sequence[Condition], ids: Sequence[str]) -> xr.Dataset:
    """The outputs under these conditions, in this order: (condition, sample), with `phrase` where they are by phrase.

    Raises
    ------
    KeyError
        Naming the first condition that no finished set holds.
    """
    places = {c: (made, at) for made in complete_sets(root) for at, c in enumerate(made.conditions)}
    for condition in conditions:
        if condition not in places:
            raise KeyError(condition.name)
    phrases = max([places[c][0].shape(0)[2] for c in conditions if c.by_phrase], default=0)
    shape = (len(conditions), len(ids), *([phrases] if phrases else []))
    dims = ("condition", "sample", "phrase")[: len(shape)]
    loaded: dict[str, dict[str, np.ndarray]] = {}
    variables: dict[str, Any] = {}
    for name, (dtype, fill, units, meaning) in OUTPUTS.items():
        values = np.full(shape, fill, dtype)
        for row, condition in enumerate(conditions):
            made, at = places[condition]
            arrays = loaded.setdefault(made.path, {})
            if name not in arrays:
                arrays[name] = np.asarray(root[f"{made.path}/{name}"][:])  # type: ignore[index]
            found = arrays[name][at]
            # An output of the whole sample stands for each of its phrases.
            values[row] = found[:, None] if phrases and found.ndim == 1 else _as_wide(found, phrases, fill)
        variables[name] = (dims, values, {"long_name": meaning, "units": units})
    coordinates = {
        "condition": np.array([c.name for c in conditions], object),
        "sample": np.array(list(ids), object),
    }
    return xr.Dataset(variables, coordinates)


def set_of(path: str) -> str:
    """The name of the set that an array or group of a run belongs to; '' for none."""
    parts = path.split("/")
    return parts[1] if parts[0] == GROUP and len(parts) > 1 and len(parts[1]) == len(set_name([])) else ""


def forget_set(root: zarr.Group, name: str) -> None:
    """Delete a set, so that it counts as never made."""
    outputs = root.require_group(GROUP)
    for attribute in ("sets", "members"):
        outputs.attrs[attribute] = [n for n in _listed(outputs, attribute) if n != name]
    delete_below(root.store, f"{GROUP}/{name}")


def complete_sets(root: zarr.Group) -> list[OutputSet]:
    """The sets that are done for every sample."""
    return [made for made in stored_sets(root) if is_complete(root, made)]


def split_sets(conditions: Iterable[Condition], phrases: int) -> list[OutputSet]:
    """The sets in which these conditions are stored: those by sample, and those by phrase."""
    listed = list(conditions)
    parts = [tuple(c for c in listed if c.by_phrase == kind) for kind in (False, True)]
    return [OutputSet(part, phrases) for part in parts if part]


def _listed(group: zarr.Group, attribute: str) -> list[str]:
    """Names among a group's attributes, in order."""
    return sorted(map(str, group.attrs.get(attribute, [])))  # type: ignore[arg-type]


def _as_wide(values: np.ndarray, phrases: int, fill: float) -> np.ndarray:
    if values.ndim == 1 or values.shape[1] == phrases:
        return values
    wide = np.full((len(values), phrases), fill, values.dtype)
    wide[:, : values.shape[1]] = values
    return wide


def _create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    fill: float,
    dims: tuple[str, ...],
    attrs: Mapping[str, str],
) -> None:
    group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(1, n) for n in chunks),
        dtype=dtype,
        fill_value=fill,
        dimension_names=dims,
        compressors=COMPRESSORS,
        attributes=dict(attrs),
    )
