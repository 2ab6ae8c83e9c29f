"""From a recorded call to the quantities that are stored of it, as rows of the block being extracted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attnscope.families import Fold, Inputs
from attnscope.loading import LoadedModel
from attnscope.plan import SitePlan
from attnscope.planning import RecordingError, check_output, check_rows, fold_of
from attnscope.quantities import (
    ANSWERS,
    FACTORS,
    RAGGED,
    RESIDUALS,
    SCORE_GRADIENTS,
    SITE_QUANTITIES,
    SUMMARIES,
    TENSORS,
    ExtractSpec,
)
from attnscope.ragged import without_padding
from attnscope.recipes import RuleReader, proved_rows, recipe_of
from attnscope.recording import AttentionCall
from attnscope.recording.bystanders import modes_aside
from attnscope.recording.calls import ALL, unseen
from attnscope.run import Run
from attnscope.summaries import Kinds, Summaries, TokenKinds
from attnscope.tokens import KIND_CODES
from attnscope.writing import BlockBuffer, Place, cached_tiles, encoded, gathered, head_tiles, on_host

_LOG_SUM_EXP_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Places:
    """Where each call is stored: (module, call number) to (site, layer position); number -1 stands for all calls."""

    by_call: Mapping[tuple[str, int], tuple[str, int]]
    complete: bool

    @classmethod
    def of(cls, run: Run, spec: ExtractSpec) -> "Places":
        """The places that a run's plan foresees."""
        by_call = {
            call: (name, position)
            for name, site in run.plan.sites.items()
            for position, call in enumerate(zip(site.modules, site.call_numbers, strict=True))
        }
        return cls(by_call, spec.sites is None and spec.layers is None)

    def find(self, call: AttentionCall) -> tuple[str, int, bool] | None:
        """Site, layer position, and whether the call is one part of several; None for a call that isn't wanted.

        Raises
        ------
        RecordingError
            When every call is wanted and this one was not foreseen: it would be lost.
        """
        for number in (call.number, -1):
            place = self.by_call.get((call.module, number))
            if place is not None:
                return (*place, number == -1)
        if self.complete:
            raise RecordingError(
                f"module {call.module!r} attended in call {call.number}, which the first sample's forward had not;"
                " the model's calls depend on its input"
            )
        return None

    @property
    def one_by_one(self) -> bool:
        """Whether some layers are made of several calls."""
        return any(number == -1 for _, number in self.by_call)


