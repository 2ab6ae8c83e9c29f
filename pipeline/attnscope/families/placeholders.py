"""Layouts of a language model's tokens, some of which stand for parts of an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from attnscope.families import Fold, SiteRule
from attnscope.families.layouts import text_kinds, token_strings
from attnscope.tokens import KIND_CODES, TokenLayout, plain_layout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.families import LayoutFunction
    from attnscope.loading import LoadedModel

TOWERS = (
    SiteRule(r"vision_(tower|model)\.(\w+\.)*?layers?\.(?P<layer>\d+)\.", "vision.self"),
    SiteRule(r"(language|text)_model\.(\w+\.)*?layers\.(?P<layer>\d+)\.", "joint.self"),
)
"""An image encoder, and a language model over text and image tokens together."""

POOLING = (SiteRule(r"vision_(tower|model)\.(\w+\.)*?head\.attention", "queries.vision"),)
"""SigLIP's learned probe, which pools the patches (for nobody, where a language model reads them)."""


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of one sample in order: place on the image's grid, and the tile that each is cut from.

    `row` and `column` are -1 for a token that is no part of the image. `tile` is '' where an image is one tile.
    """

    row: np.ndarray
    column: np.ndarray
    tile: np.ndarray

    @classmethod
    def joined(cls, parts: "Sequence[ImageTokens]") -> "ImageTokens":
        """One behind the other."""
        none = ImageTokens(np.zeros(0, int), np.zeros(0, int), np.zeros(0, object))
        return cls(*(np.concatenate([getattr(p, name) for p in (none, *parts)]) for name in ("row", "column", "tile")))


Images: TypeAlias = "Callable[[dict[str, Tensor], LoadedModel], Sequence[ImageTokens]]"


def separator() -> ImageTokens:
    """One token that is no part of the image, among those that are."""
    return ImageTokens(np.array([-1]), np.array([-1]), np.array([""], object))


def grid(
    rows: int, columns: int, tile: str = "", first: tuple[int, int] = (0, 0), step: tuple[int, int] = (1, 1)
) -> ImageTokens:
    """A grid in row-major order, whose first token lies at `first` of the image's grid and the next `step` further."""
    row = first[0] + step[0] * np.repeat(np.arange(rows), columns)
    column = first[1] + step[1] * np.tile(np.arange(columns), rows)
    return ImageTokens(row, column, np.full(rows * columns, tile, object))


def tiles(shape: tuple[int, int], side: tuple[int, int], overview: str | None = None) -> ImageTokens:
    """An image cut into (rows, columns) tiles of side tokens, with an overview of it all 'first' or 'last'.

    An overview's token lies at the upper left of the tokens that it covers.
    """
    cut = [
        grid(*side, tile=f"tile {r},{c}", first=(r * side[0], c * side[1]))
        for r in range(shape[0])
        for c in range(shape[1])
    ]
    whole = grid(*side, tile="overview", step=shape)
    return ImageTokens.joined({"first": [whole, *cut], "last": [*cut, whole], None: cut}[overview])


def joint_tokens(images: Images, kind: str = "image", videos: "Images | None" = None) -> "LayoutFunction":
    """The layout of a stream of text with image tokens, and those of videos, at the placeholders of `input_ids`."""

    def layout(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
        ids = inputs["input_ids"]
        kinds = text_kinds(ids, inputs.get("attention_mask"), loaded)
        text = np.array([token_strings(row, loaded) for row in ids.tolist()], dtype=object).reshape(ids.shape)
        row, column = np.full((2, *ids.shape), -1, np.int16)
        for read, placeholder in ((images, image_token_id(loaded)), (videos, video_token_id(loaded))):
            at_image = (ids.cpu().numpy() == placeholder) & (kinds != KIND_CODES["padding"])
            # Where no token stands for an image, there may be none among the inputs.
            if read is None or not at_image.any():
                continue
            kinds[at_image] = KIND_CODES[kind]
            text[at_image] = ""
            for sample, image in enumerate(read(inputs, loaded)):
                places = np.flatnonzero(at_image[sample])
                if len(places) == len(image.row):
                    row[sample, places], column[sample, places] = image.row, image.column
                    text[sample, places] = image.tile
                    kinds[sample, places[image.row < 0]] = KIND_CODES["special"]
        return TokenLayout(kinds, text, row, column)

    return layout


def tiled_tokens(images: Images, prefix: Sequence[str] = ()) -> "LayoutFunction":
    """The layout of an image encoder's tokens, tile behind tile, each with tokens of these kinds before its patches."""

    def layout(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
        found = images(inputs, loaded)
        kind = np.full((len(found), tokens), KIND_CODES["padding"], np.int8)
        text = np.full(kind.shape, "", object)
        row, column = np.full((2, *kind.shape), -1, np.int16)
        for sample, image in enumerate(found):
            new = np.flatnonzero(np.r_[True, image.tile[1:] != image.tile[:-1]])
            place = np.arange(len(image.row)) + len(prefix) * (np.searchsorted(new, np.arange(len(image.row)), "right"))
            kind[sample, place] = KIND_CODES["image"]
            text[sample, place], row[sample, place], column[sample, place] = image.tile, image.row, image.column
            for offset, name in enumerate(prefix):
                before = place[new] - len(prefix) + offset
                kind[sample, before], text[sample, before] = KIND_CODES[name], image.tile[new]
        return TokenLayout(kind, text, row, column)

    return layout


def pooling_query(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
    """The layout of pooling probes, one for each tile."""
    return plain_layout(np.full((len(inputs["input_ids"]), tokens), KIND_CODES["query"]))


def tile_fold(tiles_of: Sequence[int], queries: int, keys: int) -> Fold:
    """Where the tokens of tiles belong that an image encoder reads as a batch: behind each other, sample by sample."""
    number = np.concatenate([np.arange(n) for n in tiles_of])[:, None]
    samples = np.repeat(np.arange(len(tiles_of)), tiles_of)
    return Fold(samples, number * queries + np.arange(queries), number * keys + np.arange(keys))


def image_token_id(loaded: "LoadedModel") -> int:
    """The placeholder's number in the vocabulary, by any of the names that configs have for it; -1 for none."""
    return _token_id(loaded, ("image_token_id", "image_token_index"))


def video_token_id(loaded: "LoadedModel") -> int:
    """As `image_token_id`, of the placeholder for parts of a video."""
    return _token_id(loaded, ("video_token_id", "video_token_index"))


def _token_id(loaded: "LoadedModel", names: Sequence[str]) -> int:
    found = (getattr(loaded.config, name, None) for name in names)
    return next((int(n) for n in found if n is not None), -1)
