"""Singular modes of the query-key interaction: which directions of the tokens attend to which, by the weights alone.

A head scores a pair of tokens by x_i^T M x_j with M = W_q^T W_k. Its singular value decomposition M = U S V^T splits
the score into modes, x_i^T M x_j = sum_n (x_i . u_n) s_n (v_n . x_j). Where u_n and v_n point the same way (cosine 1)
tokens attend to tokens like themselves; where they are orthogonal, or opposed, to unlike ones.

1. The modes of each head come from an orthonormal basis of the rows of either projection and the SVD of the small core
   between them: M itself is never formed.
2. The cosines of each pair of singular vectors are averaged with the singular values as weights.
3. That average is set beside what random permutations of the key features give, which keep every singular value.

Pan, X., Philip, A., Xie, Z. and Schwartz, O., "Dissecting Query-Key Interaction in Vision Transformers", NeurIPS 2024.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, bootstrap_interval, hookimpl
from attnscope.report import Citation, Element, Heading, HeatMap, LineChart, Note, Paragraph, Series

# OpenBLAS computes products of up to this many multiplications on one thread.
_ONE_THREAD = 2**18
_ROTARY = (
    "the model rotates queries and keys by position (or biases scores by it), which its weights don't show:"
    " modes of W_q^T W_k describe tokens at equal positions only"
)
_RECTANGULAR = "queries and keys have different features, so that cosines aren't defined; singular values are given"
_BIAS = (
    "The bias of the queries adds b_q^T W_k x_j to the scores, which no mode of W_q^T W_k contains: for white inputs"
    " its standard deviation over that of x_i^T W_q^T W_k x_j has the median {:.2g} over heads, the greatest {:.2g}."
)


def singular_values(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of W_q^T W_k and the cosines of its singular vectors, both (..., mode), dimensionless.

    `query` (..., channel, feature) and `key` (..., channel, key_feature) are the projections; modes are as many as
    channels (or features, if fewer). With W_q = C_q B_q, W_k = C_k B_k, rows of B orthonormal, and C_q^T C_k = X S Y^T
    the vectors are U = B_q^T X and V = B_k^T Y, and the diagonal of U^T V = X^T (B_q B_k^T) Y is had without them.
    Cosines are NaN where the features differ in number.
    """
    query_basis, key_basis, (left, values, right) = _thin(query, key)
    if query.shape[-1] != key.shape[-1]:
        return values, np.full(values.shape, np.nan, values.dtype)
    between = _row_products(query_basis, key_basis)
    return values, (_transposed(left) @ between * right).sum(-1)