class Taker:
    """Turns each recorded call of one batch into the wanted quantities and puts them into the block's buffer.

    `tokens` are the tokens of each stream that the batch had, padding included; `kinds` tells what they are.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        run: Run,
        places: Places,
        buffer: BlockBuffer,
        batch: tuple[Sequence[int], Inputs],
        kinds: Kinds,
    ) -> None:
        self._loaded = loaded
        self._run = run
        self._spec = run.spec
        self._places = places
        self._buffer = buffer
        self._rows, self._inputs = batch
        self._kinds = kinds
        self._rules = RuleReader()
        self._parts: dict[tuple[str, Place], dict[str, np.ndarray]] = {}
        self._ends: dict[tuple[str, Place], tuple[int, int]] = {}
        self._laid: set[tuple[str, int]] = set()
        self.tokens: dict[str, int] = {}

    def __call__(
        self,
        call: AttentionCall,
        gradient: torch.Tensor | None = None,
        beside: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        found = self._places.find(call)
        if found is not None:
            with modes_aside(call):
                self._take(call, found, gradient, beside)

    def _take(
        self,
        call: AttentionCall,
        found: tuple[str, int, bool],
        gradient: torch.Tensor | None,
        beside: Mapping[str, torch.Tensor] | None,
    ) -> None:
        site, layer, is_part = found
        plan = self._run.plan.sites[site]
        if is_part:
            self._add_part(call, site, layer, call_quantities(call, gradient, self._spec, plan))
            return
        self._count(plan, call.shape[2], call.shape[3])
        if call.shape[0] != len(self._rows):
            raise RecordingError(
                f"module {call.module!r} attends over a batch of {call.shape[0]} for {len(self._rows)} samples"
            )
        values = call_quantities(call, gradient, self._spec, plan, self._token_kinds(plan, *call.shape[2:]))
        values |= {name: shares.numpy() for name, shares in (beside or {}).items()}
        if plan.form == "factored" and "attention" in self._spec.quantities:
            values |= self._factors(call, plan, layer)
        self._put(site, layer, values)

    def take_answer(
        self,
        answer: int,
        call: AttentionCall,
        gradient: torch.Tensor | None,
        beside: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Take what is recorded of a call for the logit of one written token, of whose derivative this is."""
        found = self._places.find(call)
        if found is None:
            return
        site, layer, is_part = found
        plan = self._run.plan.sites[site]
        values = answer_quantities(call, gradient, self._spec, plan)
        if is_part:
            self._add_part(call, site, (layer, answer), values)
            return
        if beside is not None:
            values |= {"answer_residual": beside["residual_gradient"].numpy()}
        self._put(site, (layer, answer), values)

    def finish_answer(self) -> None:
        """Put what was gathered part by part for one written token."""
        for (site, place), arrays in self._parts.items():
            self._put(site, place, arrays)
        self._parts = {}

    def finish_answers(self, count: int) -> None:
        """Say that the samples of the batch wrote so many tokens; they have nothing for further ones."""
        for site, plan in self._run.plan.sites.items():
            for name in sorted(plan.stored(self._spec) & ANSWERS.keys()):
                for layer, answer in np.ndindex(len(plan.layers), self._run.plan.answers):
                    if answer >= count:
                        self._buffer.put(site, name, (layer, answer), self._rows, None)

    def finish(self) -> None:
        """Put what was gathered part by part; call it when the forward is over."""
        for (site, layer), arrays in self._parts.items():
            plan = self._run.plan.sites[site]
            queries, keys = (self.tokens[stream] for stream in (plan.queries, plan.keys))
            kinds = self._token_kinds(plan, queries, keys)
            if kinds is not None:
                # The parts of a layer lie side by side only now.
                valid = torch.from_numpy(arrays["query_valid"][:, :queries])
                beside = Summaries(kinds, valid, plan.stored(self._spec) & SUMMARIES, self._spec.encoding)
                for head in range(plan.heads):
                    stored = arrays["attention"][:, head : head + 1, :queries, :keys]
                    beside.add_stored(torch.from_numpy(np.ascontiguousarray(stored)))
                arrays |= beside.arrays()
            self._put(site, layer, arrays)
        self._parts = {}
        for stream, tokens in self._laid:
            if tokens != self.tokens[stream]:
                raise RecordingError(
                    f"calls attend to {tokens} and to {self.tokens[stream]} tokens of stream {stream!r}: padding can't"
                    " be left out; extract with form 'dense'"
                )

    def _put(self, site: str, place: Place, values: Mapping[str, np.ndarray]) -> None:
        plan = self._run.plan.sites[site]
        if plan.form == "ragged" and "attention" in values:
            assert isinstance(place, int)
            self._put_ragged(site, place, values["attention"])
        for name in sorted(plan.stored(self._spec) & set(values)):
            self._buffer.put(site, name, place, self._rows, values[name])

    def _put_ragged(self, site: str, layer: int, attention: np.ndarray) -> None:
        plan = self._run.plan.sites[site]
        streams = zip((plan.queries, plan.keys), attention.shape[2:], strict=True)
        queries, keys = (self._real(stream, min(size, self.tokens[stream])) for stream, size in streams)
        pieces = (without_padding(*sample) for sample in zip(attention, queries, keys, strict=True))
        self._buffer.put_ragged(site, layer, dict(zip(self._rows, pieces, strict=True)))

    def _real(self, stream: str, tokens: int) -> np.ndarray:
        """Which of so many tokens of a stream aren't padding: (sample, token) bool."""
        self._laid.add((stream, tokens))
        with unseen(), torch.no_grad():
            return self._kinds(stream, tokens)[:, :tokens] != KIND_CODES["padding"]

    def _token_kinds(self, plan: SitePlan, queries: int, keys: int) -> TokenKinds | None:
        """What the first so many queries and keys of a site are in this batch; None where nothing is told by kind."""
        if not plan.stored(self._spec) & SUMMARIES:
            return None
        with unseen(), torch.no_grad():
            found = [self._kinds(stream, n)[:, :n] for stream, n in ((plan.queries, queries), (plan.keys, keys))]
        query, key = (torch.tensor(kind) for kind in found)
        return TokenKinds(query, key)

    def _factors(self, call: AttentionCall, plan: SitePlan, layer: int) -> dict[str, np.ndarray]:
        """Query, key, log-sum-exp and rules, proved on some rows against what the kernel returned."""
        if recipe_of(call) is None or not _same_recipe(call, plan, layer):
            raise RecordingError(
                f"attention of module {call.module!r} can't be stored factored for this sample: its scale, mask or"
                " bias differ from the first sample's; extract with form 'dense'"
            )
        rows = proved_rows(call)
        check_output(call, rows)
        total = call.log_sum_exp()
        again = call.scores(rows).logsumexp(dim=-1) if call.sinks is None else total[:, :, rows]
        valid = torch.isfinite(again)
        if not torch.allclose(again[valid], total[:, :, rows][valid], atol=_LOG_SUM_EXP_TOLERANCE):
            raise RecordingError(f"log-sum-exp of module {call.module!r} does not belong to its scores")
        rules = self._rules.rules(call)
        found = {"key_valid": rules.key_valid.numpy(), "causal": rules.causal.numpy()}
        if rules.mask is not None:
            found["mask"] = rules.mask.numpy()
        found["log_sum_exp"] = total.cpu().numpy()
        return found | {name: _plain(getattr(call, name), plan.dtype) for name in ("query", "key")}

    def _add_part(self, call: AttentionCall, site: str, place: Place, values: Mapping[str, np.ndarray]) -> None:
        fold = fold_of(call, self._loaded, self._inputs) or self._behind_the_others(call, site, place)
        self._count(self._run.plan.sites[site], int(fold.queries.max()) + 1, int(fold.keys.max()) + 1)
        arrays = self._parts.setdefault((site, place), {})
        sizes = self._run.plan.sizes(self._run.plan.sites[site])
        for name, part in values.items():
            if name not in arrays:
                arrays[name] = _empty(name, len(self._rows), sizes, part.dtype)
            scatter(arrays[name], name, part, fold)

    def _count(self, site: SitePlan, queries: int, keys: int) -> None:
        """Keep in `tokens` how many tokens of each stream this batch has had."""
        for stream, tokens in ((site.queries, queries), (site.keys, keys)):
            self.tokens[stream] = max(tokens, self.tokens.get(stream, 0))

    def _behind_the_others(self, call: AttentionCall, site: str, place: Place) -> Fold:
        """The call's tokens follow those of the calls before it; the batch is one sample."""
        batch, _, queries, keys = call.shape
        first_query, first_key = self._ends.get((site, place), (0, 0))
        self._ends[site, place] = (first_query + batch * queries, first_key + batch * keys)
        return Fold(
            np.zeros(batch, np.int64),
            first_query + np.arange(batch * queries).reshape(batch, queries),
            first_key + np.arange(batch * keys).reshape(batch, keys),
        )


