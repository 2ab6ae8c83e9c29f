"""How sharply each token attends: the entropy of its attention, as a map over the image, layer by layer.

1. The attention of a query token over all keys has an entropy, H_i = -sum_j a_ij log a_ij in nats; it is averaged over
   the heads and laid out on the patch grid.
2. Low entropy marks attention that is concentrated, which Lis et al. find on single objects, known to the model or not.
3. Where samples carry regions, the area under the ROC curve says how well low entropy tells object from background.

Lis, K., Rottmann, M., Mütze, A., Honari, S., Fua, P. and Salzmann, M., "AttEntropy: Segmenting Unknown Objects in
Complex Scenes using the Spatial Attention Entropy of Semantic Segmentation Transformers", 2022.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, hookimpl
from attnscope.reading import (
    MODALITIES,
    TokenBlock,
    allowed_keys,
    chosen_layers,
    chosen_sites,
    extracted_in,
    join_sites,
    on_grid,
    read_pictures,
    read_tokens,
)
from attnscope.report import (
    Citation,
    Element,
    Heading,
    HeatMap,
    ImageGrid,
    ImageRow,
    LineChart,
    Note,
    Paragraph,
    Series,
    ShadedText,
    overlay,
)
from attnscope.statistics import add_sums, area_under_curve, sample_sums, with_intervals

_LAYERS_SHOWN = 5


def entropy(attention: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, (...) in nats, between 0 and the logarithm of the number of keys.

    Rows need not sum to 1 (to less with attention sinks): the entropy is that of the row over its sum. Missing keys
    (NaN) are left out; a row without any key is NaN.
    """
    weights = np.nan_to_num(np.asarray(attention, np.float64))
    total = weights.sum(-1)
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    concentrated = (weights * logarithms).sum(-1)
    safe = np.where(total > 0, total, 1.0)
    return np.where(total > 0, np.maximum(np.log(safe) - concentrated / safe, 0.0), np.nan)


