"""What the analysers say of the models that attnscope carries: the figures that the pages about analysers quote.

    python benchmarks/reference_models.py [PART ...]

Parts are modes, entropy, preference, relevance, ablation, alignment, regions, concepts and masked; all of them without
one. Brackets hold 95 % bootstrap intervals. Scenes are of splits that no model was trained on.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xarray as xr

import attnscope
from attnscope.analysis import Analyser, make_analyser
from attnscope.quantities import ExtractSpec
from attnscope.reference.scenes import COLOURS, SHAPES

SCORE = frozenset({"score"})
Options = dict[str, object]


def analysed(model: str, samples: str, wanted: dict[str, Options], target: str | None = None) -> list[xr.Dataset]:
    """The results of some analysers of one run."""
    analysers: list[Analyser] = [make_analyser(name, options) for name, options in wanted.items()]
    run = attnscope.extract(model, samples, analysers, spec=ExtractSpec(SCORE, target=target))
    return [attnscope.analyse(run, analyser, save=False) for analyser in analysers]


def told(result: xr.Dataset, name: str, digits: int = 2, **place: object) -> str:
    """A variable's values with their intervals."""
    low, high = (result.get(name + end) for end in ("_low", "_high"))
    values = np.ravel(result[f"{name}_mean" if f"{name}_mean" in result else name].sel(place).values)
    if low is None or high is None:
        return " ".join(f"{v:.{digits}f}" for v in values)
    ends = (np.ravel(each.sel(place).values) for each in (low, high))
    return " ".join(f"{v:.{digits}f} ({a:.{digits}f} to {b:.{digits}f})" for v, a, b in zip(values, *ends, strict=True))


def modes() -> Iterator[str]:
    """Mean cosine of the singular modes by layer."""
    for model, samples in (
        ("embedded:dinov2-small", "embedded:photographs"),
        *((f"reference:{name}", "reference:test:8") for name in ("clip", "vilt", "lxmert")),
    ):
        (result,) = analysed(model, samples, {"qk_svd": {}})
        for site in result.site.values:
            yield f"{model} {site}: {told(result, 'layer_cosine_average', site=site)}"


def entropy() -> Iterator[str]:
    """How well low entropy tells objects from background: by layer, and from the mean map."""
    photographs = ("embedded:dinov2-small", "embedded:photographs")
    for model, samples in (photographs, *((m, "reference:test:60") for m in ("reference:clip", "reference:vilt"))):
        (result,) = analysed(model, samples, {"attention_entropy": {}})
        place = {"site": result.site.values[0], "modality": "image"}
        yield f"{model} {told(result, 'object_area', **place)}; {told(result, 'object_area_of_mean', **place)}"


def preference() -> Iterator[str]:
    """Where attention from an object of CLIP goes, by layer, and what areas alone would give."""
    (result,) = analysed("reference:clip", "reference:test:60", {"qk_svd": {"on_samples": "yes"}})
    place = {"site": "vision.self", "direction": "image to image"}
    for group in result.group.values:
        yield f"{group} {told(result, 'layer_preference', group=group, **place)}"
        yield f"  by area {told(result, 'area_preference', group=group, **place)}"


def relevance() -> Iterator[str]:
    """Pointing and perturbation of CLIP on crowded scenes, and the pointing on plain ones."""
    methods = ["relevance", "gradient", "attention", "rollout"]
    options: Options = {"methods": methods}
    wanted = {"relevance": options, "faithfulness": {"rankings": methods, "ranking_options": options}}
    for samples in ("reference:hard:100", "reference:test:100"):
        found, areas = analysed("reference:clip", samples, wanted)
        yield f"{samples}: {pointing(found.sel(stream='vision'))}"
        yield from faithful(areas)


def pointing(found: xr.Dataset) -> str:
    """How often the strongest patch of each method lies in a named box, and by chance."""
    methods = ", ".join(f"{r} {told(found, 'pointing', ranking=r)}" for r in found.ranking.values)
    return f"pointing by {methods}; by chance {float(found['pointing_chance'].mean()):.2f}"


def faithful(areas: xr.Dataset) -> Iterator[str]:
    """Areas under the score while the first and the last tokens go, and differences paired by sample."""
    for ranking in areas.ranking.values:
        ends = "; ".join(f"{e} {told(areas, 'score_area', 1, ranking=ranking, end=e)}" for e in areas.end.values)
        yield f"  {ranking}: area without {ends}"
    for name in areas.data_vars:
        if "difference" in str(name) and not str(name).endswith(("_low", "_high", "_draws")):
            yield f"  {name} {areas[name].dims}: {told(areas, str(name), 1)}"