def call_quantities(
    call: AttentionCall,
    gradient: torch.Tensor | None,
    spec: ExtractSpec,
    plan: SitePlan,
    kinds: TokenKinds | None = None,
) -> dict[str, np.ndarray]:
    """The stored quantities of one call: (batch, ...) arrays by name, reduced over heads tile by tile.

    `gradient` is the derivative of the score by the call's output, (batch, query_token, head, value_channel); None
    counts as zero. What factored attention needs is not among them. Where the `kinds` of the tokens are not known,
    attention itself stands in for its summaries.
    """
    wanted = plan.stored(spec)
    if wanted & RAGGED:
        wanted = wanted - RAGGED | {"attention"}
    if plan.form == "factored" and "attention" in spec.quantities:
        wanted -= FACTORS
    if kinds is None and wanted & SUMMARIES:
        wanted = wanted - SUMMARIES | {"attention"}
    batch, _, queries, _ = call.shape
    valid = call.row_valid()
    valid = (valid[:, 0] if valid.shape[1] == 1 else valid.any(dim=1)).expand(batch, queries)
    encoding = "exact" if plan.form == "factored" else spec.encoding
    beside = None if kinds is None else Summaries(kinds, valid, wanted & SUMMARIES, encoding)
    found = _by_head_tiles(call, gradient, wanted, spec.encoding, beside) | {"query_valid": valid.cpu().numpy()}
    for name in TENSORS:
        tensor = getattr(call, name)
        if name in wanted and tensor is not None:
            found[name] = _plain(tensor, plan.dtype)
    if "log_sum_exp" in wanted and call.query is not None:
        found["log_sum_exp"] = call.log_sum_exp().cpu().numpy()
    return found


def answer_quantities(
    call: AttentionCall, gradient: torch.Tensor | None, spec: ExtractSpec, plan: SitePlan
) -> dict[str, np.ndarray]:
    """What is stored of one call for one written token, by the derivative of its logit: (batch, ...) arrays by name."""
    wanted = {ANSWERS[name]: name for name in plan.stored(spec) & ANSWERS.keys()}
    found = _by_head_tiles(call, gradient, frozenset(wanted), spec.encoding, None)
    return {wanted[name]: values for name, values in found.items()}


