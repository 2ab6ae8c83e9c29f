"""Selection: samples, layers, heads and tokens of a run, chosen by the names that people use.

Samples are chosen by id, layers by the model's own numbers, heads by number, and tokens by position, kind, text, or
their place on the patch grid. What a text means differs between samples, so each sample has its own tokens; a result
covers the union, and is NaN where a sample has no such token.
"""

import difflib
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import xarray as xr

from attnscope.tokens import KIND_CODES, KINDS

if TYPE_CHECKING:
    from attnscope.run import Run

Choice = SupportsIndex | str | slice | Sequence[SupportsIndex | str] | None
"""How to choose along one dimension; None chooses everything."""

_DIMS = {
    "head": ("head", "kv_head"),
    "query": ("query_token", "query_kind"),
    "key": ("key_token", "key_kind"),
}
_NUMBER = re.compile(r"-?\d+")
_SLICE = re.compile(r"(-?\d*):(-?\d*)(?::(-?\d+))?")
_PIECE_MARKS = ("##", "Ġ", "▁")
_NAMED_AT_MOST = 12


class SelectionError(ValueError):
    """A choice that a run can't meet; the message is one sentence and names what is known."""


@dataclass(frozen=True)
class Selection:
    """What was chosen, not yet read: a lazy array, and which tokens are whose where samples differ.

    `masks` are (sample, query_token) or (sample, key_token); elements outside of them are NaN (False in a boolean
    quantity).
    """

    array: xr.DataArray
    masks: tuple[xr.DataArray, ...] = ()

    def values(self) -> xr.DataArray:
        """The chosen values; lazy as long as all samples mean the same tokens."""
        chosen = self.array
        outside = False if chosen.dtype == bool else np.nan
        for mask in self.masks:
            chosen = chosen.where(mask, outside)
        return chosen

    def by_sample(self) -> Iterator[xr.DataArray]:
        """The same, one sample at a time, so that memory doesn't grow with their number."""
        if "sample" not in self.array.dims:
            yield self.values()
            return
        for at in range(self.array.sizes["sample"]):
            masks = tuple(mask.isel(sample=slice(at, at + 1)) for mask in self.masks)
            yield Selection(self.array.isel(sample=slice(at, at + 1)), masks).values()


def select(
    run: "Run",
    site: str,
    *,
    quantity: str = "attention",
    sample: Choice = None,
    layer: Choice = None,
    head: Choice = None,
    query: Choice = None,
    key: Choice = None,
) -> xr.DataArray:
    """A part of one quantity of a site; only what is asked for is read.

    Parameters
    ----------
    quantity
        Its name in the schema.
    sample
        An id, a position, a slice of positions, or a list of them.
    layer
        The model's own layer numbers: 4, '4', '2:5' (5 not included), or a list.
    head
        A number, a slice, or a list; of key heads for a quantity that has only those.
    query, key
        Tokens: a position, a slice such as '2:5', a list; a kind ('image', 'text', 'cls', ...); a text ("'dog'",
        without regard to case; one spelled by several tokens chooses them all); a box on the grid, 'r0:r1,c0:c1'.

    Returns
    -------
    xarray.DataArray
        A single number drops its dimension, everything else keeps it. Where a kind, text or box means other tokens
        in other samples, the result covers all of them and is NaN where a sample has none there.

    Raises
    ------
    SelectionError
        When there is no such sample, layer, head or token; the message names the known ones.
    """
    choices = {"sample": sample, "layer": layer, "head": head, "query": query, "key": key}
    return choose(run, site, quantity, choices).values()


