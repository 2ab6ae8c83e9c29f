"""Do explanation methods differ on the reference world's hard split? Pointing at what the caption mentions, per method.

For each scene the strongest patch of each method's map (target: CLIP's similarity of image and caption), and whether it
shows a thing that the caption mentions. Scenes hold five to seven things of which three or four are mentioned, and the
ground fills most patches, so that chance is the share of patches that show one. Differences between two methods are
paired by scene; intervals are 95 % bootstrap over scenes.

    python benchmarks/hard_split.py [SCENES]
"""

import itertools
import sys

import numpy as np

import attnscope
from attnscope.samples import regions_from
from attnscope_relevance import Relevance

METHODS = ("relevance", "rollout", "attention", "gradcam", "gradient")
GRID = 4
_LEAST_PART = 0.15


def hits(split: str, scenes: int) -> dict[str, np.ndarray]:
    """Per method whether the strongest patch shows a mentioned thing (sample,), and the chance of it."""
    analyser = Relevance(target="similarity", methods=METHODS)
    run = attnscope.extract("reference:clip", f"reference:{split}:{scenes}", [analyser])
    result = attnscope.analyse(run, analyser, save=False).sel(stream="vision")
    shown = np.stack([mentioned_patches(text) for text in run.samples["regions"].values])
    patches = result["row"].values[0] >= 0
    found = {"chance": shown.mean(1)}
    for method in METHODS:
        strongest = result[method].values[:, patches].argmax(1)
        found[method] = shown[np.arange(scenes), strongest].astype(float)
    return found


def mentioned_patches(regions: str) -> np.ndarray:
    """Which patches (patch,) show a good part of a thing that a phrase mentions."""
    shown = np.zeros(GRID * GRID, bool)
    for region in regions_from(regions):
        if region.span is not None and region.mask is not None and "ground" not in str(region.phrase):
            pixels = region.mask.pixels()
            side = len(pixels) // GRID
            cells = pixels.reshape(GRID, side, GRID, side).swapaxes(1, 2).reshape(GRID * GRID, -1)
            shown |= cells.mean(1) >= _LEAST_PART
    return shown


def report(split: str, scenes: int) -> None:
    """Print the share of hits of each method, and the paired difference of each two."""
    found = hits(split, scenes)
    print(f"{split}, {scenes} scenes")
    for name, values in found.items():
        low, high = attnscope.bootstrap_interval(values)
        print(f"  {name:10s} {values.mean():.3f} ({low:.3f} to {high:.3f})")
    for first, second in itertools.combinations(METHODS, 2):
        difference = found[first] - found[second]
        low, high = attnscope.bootstrap_interval(difference)
        apart = "apart" if low > 0 or high < 0 else ""
        print(f"  {first} - {second}: {difference.mean():+.3f} ({low:+.3f} to {high:+.3f}) {apart}")


if __name__ == "__main__":
    for name in ("hard", "test"):
        report(name, int(sys.argv[1]) if len(sys.argv) > 1 else 200)
