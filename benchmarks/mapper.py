"""Does weighing what attention adds make explanations better? Perturbation tests of a mapper behind CLIP.

`reference:mapper` answers a question about each scene, and describes each scene greedily, each word of its caption
being a target of its own. Patches of the image, or words of the text (of the question, or of the caption so far), are
dropped, from the one that a method ranks first (positive) or last (negative); what is measured is how often the model
still says what it says of the intact input. Areas are mean heights of that curve. What belongs to one scene is averaged
first; intervals are 95 % bootstrap over scenes, and differences are paired by scene.

    python benchmarks/mapper.py [SCENES [SPLIT ...]]
"""

import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import attnscope
from attnscope.loading import load_model
from attnscope.quantities import ExtractSpec
from attnscope.reference import COLOURS, SHAPES, read_reference
from attnscope.samples import Sample
from attnscope_faithfulness import Faithfulness
from attnscope_relevance import Relevance

METHODS = ("relevance", "rollout", "attention", "gradcam")
WEIGHTINGS = ("norm", "gradient")
NAMES = {
    "relevance": "Chefer, unweighted",
    **{f"relevance, {weighting}": f"weighted by {weighting}" for weighting in WEIGHTINGS},
    "rollout": "rollout",
    "attention": "raw attention",
    "gradcam": "Grad-CAM",
    "random": "random order",
}
TAKEN = {"image by drop": "patches", "text by drop": "words"}
ENDS = {"most": "first gone", "least": "last gone"}
_MOST_WORDS = 38
_KINDS = ("colour", "shape", "exists")

Areas = dict[tuple[str, str, str], np.ndarray]
"""Area under each sample's curve by what is taken, method and end: (sample,), NaN where nothing could be taken."""


def questions(split: str, scenes: int) -> list[Sample]:
    """One question about each scene, for a colour, a shape, or whether something is there, by turns."""
    found: dict[str, dict[str, Sample]] = {}
    for sample in read_reference(f"reference:{split}:questions:{8 * scenes}"):
        scene, _, kind = sample.id.rpartition("-")
        found.setdefault(scene, {})[kind] = sample
    chosen = []
    for number, of_scene in enumerate(itertools.islice(found.values(), scenes)):
        turns = (_KINDS[(number + turn) % len(_KINDS)] for turn in range(len(_KINDS)))
        chosen.append(next(of_scene[kind] for kind in turns if kind in of_scene))
    return chosen


def caption_beginnings(split: str, scenes: int) -> list[Sample]:
    """Every beginning of each scene's greedy caption; its target `next` is the word that the model writes behind it."""
    loaded = load_model("reference:mapper:captions")
    found = []
    for sample in read_reference(f"reference:{split}:{scenes}"):
        start = Sample(sample.id, sample.load_image())
        with torch.no_grad():
            inputs = loaded.family.encode([start], loaded)
            ids = loaded.model.generate(**inputs, max_new_tokens=_MOST_WORDS, do_sample=False)[0]  # type: ignore[operator]
        assert loaded.tokenizer is not None
        words = loaded.tokenizer.convert_ids_to_tokens(ids)[1:]
        found += [
            Sample(f"{sample.id}-{at}", start.image, " ".join(words[:at]) or None, targets={"next": words[at]})
            for at in range(len(words))
        ]
    return found