def ablation() -> Iterator[str]:
    """Bits that LXMERT and ViLT lose without the other modality, by what stands in its place."""
    both: Options = {"operators": ["mean", "zero", "other"], "vision": "object"}
    alone: Options = {"operators": ["mean", "zero", "noise", "other"]}
    for model, options in (("reference:lxmert", both), ("reference:vilt:words", alone)):
        (result,) = analysed(model, "reference:test:60", {"modality_ablation": options})
        for direction in result.direction.values:
            for operator in result.operator.values:
                place = {"direction": direction, "operator": operator}
                yield f"{model} {direction}, {operator}, {int(result['examples'].sel(place))} examples"
                for name in ("loss", "influence", "correct"):
                    yield f"  {name}: {told(result, name, **place)}"
        if "asymmetry" in result:
            yield f"  asymmetry: {told(result, 'asymmetry')}"
    words: Options = {"language": "answer", "operators": ["mean", "zero", "other"], "target": "masked"}
    for model in ("reference:vilt:words", "reference:lxmert"):
        wanted = {"modality_ablation": words}
        (result,) = analysed(model, "reference:test:masked:80", wanted, target="masked")
        for operator in result.operator.values:
            place = {"operator": operator, "level": ["none", "all"]}
            yield f"{model} one masked colour or shape, {operator}: {told(result.isel(direction=0), 'loss', **place)}"
            yield f"  influence {told(result.isel(direction=0), 'influence', operator=operator, level='all')}"


def alignment() -> Iterator[str]:
    """Grounding and keywords of ViLT."""
    (result,) = analysed("reference:vilt:words", "reference:test:60", {"multilevel_alignment": {}})
    for name in result.data_vars:
        if not str(name).endswith(("_low", "_high")) and result[name].dtype.kind == "f" and result[name].size < 40:
            yield f"{name} {result[name].dims}: {told(result, str(name), 3)}"


def regions() -> Iterator[str]:
    """Grounding of LXMERT's words in its regions, by attention and by its gradient, and the pointing of relevance."""
    for options in ({"maps": "attention"}, {"maps": "gradcam"}):
        wanted: dict[str, Options] = {"multilevel_alignment": {**options, "target": "matching"}}
        (result,) = analysed("reference:lxmert", "reference:test:60", wanted, target="matching")
        for name in ("pointing", "mass", "box", "region"):
            yield f"{options['maps']} {name}: {told(result, name)}; by chance {told(result, f'{name}_chance')}"
        yield f"matching {told(result, 'matching')}"
    methods: Options = {"methods": ["relevance", "gradient", "attention", "rollout"], "target": "masked"}
    (found,) = analysed("reference:lxmert", "reference:test:masked:80", {"relevance": methods}, target="masked")
    yield f"masked words: {pointing(found.sel(stream='vision'))}"


def concepts() -> Iterator[str]:
    """What images show and their captions leave out, by the models' scores of pairs."""
    listed = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for model, target in (("clip", "similarity"), ("vilt", "matching"), ("lxmert", "matching")):
        wanted: dict[str, Options] = {"multilevel_alignment": {"concepts": listed, "target": target}}
        (result,) = analysed(f"reference:{model}", "reference:test:60", wanted, target=target)
        yield f"{model}: {int(result['missing_skipped'])} captions leave out nothing"
        for name in ("missing_precision", "missing_recall"):
            yield f"  {name} {told(result, name)}; by chance {told(result, f'{name}_chance', 3)}"


def masked() -> Iterator[str]:
    """Pointing and perturbation of ViLT for one masked colour or shape."""
    methods = ["relevance", "gradient", "attention", "rollout"]
    options: Options = {"methods": methods, "target": "masked"}
    wanted = {"relevance": options, "faithfulness": {"rankings": ["relevance"], "ranking_options": options}}
    found, areas = analysed("reference:vilt:words", "reference:test:masked:80", wanted, target="masked")
    yield pointing(found.isel(stream=0))
    yield from faithful(areas)


PARTS: Sequence[Callable[[], Iterator[str]]] = (
    modes,
    entropy,
    preference,
    relevance,
    ablation,
    alignment,
    regions,
    concepts,
    masked,
)


def main() -> None:
    warnings.filterwarnings("ignore")
    for part in PARTS:
        if not sys.argv[1:] or part.__name__ in sys.argv[1:]:
            print(f"\n{part.__name__}: {str(part.__doc__).splitlines()[0]}")
            for line in part():
                print(line, flush=True)


if __name__ == "__main__":
    main()