def choose(
    run: "Run", site: str, quantity: str, choices: Mapping[str, Choice], computed: xr.DataArray | None = None
) -> Selection:
    """The selection that `select` reads; `choices` are by 'sample', 'layer', 'head', 'query' and 'key'.

    `computed` stands in for a quantity that the run doesn't hold.
    """
    known = run.quantities(site)
    if quantity not in known and computed is None:
        raise SelectionError(f"site {site!r} of {run.location} has no {quantity!r}; it has {', '.join(known)}")
    array = _with_tokens(run, site, run.array(site, quantity) if computed is None else computed)
    dims = {name: _dim_of(name, array, quantity) for name, choice in choices.items() if choice is not None}
    chosen: dict[str, int | np.ndarray] = {}
    for name in ("sample", "layer", "head"):
        if name in dims:
            chosen[dims[name]] = _axis(run, site, name, array.sizes[dims[name]]).positions(choices[name])
    samples = np.atleast_1d(chosen.get("sample", np.arange(len(run.sample_ids))))
    masks = []
    for name in ("query", "key"):
        if dims.get(name) == f"{name}_kind":
            chosen[f"{name}_kind"] = _kinds_chosen(choices[name], quantity)
        elif name in dims:
            positions, mask = _tokens(run, site, name, choices[name], samples)
            chosen[dims[name]] = positions
            if mask is not None:
                masks.append(xr.DataArray(mask, dims=("sample", dims[name])))
    return Selection(array.isel(chosen), tuple(masks))


def chosen_positions(run: "Run", site: str, name: str, choice: Choice) -> np.ndarray:
    """Positions along 'sample', 'layer' or 'head' of a site's attention, as `select` understands a choice."""
    lengths = {"sample": len(run.sample_ids), "layer": len(run.plan.sites[site].layers)}
    length = lengths.get(name, run.plan.sites[site].heads)
    found = np.arange(length) if choice is None else _axis(run, site, name, length).positions(choice)
    return np.atleast_1d(found)


def chosen_tokens(run: "Run", site: str, side: str, choice: Choice, samples: np.ndarray) -> np.ndarray:
    """Which tokens are chosen, of the samples at these positions: (sample, token) bool; `side` is 'query' or 'key'."""
    plan = run.plan.sites[site]
    length = plan.query_tokens if side == "query" else plan.key_tokens
    if choice is None:
        return np.ones((len(samples), length), bool)
    positions, mask = _tokens(run, site, side, choice, samples)
    found = np.zeros((len(samples), length), bool)
    found[:, np.atleast_1d(positions)] = True if mask is None else mask
    return found


# -- samples, layers, heads --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """The labels along a dimension. Numbers and slices mean positions, or the labels themselves if `numbered`."""

    name: str
    labels: Sequence[str | int]
    place: str
    numbered: bool = False

    def positions(self, choice: Choice) -> int | np.ndarray:
        """Positions of what was chosen: one number for one thing, an array for a slice or list."""
        if isinstance(choice, str) and choice not in self.labels:
            pieces = [piece.strip() for piece in choice.split(",")]
            choice = pieces[0] if len(pieces) == 1 else pieces
        if isinstance(choice, Sequence) and not isinstance(choice, str):
            found = np.concatenate([np.atleast_1d(self._single(piece)) for piece in choice] or [np.array([], int)])
            return self._some(found.astype(int), choice)
        if isinstance(choice, np.ndarray):
            return self.positions(choice.tolist())
        return self._single(choice)

    def _single(self, choice: Choice) -> int | np.ndarray:
        if isinstance(choice, str) and choice in self.labels:
            return self.labels.index(choice)
        meant = _number_or_slice(choice) if isinstance(choice, str) else choice
        if isinstance(meant, slice):
            return self._some(self._span(meant), choice)
        if not isinstance(meant, SupportsIndex):
            raise self._unknown(choice)
        number = operator.index(meant)
        if self.numbered and number in self.labels:
            return self.labels.index(number)
        if self.numbered or not -len(self.labels) <= number < len(self.labels):
            raise self._unknown(choice)
        return number % len(self.labels)

    def _span(self, span: slice) -> np.ndarray:
        if not self.numbered:
            return np.arange(len(self.labels))[span]
        inside = [
            at
            for at, number in enumerate(self.labels)
            if (span.start is None or number >= span.start) and (span.stop is None or number < span.stop)
        ]
        return np.array(inside, int)[:: span.step]

    def _some(self, found: np.ndarray, choice: Choice) -> np.ndarray:
        if not found.size:
            raise self._unknown(choice)
        return found

    def _unknown(self, choice: Choice) -> SelectionError:
        near = difflib.get_close_matches(str(choice), [str(label) for label in self.labels], 1)
        hint = f" (did you mean {near[0]!r}?)" if near and not self.numbered else ""
        shown = _shown(choice)
        return SelectionError(f"{self.place} has no {self.name} {shown}{hint}; it has {_listed(self.labels)}")