def areas(head: str, samples: Sequence[Sample]) -> Areas:
    """The areas of all methods on the answers, or on the next words, of some samples."""
    plain = Relevance(methods=METHODS)
    weighted = [Relevance(methods=("relevance",), weighting=w) for w in WEIGHTINGS]  # type: ignore[arg-type]
    tests = [_test(plain, METHODS), *(_test(each, ("relevance",)) for each in weighted)]
    found: Areas = {}
    with tempfile.TemporaryDirectory() as folder:
        out, spec = Path(folder) / "run.zarr", ExtractSpec(frozenset({"score"}))
        run = attnscope.extract(f"reference:mapper:{head}", samples, [plain, *weighted], spec=spec, out=out)
        # Saved, so that one analysis serves the rankings by all of its methods.
        attnscope.analyse(run, plain)
        run = attnscope.extract(f"reference:mapper:{head}", samples, [plain, *weighted, *tests], spec=spec, out=out)
        for suffix, test in zip(("", *(f", {w}" for w in WEIGHTINGS)), tests, strict=True):
            result = test.analyse(run)["correct_areas"]
            for taken, ranking, end in itertools.product(*(result[d].values for d in ("taken", "ranking", "end"))):
                name = f"{ranking}{suffix}" if ranking == "relevance" else str(ranking)
                found[taken, name, end] = result.sel(taken=taken, ranking=ranking, end=end).values
    return found


def _test(analyser: Relevance, rankings: Sequence[str]) -> Faithfulness:
    options = {"methods": list(analyser.methods), "weighting": analyser.weighting}
    return Faithfulness(rankings=tuple(rankings), ranking_options=options, modalities=("image", "text"))


def by_scene(values: np.ndarray, scenes: np.ndarray) -> np.ndarray:
    """The mean of each scene's values that are there, (scene,); NaN for a scene without any."""
    return np.array([_mean(values[scenes == scene]) for scene in np.unique(scenes)])


def _mean(values: np.ndarray) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if there.size else np.nan


def told(values: np.ndarray) -> str:
    """The mean over scenes with its interval."""
    low, high = attnscope.bootstrap_interval(values)
    return f"{_mean(values):.3f} ({float(low):.3f} to {float(high):.3f})"


def lines(found: Areas, samples: Sequence[Sample], chosen: Callable[[Sample], bool]) -> Iterator[str]:
    """A table of areas, and the paired differences of the weighted from every other method."""
    kept = np.array([chosen(s) for s in samples])
    scenes = np.array(["-".join(s.id.split("-")[:2]) for s in samples])[kept]
    each = {place: by_scene(values[kept], scenes) for place, values in found.items()}
    columns = list(itertools.product(TAKEN, ENDS))
    heads = " | ".join(f"{TAKEN[taken]}, {ENDS[end]}" for taken, end in columns)
    yield f"{len(set(scenes))} scenes, {int(kept.sum())} targets"
    yield f"| method | {heads} |"
    yield "|---|" + "---|" * len(columns)
    for name, words in NAMES.items():
        yield f"| {words} | {' | '.join(told(each[taken, name, end]) for taken, end in columns)} |"
    yield f"| difference | {heads} |"
    yield "|---|" + "---|" * len(columns)
    firsts = [f"relevance, {weighting}" for weighting in WEIGHTINGS]
    pairs = [(a, b) for a in firsts for b in NAMES if b not in firsts] + [tuple(firsts)]
    for a, b in pairs:
        cells = (told(each[taken, a, end] - each[taken, b, end]) for taken, end in columns)
        yield f"| {NAMES[a]} - {NAMES[b]} | {' | '.join(cells)} |"


def names_attribute(sample: Sample) -> bool:
    """Whether the next word is a colour or a shape."""
    return sample.targets["next"] in {*COLOURS, *SHAPES}


def report(title: str, *told: str) -> None:
    """Print a part."""
    print(f"\n{title}", *told, sep="\n", flush=True)


def main() -> None:
    warnings.filterwarnings("ignore")
    scenes = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    for split in sys.argv[2:] or ("test", "hard"):
        asked = questions(split, scenes)
        report(f"{split}: answers", *lines(areas("answers", asked), asked, lambda sample: True))
        begun = caption_beginnings(split, scenes)
        found = areas("captions", begun)
        report(f"{split}: each word of captions", *lines(found, begun, lambda sample: True))
        report(f"{split}: colours and shapes in captions", *lines(found, begun, names_attribute))


if __name__ == "__main__":
    main()
