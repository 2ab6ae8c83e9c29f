"""What analysers read of a run besides its quantities: tokens and regions of a block of samples, and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from attnscope.run import EXTRACTED, Run
from attnscope.tokens import KIND_CODES

MODALITIES = {"image": ("image",), "text": ("text", "generated")}
"""Kinds of the tokens that hold what an image shows and what a text says; CLS, registers, special tokens don't."""


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """The tokens of one stream for some samples: (sample, token) arrays, and `region_share` (sample, region, token).

    `box` (sample, token, 4) is left, top, right and bottom in pixels of what a detector found; NaN for other tokens.
    """

    kind: np.ndarray
    text: np.ndarray
    row: np.ndarray
    column: np.ndarray
    region_share: np.ndarray
    box: np.ndarray

    def is_of(self, *kinds: str) -> np.ndarray:
        """Which tokens are of these kinds, (sample, token)."""
        return is_of_kind(self.kind, *kinds)

    def objects(self, chosen: np.ndarray, sample: int, *, inside: float, largest: float) -> np.ndarray:
        """Regions of a sample that are objects among the chosen tokens, (object, chosen token) bool.

        A token belongs to a region that covers at least the share `inside` of it. Left out are regions that hold no
        token, or more than the share `largest` of them (a ground, a sky), or of which it isn't known.
        """
        shares = self.region_share[sample][:, chosen]
        members = shares[np.isfinite(shares).all(-1)] >= inside if shares.size else np.zeros((0, chosen.sum()), bool)
        part = members.mean(-1) if members.size else np.zeros(len(members))
        return members[(part > 0) & (part <= largest)]


def is_of_kind(kind: np.ndarray, *kinds: str) -> np.ndarray:
    """Which of these codes of tokens stand for one of these kinds, such as 'image' or 'cls'; bool, of their shape."""
    return np.isin(kind, [KIND_CODES[name] for name in kinds])


def extracted_in(run: Run, block: range) -> np.ndarray:
    """Positions in the run of the samples of a block that are extracted."""
    return block.start + np.flatnonzero(run.status[block.start : block.stop] == EXTRACTED)


def read_tokens(run: Run, stream: str, positions: np.ndarray) -> TokenBlock:
    """The tokens of a stream for the samples at these positions."""
    tokens = run.tokens(stream)
    kind, text, row, column = (_rows(tokens[name], positions) for name in ("kind", "token_text", "row", "column"))
    empty = np.full((len(positions), 0, tokens.sizes["token"]), np.nan, np.float32)
    shares = _rows(tokens["region_share"], positions) if "region_share" in tokens else empty
    nowhere = np.full((*kind.shape, 4), np.nan, np.float32)
    boxes = _rows(tokens["box"], positions) if "box" in tokens else nowhere
    return TokenBlock(kind, text, row, column, shares, boxes)


def read_pictures(run: Run, positions: Sequence[int] | np.ndarray) -> np.ndarray | None:
    """The images of these samples as the model saw them, (sample, row, column, colour) uint8; None in a run of text."""
    return _rows(run.samples["thumbnail"], np.asarray(positions)) if run.plan.thumbnails else None


def _rows(array: xr.DataArray, positions: np.ndarray) -> np.ndarray:
    """Values of the samples at these positions; a slice is read, or each by itself where they lie far apart.

    To read places that are listed one by one takes zarr an index for every number (288 MB for 64 pictures).
    """
    if not len(positions):
        return array.isel(sample=slice(0, 0)).values
    first, last = int(positions.min()), int(positions.max())
    if last - first < 4 * len(positions):
        return array.isel(sample=slice(first, last + 1)).values[positions - first]
    return np.stack([array.isel(sample=int(at)).values for at in positions])


def on_grid(values: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Values of tokens (token) on their patch grid (row, column); NaN where there is no token or value."""
    placed = row >= 0
    grid = np.full((int(row.max(initial=0)) + 1, int(column.max(initial=0)) + 1), np.nan)
    grid[row[placed], column[placed]] = values[placed]
    return grid


def allowed_keys(run: Run, site: str, position: int, attention: np.ndarray) -> np.ndarray:
    """Which keys each query may attend to, (..., query_token, key_token) bool, from the attention of one layer.

    Where weights are stored as float32, or computed from query and key, a weight of 0 says that the key is masked. Half
    precision and one-byte codes round small weights to 0 as well: there a key without weight counts as masked where the
    layer is causal or has a window, or where its whole row has no weight. `position` is that of the layer in the run.
    """
    known = np.isfinite(attention)
    weights = np.where(known, attention, 0)
    plan = run.plan.sites[site]
    if plan.form == "factored" or run.spec.encoding == "exact":
        return weights > 0
    allowed = known & (weights.sum(-1, keepdims=True) > 0)
    queries, keys = weights.shape[-2:]
    recipe = plan.recipes[position] if plan.recipes else None
    ahead = np.arange(keys) - np.arange(queries)[:, None] - (recipe.causal_offset if recipe is not None else 0)
    if plan.queries == plan.keys and queries > 1 and not weights[..., ahead > 0].any():
        allowed = allowed & (ahead <= 0)
    if recipe is not None and recipe.window is not None:
        allowed = allowed & (np.abs(ahead) < recipe.window)
    return allowed | (weights > 0)


def chosen_sites(run: Run, sites: Sequence[str] | None) -> list[str]:
    """The sites that an analyser's option names, or all; ValueError for one that the run doesn't have."""
    for site in sites or ():
        if site not in run.sites:
            raise ValueError(f"{run.location} has no site {site!r}; it has {', '.join(run.sites)}")
    return list(sites or run.sites)


def chosen_layers(run: Run, site: str, layers: Sequence[int] | None) -> dict[int, int]:
    """Layer number to its position in the run's arrays, for the layers that an option names, or all of the site."""
    known = {layer: position for position, layer in enumerate(run.plan.sites[site].layers)}
    for layer in layers or ():
        if layer not in known:
            raise ValueError(f"site {site!r} has no layer {layer}; it has {min(known)} to {max(known)}")
    return {layer: known[layer] for layer in layers or known}


def join_sites(parts: dict[str, xr.Dataset], fill: dict[str, object] | None = None) -> xr.Dataset:
    """Results of several sites side by side; what a site lacks is NaN, and 0 in sums."""
    sums = {str(n): 0.0 for part in parts.values() for n in part.data_vars if str(n).endswith("_sums")}
    along = xr.Variable("site", np.array(list(parts), object), {"long_name": "kind of attention"})
    return xr.concat(list(parts.values()), along, join="outer", coords="minimal", compat="override",
                     data_vars="all", fill_value={**sums, **(fill or {})})  # fmt: skip


def directions(queries: TokenBlock, keys: TokenBlock) -> list[tuple[str, str]]:
    """From which modality to which tokens of these streams attend, such as ('text', 'image')."""
    held = [[name for name, kinds in MODALITIES.items() if side.is_of(*kinds).any()] for side in (queries, keys)]
    return [(query, key) for query in held[0] for key in held[1]]
