"""Relevance of each token for the model's answer, with attention rollout and raw attention beside it.

1. Each layer gives one map per sample: the positive part of gradient times attention, averaged over heads.
2. Relevance starts as the identity and gains, layer by layer in forward order, what attention passes on:
   R <- R + A R. Only the row of the token that the answer is read from is wanted, so that row is carried backwards
   through the layers, r <- r + r A from the last to the first, and no product of two maps is ever formed.
3. Rollout does the same with the head mean of the attention and a residual of equal weight, without a gradient; raw
   attention is the head mean of the last layer.

Chefer, H., Gur, S. and Wolf, L., "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers", ICCV 2021, equations 5 and 6. Rollout: Abnar, S. and Zuidema, W., "Quantifying Attention
Flow in Transformers", ACL 2020.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, bootstrap_interval, hookimpl
from attnscope.report import (
    Citation,
    Element,
    Heading,
    ImageGrid,
    ImageRow,
    Note,
    Paragraph,
    ShadedText,
    Table,
    overlay,
)

MethodName: TypeAlias = Literal["relevance", "rollout", "attention"]

_EXTRACTED = 1
# Tokens whose relevance is kept in the result but shown on no map and counted in no statistic.
_BESIDE_CONTENT = ("padding", "cls", "register", "special")
_TOP_SHARE = 0.1


def add_relevance(row: np.ndarray, relevance_map: np.ndarray) -> np.ndarray:
    """One layer of equation 6 seen from a row of R: r (I + A), (sample, token), dimensionless.

    `row` is (sample, token), `relevance_map` (sample, query_token, key_token) the positive head mean of gradient times
    attention.
    """
    return row + attend(row, relevance_map)


def add_rollout(row: np.ndarray, attention_mean: np.ndarray) -> np.ndarray:
    """One layer of rollout seen from a row: r D^-1 (I + A), (sample, token), with D the row sums of I + A.

    Rows of attention that sum to 1 make D twice the identity; a query without a valid key (a row of zeros) passes its
    own relevance on unchanged.
    """
    scaled = row / (1 + attention_mean.sum(-1))
    return scaled + attend(scaled, attention_mean)


def attend(row: np.ndarray, attention_map: np.ndarray) -> np.ndarray:
    """A row vector (sample, query_token) times a map (sample, query_token, key_token): (sample, key_token)."""
    return np.matmul(row[:, None, :], attention_map)[:, 0]


def fold_back(
    row: np.ndarray, maps: Iterable[np.ndarray], step: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Carry a read-out row (sample, token) backwards through maps that come last layer first."""
    for layer_map in maps:
        row = step(row, np.nan_to_num(np.asarray(layer_map, np.float64)))
    return row


def readout_rows(kind: np.ndarray, codes: dict[str, int], row: "int | Literal['auto', 'cls', 'mean']") -> np.ndarray:
    """The row that the answer is read from, as weights (sample, token) that sum to 1.

    'cls' takes the first CLS token, 'mean' all real tokens alike, 'auto' the CLS token where a sample has one and the
    mean elsewhere; a number counts the real tokens of each sample, from the end when negative.
    """
    real = kind != codes["padding"]
    is_cls = kind == codes["cls"]
    mean = real / np.maximum(real.sum(-1, keepdims=True), 1)
    if row == "mean":
        return mean
    if isinstance(row, int):
        order = np.cumsum(real, -1) - 1
        wanted = np.where(row < 0, row + real.sum(-1), row)[:, None]
        if (real.any(-1) & ((wanted[:, 0] < 0) | (wanted[:, 0] >= real.sum(-1)))).any():
            raise ValueError(f"row {row} lies outside the tokens of a sample, the shortest has {real.sum(-1).min()}")
        return (real & (order == wanted)).astype(float)
    if row == "cls" and not is_cls.any(-1)[real.any(-1)].all():
        raise ValueError("row 'cls' asks for a CLS token, which not every sample has; use 'mean' or a token number")
    first = is_cls & (np.cumsum(is_cls, -1) == 1)
    return np.where(is_cls.any(-1, keepdims=True), first, mean)


