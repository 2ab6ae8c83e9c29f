"""What is kept of attention beside itself, so that a question over many samples need not read it.

Everything is taken of the weights as they are stored, so that an answer from here is the answer of the array. Keys of
padding are left out; a query of padding, or one without a valid key, has no summary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from attnscope.quantities import RANKS
from attnscope.recording.calls import unseen
from attnscope.tokens import KIND_CODES, KINDS
from attnscope.writing import decoded, encoded

Kinds = Callable[[str, int], np.ndarray]
"""The kinds (sample, token) of the tokens of a stream in this batch, given its name and how many tokens it has."""

_BY_KIND = frozenset({"kind_mass", "kind_mass_max", "kind_max"})
_TINY = 1e-38


@dataclass(frozen=True)
class TokenKinds:
    """Codes of kinds of the queries (sample, query_token) and the keys (sample, key_token) of a call."""

    query: torch.Tensor
    key: torch.Tensor


class Summaries:
    """Gathers the wanted summaries of one layer, some heads at a time.

    `valid` (sample, query_token) says which queries have a key; `encoding` is how the attention is stored.
    """

    def __init__(self, kinds: TokenKinds, valid: torch.Tensor, wanted: frozenset[str], encoding: str) -> None:
        self._kinds = TokenKinds(kinds.query.to(valid.device), kinds.key.to(valid.device))
        self._valid = valid
        self._wanted = wanted
        self._encoding = encoding
        self._parts: dict[str, list[torch.Tensor]] = {}

    def add(self, attention: torch.Tensor) -> None:
        """Take the attention weights of the next heads, (sample, head, query_token, key_token) float32."""
        with unseen():
            self.add_stored(encoded(attention, self._encoding))

    def add_stored(self, stored: torch.Tensor) -> None:
        """The same of weights that are encoded already."""
        with unseen():
            for name, part in summaries(decoded(stored), self._kinds, self._valid, self._wanted).items():
                self._parts.setdefault(name, []).append(part)

    def arrays(self) -> dict[str, np.ndarray]:
        """The summaries by name, as they are stored."""
        found = {name: torch.cat(parts, dim=1) for name, parts in self._parts.items()}
        if self._encoding == "float16" and "top_value" in found:
            found["top_value"] = found["top_value"].half()
        return {name: values.cpu().numpy() for name, values in found.items()}


def summaries(
    attention: torch.Tensor, kinds: TokenKinds, valid: torch.Tensor, wanted: frozenset[str]
) -> dict[str, torch.Tensor]:
    """The wanted summaries of attention weights (sample, head, query_token, key_token), by name.

    Entropy is in nats, all else dimensionless.
    """
    padding = KIND_CODES["padding"]
    real = kinds.key != padding
    if not real.all():
        attention = attention.masked_fill(~real[:, None, None], 0.0)
    rows = valid & (kinds.query != padding)
    found = {}
    if "entropy" in wanted:
        found["entropy"] = entropy(attention).masked_fill_(~rows[:, None], torch.nan)
    if wanted & {"top_key", "top_value"}:
        found["top_key"], found["top_value"] = strongest_keys(attention, rows)
    if wanted & _BY_KIND:
        found |= by_kind(attention, torch.where(rows, kinds.query, padding), kinds.key)
    return {name: values for name, values in found.items() if name in wanted}


def entropy(attention: torch.Tensor) -> torch.Tensor:
    """-sum p ln p over the last dimension, in nats."""
    return (attention * attention.clamp_min(_TINY).log_()).sum(dim=-1).neg_()


def strongest_keys(attention: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places and weights of the largest weights of each row, largest first; -1 and NaN where no weight is left."""
    values, keys = attention.topk(min(RANKS, attention.shape[-1]), dim=-1)
    absent = (values <= 0) | ~rows[:, None, :, None]
    return keys.int().masked_fill_(absent, -1), values.masked_fill_(absent, torch.nan)


def by_kind(attention: torch.Tensor, query_kind: torch.Tensor, key_kind: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mass and largest weight, (sample, head, kind of query, kind of key); NaN where a sample has no such tokens.

    `kind_mass` is the mean over the queries of a kind of what all keys of a kind get together, `kind_mass_max` the
    largest of these, `kind_max` the largest single weight.
    """
    samples, heads = attention.shape[:2]
    names = ("kind_mass", "kind_mass_max", "kind_max")
    found = {n: attention.new_full((samples, heads, len(KINDS), len(KINDS)), torch.nan) for n in names}
    for to in _kinds(key_kind):
        keys = key_kind == to
        mass = (attention @ keys[:, None, :, None].to(attention.dtype)).squeeze(-1)
        largest = (attention if keys.all() else attention * keys[:, None, None]).amax(dim=-1)
        for of in _kinds(query_kind):
            queries = (query_kind == of)[:, None]
            there = queries.any(dim=-1) & keys.any(dim=-1, keepdim=True)
            mean = (mass * queries).sum(dim=-1) / queries.sum(dim=-1)
            results = (mean, *(x.masked_fill(~queries, -1.0).amax(dim=-1) for x in (mass, largest)))
            for name, result in zip(names, results, strict=True):
                found[name][:, :, of, to] = result.masked_fill(~there, torch.nan)
    return found


def _kinds(kind: torch.Tensor) -> list[int]:
    """The codes that occur, padding aside."""
    return [code for code in kind.unique().tolist() if code != KIND_CODES["padding"]]
