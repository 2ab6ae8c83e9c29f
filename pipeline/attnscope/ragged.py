"""The ragged form: attention of samples of unequal length, stored end to end without their padding.

In `attention_values` each block of samples has a region of its own, and in there one sample follows another: of each
head, the weights of its first query over all its keys, then of its second, and so on. Only tokens whose kind isn't
padding count, in their order, wherever padding stands. `attention_offset` says where a sample begins.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import zarr

from attnscope.attention_array import Tile, to_float32
from attnscope.chunks import read_part
from attnscope.plan import SitePlan
from attnscope.tokens import KIND_CODES

_CHUNK_BYTES = 2**20
_LEAST_CHUNK = 2**10
# A shard says of each chunk where it lies (16 bytes), whether it is there or not.
_MOST_CHUNKS = 2**11


def chunk_for(elements: np.ndarray, dtype: str) -> int:
    """Elements of a chunk, those of each sample being given: about four samples, since one is read as well as many."""
    return min(max(4 * int(np.median(elements)), _LEAST_CHUNK), _CHUNK_BYTES // np.dtype(dtype).itemsize)


def end_to_end_sizes(site: SitePlan, unit: int) -> SitePlan:
    """The site with room in each block for samples without padding; as it was in another form.

    What stays empty takes no room on the disk, and samples that the run grows by have it.
    """
    if site.form != "ragged":
        return site
    fullest = unit * site.query_tokens * site.key_tokens
    chunk = max(site.chunk_elements, -(-fullest // _MOST_CHUNKS))
    return replace(site, block_elements=-(-fullest // chunk) * chunk, chunk_elements=chunk)


def without_padding(attention: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The weights (head, query_token, key_token) of real tokens, (head, element); queries and keys are masks."""
    rows, columns = (_narrow(np.flatnonzero(mask)) for mask in (queries, keys))
    return attention[:, rows][..., columns].reshape(len(attention), -1)


def end_to_end(pieces: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """Pieces (head, element) one behind the other, and where each begins, -1 for none."""
    lengths = np.array([0 if piece is None else piece.shape[1] for piece in pieces])
    begins = np.cumsum(lengths) - lengths
    there = [piece for piece in pieces if piece is not None]
    return np.concatenate(there, axis=1), np.where([piece is None for piece in pieces], -1, begins)


@dataclass(frozen=True)
class _Part:
    """What a tile wants of one sample: elements, of rows that are so long; the wanted keys; and where they are laid."""

    elements: range
    row_length: int
    keys: slice
    sample: int
    rows: slice | np.ndarray
    columns: slice | np.ndarray


class RaggedTiles:
    """Tiles of attention that is stored end to end, laid out again as if it were padded with NaN.

    `arrays` are `attention_values`, `attention_offset`, and the kinds of the tokens as `query_kind` and `key_kind`;
    `of_code` holds the weight of each code where codes are stored.
    """

    without_padding = True

    def __init__(
        self, arrays: Mapping[str, zarr.Array], shape: tuple[int, ...], of_code: zarr.Array | None = None
    ) -> None:
        self._arrays = arrays
        self._of_code = None if of_code is None else np.asarray(of_code[:])
        self.shape = shape

    def read(self, tile: Tile) -> np.ndarray:
        _, layers, heads, _, _ = tile
        result = np.full([s.stop - s.start for s in tile], np.nan, np.float32)
        stored = self._arrays["attention_values"]
        for together in _neighbours(self._parts(tile), stored.chunks[2]):
            begin = together[0].elements.start
            values = self._floats(read_part(stored, (layers, heads, slice(begin, together[-1].elements.stop))))
            for part in together:
                piece = values[..., part.elements.start - begin : part.elements.stop - begin]
                piece = piece.reshape(*piece.shape[:2], -1, part.row_length)[..., part.keys]
                rows = part.rows
                if isinstance(rows, np.ndarray) and isinstance(part.columns, np.ndarray):
                    rows = rows[:, None]
                result[part.sample][:, :, rows, part.columns] = piece
        return result

    def _parts(self, tile: Tile) -> Iterator[_Part]:
        samples, _, _, queries, keys = tile
        offsets = read_part(self._arrays["attention_offset"], samples)
        real = [read_part(self._arrays[n], samples) != KIND_CODES["padding"] for n in ("query_kind", "key_kind")]
        for sample in np.flatnonzero(offsets >= 0):
            rows, columns = (np.flatnonzero(mask[sample]) for mask in real)
            above, below = np.searchsorted(rows, (queries.start, queries.stop))
            left, right = np.searchsorted(columns, (keys.start, keys.stop))
            begin, length = int(offsets[sample]), len(columns)
            if above < below and left < right:
                yield _Part(
                    elements=range(begin + int(above) * length, begin + int(below) * length),
                    row_length=length,
                    keys=slice(int(left), int(right)),
                    sample=int(sample),
                    rows=_narrow(rows[above:below] - queries.start),
                    columns=_narrow(columns[left:right] - keys.start),
                )

    def _floats(self, stored: np.ndarray) -> np.ndarray:
        return to_float32(stored) if self._of_code is None else self._of_code[stored]


def _neighbours(parts: Iterator[_Part], chunk: int) -> Iterator[list[_Part]]:
    """Parts in order, together as long as no chunk between them is left out."""
    group: list[_Part] = []
    for part in parts:
        if group and part.elements.start // chunk > (group[-1].elements.stop - 1) // chunk + 1:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _narrow(positions: np.ndarray) -> slice | np.ndarray:
    """Ascending neighbours as a slice."""
    together = len(positions) > 0 and positions[-1] - positions[0] == len(positions) - 1
    return slice(int(positions[0]), int(positions[-1]) + 1) if together else positions