def _axis(run: "Run", site: str, name: str, length: int) -> _Axis:
    if name == "sample":
        return _Axis("sample", run.sample_ids, run.location)
    if name == "layer":
        return _Axis("layer", run.plan.sites[site].layers, f"site {site!r}", numbered=True)
    return _Axis("head", range(length), f"site {site!r}")


def _dim_of(name: str, array: xr.DataArray, quantity: str) -> str:
    dims = _DIMS.get(name, (name,))
    for dim in dims:
        if dim in array.dims:
            return dim
    raise SelectionError(f"{quantity!r} has no {name} to choose; its dimensions are {', '.join(map(str, array.dims))}")


def _kinds_chosen(choice: Choice, quantity: str) -> int | np.ndarray:
    """Codes of kinds of tokens: one number for one kind, an array for several."""
    pieces = [p.strip() for p in choice.split(",")] if isinstance(choice, str) else choice
    if not isinstance(pieces, Sequence) or not all(piece in KIND_CODES for piece in pieces):
        raise SelectionError(f"{quantity!r} is by kind of token, got {_shown(choice)}; kinds are {', '.join(KINDS)}")
    codes = [KIND_CODES[str(piece)] for piece in pieces]
    return codes[0] if isinstance(choice, str) and len(codes) == 1 else np.array(codes)


# -- tokens ------------------------------------------------------------------------------------------------------------


def _tokens(
    run: "Run", site: str, side: str, choice: Choice, samples: np.ndarray
) -> tuple[int | np.ndarray, np.ndarray | None]:
    """Positions along a token dimension, and which of them are whose (sample, token) where samples differ."""
    plan = run.plan.sites[site]
    stream, length = (plan.queries, plan.query_tokens) if side == "query" else (plan.keys, plan.key_tokens)
    axis = _Axis(f"{side} token", range(length), f"site {site!r}")
    meant = _plain_positions(choice)
    if meant is not None:
        return axis.positions(meant), None
    tokens = run.tokens(stream).isel(sample=samples)
    pieces = [choice] if isinstance(choice, str) else list(choice)  # type: ignore[arg-type]
    mask = np.zeros((len(samples), length), bool)
    for piece in pieces:
        plain = _plain_positions(piece)
        if plain is None:
            mask |= _named_tokens(tokens, str(piece), f"site {site!r} has no {side} token")
        else:
            mask[:, axis.positions(plain)] = True
    positions = np.flatnonzero(mask.any(axis=0))
    mask = mask[:, positions]
    return positions, None if mask.all() else mask


def _plain_positions(choice: Choice) -> Choice:
    """Numbers, slices and lists of numbers as such; None for what only the tokens themselves can tell."""
    if isinstance(choice, str):
        pieces = [_number_or_slice(piece.strip()) for piece in choice.split(",")]
        if len(pieces) == 1:
            return pieces[0]
        return [p for p in pieces if isinstance(p, int)] if all(isinstance(p, int) for p in pieces) else None
    if isinstance(choice, Sequence) and any(isinstance(piece, str | slice) for piece in choice):
        return None
    return choice


def _named_tokens(tokens: xr.Dataset, name: str, complaint: str) -> np.ndarray:
    """Which tokens (sample, token) are of this kind, spell this text, or lie in this box."""
    quoted = len(name) > 1 and name[0] == name[-1] and name[0] in "'\""
    box = _box(name)
    if box is not None:
        mask = _in_box(tokens, box)
        known = f"the grid has {_extent(tokens['row'])} rows and {_extent(tokens['column'])} columns"
    elif name in KIND_CODES:
        mask = tokens["kind"].values == KIND_CODES[name]
        known = f"its kinds are {_kinds(tokens)}"
    else:
        mask, known = _of_text(tokens, name[1:-1] if quoted else name)
        known = f"its texts are {known}" if quoted else f"its kinds are {_kinds(tokens)}, its texts {known}"
    if not mask.any():
        raise SelectionError(f"{complaint} {_shown(name)} in the chosen samples; {known}")
    return mask


