"""Singular modes of the query-key interaction: which directions of the tokens attend to which.

A head scores a pair of tokens by x_i^T M x_j with M = W_q^T W_k. Its singular value decomposition M = U S V^T splits
the score into modes, x_i^T M x_j = sum_n (x_i . u_n) s_n (v_n . x_j). Where u_n and v_n point the same way (cosine 1)
tokens attend to tokens like themselves; where they are orthogonal, or opposed, to unlike ones.

1. The modes of each head come from an orthonormal basis of the rows of either projection and the SVD of the small core
   between them: M itself is never formed.
2. The cosines of each pair of singular vectors are averaged with the singular values as weights.
3. That average is set beside what random permutations of the key features give, which keep every singular value.
4. On samples, the projections of the tokens on each mode's vectors are read off the stored queries and keys (`modes`),
   and give the images that a mode is strongest on, what it adds to the attention, and whether it joins one object to
   itself (`on_samples`).
5. Where samples carry two objects or more, attention from one is parted among the same object, others, and background.

Pan, X., Philip, A., Xie, Z. and Schwartz, O., "Dissecting Query-Key Interaction in Vision Transformers", NeurIPS 2024.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, bootstrap_interval, hookimpl
from attnscope.reading import chosen_layers, join_sites
from attnscope.report import Element
from attnscope.statistics import with_intervals
from attnscope_qk_svd.modes import (
    average_cosine,
    bias_ratio,
    degenerate_groups,
    mode_readers,
    permuted_averages,
    share_within_groups,
    singular_modes,
    singular_values,
    with_bias,
)
from attnscope_qk_svd.on_samples import Options, SiteModes, merge_tallies, sample_variables, tally_block
from attnscope_qk_svd.showing import show

_ROTARY = (
    "the model rotates queries and keys by position (or scales or norms them, or biases scores by position), which its"
    " weights don't show: modes of W_q^T W_k describe tokens at equal positions only"
)
_RECTANGULAR = "queries and keys have different features, so that cosines aren't defined; singular values are given"
_NO_WEIGHTS = "the model makes its queries and keys with no linear layers that attnscope knows"
_NO_MAPS = {
    "rotary": "no maps of modes: queries aren't the plain projections of their input, so that inputs can't be read off",
    "unknown": "no maps of modes: it wasn't seen whether queries are the plain projections of their input",
    "norm_gain": "no maps of modes: with the norm's gain in the weights they'd need its shift too, which isn't stored",
    "absent": "no maps of modes: the run holds no queries and keys (on_samples=yes records them where it can)",
}


@dataclass(frozen=True)
class QKSVD:
    """Singular modes of W_q^T W_k, per layer and head, and what they do on the run's samples.

    `use_norm_gain` folds the gain of the norm before the projections into them, `use_bias` their biases (as the weights
    of a feature that is 1 for every token); `vectors` keeps the singular vectors; `tolerance` is the gap, relative to
    the largest singular value, below which modes count as degenerate. `on_samples`: 'yes' records and demands what the
    samples' part needs, 'auto' uses what the run holds, 'no' looks at the weights alone. `top_images` is how many
    images are kept of every mode, `shown_images` how many the report shows of some; regions of more than the share
    `largest` of an image are no objects.
    """

    name: ClassVar[str] = "qk_svd"
    title: ClassVar[str] = "Query-key singular modes"
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    use_norm_gain: bool = False
    use_bias: bool = False
    on_samples: Literal["auto", "yes", "no"] = "auto"
    top_images: int = 5
    shown_images: int = 3
    largest: float = 0.5
    draws: int = 200
    vectors: bool = False
    null_draws: int = 100
    seed: int = 0
    tolerance: float = 1e-6
    precision: Literal["float64", "float32"] = "float64"

    def requires(self) -> ExtractSpec:
        return ExtractSpec(
            quantities=frozenset({"weights", *(("attention", "query", "key") if self.on_samples == "yes" else ())}),
            sites=None if self.sites is None else frozenset(self.sites),
            layers=None if self.layers is None else frozenset(self.layers),
        )

    def analyse(self, run: Run) -> xr.Dataset:
        """Modes, cosines and averages with dims (site, layer, head, mode); NaN where a site is smaller than another."""
        weights, caveats = self._weights(run)
        found = {site: self._site(site, stored) for site, stored in weights.items()}
        caveats += [f"{site}: {text}" for site, stored in weights.items() for text in _caveats(stored)]
        by_weights = join_sites(found, {"degenerate_group": -1}).transpose("site", "layer", "head", "mode", ...)
        by_weights["degenerate_group"] = by_weights["degenerate_group"].astype(np.int64)
        attended = [s for s in weights if self.on_samples != "no" and "attention" in run.quantities(s)]
        modes = {}
        for site in attended:
            why_not = self._why_no_maps(run, site, weights[site])
            caveats += [f"{site}: {_NO_MAPS[why_not]}"] if why_not else []
            if not why_not:
                modes[site] = self._modes(weights[site], found[site])
        attrs = {
            "caveats": "; ".join(caveats),
            "sign": "the entry of each left vector with the largest magnitude is positive",
            "interval": "95 % bootstrap over heads for layer_cosine_average and layer_same_object, over samples else",
        }
        if not attended:
            return by_weights.assign_attrs(attrs)
        layers = {site: chosen_layers(run, site, found[site]["layer"].values.tolist()) for site in attended}
        options = Options(self.top_images, self.shown_images, self.largest, self.draws, self.seed)
        tallies = (_joined(tally_block(run, block, layers, modes, options)) for block in run.blocks())
        return self._finished(by_weights, tallies).assign_attrs(attrs)

    def _weights(self, run: Run) -> tuple[dict[str, xr.Dataset], list[str]]:
        """The weights of every site that has any, and what is said of the others."""
        found, caveats = {}, []
        for site in self.sites or run.sites:
            try:
                found[site] = run.weights(site)
            except ValueError:
                if self.sites:
                    raise
                caveats.append(f"{site}: {_NO_WEIGHTS}")
        if not found:
            raise ValueError(f"{run.location} holds the query and key projections of no site: {_NO_WEIGHTS}")
        return found, caveats

    def combine(self, parts: Iterable[xr.Dataset]) -> xr.Dataset:
        """One result of those of parts of a run; what rests on the weights alone is the same in all of them."""
        first: list[xr.Dataset] = []

        def passing() -> Iterator[xr.Dataset]:
            for part in parts:
                if not first:
                    first.append(part[[n for n in _MEANINGS if n in part]].assign_attrs(part.attrs))
                yield part[sample_variables(part)]

        tallies = passing()
        head = next(tallies)
        if not sample_variables(head):
            return first[0]
        whole = (part for parts in ([head], tallies) for part in parts)
        return self._finished(first[0], whole).assign_attrs(first[0].attrs)

    def _finished(self, by_weights: xr.Dataset, tallies: Iterable[xr.Dataset]) -> xr.Dataset:
        merged = with_intervals(merge_tallies(tallies, self.top_images, self.shown_images))
        result = by_weights.merge(merged, compat="override", join="outer")
        if "top_same" not in result:
            return result
        count = result["contribution_count"]
        result["contribution"] = (result["contribution_total"] / count.where(count > 0)).assign_attrs(
            long_name=_MEANINGS_ON_SAMPLES["contribution"], units="score before scale"
        )
        weight = result["singular_value"].where(result["top_same"].notnull().any("rank"))
        total = weight.sum("mode")
        for name, source in (("same_object", "top_same"), ("same_object_chance", "top_chance")):
            mean = (weight * result[source].mean("rank")).sum("mode") / total.where(total > 0)
            result[name] = mean.assign_attrs(long_name=_MEANINGS_ON_SAMPLES[name], units="1")
            described = {"long_name": f"mean over heads of: {_MEANINGS_ON_SAMPLES[name]}", "units": "1"}
            result[f"layer_{name}"] = mean.mean("head").assign_attrs(described)
        low, high = bootstrap_interval(result["same_object"].transpose("head", ...).values, seed=self.seed)
        for end, values in (("low", low), ("high", high)):
            across = result["same_object"].transpose("head", ...).dims[1:]
            described = {"long_name": f"{end}er end of the interval of layer_same_object over heads", "units": "1"}
            result[f"layer_same_object_{end}"] = xr.Variable(across, values, described)
        return result

    def _why_no_maps(self, run: Run, site: str, weights: xr.Dataset) -> str:
        # A model with attention code of its own may show its attention and no queries and keys.
        if not {"query", "key"} <= set(run.quantities(site)) or not run.plan.sites[site].channels:
            return "absent"
        if self.use_norm_gain:
            return "norm_gain"
        if weights.attrs.get("rotary"):
            return "rotary"
        return "" if weights.attrs.get("plain") else "unknown"

    def _modes(self, weights: xr.Dataset, found: xr.Dataset) -> SiteModes:
        """What reads the modes of a site off its queries and keys."""
        layers = found["layer"].values.tolist()
        readers, biases = [], []
        for layer in layers:
            one = weights.sel(layer=layer)
            query, key = self._projections(one)
            readers.append(mode_readers(query, key, self.tolerance))
            both = [one[f"{side}_bias"].values.astype(float) for side in ("query", "key")]
            both[1] = np.repeat(both[1], len(query) // len(both[1]), axis=0)
            # With the biases in the modes nothing of a query is left out.
            biases.append([np.zeros_like(b) if self.use_bias else b for b in both])
        values, cosines = (found[n].transpose("layer", "head", "mode").values for n in ("singular_value", "cosine"))
        query_reader, key_reader = (np.stack(side) for side in zip(*readers, strict=True))
        query_bias, key_bias = (np.stack(side) for side in zip(*biases, strict=True))
        shown = _shown_modes(found["cosine_average"].transpose("layer", "head").values)
        return SiteModes(tuple(layers), query_reader, key_reader, query_bias, key_bias, values, cosines, shown)

    def _projections(self, weights: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Query and key projections (head, channel, feature) of a layer, with what the options put into them."""
        query, key = (weights[side].values.astype(self.precision) for side in ("query", "key"))
        if self.use_norm_gain:
            query, key = (side * weights["norm_gain"].values.astype(self.precision) for side in (query, key))
        if self.use_bias:
            query, key = (
                with_bias(side, weights[f"{name}_bias"].values.astype(self.precision))
                for name, side in (("query", query), ("key", key))
            )
        # Query heads that share a key head (GQA) lie side by side.
        return query, np.repeat(key, len(query) // len(key), axis=0)

    def _site(self, site: str, weights: xr.Dataset) -> xr.Dataset:
        stored = np.isfinite(weights["query"].isel(head=0, channel=0, feature=0).values)
        known = [int(layer) for layer in weights["layer"].values[stored]]
        layers = known if self.layers is None else list(self.layers)
        unknown = sorted(set(layers) - set(known))
        if unknown:
            raise ValueError(f"site {site!r} has no layer {unknown[0]}; it has {known[0]} to {known[-1]}")
        if self.use_norm_gain and "norm_gain" not in weights:
            raise ValueError(f"the run holds no norm gain for site {site!r}; leave use_norm_gain out")
        parts = [self._layer(weights.sel(layer=layer)) for layer in layers]
        return xr.concat(parts, xr.Variable("layer", layers, {"long_name": "layer number of the model"}))

    def _layer(self, weights: xr.Dataset) -> xr.Dataset:
        query, key = self._projections(weights)
        values, cosines = singular_values(query, key)
        groups = degenerate_groups(values, self.tolerance)
        # Modes of no size can be any directions: their cosine says nothing.
        defined = values > self.tolerance * values[..., :1]
        average = average_cosine(values, cosines)
        null = self._null(query, key, values)
        heads = average[:, None] if len(average) else np.full((1, 1), np.nan)
        low, high = bootstrap_interval(heads, seed=self.seed)
        described = {
            "singular_value": (("head", "mode"), values),
            "cosine": (("head", "mode"), np.where(defined, share_within_groups(cosines, groups), np.nan)),
            "degenerate_group": (("head", "mode"), groups),
            "cosine_average": ("head", average),
            "null_low": ("head", np.quantile(null, 0.025, axis=0)),
            "null_high": ("head", np.quantile(null, 0.975, axis=0)),
            "bias_ratio": ("head", self._bias_ratio(weights, key, values)),
            "layer_cosine_average": ((), average.mean()),
            "layer_cosine_average_low": ((), low[0]),
            "layer_cosine_average_high": ((), high[0]),
            "layer_null_low": ((), np.quantile(null.mean(1), 0.025)),
            "layer_null_high": ((), np.quantile(null.mean(1), 0.975)),
        }
        if self.vectors:
            left, _, right = singular_modes(query, key)
            described["left_vector"] = (("head", "mode", "feature"), left.astype(np.float32))
            described["right_vector"] = (("head", "mode", "key_feature"), right.astype(np.float32))
        coordinates = {"head": np.arange(len(query)), "mode": np.arange(values.shape[-1])}
        if self.vectors:
            # Sites may have different numbers of them.
            coordinates |= {"feature": np.arange(query.shape[-1]), "key_feature": np.arange(key.shape[-1])}
        variables = {
            name: xr.Variable(dims, data, {"long_name": _MEANINGS[name], "units": "1"})
            for name, (dims, data) in described.items()
        }
        return xr.Dataset(variables, coordinates)

    def _null(self, query: np.ndarray, key: np.ndarray, values: np.ndarray) -> np.ndarray:
        if not self.null_draws or query.shape[-1] != key.shape[-1]:
            return np.full((1, len(query)), np.nan)
        total = values.sum(-1)
        nuclear_norm = np.where(total > 0, total, np.nan)
        return permuted_averages(
            query, key, nuclear_norm, draws=self.null_draws, seed=self.seed, constant=self.use_bias
        )

    def _bias_ratio(self, weights: xr.Dataset, key: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Size of what the modes leave out; nothing where the biases are among them."""
        bias = weights["query_bias"].values.astype(self.precision)
        return np.zeros(len(bias)) if self.use_bias else bias_ratio(bias, key, values)

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        yield from show(result)


_MEANINGS = {
    "singular_value": "singular value of W_q^T W_k, largest first",
    "cosine": "cosine of the left and right singular vector; the mean over a group of equal singular values",
    "degenerate_group": "number of the group of equal singular values that the mode belongs to; -1 for none",
    "cosine_average": "mean cosine over modes, weighted by the singular values",
    "null_low": "2.5th percentile of cosine_average over random permutations of the key features",
    "null_high": "97.5th percentile of cosine_average over random permutations of the key features",
    "bias_ratio": "standard deviation of the query bias's key-only term over that of the bilinear term, white inputs",
    "layer_cosine_average": "mean of cosine_average over heads",
    "layer_cosine_average_low": "lower end of the interval of layer_cosine_average over heads",
    "layer_cosine_average_high": "upper end of the interval of layer_cosine_average over heads",
    "layer_null_low": "2.5th percentile of layer_cosine_average over random permutations of the key features",
    "layer_null_high": "97.5th percentile of layer_cosine_average over random permutations of the key features",
    "left_vector": "left singular vector (query side), length 1",
    "right_vector": "right singular vector (key side), length 1",
}


_MEANINGS_ON_SAMPLES = {
    "contribution": "what a mode adds to the score of attended tokens over the mean token, mean over samples",
    "same_object": "chance that a mode's strongest images have one object strongest in both vectors, by singular value",
    "same_object_chance": "the same if all objects, and the background, were alike",
}
_DISPLAY_LAYERS = 4


def _caveats(weights: xr.Dataset) -> Iterator[str]:
    if weights.attrs.get("rotary"):
        yield _ROTARY
    if weights["query"].shape[-1] != weights["key"].shape[-1]:
        yield _RECTANGULAR


def _shown_modes(averages: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """The first mode of the heads with the highest and the lowest average cosine, at a few layers over the depth."""
    layers = np.unique(np.linspace(0, len(averages) - 1, min(_DISPLAY_LAYERS, len(averages))).round().astype(int))
    shown = []
    for layer in layers.tolist():
        heads = np.nan_to_num(averages[layer])
        shown += [(layer, head, 0) for head in dict.fromkeys([int(heads.argmax()), int(heads.argmin())])]
    return tuple(shown)


def _joined(tallies: dict[str, xr.Dataset]) -> xr.Dataset:
    """The tallies of several sites: side by side, and what is displayed of them one behind the other."""
    plain = {site: tally.drop_vars([n for n in tally.variables if str(n).startswith("display")])
             for site, tally in tallies.items()}  # fmt: skip
    joined = join_sites(
        plain, {"top_score": -np.inf, "top_sample": -1, "contribution_total": 0.0, "contribution_count": 0.0}
    )
    displayed = []
    for site, tally in tallies.items():
        if "display_score" in tally:
            own = tally[[n for n in tally.variables if str(n).startswith("display")]]
            own = own.drop_vars([n for n in own.coords if not str(n).startswith("display")])
            names: dict[str, object] = {dim: np.arange(own.sizes[dim]) for dim in ("query_token", "key_token")}
            names["display_site"] = ("display", np.full(own.sizes["display"], site, object))
            displayed.append(own.assign_coords(names))
    if not displayed:
        return joined
    fill = {f"display_{side}_{name}": "" if name == "text" else -1
            for side in ("query", "key") for name in ("row", "column", "text")}  # fmt: skip
    along = xr.concat(
        displayed, "display", join="outer", fill_value=fill | {"display_id": "", "display_score": -np.inf}
    )
    return joined.merge(along)


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(QKSVD)