def _by_head_tiles(
    call: AttentionCall,
    gradient: torch.Tensor | None,
    wanted: frozenset[str],
    encoding: str,
    beside: Summaries | None,
) -> dict[str, np.ndarray]:
    full: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    slopes = wanted & SCORE_GRADIENTS - RESIDUALS
    reduced = wanted & (SUMMARIES | {"attention_mean"})
    if not slopes and not reduced:
        return {"attention": on_host(_stored_attention(call, encoding))} if "attention" in wanted else {}
    # What is told beside the attention as it is stored is that of the same weights.
    exactness = "exact" if slopes or "attention_mean" in wanted or "attention" not in wanted else encoding
    # With a gradient, attention, gradient, their product and its positive part are there at once.
    for heads in head_tiles(call, 4 if slopes else 1):
        attention = _attention(call, heads, exactness)
        if "attention" in wanted:
            stored = encoded(attention, encoding)
            full["attention"] = gathered(full.get("attention"), stored, heads, call.shape[1])
        if beside is not None:
            beside.add(attention)
        if "attention_mean" in wanted:
            _accumulate(sums, "attention_mean", attention.sum(dim=1))
        if not slopes:
            continue
        slope = torch.zeros_like(attention) if gradient is None else call.attention_gradient(gradient, heads=heads)
        if "attention_grad" in wanted:
            full["attention_grad"] = gathered(full.get("attention_grad"), slope, heads, call.shape[1])
        if "attention_relevance" in wanted:
            # Not in place: what is stored of the two tensors may be their own memory.
            _accumulate(sums, "attention_relevance", (attention * slope).clamp_(min=0).sum(dim=1))
        if "attention_gradient" in wanted:
            _accumulate(sums, "attention_gradient", (attention * slope).sum(dim=1))
        if "attention_gradcam" in wanted:
            # The derivative by a weight that a mask holds at zero says nothing.
            total = (slope * (attention > 0)).sum(dim=(2, 3), keepdim=True)
            _accumulate(sums, "attention_gradcam", (attention * total).sum(dim=1))
    found = {name: on_host(tensor) for name, tensor in full.items()}
    found |= {name: (total / call.shape[1]).cpu().numpy() for name, total in sums.items()}
    return found if beside is None else found | beside.arrays()


def _stored_attention(call: AttentionCall, encoding: str) -> torch.Tensor:
    """The attention of a call as it is stored, (batch, head, query_token, key_token), of which nothing else is made."""
    tiles = cached_tiles(call)
    if len(tiles) == 1:
        return encoded(_attention(call, ALL, encoding), encoding)
    whole: torch.Tensor | None = None
    for samples, heads in tiles:
        tile = _attention(call.of_samples(samples), heads, encoding)
        if whole is None:
            whole = encoded(tile[:0], encoding).new_empty(call.shape)
        # Cast where it lies in the end.
        whole[samples, heads] = tile if encoding == "float16" else encoded(tile, encoding)
    assert whole is not None
    return whole


def _attention(call: AttentionCall, heads: slice, encoding: str) -> torch.Tensor:
    """Attention of some heads, as exact as it has to be for an encoding."""
    found = None if encoding == "exact" else call.attention_by_kernel(heads)
    if found is None:
        found = call.attention(heads=heads)
        check_rows(found, call)
    return found


def scatter(target: np.ndarray, name: str, part: np.ndarray, fold: Fold) -> None:
    """Lay the values (call_batch, ...) of one call into the array (sample, ...) of a whole layer."""
    dims = SITE_QUANTITIES[name].dims[2:]
    for row in range(len(part)):
        places = {"query_token": fold.queries[row], "key_token": fold.keys[row]}
        into, out_of = [], []
        for dim, size in zip(dims, part.shape[1:], strict=True):
            at = places.get(dim, np.arange(size))
            out_of.append(np.flatnonzero(at >= 0))
            into.append(at[at >= 0])
        target[fold.samples[row]][np.ix_(*into)] = part[row][np.ix_(*out_of)]


def _empty(name: str, samples: int, sizes: Mapping[str, int], dtype: np.dtype) -> np.ndarray:
    """Zeros where no part attends to the tokens of another, the fill value where a token has no part."""
    row = SITE_QUANTITIES[name]
    shape = [samples, *(sizes[d] for d in row.dims[2:])]
    between_tokens = {"query_token", "key_token"} <= set(row.dims)
    return np.full(shape, 0 if between_tokens else row.fill, dtype)


def _same_recipe(call: AttentionCall, plan: SitePlan, layer: int) -> bool:
    stored = plan.recipes[layer]
    mine = recipe_of(call)
    # Where nothing is causal the offset says nothing; it differs with the padding of the batch.
    return mine is not None and (mine.scale, mine.softcap, mine.window, mine.sinks) == (
        stored.scale,
        stored.softcap,
        stored.window,
        stored.sinks,
    )


def _plain(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    tensor = tensor.detach()
    if dtype == "bfloat16":
        return tensor.contiguous().cpu().view(torch.uint16).numpy()
    return (tensor if dtype == "float16" else tensor.float()).cpu().numpy()


def _accumulate(sums: dict[str, torch.Tensor], name: str, part: torch.Tensor) -> None:
    sums[name] = sums[name] + part if name in sums else part
