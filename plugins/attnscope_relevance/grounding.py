"""The pointing game: whether a map is strongest where the image shows what the text names.

Zhang, J. et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016.
"""

import json

import numpy as np

from attnscope import Run
from attnscope.reading import TokenBlock, extracted_in, read_tokens

_INSIDE, _LARGEST = 0.5, 0.5
_MASKS = ("[MASK]", "<mask>")


def point(run: Run, stream: str, relevance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits (method, sample), 0 or 1, and the share of patches that would be one (sample,); NaN where none is known.

    `relevance` is (method, sample, token). Boxes are those of the masked words where a text has such, else of all its
    phrases; those over more than half of the image are no objects. A patch lies in a box when it holds at least half as
    much of it as the patch that holds most. A map of nothing hits nothing.
    """
    hits = np.full(relevance.shape[:2], np.nan)
    chance = np.full(relevance.shape[1], np.nan)
    for block in run.blocks():
        positions = extracted_in(run, block)
        if not len(positions):
            continue
        read = {name: read_tokens(run, name, positions) for name in run.streams}
        regions = run.samples["regions"].isel(sample=positions).values
        patches = read[stream].is_of("image")
        for row, position in enumerate(positions):
            inside = _inside(read, stream, row, str(regions[row]))
            if inside is None:
                continue
            chance[position] = inside.mean()
            values = relevance[:, position, : patches.shape[1]][:, patches[row]]
            for method, one in enumerate(values):
                if np.isfinite(one).all():
                    hits[method, position] = one.any() and inside[one.argmax()]
    return hits, chance


def _inside(read: dict[str, TokenBlock], stream: str, row: int, regions: str) -> np.ndarray | None:
    """Which patches of a sample lie in a box that its text names, (patch,); None where no box is known."""
    shares = read[stream].region_share[row][:, read[stream].is_of("image")[row]]
    if not shares.size:
        return None
    listed = json.loads(regions or "[]")
    named = [n for n, r in enumerate(listed) if r.get("phrase") and r.get("box")]
    masked = {n for n in named for tokens in read.values() if _is_masked(tokens, row, n)}
    chosen = [n for n in named if n < len(shares) and (not masked or n in masked)]
    known = [shares[n] for n in chosen if np.isfinite(shares[n]).all() and 0 < shares[n].mean() <= _LARGEST]
    return np.any([one >= _INSIDE * one.max() for one in known], axis=0) if known else None


def _is_masked(tokens: TokenBlock, row: int, region: int) -> bool:
    """Whether a mask token stands in the words of a region."""
    shares = tokens.region_share[row]
    is_mask = np.isin(tokens.text[row], _MASKS)
    return region < len(shares) and bool((np.nan_to_num(shares[region])[is_mask] >= _INSIDE).any())
