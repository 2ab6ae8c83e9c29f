"""Relevance of each token for the model's answer, along whatever streams attend to each other.

1. Each layer of each kind of attention gives one map per sample: the positive part of gradient times attention,
   averaged over heads.
2. Relevance starts as the identity of every stream and gains, in the order in which the model ran its layers, what
   attention passes on: within a stream R <- R + A R, and from the stream that it looks at, whose own relevance and the
   looking stream's are normalised first. Where no two streams look at each other, only the row of the token that the
   answer is read from is carried, backwards through the layers, and no product of two maps is ever formed.
3. Beside it: rollout (the same walk with the head mean of the attention and a residual of equal weight, without a
   gradient), and of the last layer alone the attention, Grad-CAM on it, and gradient times attention.

Chefer, H., Gur, S. and Wolf, L., "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers", ICCV 2021, equations 5 to 11. Rollout: Abnar, S. and Zuidema, W., "Quantifying Attention
Flow in Transformers", ACL 2020. Grad-CAM: Selvaraju, R. et al., ICCV 2017, on attention maps as Chefer et al. have it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, bootstrap_interval, hookimpl
from attnscope.reading import is_of_kind
from attnscope.report import Citation, Element, Heading, Note, Paragraph, Table
from attnscope_relevance.grounding import point
from attnscope_relevance.reading import METHODS, OF_ANSWER, Reader, reach
from attnscope_relevance.showing import BESIDE_CONTENT, answer_elements, sample_elements, summary
from attnscope_relevance.walking import Event

MethodName: TypeAlias = Literal["relevance", "rollout", "attention", "gradcam", "gradient"]

EACH_WRITTEN = "generated"
"""The target that stands for each token that the model wrote."""
_EXTRACTED = 1
_TOP_SHARE = 0.1


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
class Relevance:
    """Relevance of the tokens of every stream for the target, and the same by plainer methods.

    `target` is the scalar that the gradient is taken of (a class number, or a name that the model's family knows), or
    'generated' for the logit of each token that the model wrote behind its prompt: one map for each, and their mean;
    `row` the token that the answer is read from: 'auto' takes the tokens whose last layer the target depends on where
    that is known, else the CLS token, else the mean (see `readout_rows`); `start_layer` the first layer that takes
    part, counted from the end when negative; `streams` those that answers are read from, by default every one that no
    other looks at; `pictures` how many samples the report shows.

    `weighting` lets residual and attention of each token count by their norms, or by gradient times value, where Chefer
    et al. let both count alike: weighted accumulation after Huang et al. (arXiv 2308.10240), whose formula could not be
    read. This one is our own, scaled so that equal terms give Chefer's rules.
    """

    name: ClassVar[str] = "relevance"
    title: ClassVar[str] = "Relevance of tokens"
    target: int | str | None = None
    methods: tuple[MethodName, ...] = ("relevance", "rollout", "attention")
    weighting: Literal["none", "norm", "gradient"] = "none"
    row: int | Literal["auto", "cls", "mean"] = "auto"
    start_layer: int = 0
    streams: tuple[str, ...] | None = None
    pictures: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"relevance has no method {got}; its methods are {', '.join(METHODS)}")

    def requires(self) -> ExtractSpec:
        wanted = {METHODS[m].quantity for m in self.methods}
        if self.weighting != "none":
            wanted.add(f"residual_{self.weighting}")
        if self.target == EACH_WRITTEN:
            wanted = {OF_ANSWER.get(name, name) for name in wanted}
        return ExtractSpec(quantities=frozenset({*wanted, "score"}), target=self.target)

    def analyse(self, run: Run) -> xr.Dataset:
        """One variable (stream, sample, token) per method, how concentrated its maps are and how far methods agree.

        The dimension of methods is `ranking`, since `method` means something else to `Dataset.sel`. Where each written
        token is a target, these are means over them, and `each_<method>` has one for each: (stream, sample, answer,
        token).
        """
        events = self._events(run)
        roots = self._roots(run, events)
        reached = [s for s in run.streams if any(s in reach(events, root) for root in roots)]
        reader = Reader(
            run, events, self.row, self.methods, None if self.weighting == "none" else f"residual_{self.weighting}"
        )
        answers = run.spec.generate if self.target == EACH_WRITTEN else 1
        if not answers:
            raise ValueError(
                f"{run.location} holds nothing that the model wrote; extract with generate=N (--generate N)"
            )
        each = {s: np.full((len(self.methods), len(run.status), answers, n), np.nan, np.float32)
                for s, n in run.plan.streams.items() if s in reached}  # fmt: skip
        dead = {s: np.zeros((2, len(run.status)), np.int64) for s in reached}
        for sample in map(int, np.flatnonzero(run.status == _EXTRACTED)):
            for answer in self._answers(reader, sample):
                for (number, method), root in itertools.product(enumerate(self.methods), roots):
                    for stream, row in reader.explain(sample, root, METHODS[method], answer).items():
                        each[stream][number, sample, answer or 0, : len(row)] = row
                for stream in reached:
                    dead[stream][:, sample] = reader.dead_rows(sample, stream)
        found = {stream: _mean_of_answers(values) for stream, values in each.items()}
        parts = [self._describe(run, s, found[s], dead[s]) for s in reached]
        parts = [part.assign(self._pointing(run, s, found[s])) for s, part in zip(reached, parts, strict=True)]
        along = xr.Variable("stream", np.array(reached, object))
        joined = xr.concat(parts, along, join="outer", coords=list(_TOKEN_FIELDS), fill_value=_FILL)
        result = joined.assign_attrs(
            target=str(run.spec.target if run.spec.target is not None else run.attrs.get("target", "")),
            readout="; ".join(f"{root}: {reader.readouts.get(root, 'nothing')}" for root in roots),
            interval="95 % bootstrap over samples",
        )
        if self.target == EACH_WRITTEN:
            result = _with_answers(run, result, self.methods, [each[s] for s in reached])
        return result.assign(_thumbnails(run, self.pictures))

    def _answers(self, reader: Reader, sample: int) -> Sequence[int | None]:
        """The numbers of the written tokens that are asked for; None where the target is one score."""
        return range(reader.written(sample)) if self.target == EACH_WRITTEN else [None]

    def _events(self, run: Run) -> list[Event]:
        """The layers that take part, in the order in which the model ran them."""
        found = []
        for name, site in run.plan.sites.items():
            first = self._first_layer(site.layers)
            turns = site.turns or tuple(range(len(site.layers)))
            for position, (layer, turn) in enumerate(zip(site.layers, turns, strict=True)):
                if layer >= first:
                    found.append((turn, Event(name, position, site.queries, site.keys)))
        return [event for _, event in sorted(found, key=lambda pair: pair[0])]

    def _first_layer(self, layers: Sequence[int]) -> int:
        if self.start_layer < 0:
            return layers[max(0, len(layers) + self.start_layer)]
        if self.start_layer > max(layers):
            raise ValueError(f"start_layer {self.start_layer} lies behind the last layer, {max(layers)}")
        return self.start_layer

    def _roots(self, run: Run, events: Sequence[Event]) -> list[str]:
        """The streams that answers are read from."""
        having = list(dict.fromkeys(e.queries for e in events))
        for stream in self.streams or ():
            if stream not in having:
                known = ", ".join(having) or "none"
                raise ValueError(f"no attention of stream {stream!r} is here; the run's streams are {known}")
        if self.streams:
            return list(self.streams)
        looked_at = {e.keys for e in events if not e.is_self}
        free = [s for s in having if s not in looked_at]
        if free:
            return free
        # All look at each other: the answer is read from the text, as two-stream models do.
        return [next((s for s in having if s == "text"), having[0])]

    def _describe(self, run: Run, stream: str, relevance: np.ndarray, dead: np.ndarray) -> xr.Dataset:
        tokens = run.tokens(stream)
        content = ~is_of_kind(tokens["kind"].values, *BESIDE_CONTENT)
        concentration = np.full(relevance.shape[:2], np.nan)
        pairs = list(itertools.combinations(range(len(self.methods)), 2))
        agreement = np.full((len(pairs), len(content)), np.nan)
        for sample, chosen in enumerate(content & np.isfinite(relevance).all(0)):
            maps = relevance[:, sample, chosen]
            if maps.size:
                concentration[:, sample] = [top_share(m) for m in maps]
                agreement[:, sample] = [rank_correlation(maps[a], maps[b]) for a, b in pairs]
        described: dict[str, tuple[object, np.ndarray]] = {
            m: (("sample", "token"), values) for m, values in zip(self.methods, relevance, strict=True)
        }
        described["dead_rows"] = ("sample", dead[0])
        described["dead_relevance"] = ("sample", dead[1])
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
        names = [f"{self.methods[a]} and {self.methods[b]}" for a, b in pairs]
        coordinates = {
            "ranking": np.array(self.methods, object),
            "pair": np.array(names, object),
            "sample": np.array(run.sample_ids, object),
            "token": np.arange(tokens.sizes["token"]),
            **{n: tokens[n].variable.load() for n in _TOKEN_FIELDS},
        }
        return xr.Dataset(variables, coordinates)

    def _pointing(self, run: Run, stream: str, relevance: np.ndarray) -> dict[str, xr.Variable]:
        """How often the strongest patch lies in a box that the text names, and how often any patch would."""
        hits, chance = point(run, stream, relevance)
        low, high = bootstrap_interval(hits.T, seed=self.seed)
        described = {
            "pointing": (("ranking", "sample"), hits),
            "pointing_mean": ("ranking", _mean(hits)),
            "pointing_low": ("ranking", low),
            "pointing_high": ("ranking", high),
            "pointing_chance": ("sample", chance),
        }
        return {n: xr.Variable(d, v, {"long_name": _MEANINGS[n], "units": "1"}) for n, (d, v) in described.items()}

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        target = f" (target: {result.attrs['target']})" if result.attrs.get("target") else ""
        yield Paragraph(
            f"Which tokens does the model's answer rest on{target}? Relevance follows attention through all layers and"
            " counts it only where more of it would raise the target; rollout follows attention without asking for the"
            " target; the others look at the last layer alone. Brighter and darker mean more, on each map's own scale."
        )
        yield Citation(
            "Chefer, Gur and Wolf, Generic Attention-model Explainability, ICCV 2021, equations 5 to 11; rollout:"
            " Abnar and Zuidema, ACL 2020.",
            "https://arxiv.org/abs/2103.15679",
        )
        yield from sample_elements(result)
        yield from answer_elements(result)
        for stream in result["stream"].values:
            yield Heading(str(stream))
            yield Table(*summary(result.sel(stream=stream)))
        yield Note(
            f"Read from: {result.attrs.get('readout', '')}. CLS, register and special tokens have relevance too, which"
            " the result keeps; the maps and the tables leave them out."
        )
        dead, unscaled = (int(result[name].sum()) for name in ("dead_rows", "dead_relevance"))
        if dead:
            yield Note(f"{dead} query rows had no valid key; they pass relevance on unchanged.")
        if unscaled:
            yield Note(
                f"{unscaled} times a token had gained no relevance that could be normalised before attention passed"
                " from one stream to another; it then counts as itself alone."
            )


_MEANINGS = {
    "concentration": "share of a map's total in the tenth of its content tokens with the most",
    "concentration_mean": "mean of concentration over samples",
    "concentration_low": "lower end of the interval of concentration_mean over samples",
    "concentration_high": "upper end of the interval of concentration_mean over samples",
    "agreement": "rank correlation of two methods over the content tokens",
    "agreement_mean": "mean of agreement over samples",
    "agreement_low": "lower end of the interval of agreement_mean over samples",
    "agreement_high": "upper end of the interval of agreement_mean over samples",
    "pointing": "1 where the strongest patch lies in a box that the text (or its masked phrase) names, 0 elsewhere",
    "pointing_mean": "mean of pointing over samples",
    "pointing_low": "lower end of the interval of pointing_mean over samples",
    "pointing_high": "upper end of the interval of pointing_mean over samples",
    "pointing_chance": "share of the patches that lie in such a box",
    "dead_rows": "number of query rows, over all layers, without a valid key",
    "dead_relevance": "number of tokens, over all steps between streams, whose relevance was nil and stayed so",
}
_TOKEN_FIELDS = ("kind", "token_text", "row", "column")
# What stands where a stream has fewer tokens than another.
_FILL = {"kind": 0, "token_text": "", "row": -1, "column": -1}


def _mean(values: np.ndarray) -> np.ndarray:
    present = np.isfinite(values)
    count = present.sum(-1)
    return np.divide(np.where(present, values, 0).sum(-1), count, out=np.full(len(values), np.nan), where=count > 0)


def _mean_of_answers(each: np.ndarray) -> np.ndarray:
    """Mean over the written tokens that a sample has, of (method, sample, answer, token); NaN for none and padding."""
    if each.shape[2] == 1:
        return each[:, :, 0]
    there = np.isfinite(each).sum(2)
    total = np.nansum(each, axis=2, dtype=np.float64)
    return np.divide(total, there, out=np.full(total.shape, np.nan), where=there > 0).astype(np.float32)


def _with_answers(run: Run, result: xr.Dataset, methods: Sequence[str], each: Sequence[np.ndarray]) -> xr.Dataset:
    """The result with the maps of each written token, (stream, sample, answer, token), and what these tokens say."""
    tokens = result.sizes["token"]
    wide = [np.pad(e, [(0, 0)] * 3 + [(0, tokens - e.shape[3])], constant_values=np.nan) for e in each]
    dims = ("stream", "sample", "answer", "token")
    found = {
        f"each_{method}": xr.Variable(dims, np.stack([w[number] for w in wide]),
                                      {"long_name": f"{METHODS[method].meaning}, for each written token", "units": "1"})
        for number, method in enumerate(methods)
    }  # fmt: skip
    words = np.full((result.sizes["sample"], run.spec.generate), "", object)
    for stream in run.streams:
        tokens_of = run.tokens(stream)
        is_written = is_of_kind(tokens_of["kind"].values, "generated")
        for sample in np.flatnonzero(is_written.any(-1)):
            said = tokens_of["token_text"].isel(sample=int(sample)).values[is_written[sample]]
            words[sample, : len(said)] = said
    attrs = {"long_name": "the token that was written", "units": ""}
    return result.assign(found).assign_coords(answer_text=xr.Variable(("sample", "answer"), words, attrs))


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


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(Relevance)
