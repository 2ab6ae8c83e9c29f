"""Token layouts: what each token of a stream is, and where it lies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("padding", "text", "image", "cls", "register", "special", "query", "generated", "unknown", "audio", "channel")
"""What a token may be, in the order of the stored codes."""

KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one stream for a batch of samples.

    `kind` holds codes of `KINDS`, (sample, token) int8; `text` the token strings, (sample, token) object, '' where a
    token has none; `row` and `column` the place on the patch grid, (sample, token) int16, -1 where a token has none.
    """

    kind: np.ndarray
    text: np.ndarray
    row: np.ndarray
    column: np.ndarray

    @property
    def token_count(self) -> int:
        """Tokens of the longest sample, padding included."""
        return int(self.kind.shape[1])


def text_layout(token_text: Sequence[Sequence[str]], kind: np.ndarray) -> TokenLayout:
    """The layout of text tokens: strings and kinds, no places."""
    nowhere = np.full(kind.shape, -1, np.int16)
    return TokenLayout(kind.astype(np.int8), np.array(token_text, dtype=object).reshape(kind.shape), nowhere, nowhere)


def grid_layout(samples: int, rows: int, columns: int, prefix: Sequence[str] = ("cls",)) -> TokenLayout:
    """The layout of patches in row-major order behind prefix tokens of the given kinds."""
    kind = [KIND_CODES[p] for p in prefix] + [KIND_CODES["image"]] * (rows * columns)
    row = [-1] * len(prefix) + np.repeat(np.arange(rows), columns).tolist()
    column = [-1] * len(prefix) + np.tile(np.arange(columns), rows).tolist()
    shape = (samples, len(kind))
    return TokenLayout(
        kind=np.broadcast_to(np.array(kind, np.int8), shape),
        text=np.broadcast_to(np.array([""] * len(kind), dtype=object), shape),
        row=np.broadcast_to(np.array(row, np.int16), shape),
        column=np.broadcast_to(np.array(column, np.int16), shape),
    )


def ragged_grid_layout(shapes: np.ndarray, tokens: int) -> TokenLayout:
    """Patch grids of each sample's own (rows, columns), in row-major order, padded to so many tokens.

    `shapes` is (sample, 2).
    """
    place = np.arange(tokens)[None, :]
    columns = shapes[:, 1:].astype(np.int64)
    real = place < shapes.prod(axis=1)[:, None]
    kind = np.where(real, KIND_CODES["image"], KIND_CODES["padding"])
    return plain_layout(kind, row=np.where(real, place // columns, -1), column=np.where(real, place % columns, -1))


def plain_layout(kind: np.ndarray, *, row: np.ndarray | int = -1, column: np.ndarray | int = -1) -> TokenLayout:
    """The layout of tokens without strings: kinds (sample, token), and places that broadcast to them."""
    places = [np.broadcast_to(np.asarray(p, np.int16), kind.shape) for p in (row, column)]
    return TokenLayout(kind.astype(np.int8), np.full(kind.shape, "", dtype=object), *places)


def joined_layout(*parts: TokenLayout) -> TokenLayout:
    """The layout of one stream from those of its parts, one behind the other."""
    names = ("kind", "text", "row", "column")
    return TokenLayout(*(np.concatenate([getattr(part, name) for part in parts], axis=1) for name in names))


def unknown_layout(samples: int, tokens: int) -> TokenLayout:
    """The layout of tokens that nobody can name."""
    shape = (samples, tokens)
    nowhere = np.full(shape, -1, np.int16)
    return TokenLayout(
        np.full(shape, KIND_CODES["unknown"], np.int8), np.full(shape, "", dtype=object), nowhere, nowhere
    )
