"""Which score aligns queries with keys: dot, scaled, cosine, general, activated, additive, on the run's own vectors.

1. Every score of Cao et al. is computed on the queries and keys that the run stores, and its softmax is an attention.
   Learned parameters are fitted on a training split of the samples; all scores are evaluated on the others.
2. Each attention is compared with the model's own: Jensen-Shannon divergence, Kendall's tau, overlap of the strongest
   keys, entropy.
3. Is what it ranks first significant? Keys are taken away in its order, the model's own attention is made to sum to 1
   over those that are left, and the change of the head's output is measured (deletion, insertion). The model itself is
   not run again: analyser 'faithfulness' does that, with this one's `received_<score>` as rankings (`keep_received`).
4. Where samples carry regions: does the attention from a region's tokens, or from the words that name it, fall on it?

Cao, F. et al., "Understanding Attention for Vision-and-Language Tasks", COLING 2022. The measures of 3 are attnscope's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, hookimpl
from attnscope.reading import (
    MODALITIES,
    TokenBlock,
    allowed_keys,
    chosen_layers,
    chosen_sites,
    directions,
    extracted_in,
    join_sites,
    read_tokens,
)
from attnscope.report import Element
from attnscope.statistics import add_sums, mean_height, sample_sums, sums_in, with_intervals
from attnscope_alignment_scores.comparing import (
    divergence,
    draw_pairs,
    entropy,
    grounding,
    output_change,
    overlap,
    rank_agreement,
    rank_keys,
)
from attnscope_alignment_scores.fitting import Lesson, first_parameters, fit
from attnscope_alignment_scores.scores import ALIGNMENTS, Parameters, align, attend
from attnscope_alignment_scores.showing import show
from attnscope_alignment_scores.trained import read_trained

Fitted: TypeAlias = Mapping[tuple[str, int], tuple[Parameters, float, float]]
"""Parameters, and the loss before and after, by name of the score and layer."""
_NEEDED = ("attention", "query", "key")
_ASKING = (*MODALITIES, "cls")
_DIRECTIONS = tuple(f"{query} to {key}" for query in _ASKING for key in MODALITIES)
_COMPARED = ("divergence", "rank_agreement", "top_overlap", "entropy", "deletion", "insertion")
_PAIRED = ("deletion", "insertion")
_GROUNDED = ("pointing", "mass", "region_overlap")


@dataclass(frozen=True)
class AlignmentScores:
    """Alignment scores beside the model's own attention, and how significant what they rank first is.

    `alignments` are names of the table ALIGNMENTS; learned ones are fitted for every head on the share `train_share` of
    the samples (at most `fit_samples`, `fit_rows` rows of each), to come near the model's attention (`objective`
    'attention': cross entropy) or to put attention into regions ('regions': -log of the mass inside the region of the
    token that asks). `queries` is how many rows of each sample and layer are measured, evenly spread; `pairs` how many
    pairs of keys Kendall's tau is taken over; `top` how many keys are the strongest; `fractions` what deletion and
    insertion take. A token belongs to a region that covers the share `inside` of it; regions of more than the share
    `largest` of the tokens are ground. `keep_received` keeps how much attention every token gets, sample by sample:
    `received_<score>` (site, sample, token), which grows with their number. `trained` is a folder of tables that
    `attnscope reference scores` made: what models reach whose attention was trained with each score.
    """

    name: ClassVar[str] = "alignment_scores"
    title: ClassVar[str] = "Alignment scores"
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    alignments: tuple[str, ...] = tuple(ALIGNMENTS)
    objective: Literal["attention", "regions"] = "attention"
    train_share: float = 0.5
    fit_samples: int = 8
    fit_rows: int = 8
    fit_steps: int = 30
    queries: int = 16
    pairs: int = 500
    top: int = 5
    fractions: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
    inside: float = 0.5
    largest: float = 0.5
    keep_received: bool = False
    trained: str | None = None
    draws: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.alignments) - set(ALIGNMENTS))
        if unknown or not self.alignments:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"alignment_scores has no score {got}; its scores are {', '.join(ALIGNMENTS)}")
        if not self.fractions or list(self.fractions) != sorted(set(self.fractions)):
            raise ValueError("fractions must be one or more numbers in rising order")
        if not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError("fractions must lie between 0 and 1: something is taken and something left")

    def requires(self) -> ExtractSpec:
        return ExtractSpec(
            quantities=frozenset({*_NEEDED, "value"}),
            sites=None if self.sites is None else frozenset(self.sites),
            layers=None if self.layers is None else frozenset(self.layers),
        )

    def analyse(self, run: Run) -> xr.Dataset:
        """Means over the evaluated samples: (site, alignment, layer), and (site, direction, alignment, layer)."""
        named = chosen_sites(run, self.sites)
        # Attention that a model computes without query and key has no other score.
        sites = [s for s in named if set(_NEEDED) <= set(run.quantities(s)) and run.plan.sites[s].channels]
        if not sites:
            raise ValueError(f"{run.location} holds queries and keys of no site that alignment_scores is asked for")
        training, evaluated = self._split(run)
        fitted = {site: self._fit(run, site, training) for site in sites}
        blocks = (self._block(run, block, fitted, evaluated) for block in run.blocks())
        losses = join_sites({site: self._losses(run, site, fitted[site]) for site in sites})
        return self._finished(blocks, losses.merge(self._trained())).assign_attrs(
            interval="95 % bootstrap over samples",
            samples_trained_on=len(training),
            samples_evaluated=len(evaluated),
            not_scored=", ".join(s for s in named if s not in sites),
        )

    def combine(self, parts: Iterable[xr.Dataset]) -> xr.Dataset:
        """One result of those of parts of a run; every part was fitted on the same samples of the whole run."""
        first: list[xr.Dataset] = []

        def passing() -> Iterator[xr.Dataset]:
            for part in parts:
                if not first:
                    once = [name for name in part if str(name).startswith(_ONCE)]
                    first.append(part[once].assign_attrs(part.attrs))
                yield part[[*sums_in(part), *_received_in(part)]]

        tallies = passing()
        head = next(tallies)
        return self._finished((p for some in ([head], tallies) for p in some), first[0]).assign_attrs(first[0].attrs)

    def _finished(self, tallies: Iterable[xr.Dataset], once: xr.Dataset) -> xr.Dataset:
        received: list[xr.Dataset] = []

        def passing() -> Iterator[xr.Dataset]:
            for tally in tallies:
                received.extend([tally[_received_in(tally)]] if _received_in(tally) else [])
                yield tally

        result = with_intervals(add_sums(passing())).merge(once, compat="override", join="outer")
        if not received:
            return result
        kept = xr.concat(received, "sample", data_vars="minimal", join="outer", coords="minimal", compat="override")
        return result.merge(kept, compat="override", join="outer")

    # -- what is learned --------------------------------------------------------------------------------------------

    def _split(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the samples that are learned from and of those that are evaluated, of the whole run."""
        extracted = np.flatnonzero(run.samples["status"].values == 1)
        if not any(ALIGNMENTS[name].is_learned for name in self.alignments):
            return extracted[:0], extracted
        order = np.random.default_rng(self.seed).permutation(extracted)
        count = min(round(self.train_share * len(extracted)), len(extracted) - 1)
        return np.sort(order[:count][: self.fit_samples]), np.sort(order[count:])

    def _fit(self, run: Run, site: str, training: np.ndarray) -> Fitted:
        """Parameters of every learned score by name and layer, with the loss before and after."""
        learned = [name for name in self.alignments if ALIGNMENTS[name].is_learned]
        plan = run.plan.sites[site]
        sides = [read_tokens(run, stream, training) for stream in (plan.queries, plan.keys)]
        found: dict[tuple[str, int], tuple[Parameters, float, float]] = {}
        for layer, position in chosen_layers(run, site, self.layers).items() if learned else ():
            lessons = [
                lesson
                for at, sample in enumerate(training)
                if (lesson := self._lesson(run, (site, position, int(sample)), sides, at)) is not None
            ]
            scale = plan.recipes[position].scale if plan.recipes else plan.channels**-0.5
            for name in learned if lessons else ():
                start = first_parameters(ALIGNMENTS[name], plan.heads, plan.channels, scale, self.seed)
                found[name, layer] = fit(ALIGNMENTS[name], start, lessons, steps=self.fit_steps)
        return found

    def _lesson(self, run: Run, place: tuple[str, int, int], sides: Sequence[TokenBlock], at: int) -> Lesson | None:
        site, position, sample = place
        read = _Reader(run, site, slice(sample, sample + 1), position, with_value=False)
        vectors = read.of(0)
        if self.objective == "attention":
            rows = _spread(vectors.live_rows(), self.fit_rows)
            target = vectors.attention[:, rows]
        else:
            asked = next((a for a in self._asked(sides, at) if a[1].any(-1).any()), None)
            if asked is None:
                return None
            few = _spread(np.arange(len(asked[0])), self.fit_rows)
            rows = asked[0][few]
            everywhere = np.zeros((len(rows), vectors.attention.shape[-1]), np.float32)
            everywhere[:, asked[2]] = asked[1][few]
            target = np.broadcast_to(everywhere, (len(vectors.attention), *everywhere.shape))
        if not len(rows):
            return None
        allowed = vectors.allowed[:, rows]
        usable = ((target * allowed).sum(-1) > 0).all(0)
        if not usable.any():
            return None
        return Lesson(
            vectors.query[:, rows[usable]], vectors.key, allowed[:, usable], np.ascontiguousarray(target[:, usable]),
            self.objective == "regions",
        )  # fmt: skip

    def _losses(self, run: Run, site: str, fitted: Fitted) -> xr.Dataset:
        layers = list(chosen_layers(run, site, self.layers))
        values = np.full((2, len(self.alignments), len(layers)), np.nan)
        for (name, layer), (_, before, after) in fitted.items():
            values[:, self.alignments.index(name), layers.index(layer)] = before, after
        dims = ("alignment", "layer")
        found = {
            f"fit_loss_{n}": xr.Variable(dims, v, _describe(f"fit_loss_{n}"))
            for n, v in zip(("before", "after"), values, strict=True)
        }
        return xr.Dataset(found, {"alignment": np.array(self.alignments, object), "layer": layers})

    def _trained(self) -> xr.Dataset:
        """What trained models reach, from their tables; a place for it where none is named."""
        if self.trained is not None:
            return read_trained(self.trained, self.alignments)
        nothing = xr.Variable("alignment", np.full(len(self.alignments), np.nan), _describe("trained_score"))
        return xr.Dataset({"trained_score": nothing}, {"alignment": np.array(self.alignments, object)})

    # -- what is measured -------------------------------------------------------------------------------------------

    def _block(
        self,
        run: Run,
        block: range,
        fitted: Mapping[str, Fitted],
        evaluated: np.ndarray,
    ) -> xr.Dataset:
        positions = extracted_in(run, block)
        chosen = positions if self.keep_received else np.intersect1d(positions, evaluated)
        parts = {}
        for site, parameters in fitted.items():
            values, received = self._site(run, site, chosen, {at: p for at, (p, _, _) in parameters.items()})
            counted = np.isin(chosen, evaluated)
            sums = sample_sums(values.isel(sample=counted), chosen[counted], draws=self.draws, seed=self.seed)
            parts[site] = sums if received is None else sums.merge(self._kept(run, block, chosen, received))
        return join_sites(parts)

    def _site(
        self, run: Run, site: str, positions: np.ndarray, parameters: Mapping[tuple[str, int], Parameters]
    ) -> tuple[xr.Dataset, np.ndarray | None]:
        """What is known of each sample at one site, and how much attention its tokens get if that is to be kept."""
        plan = run.plan.sites[site]
        layers = chosen_layers(run, site, self.layers)
        sides = [read_tokens(run, stream, positions) for stream in (plan.queries, plan.keys)]
        sizes = (len(positions), len(self.alignments), len(layers))
        compared = {name: np.full(sizes, np.nan) for name in _COMPARED}
        curves = {name: np.full((*sizes, len(self.fractions)), np.nan) for name in _PAIRED}
        grounded = {name: np.full((sizes[0], len(_DIRECTIONS), *sizes[1:]), np.nan) for name in _GROUNDED}
        chance = np.full((sizes[0], len(_DIRECTIONS)), np.nan)
        received = np.zeros((sizes[1], sizes[0], plan.key_tokens)) if self.keep_received else None
        pairs = draw_pairs(plan.key_tokens, self.pairs, self.seed)
        for place, (layer, position) in enumerate(layers.items() if len(positions) else ()):
            at = slice(positions[0], positions[-1] + 1)
            read = _Reader(run, site, at, position, with_value="value" in run.quantities(site))
            for sample, row in enumerate(positions - positions[0]):
                vectors = read.of(row)
                scored = _Scored(
                    vectors, layer, parameters, np.random.default_rng([self.seed, positions[sample], layer])
                )
                rows = _spread(vectors.live_rows(), self.queries)
                asked = [*self._asked(sides, sample)]
                for number, name in enumerate(self.alignments):
                    if not scored.has(name):
                        continue
                    self._compare(scored, name, rows, pairs, (sample, number, place), compared, curves)
                    if received is not None and len(rows):
                        received[number, sample] += scored.attend(name, rows).mean((0, 1)) / len(layers)
                    for query_rows, inside, keys, direction in asked:
                        of = scored.attend(name, query_rows)[..., keys]
                        found = grounding(of, inside, scored.order_of(keys))
                        for measure, values in zip(_GROUNDED, found.values(), strict=True):
                            grounded[measure][sample, direction, number, place] = _mean(values.ravel())
                        chance[sample, direction] = inside.mean()
        measured = self._named(compared, curves, grounded, chance)
        coordinates = {"alignment": np.array(self.alignments, object), "layer": list(layers),
                       "direction": list(_DIRECTIONS), "fraction": list(self.fractions)}  # fmt: skip
        return xr.Dataset(measured, coordinates), received

    def _kept(self, run: Run, block: range, positions: np.ndarray, received: np.ndarray) -> xr.Dataset:
        """What each token of a block gets, by score; NaN for samples that aren't there and tokens of padding."""
        kept = np.full((len(self.alignments), len(block), received.shape[-1]), np.nan, np.float32)
        kept[:, positions - block.start] = received
        names = {
            "sample": np.array(run.sample_ids, object)[block.start : block.stop],
            "token": np.arange(kept.shape[-1]),
        }
        found = {
            f"{_RECEIVED}{name}": xr.Variable(("sample", "token"), values, _describe(_RECEIVED))
            for name, values in zip(self.alignments, kept, strict=True)
        }
        return xr.Dataset(found, names)

    def _compare(
        self,
        scored: "_Scored",
        name: str,
        rows: np.ndarray,
        pairs: np.ndarray,
        at: tuple[int, int, int],
        compared: Mapping[str, np.ndarray],
        curves: Mapping[str, np.ndarray],
    ) -> None:
        """Set a score beside the model's own attention on some rows of one sample and layer."""
        if not len(rows):
            return
        vectors = scored.vectors
        own, allowed = vectors.attention[:, rows], vectors.allowed[:, rows]
        scores, attention = scored.scores(name, rows), scored.attend(name, rows)
        ranks = rank_keys(scores, allowed, scored.order)
        if name != "random":
            compared["divergence"][at] = divergence(attention, own).mean()
            compared["rank_agreement"][at] = _mean(rank_agreement(scores, own, allowed, pairs).ravel())
            mine = rank_keys(own, allowed, scored.order)
            compared["top_overlap"][at] = _mean(overlap(ranks, mine, allowed, self.top).ravel())
            compared["entropy"][at] = entropy(attention).mean()
        if vectors.value is None:
            return
        changes = output_change(own, vectors.value, ranks, allowed, self.fractions)
        for measure, change in zip(_PAIRED, changes, strict=True):
            curves[measure][at] = mean = _mean(change.reshape(len(change), -1))
            compared[measure][at] = mean_height(mean, self.fractions)

    def _asked(
        self, sides: Sequence[TokenBlock], sample: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
        """Rows that ask of a region, which keys lie in it (row, key), the keys themselves, and the direction."""
        queries, keys = sides
        pairs = directions(queries, keys)
        modalities = dict.fromkeys(key for _, key in pairs) or {
            m: None for m, k in MODALITIES.items() if keys.is_of(*k).any()
        }
        for key in modalities:
            asked = np.flatnonzero(keys.is_of(*MODALITIES[key])[sample])
            members = self._members(keys, sample, asked)
            for query in [*(q for q, k in pairs if k == key), "cls"]:
                kinds = ("cls",) if query == "cls" else MODALITIES[query]
                asking = np.flatnonzero(queries.is_of(*kinds)[sample])
                if query == "cls":
                    rows, inside = asking, np.broadcast_to(members.any(0), (len(asking), len(asked)))
                else:
                    belongs = self._members(queries, sample, asking) & members.any(-1, keepdims=True)
                    chosen = _spread(np.flatnonzero(belongs.any(0)), self.queries)
                    rows = asking[chosen]
                    # A token of several regions asks of the first of them.
                    inside = members[belongs[:, chosen].argmax(0)] if len(chosen) else members[:0]
                if len(rows) and inside.any():
                    yield rows, inside, asked, _DIRECTIONS.index(f"{query} to {key}")

    def _members(self, tokens: TokenBlock, sample: int, chosen: np.ndarray) -> np.ndarray:
        """(region, chosen token): which lie in each region; none for a ground and for what isn't known."""
        shares = tokens.region_share[sample][:, chosen]
        members = np.nan_to_num(shares) >= self.inside
        return members & (members.mean(-1, keepdims=True) <= self.largest) if members.size else members

    def _named(
        self,
        compared: Mapping[str, np.ndarray],
        curves: Mapping[str, np.ndarray],
        grounded: Mapping[str, np.ndarray],
        chance: np.ndarray,
    ) -> dict[str, xr.Variable]:
        by_layer = ("sample", "alignment", "layer")
        found = {n: xr.Variable(by_layer, v, _describe(n)) for n, v in compared.items()}
        found |= {
            f"{n}_curve": xr.Variable((*by_layer, "fraction"), v, _describe(f"{n}_curve")) for n, v in curves.items()
        }
        found |= {
            n: xr.Variable(("sample", "direction", "alignment", "layer"), v, _describe(n)) for n, v in grounded.items()
        }
        found["chance"] = xr.Variable(("sample", "direction"), chance, _describe("chance"))
        if "random" in self.alignments:
            floor = self.alignments.index("random")
            for name in _PAIRED:
                difference = compared[name] - compared[name][:, floor : floor + 1]
                found[f"{name}_over_random"] = xr.Variable(by_layer, difference, _describe(f"{name}_over_random"))
        for name, variable in list(found.items()):
            if variable.dims[-1] == "layer":
                described = {**variable.attrs, "long_name": f"mean over layers of: {variable.attrs['long_name']}"}
                found[f"mean_{name}"] = xr.Variable(variable.dims[:-1], _mean(variable.values), described)
        return found

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        yield from show(result)


@dataclass(frozen=True, eq=False)
class _Vectors:
    """One sample and layer: query, key, value by query head, the model's attention, and which keys are allowed."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray | None
    attention: np.ndarray
    allowed: np.ndarray

    def live_rows(self) -> np.ndarray:
        """Rows that have a key in every head."""
        return np.flatnonzero(self.allowed.any(-1).all(0))


class _Reader:
    """The vectors of some samples at one layer."""

    def __init__(self, run: Run, site: str, samples: slice, position: int, *, with_value: bool) -> None:
        def read(name: str) -> np.ndarray:
            return np.nan_to_num(run.array(site, name).isel(sample=samples, layer=position).values.astype(np.float32))

        self._query, self._key = read("query"), read("key")
        self._value = read("value") if with_value else None
        self._attention = run.attention(site).isel(sample=samples, layer=position).values
        self._place = (run, site, position)
        plan = run.plan.sites[site]
        self._groups = plan.heads // plan.kv_heads

    def of(self, sample: int) -> _Vectors:
        attention = self._attention[sample]
        weights = np.nan_to_num(attention)
        allowed = allowed_keys(*self._place, attention)
        total = weights.sum(-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        key, value = (
            None if side is None else np.repeat(side[sample], self._groups, axis=0) for side in (self._key, self._value)
        )
        assert key is not None
        return _Vectors(self._query[sample], key, value, weights, allowed)


class _Scored:
    """Scores and attentions of one sample and layer, made for the rows that are asked for."""

    def __init__(
        self,
        vectors: _Vectors,
        layer: int,
        parameters: Mapping[tuple[str, int], Parameters],
        generator: np.random.Generator,
    ) -> None:
        self.vectors = vectors
        self._layer = layer
        self._parameters = parameters
        keys = vectors.attention.shape[-1]
        self._random = np.asarray(generator.random(keys), np.float32)
        self.order = generator.permutation(keys)

    def has(self, name: str) -> bool:
        return not ALIGNMENTS[name].is_learned or (name, self._layer) in self._parameters

    def scores(self, name: str, rows: np.ndarray) -> np.ndarray:
        """(head, row, key_token)."""
        if name == "model":
            return self.vectors.attention[:, rows]
        if name == "random":
            return np.broadcast_to(self._random, self.vectors.attention[:, rows].shape)
        given = self._parameters.get((name, self._layer))
        return align(ALIGNMENTS[name], self.vectors.query[:, rows], self.vectors.key, given)

    def attend(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The attention of these scores, (head, row, key_token)."""
        scores = self.scores(name, rows)
        return scores if name == "model" else attend(scores, self.vectors.allowed[:, rows])

    def order_of(self, keys: np.ndarray) -> np.ndarray:
        """The random order among some of the keys."""
        return np.argsort(self._random[keys])


_RECEIVED = "received_"
# How the names begin of what is the same for every part of a run.
_ONCE = ("fit_loss_", "trained_")
_MEANINGS = {
    "divergence": ("Jensen-Shannon divergence from the model's own attention, mean over heads and rows", "nat"),
    "rank_agreement": ("Kendall's tau-b of the scores with the model's own attention, mean over heads and rows", "1"),
    "top_overlap": ("share of the strongest keys that are also the strongest of the model's own attention", "1"),
    "entropy": ("entropy of the attention, mean over heads and rows", "nat"),
    "deletion": ("area under the deletion curve: change of a head's output without the keys ranked first", "1"),
    "insertion": ("area under the insertion curve: change of a head's output with the keys ranked first alone", "1"),
    "deletion_curve": ("change of a head's output, over its length, without the fraction of keys ranked first", "1"),
    "insertion_curve": (
        "change of a head's output, over its length, with the fraction of keys ranked first alone",
        "1",
    ),
    "deletion_over_random": ("deletion less that of a random ranking of the same sample and layer", "1"),
    "insertion_over_random": ("insertion less that of a random ranking of the same sample and layer", "1"),
    "pointing": ("how often the largest weight lies in the region that the token belongs to", "1"),
    "mass": ("part of the weights that falls into the region that the token belongs to", "1"),
    "region_overlap": ("intersection over union of the region and as many keys with the most weight", "1"),
    "chance": ("pointing and mass of attention alike to all keys: the region's share of the keys", "1"),
    _RECEIVED: ("attention that a token gets, mean over layers, heads and rows", "1"),
    "fit_loss_before": ("loss of a learned score where its fit began", "nat"),
    "fit_loss_after": ("loss of a learned score on its training samples after the fit", "nat"),
    "trained_score": ("what a model trained with this score in its attention reaches; not measured in this run", "1"),
}


def _describe(name: str) -> dict[str, str]:
    meaning, unit = _MEANINGS[name]
    return {"long_name": meaning, "units": unit}


def _received_in(result: xr.Dataset) -> list[str]:
    return [str(name) for name in result.data_vars if str(name).startswith(_RECEIVED)]


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is there, NaN over nothing."""
    present = np.isfinite(values)
    count = present.sum(-1)
    return np.divide(np.where(present, values, 0).sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)


def _spread(places: np.ndarray, count: int) -> np.ndarray:
    """At most so many of the places, evenly spread."""
    if len(places) <= count:
        return places
    return places[np.linspace(0, len(places) - 1, count).round().astype(int)]


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(AlignmentScores)