def _in_box(tokens: xr.Dataset, box: tuple[slice, slice]) -> np.ndarray:
    mask = np.ones(tokens["row"].shape, bool)
    for name, span in zip(("row", "column"), box, strict=True):
        place = tokens[name].values
        mask &= place >= max(span.start or 0, 0)
        if span.stop is not None:
            mask &= place < span.stop
    return mask


def _of_text(tokens: xr.Dataset, text: str) -> tuple[np.ndarray, str]:
    wanted = "".join(text.split()).casefold()
    strings = [[_plain_text(str(token)) for token in row] for row in tokens["token_text"].values]
    known = sorted({token for row in strings for token in row if token[:1].isalnum()})
    near = difflib.get_close_matches(wanted, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    told = f"{_listed(known) or 'none'}{hint}"
    return np.array([_spelling(row, wanted) for row in strings], bool), told


def _spelling(strings: Sequence[str], wanted: str) -> list[bool]:
    """Which tokens take part in spelling a text, alone or one behind another."""
    part = [False] * len(strings)
    for start in range(len(strings)):
        spelled = ""
        for stop in range(start, len(strings)):
            spelled += strings[stop]
            if not strings[stop] or not wanted.startswith(spelled):
                break
            if spelled == wanted:
                part[start : stop + 1] = [True] * (stop + 1 - start)
                break
    return part


def _plain_text(token: str) -> str:
    """A token's string without the marks by which tokenizers tell words from pieces of words."""
    for mark in _PIECE_MARKS:
        token = token.removeprefix(mark)
    return token.removesuffix("</w>").strip().casefold()


def _with_tokens(run: "Run", site: str, array: xr.DataArray) -> xr.DataArray:
    """The array with number, kind, text, row and column of its tokens as coordinates, read when they are needed."""
    plan = run.plan.sites[site]
    coordinates: dict[str, xr.Variable | np.ndarray] = {}
    for side, stream in (("query", plan.queries), ("key", plan.keys)):
        dim = f"{side}_token"
        if dim not in array.dims:
            continue
        coordinates[dim] = np.arange(array.sizes[dim])
        if f"{side}_kind" in array.coords:
            continue
        for name, label in run.token_labels(stream):
            coordinates[f"{side}_{name.removeprefix('token_')}"] = xr.Variable(
                ("sample", dim), label._data, label.attrs
            )
    if "kv_head" in array.dims:
        coordinates["kv_head"] = np.arange(array.sizes["kv_head"])
    return array.assign_coords(coordinates)


# -- words -------------------------------------------------------------------------------------------------------------


def _number_or_slice(text: str) -> int | slice | None:
    if _NUMBER.fullmatch(text):
        return int(text)
    found = _SLICE.fullmatch(text)
    if not found or found[3] == "0":
        return None
    return slice(*(int(part) if part else None for part in found.groups()))


def _box(text: str) -> tuple[slice, slice] | None:
    pieces = [_number_or_slice(piece.strip()) for piece in text.split(",")]
    if len(pieces) != 2:
        return None
    rows, columns = (slice(p, p + 1) if isinstance(p, int) else p for p in pieces)
    return (rows, columns) if isinstance(rows, slice) and isinstance(columns, slice) else None


def _kinds(tokens: xr.Dataset) -> str:
    return ", ".join(KINDS[code] for code in np.unique(tokens["kind"].values))


def _extent(place: xr.DataArray) -> int:
    return int(place.max()) + 1


def _shown(choice: object) -> str:
    if isinstance(choice, slice):
        return ":".join("" if part is None else str(part) for part in (choice.start, choice.stop))
    return choice if isinstance(choice, str) and choice[:1] in ("'", '"') else repr(choice)


def _listed(labels: Iterable[str | int]) -> str:
    """What is known, in a few words: a range for numbers without a gap, else the first ones."""
    names = list(labels)
    if len(names) > 2 and isinstance(names[0], int) and names == list(range(names[0], names[0] + len(names))):
        return f"{names[0]} to {names[-1]}"
    shown = ", ".join(map(str, names[:_NAMED_AT_MOST]))
    return shown if len(names) <= _NAMED_AT_MOST else f"{shown} and {len(names) - _NAMED_AT_MOST} more"


__all__ = ["Choice", "Selection", "SelectionError", "choose", "select"]