def evenness(entropies: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Entropy over its greatest possible value log(keys), in [0, 1]; NaN where there is one key or none."""
    most = np.log(np.maximum(keys, 1))
    return np.divide(entropies, most, out=np.full(np.shape(entropies), np.nan), where=most > 0)


def separate(entropies: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of low entropy (..., token) for the tokens of any object (object, token): (...)."""
    if not len(objects):
        return np.full(entropies.shape[:-1], np.nan)
    return area_under_curve(-entropies, np.any(objects, axis=0))


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of every token's attention, and how well low entropy tells the regions of a sample from the rest.

    A token belongs to a region that covers the share `inside` of it; regions of more than the share `largest` of the
    tokens are ground rather than object. `pictures` is how many samples the report shows, `draws` how often samples
    are drawn anew for the intervals.
    """

    name: ClassVar[str] = "attention_entropy"
    title: ClassVar[str] = "Entropy of attention"
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    inside: float = 0.5
    largest: float = 0.5
    pictures: int = 4
    draws: int = 200
    seed: int = 0

    def requires(self) -> ExtractSpec:
        return ExtractSpec(
            sites=None if self.sites is None else frozenset(self.sites),
            layers=None if self.layers is None else frozenset(self.layers),
        )

    def analyse(self, run: Run) -> xr.Dataset:
        """Means over samples with dims (site, modality, layer, head), intervals, and maps of the first samples."""
        found = set(chosen_sites(run, self.sites))
        return self.combine(self._block(run, block) for block in run.blocks()).assign_attrs(
            interval="95 % bootstrap over samples", sites=", ".join(s for s in run.sites if s in found)
        )

    def combine(self, parts: Iterable[xr.Dataset]) -> xr.Dataset:
        """One result of those of parts of a run."""
        shown: list[xr.Dataset] = []
        kept: dict[str, object] = {}

        def passing() -> Iterator[xr.Dataset]:
            for part in parts:
                maps = part[[n for n in _MAPS if n in part]]
                shown.append(maps)
                merged = xr.concat(
                    shown, "shown", data_vars="minimal", coords="minimal", compat="override", join="outer"
                )
                shown[:] = [merged.isel(shown=slice(0, self.pictures))]
                kept.update(part.attrs)
                yield part

        result = with_intervals(add_sums(passing()))
        return result.merge(shown[0], compat="override", join="outer").assign_attrs(kept)

    def _block(self, run: Run, block: range) -> xr.Dataset:
        positions = extracted_in(run, block)
        parts = {site: self._site(run, site, positions) for site in chosen_sites(run, self.sites)}
        joined = join_sites(parts, {"row": -1, "column": -1, "token_text": ""})
        first = positions[: self.pictures]
        pictures = read_pictures(run, first)
        if pictures is not None:
            attrs = {"long_name": "the image as the model saw it, red green blue", "units": "1"}
            joined["thumbnail"] = xr.Variable(("shown", "image_row", "image_column", "colour"), pictures, attrs)
        return joined

    def _site(self, run: Run, site: str, positions: np.ndarray) -> xr.Dataset:
        tokens = read_tokens(run, run.plan.sites[site].queries, positions)
        layers = chosen_layers(run, site, self.layers)
        shape = (len(positions), len(layers), run.plan.sites[site].heads, tokens.kind.shape[1])
        entropies, shares = np.full((2, *shape), np.nan)
        attention = run.attention(site)
        for place, layer in enumerate(layers.values() if len(positions) else ()):
            # A layer of a block is what lies together in the store.
            one = attention.isel(sample=slice(positions[0], positions[-1] + 1), layer=layer).values
            for at, position in enumerate(positions):
                weights = one[position - positions[0]]
                entropies[at, place] = entropy(weights)
                shares[at, place] = evenness(entropies[at, place], allowed_keys(run, site, layer, weights).sum(-1))
        measured = self._measure(entropies, shares, tokens)
        coordinates = {"modality": list(MODALITIES), "layer": list(layers), "head": np.arange(shape[2])}
        values = xr.Dataset(measured, coordinates)
        return xr.merge([sample_sums(values, positions, draws=self.draws, seed=self.seed),
                         self._maps(run, tokens, entropies, positions)], compat="override", join="outer")  # fmt: skip

    def _measure(self, entropies: np.ndarray, shares: np.ndarray, tokens: TokenBlock) -> dict[str, xr.Variable]:
        """What is known of each sample: (sample, modality, layer, head) and (sample, modality, layer)."""
        samples, layers, heads, _ = entropies.shape
        by_head = {n: np.full((samples, len(MODALITIES), layers, heads), np.nan) for n in _BY_HEAD}
        by_layer = {n: np.full((samples, len(MODALITIES), layers), np.nan) for n in _BY_LAYER}
        whole = np.full((samples, len(MODALITIES)), np.nan)
        dead = np.zeros((samples, layers))
        for sample in range(samples):
            real = ~tokens.is_of("padding")[sample]
            dead[sample] = np.isnan(entropies[sample][..., real]).all(1).sum(-1)
            for place, kinds in enumerate(MODALITIES.values()):
                chosen = tokens.is_of(*kinds)[sample]
                if not chosen.any():
                    continue
                of = entropies[sample][..., chosen]
                live = np.isfinite(of).all((0, 1))
                objects = tokens.objects(chosen, sample, inside=self.inside, largest=self.largest)[:, live]
                of, even = of[..., live], shares[sample][..., chosen][..., live]
                by_head["entropy"][sample, place] = _mean(of)
                by_head["object_area_head"][sample, place] = separate(of, objects)
                by_layer["entropy_mean"][sample, place] = _mean(of.mean(1))
                by_layer["evenness"][sample, place] = _mean(even.mean(1))
                by_layer["object_area"][sample, place] = separate(of.mean(1), objects)
                whole[sample, place] = separate(of.mean((0, 1)), objects)
        dims = ("sample", "modality", "layer", "head")
        named = {
            n: xr.Variable(dims[: v.ndim], v, _describe(n)) for n, v in {**by_head, **by_layer, _WHOLE: whole}.items()
        }
        return {**named, "dead_rows": xr.Variable(("sample", "layer"), dead, _describe("dead_rows"))}

    def _maps(self, run: Run, tokens: TokenBlock, entropies: np.ndarray, positions: np.ndarray) -> xr.Dataset:
        """Entropies of the first samples, mean over heads, with the places and strings of their tokens."""
        first = slice(0, self.pictures)
        is_content = tokens.is_of(*(kind for kinds in MODALITIES.values() for kind in kinds))[first]
        mean = np.where(is_content[:, None], entropies[first].mean(2), np.nan)
        variables = {
            "entropy_map": xr.Variable(("shown", "layer", "token"), mean.astype(np.float32), _describe("entropy_map")),
            "row": xr.Variable(("shown", "token"), tokens.row[first], _describe("row")),
            "column": xr.Variable(("shown", "token"), tokens.column[first], _describe("column")),
            "token_text": xr.Variable(("shown", "token"), tokens.text[first], _describe("token_text")),
            "shown_id": xr.Variable("shown", np.array(run.sample_ids, object)[positions[first]], _describe("shown_id")),
        }
        return xr.Dataset(variables, {"token": np.arange(tokens.kind.shape[1])})

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        yield Paragraph(
            "How sharply does each token attend? The entropy of its attention is 0 where it attends to one token alone"
            " and the logarithm of their number where it attends to all alike. Low entropy has been found to mark"
            " objects, even such as the model was never trained on: areas above 0.5 below say so of these samples."
        )
        yield Citation(
            "Lis, Rottmann, Mütze, Honari, Fua and Salzmann, AttEntropy, 2022.", "https://arxiv.org/abs/2212.14397"
        )
        for site in result["site"].values:
            yield from _site_elements(str(site), result.sel(site=site))
        dead = int(result["dead_rows_sums"].isel(moment=0, draw=0).sum())
        if dead:
            yield Note(f"{dead} query rows, over all samples and layers, had no valid key and are left out.")


_BY_HEAD = ("entropy", "object_area_head")
_BY_LAYER = ("entropy_mean", "evenness", "object_area")
_WHOLE = "object_area_of_mean"
_MAPS = ("entropy_map", "row", "column", "token_text", "shown_id", "thumbnail")
_MEANINGS = {
    "entropy": ("entropy of a token's attention, mean over the tokens of a modality", "nat"),
    "entropy_mean": ("entropy of a token's attention, mean over heads and over the tokens of a modality", "nat"),
    "evenness": ("entropy over the logarithm of the number of keys, mean over heads and tokens", "1"),
    "object_area_head": ("area under the ROC curve of low entropy in one head, object against the rest", "1"),
    "object_area": ("area under the ROC curve of low entropy (mean over heads), object against the rest", "1"),
    _WHOLE: ("area under the ROC curve of low entropy (mean over heads and layers), object against the rest", "1"),
    "dead_rows": ("query rows without a valid key", "1"),
    "entropy_map": ("entropy of each token's attention, mean over heads", "nat"),
    "row": ("row on the patch grid, -1 for none", "1"),
    "column": ("column on the patch grid, -1 for none", "1"),
    "token_text": ("the token's string", "1"),
    "shown_id": ("name of a sample that the report shows", "1"),
}


def _describe(name: str) -> dict[str, str]:
    meaning, unit = _MEANINGS[name]
    return {"long_name": meaning, "units": unit}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis, NaN over none."""
    return values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def _site_elements(site: str, result: xr.Dataset) -> Iterator[Element]:
    result = result.dropna("layer", how="all", subset=["entropy_mean"])
    result = result.dropna("head", how="all", subset=["entropy"])
    if not result.sizes["layer"] or not result.sizes["head"]:
        yield Heading(site)
        yield Note(f"No token of an image or a text asks at {site}: there is nothing to measure.")
        return
    yield Heading(site)
    modalities = [str(m) for m in result["modality"].values if result["entropy_mean"].sel(modality=m).notnull().any()]
    layers = result["layer"].values
    yield LineChart(
        layers, [_series(result, "entropy_mean", m, "entropy") for m in modalities], "layer", "entropy in nats",
        caption="Mean over heads, tokens and samples, with its 95 % interval over samples; each dot is a head.",
    )  # fmt: skip
    told = [m for m in modalities if result["object_area"].sel(modality=m).notnull().any()]
    if told:
        yield LineChart(
            layers, [_series(result, "object_area", m, "object_area_head") for m in told], "layer", "area under ROC",
            caption="How well low entropy tells the tokens of a region from the others: 0.5 is chance, below it objects"
            f" have the higher entropy. {_counted(result, told)} Band: 95 % interval over samples; dots: heads.",
        )  # fmt: skip
        for modality in told:
            areas = result["object_area_head"].sel(modality=modality).transpose("layer", "head").values
            caption = f"The same for every head, {modality} tokens."
            yield HeatMap(areas, layers, result["head"].values, "layer", "head", "area under ROC", caption, centre=0.5)
    else:
        yield Note("No sample carries a region that tells objects from the rest here.")
    yield from _map_elements(result)


def _series(result: xr.Dataset, name: str, modality: str, by_head: str) -> Series:
    chosen = result.sel(modality=modality)
    mean, low, high = (chosen[f"{name}{end}"].values for end in ("", "_low", "_high"))
    return Series(f"{modality} tokens", mean, low, high, chosen[by_head].transpose("layer", "head").values)


def _counted(result: xr.Dataset, modalities: list[str]) -> str:
    counts = [int(result["object_area_samples"].sel(modality=m).max()) for m in modalities]
    all_ = [int(result["entropy_mean_samples"].sel(modality=m).max()) for m in modalities]
    parts = [f"{n} of {whole} samples ({m})" for m, n, whole in zip(modalities, counts, all_, strict=True)]
    return f"Over {' and '.join(parts)}; the others have no region to tell apart."


def _map_elements(result: xr.Dataset) -> Iterator[Element]:
    layers = result["layer"].values
    chosen = np.unique(np.linspace(0, len(layers) - 1, min(_LAYERS_SHOWN, len(layers))).round().astype(int))
    rows: list[ImageRow] = []
    texts: list[Element] = []
    for shown in range(result.sizes.get("shown", 0)):
        one = result.isel(shown=shown)
        maps = one["entropy_map"].transpose("layer", "token").values[chosen]
        row, column = (one[name].values.astype(int) for name in ("row", "column"))
        if "thumbnail" in one and (row >= 0).any():
            picture = one["thumbnail"].values.astype(np.uint8)
            overlays = [overlay(picture, on_grid(values, row, column)) for values in maps]
            rows.append(ImageRow(str(one["shown_id"].item()), [picture, *overlays]))
        words = (row < 0) & np.isfinite(maps).any(0)
        if words.any():
            texts.append(Heading(str(one["shown_id"].item()), 4))
            strings = [str(t) for t in one["token_text"].values[words]]
            texts += [ShadedText(strings, v[words], f"layer {layers[n]}") for n, v in zip(chosen, maps, strict=True)]
    if rows:
        yield ImageGrid(
            ["picture", *(f"layer {layers[n]}" for n in chosen)], rows,
            "Entropy of each patch's attention, mean over heads: dark is sharp, bright is spread, each map on its own"
            " scale.",
        )  # fmt: skip
    if texts:
        yield Paragraph("Entropy of each word's attention, mean over heads: dark is spread, plain is sharp.")
        yield from texts


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(AttentionEntropy)