def top_share(values: np.ndarray, share: float = _TOP_SHARE) -> float:
    """The part of a map's total that the strongest `share` of its tokens hold (at least one token), in [0, 1]."""
    count = max(1, round(share * values.size))
    total = values.sum()
    return float(np.sort(values)[-count:].sum() / total) if total > 0 else np.nan


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two maps (token), in [-1, 1]; ties share their mean rank, NaN for a flat map."""
    a, b = (_ranks(v) - (v.size - 1) / 2 for v in (first, second))
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else np.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


@dataclass(frozen=True)
class Method:
    """How one method goes through the layers: the map that it reads of each, its step, and whether it starts late."""

    quantity: str
    step: Callable[[np.ndarray, np.ndarray], np.ndarray]
    meaning: str
    last_layer_only: bool = False


METHODS = {
    "relevance": Method(
        "attention_relevance",
        add_relevance,
        "relevance for the target through all layers, with gradient (Chefer et al. 2021)",
    ),
    "rollout": Method("attention_mean", add_rollout, "attention rollout (Abnar and Zuidema 2020)"),
    "attention": Method("attention_mean", attend, "head mean of the last layer's attention", last_layer_only=True),
}


@dataclass(frozen=True)
class Relevance:
    """Relevance of the tokens of each self-attention stream for the target, and the same by plainer methods.

    `target` is the scalar that the gradient is taken of (a class number, or a name that the model's family knows);
    `row` the token that the answer is read from (see `readout_rows`); `start_layer` the first layer that takes part,
    counted from the end when negative; `pictures` how many samples the report shows.
    """

    name: ClassVar[str] = "relevance"
    title: ClassVar[str] = "Relevance of tokens"
    target: int | str | None = None
    methods: tuple[MethodName, ...] = ("relevance", "rollout", "attention")
    row: int | Literal["auto", "cls", "mean"] = "auto"
    start_layer: int = 0
    sites: tuple[str, ...] | None = None
    pictures: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"relevance has no method {got}; its methods are {', '.join(METHODS)}")

    def requires(self) -> ExtractSpec:
        return ExtractSpec(
            quantities=frozenset({METHODS[m].quantity for m in self.methods} | {"score"}),
            sites=None if self.sites is None else frozenset(self.sites),
            target=self.target,
        )

    def analyse(self, run: Run) -> xr.Dataset:
        """One variable (site, sample, token) per method, how concentrated its maps are and how far the methods agree.

        The dimension of methods is `ranking`, since `method` means something else to `Dataset.sel`.
        """
        sites = self._sites(run)
        parts = [self._site(run, site) for site in sites]
        along = xr.Variable("site", np.array(sites, object))
        joined = xr.concat(parts, along, join="outer", coords=list(_TOKEN_FIELDS), fill_value=_FILL)
        result = joined.assign_attrs(
            target=str(run.spec.target if run.spec.target is not None else run.attrs.get("target", "")),
            readout="; ".join(f"{s}: {p.attrs['readout']}" for s, p in zip(sites, parts, strict=True)),
            not_followed=", ".join(s for s in run.sites if s not in sites),
            interval="95 % bootstrap over samples",
        )
        return result.assign(_thumbnails(run, self.pictures))

    def _sites(self, run: Run) -> list[str]:
        following = [s for s, plan in run.plan.sites.items() if plan.queries == plan.keys]
        for site in self.sites or ():
            if site not in following:
                known = ", ".join(following) or "none"
                raise ValueError(f"relevance follows self-attention, which {site!r} is not here; the run's are {known}")
        if not following:
            raise ValueError(f"relevance follows self-attention, which {run.location} holds at no site")
        return list(self.sites or following)

    def _site(self, run: Run, site: str) -> xr.Dataset:
        tokens = run.tokens(run.plan.sites[site].queries)
        codes = _codes(tokens["kind"])
        shape = tokens["kind"].shape
        relevance = np.full((len(self.methods), *shape), np.nan, np.float32)
        dead = np.zeros(shape[0], np.int64)
        extracted = run.status == _EXTRACTED
        # Tokens of samples that aren't there count as padding.
        kind = np.where(extracted[:, None], tokens["kind"].values, codes["padding"])
        for block in run.blocks():
            at = slice(block.start, block.stop)
            real = kind[at] != codes["padding"]
            if not real.any():
                continue
            rows = readout_rows(kind[at], codes, self.row)
            for number, method in enumerate(self.methods):
                folded = fold_back(rows, self._maps(run, site, METHODS[method], at, real), METHODS[method].step)
                relevance[number, at] = np.where(real, folded, np.nan)
            dead[at] = self._dead_rows(run, site, at, real)
        content = ~np.isin(kind, [codes[k] for k in _BESIDE_CONTENT])
        readout = self._readout(bool((kind == codes["cls"]).any()))
        return self._describe(run, site, relevance, dead, content).assign_attrs(readout=readout)

    def _maps(self, run: Run, site: str, method: Method, samples: slice, real: np.ndarray) -> Iterator[np.ndarray]:
        """The maps (sample, query_token, key_token) of a block of samples, last layer first, one at a time."""
        array = run.array(site, method.quantity)
        valid = run.array(site, "query_valid").isel(sample=samples)
        for position in self._walk(run.plan.sites[site].layers, method):
            maps = array.isel(sample=samples, layer=position).values
            rows = valid.isel(layer=position).values & real
            if np.isnan(maps).all(-1)[rows].any():
                raise ValueError(
                    f"{run.location} was extracted without {method.quantity!r} for some samples of {site!r}"
                )
            yield maps

    def _walk(self, layers: Sequence[int], method: Method) -> list[int]:
        """Positions of the layers that take part, last first."""
        if self.start_layer < 0:
            first = layers[max(0, len(layers) + self.start_layer)]
        elif self.start_layer > layers[-1]:
            raise ValueError(f"start_layer {self.start_layer} lies behind the last layer, {layers[-1]}")
        else:
            first = self.start_layer
        positions = [p for p, layer in enumerate(layers) if layer >= first]
        return positions[-1:] if method.last_layer_only else positions[::-1]

    def _dead_rows(self, run: Run, site: str, samples: slice, real: np.ndarray) -> np.ndarray:
        valid = run.array(site, "query_valid").isel(sample=samples).values  # (sample, layer, query_token)
        return (~valid & real[:, None]).sum((1, 2))

    def _readout(self, has_cls: bool) -> str:
        if isinstance(self.row, int):
            return f"token {self.row}"
        if self.row != "auto":
            return "CLS token" if self.row == "cls" else "mean over real tokens"
        return "CLS token" if has_cls else "mean over real tokens"

    def _describe(
        self, run: Run, site: str, relevance: np.ndarray, dead: np.ndarray, content: np.ndarray
    ) -> xr.Dataset:
        concentration = np.full(relevance.shape[:2], np.nan)
        pairs = list(itertools.combinations(range(len(self.methods)), 2))
        agreement = np.full((len(pairs), len(content)), np.nan)
        for sample, chosen in enumerate(content & np.isfinite(relevance[0])):
            maps = relevance[:, sample, chosen]
            if maps.size:
                concentration[:, sample] = [top_share(m) for m in maps]
                agreement[:, sample] = [rank_correlation(maps[a], maps[b]) for a, b in pairs]
        described: dict[str, tuple[object, np.ndarray]] = {
            m: (("sample", "token"), values) for m, values in zip(self.methods, relevance, strict=True)
        }
        described["dead_rows"] = ("sample", dead)
        for name, dim, values in (("concentration", "ranking", concentration), ("agreement", "pair", agreement)):
            low, high = bootstrap_interval(values.T, seed=self.seed)
            described[name] = ((dim, "sample"), values)
            described |= {f"{name}_mean": (dim, _mean(values)), f"{name}_low": (dim, low), f"{name}_high": (dim, high)}
        variables = {
            n: xr.Variable(
                dims, values, {"long_name": METHODS[n].meaning if n in METHODS else _MEANINGS[n], "units": "1"}
            )
            for n, (dims, values) in described.items()
        }
        return xr.Dataset(variables, self._coordinates(run, site, pairs))

    def _coordinates(self, run: Run, site: str, pairs: Sequence[tuple[int, int]]) -> dict[str, object]:
        tokens = run.tokens(run.plan.sites[site].queries)
        names = [f"{self.methods[a]} and {self.methods[b]}" for a, b in pairs]
        return {
            "ranking": np.array(self.methods, object),
            "pair": np.array(names, object),
            "sample": np.array(run.sample_ids, object),
            "token": np.arange(tokens.sizes["token"]),
            **{n: tokens[n].variable.load() for n in _TOKEN_FIELDS},
        }

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        target = f" (target: {result.attrs['target']})" if result.attrs.get("target") else ""
        yield Paragraph(
            f"Which tokens does the model's answer rest on{target}? Relevance follows attention through all layers and"
            " counts it only where more of it would raise the target; rollout follows attention without asking for the"
            " target; raw attention is the last layer alone. Brighter means more, on each map's own scale."
        )
        yield Citation(
            "Chefer, Gur and Wolf, Generic Attention-model Explainability, ICCV 2021, equations 5 and 6; rollout:"
            " Abnar and Zuidema, ACL 2020.",
            "https://arxiv.org/abs/2103.15679",
        )
        for site in result["site"].values:
            yield from _site_elements(str(site), result.sel(site=site))
        yield Note(
            f"Read from: {result.attrs.get('readout', '')}. CLS, register and special tokens have relevance too, which"
            " the result keeps; the maps and the table leave them out."
        )
        if result.attrs.get("not_followed"):
            yield Note(f"What passed through {result.attrs['not_followed']} is not part of these maps.")
        dead = int(result["dead_rows"].sum())
        if dead:
            yield Note(f"{dead} query rows had no valid key; they pass relevance on unchanged.")


_MEANINGS = {
    "concentration": "share of a map's total in the tenth of its content tokens with the most",
    "concentration_mean": "mean of concentration over samples",
    "concentration_low": "lower end of the interval of concentration_mean over samples",
    "concentration_high": "upper end of the interval of concentration_mean over samples",
    "agreement": "rank correlation of two methods over the content tokens",
    "agreement_mean": "mean of agreement over samples",
    "agreement_low": "lower end of the interval of agreement_mean over samples",
    "agreement_high": "upper end of the interval of agreement_mean over samples",
    "dead_rows": "number of query rows, over all layers, without a valid key",
}
_TOKEN_FIELDS = ("kind", "token_text", "row", "column")
# What stands where a site has fewer tokens than another.
_FILL = {"kind": 0, "token_text": "", "row": -1, "column": -1}


def _codes(kind: xr.DataArray) -> dict[str, int]:
    return dict(zip(kind.attrs["flag_meanings"].split(), kind.attrs["flag_values"], strict=True))


def _mean(values: np.ndarray) -> np.ndarray:
    present = np.isfinite(values)
    count = present.sum(-1)
    return np.divide(np.where(present, values, 0).sum(-1), count, out=np.full(len(values), np.nan), where=count > 0)


def _thumbnails(run: Run, count: int) -> dict[str, xr.Variable]:
    """Pictures of the first extracted samples, and their positions: (shown, ...)."""
    positions = np.flatnonzero(run.status == _EXTRACTED)[:count]
    attrs = {"long_name": "position of a sample that the report shows", "units": "1"}
    variables = {"shown": xr.Variable("shown", positions, attrs)}
    if run.plan.thumbnails:
        pictures = run.samples["thumbnail"].isel(sample=positions).values
        attrs = {"long_name": "the image as the model saw it, red green blue", "units": "1"}
        variables["thumbnail"] = xr.Variable(("shown", "image_row", "image_column", "colour"), pictures, attrs)
    return variables


def _site_elements(site: str, result: xr.Dataset) -> Iterator[Element]:
    yield Heading(site)
    on_grid = (result["row"].values >= 0).any()
    methods = [str(m) for m in result["ranking"].values]
    if on_grid and "thumbnail" in result:
        rows = [
            ImageRow(str(result["sample"].values[position]), _pictures(result.isel(sample=position), shown))
            for shown, position in enumerate(result["shown"].values)
        ]
        caption = "Each square is one patch; within a picture, colours run from its least to its most relevant patch."
        yield ImageGrid(["picture", *methods], rows, caption)
    elif not on_grid:
        for position in result["shown"].values:
            sample = result.isel(sample=position)
            chosen = _is_content(sample)
            yield Heading(str(sample["sample"].item()), 4)
            for method in methods:
                weights = sample[method].values[chosen]
                yield ShadedText([str(t) for t in sample["token_text"].values[chosen]], weights, method)
    yield Table(*_summary(result))


def _summary(result: xr.Dataset) -> tuple[list[str], list[tuple[object, ...]], str]:
    def line(what: str, name: str, at: xr.Dataset) -> tuple[object, ...]:
        return (what, *(float(at[f"{name}_{part}"]) for part in ("mean", "low", "high")))

    methods, pairs = result["ranking"].values, result["pair"].values
    rows = [line(f"share in the top tenth, {m}", "concentration", result.sel(ranking=m)) for m in methods]
    rows += [line(f"rank correlation, {p}", "agreement", result.sel(pair=p)) for p in pairs]
    used = int(np.isfinite(result["concentration"].values).all(0).sum())
    caption = f"Over the content tokens of {used} samples: mean and 95 % bootstrap interval over samples."
    return ["", "mean", "low", "high"], rows, caption


def _pictures(sample: xr.Dataset, shown: int) -> list[np.ndarray]:
    picture = sample["thumbnail"].values[shown]
    return [
        picture,
        *(
            overlay(picture, _grid(sample, values))
            for values in (sample[str(m)].values for m in sample["ranking"].values)
        ),
    ]


def _grid(sample: xr.Dataset, values: np.ndarray) -> np.ndarray:
    """The map (row, column) of the tokens that lie on the patch grid."""
    row, column = sample["row"].values.astype(int), sample["column"].values.astype(int)
    placed = (row >= 0) & _is_content(sample)
    grid = np.full((row.max() + 1, column.max() + 1), np.nan)
    grid[row[placed], column[placed]] = values[placed]
    return grid


def _is_content(sample: xr.Dataset) -> np.ndarray:
    codes = _codes(sample["kind"])
    return ~np.isin(sample["kind"].values, [codes[k] for k in _BESIDE_CONTENT])


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(Relevance)