def singular_modes(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left vectors (..., mode, feature), singular values (..., mode) and right vectors (..., mode, key_feature).

    Rows are orthonormal, and M = sum_n s_n u_n v_n^T. A pair (u, v) is as good as (-u, -v): the entry of u with the
    largest magnitude (the first of equals) is made positive.
    """
    query_basis, key_basis, (left, values, right) = _thin(query, key)
    u = _joined(_transposed(left)[..., None, :, :] @ query_basis, query.shape[-1])
    v = _joined(right[..., None, :, :] @ key_basis, key.shape[-1])
    largest = np.take_along_axis(u, np.abs(u).argmax(-1)[..., None], -1)
    sign = np.where(largest < 0, -1, 1).astype(u.dtype)
    return u * sign, values, v * sign


def degenerate_groups(values: np.ndarray, tolerance: float) -> np.ndarray:
    """Number of the group that each mode belongs to, (..., mode): neighbours closer than tolerance * s_1 share one.

    Singular vectors are free to rotate within a group, so only what is summed over a group is well defined.
    """
    gaps = values[..., :-1] - values[..., 1:]
    breaks = gaps > tolerance * values[..., :1]
    first = np.zeros((*values.shape[:-1], 1), int)
    return np.concatenate([first, np.cumsum(breaks, -1)], -1)


def share_within_groups(cosines: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cosines (..., mode) averaged within each group of equal singular values, which no rotation there changes."""
    same = groups[..., :, None] == groups[..., None, :]
    return np.einsum("...mn,...n->...m", same, cosines) / same.sum(-1)


def average_cosine(values: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Mean cosine weighted by the singular values, (...) in [-1, 1]; equals tr(W_q^T W_k) over the nuclear norm."""
    total = values.sum(-1)
    weighted = (values * cosines).sum(-1)
    return np.divide(weighted, total, out=np.full_like(total, np.nan), where=total > 0)


def permuted_averages(
    query: np.ndarray, key: np.ndarray, nuclear_norm: np.ndarray, *, draws: int, seed: int
) -> np.ndarray:
    """Average cosines after permuting the features of the keys, (draw, head), dimensionless.

    tr(W_q^T W_k P) over the nuclear norm, which P leaves alone as it does every singular value. `query` and `key` are
    (head, channel, feature); the heads of a layer share each permutation, so that their mean can be compared as well.
    """
    generator = np.random.default_rng(seed)
    by_feature, key_by_feature = (np.ascontiguousarray(np.moveaxis(side, -1, 0)) for side in (query, key))
    averages = np.empty((draws, *nuclear_norm.shape), nuclear_norm.dtype)
    for draw in range(draws):
        permuted = key_by_feature[generator.permutation(len(key_by_feature))]  # (feature, head, channel)
        averages[draw] = np.vecdot(by_feature, permuted).sum(0) / nuclear_norm
    return averages


def bias_ratio(query_bias: np.ndarray, key: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Size of the key-only term b_q^T W_k x_j beside the bilinear one for white inputs: |W_k^T b_q| / |M|_F, (...)."""
    size = np.linalg.norm(np.einsum("...c,...cf->...f", query_bias, key), axis=-1)
    whole = np.linalg.norm(values, axis=-1)
    return np.divide(size, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _thin(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    query_basis, query_core = _orthonormal(query)
    key_basis, key_core = _orthonormal(key)
    return query_basis, key_basis, tuple(np.linalg.svd(_transposed(query_core) @ key_core))


def _orthonormal(projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal basis B of the rows, in pieces, and the core C (..., channel, channel) with W = C B.

    Cholesky of the small Gram matrix, repeated until that is the identity: as exact as Householder's QR unless rows
    are all but dependent; then it is Householder's. (Fukaya et al., "CholeskyQR2", ScalA 2014.)
    """
    basis, core = _pieces(projection), np.eye(projection.shape[-2], dtype=projection.dtype)
    enough = max(1e-12, 10 * np.finfo(projection.dtype).eps)
    for _ in range(3):
        gram = _row_products(basis, basis)
        if np.abs(gram - np.eye(gram.shape[-1])).max() < enough:
            return basis, core
        try:
            lower = np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            break
        basis = np.linalg.inv(lower)[..., None, :, :] @ basis
        core = core @ lower
    return _householder(projection)


def _householder(projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    basis, core = np.linalg.qr(_transposed(projection))
    return _pieces(_transposed(basis)), _transposed(core)


def _pieces(rows: np.ndarray) -> np.ndarray:
    """Rows (..., channel, feature) as (..., piece, channel, part), the last piece filled up with zeros.

    Products of pieces are so small that a BLAS computes them on one thread. To wake its other threads costs more than
    the whole product does, and up to a hundred times more where the cores are busy.
    """
    channels, features = rows.shape[-2:]
    part = max(1, _ONE_THREAD // channels**2)
    count = -(-features // part)
    filled = np.zeros((*rows.shape[:-1], count * part), rows.dtype)
    filled[..., :features] = rows
    return np.ascontiguousarray(np.moveaxis(filled.reshape(*rows.shape[:-1], count, part), -2, -3))


def _joined(pieces: np.ndarray, features: int) -> np.ndarray:
    """Pieces as rows (..., channel, feature) again."""
    rows = np.moveaxis(pieces, -3, -2)
    return rows.reshape(*rows.shape[:-2], -1)[..., :features]


def _row_products(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products of the rows of two bases in pieces: (..., channel, channel)."""
    return (one @ _transposed(other)).sum(-3)


def _transposed(matrix: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrix, -1, -2)


@dataclass(frozen=True)
class QKSVD:
    """Singular modes of W_q^T W_k, per layer and head.

    `use_norm_gain` folds the gain of the norm before the projections into them; `vectors` keeps the singular vectors;
    `tolerance` is the gap, relative to the largest singular value, below which modes count as degenerate.
    """

    name: ClassVar[str] = "qk_svd"
    title: ClassVar[str] = "Query-key singular modes"
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    use_norm_gain: bool = False
    vectors: bool = False
    null_draws: int = 100
    seed: int = 0
    tolerance: float = 1e-6
    precision: Literal["float64", "float32"] = "float64"

    def requires(self) -> ExtractSpec:
        return ExtractSpec(
            quantities=frozenset({"weights"}),
            sites=None if self.sites is None else frozenset(self.sites),
            layers=None if self.layers is None else frozenset(self.layers),
        )

    def analyse(self, run: Run) -> xr.Dataset:
        """Modes, cosines and averages with dims (site, layer, head, mode); NaN where a site is smaller than another."""
        sites = list(self.sites or run.sites)
        parts, caveats = [], []
        for site in sites:
            weights = run.weights(site)
            parts.append(self._site(site, weights))
            caveats += [f"{site}: {text}" for text in _caveats(weights)]
        joined = xr.concat(
            parts, xr.Variable("site", np.array(sites, object)), join="outer", fill_value={"degenerate_group": -1}
        )
        result = joined.transpose("site", "layer", "head", "mode", ...)
        result["degenerate_group"] = result["degenerate_group"].astype(np.int64)
        return result.assign_attrs(
            caveats="; ".join(caveats),
            sign="the entry of each left vector with the largest magnitude is positive",
            interval="95 % bootstrap over heads for layer_cosine_average_low and _high",
        )

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
        query, key = (weights[side].values.astype(self.precision) for side in ("query", "key"))
        if self.use_norm_gain:
            query, key = (side * weights["norm_gain"].values.astype(self.precision) for side in (query, key))
        # Query heads that share a key head (GQA) lie side by side.
        key = np.repeat(key, len(query) // len(key), axis=0)
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
            "bias_ratio": ("head", bias_ratio(weights["query_bias"].values.astype(self.precision), key, values)),
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
        return permuted_averages(query, key, nuclear_norm, draws=self.null_draws, seed=self.seed)

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        yield Paragraph(
            "Does a head attend to tokens like the one that asks, or to others? The average cosine of the left and"
            " right singular vectors of W_q^T W_k is near 1 where like attends to like, near 0 where query and key"
            " directions have nothing in common, and negative where opposites attract. It is had from the weights"
            " alone; no sample is used."
        )
        yield Citation(
            "Pan, Philip, Xie and Schwartz, Dissecting Query-Key Interaction in Vision Transformers, NeurIPS 2024.",
            "https://arxiv.org/abs/2405.14880",
        )
        for site in result["site"].values:
            chosen = result.sel(site=site).dropna("layer", how="all", subset=["singular_value"])
            yield from _site_elements(str(site), chosen.dropna("head", how="all", subset=["singular_value"]))
        for caveat in filter(None, str(result.attrs.get("caveats", "")).split("; ")):
            yield Note(caveat[:1].upper() + caveat[1:] + ".")
        bias = result["bias_ratio"].values
        if np.isfinite(bias).any() and np.nanmax(bias) > 0:
            yield Note(_BIAS.format(np.nanmedian(bias), np.nanmax(bias)))


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


def _caveats(weights: xr.Dataset) -> Iterator[str]:
    if weights.attrs.get("rotary"):
        yield _ROTARY
    if weights["query"].shape[-1] != weights["key"].shape[-1]:
        yield _RECTANGULAR


def _site_elements(site: str, result: xr.Dataset) -> Iterator[Element]:
    layers = result["layer"].values
    yield Heading(site)
    if np.isfinite(result["cosine_average"].values).any():
        observed = Series(
            "mean over heads",
            result["layer_cosine_average"].values,
            result["layer_cosine_average_low"].values,
            result["layer_cosine_average_high"].values,
            result["cosine_average"].transpose("layer", "head").values,
        )
        middle = (result["layer_null_low"] + result["layer_null_high"]).values / 2
        null = Series("features permuted", middle, result["layer_null_low"].values, result["layer_null_high"].values)
        shown = [observed, null] if np.isfinite(middle).any() else [observed]
        yield LineChart(
            layers, shown, "layer", "average cosine", zero_line=True,
            caption="Each dot is a head, the line their mean, the band its 95 % bootstrap interval over heads."
            " 'Features permuted' is where 95 % of random permutations fall that keep every singular value.",
        )  # fmt: skip
        yield HeatMap(
            result["cosine_average"].transpose("layer", "head").values, layers, result["head"].values, "layer", "head",
            "average cosine", "The same for every head: red attends to like, blue to opposite directions.", centre=0.0,
        )  # fmt: skip
    yield LineChart(
        result["mode"].values + 1, _spectra(result, layers), "mode", "singular value / largest", logarithmic=True,
        caption="How fast the singular values fall: mean over heads, band from the least to the greatest head. A steep"
        " curve means that few modes make the head.",
    )  # fmt: skip


def _spectra(result: xr.Dataset, layers: np.ndarray) -> list[Series]:
    chosen = sorted({0, len(layers) // 3, 2 * len(layers) // 3, len(layers) - 1})
    spectra = []
    for position in chosen:
        values = result["singular_value"].isel(layer=position).transpose("head", "mode").values
        largest = np.where(values[:, :1] > 0, values[:, :1], np.nan)
        # A logarithmic axis has no place for the exact zeros of a head of lower rank.
        relative = np.clip(values / largest, 1e-8, None)
        spectra.append(Series(f"layer {layers[position]}", relative.mean(0), relative.min(0), relative.max(0)))
    return spectra


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(QKSVD)
