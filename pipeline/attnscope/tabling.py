"""A run as tables, for SQL: samples, tokens, edges, heads, and what analysers gave.

A table is made when a query names it. Each is a dict of columns of equal length; values that are not there (NaN) have
no row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from attnscope.questions import strong_edges
from attnscope.run import EXTRACTED, LEFT_OUT, MISSING, MissingQuantity, Run
from attnscope.tokens import KINDS

Table = Mapping[str, np.ndarray]

_STATUS = {MISSING: "missing", EXTRACTED: "extracted", LEFT_OUT: "left out"}


@dataclass(frozen=True)
class Tables:
    """The tables of a run; `edges` holds the attention weights above `edges_above`."""

    run: Run
    edges_above: float = 0.125

    @property
    def makers(self) -> dict[str, Callable[[], Table]]:
        """What makes each table, by name; results of analysers are named 'analyser.variable'."""
        found: dict[str, Callable[[], Table]] = {
            "samples": self.samples,
            "tokens": self.tokens,
            "edges": self.edges,
            "heads": self.heads,
            "kinds": self.kinds,
        }
        for name in self.run.analyses:
            for variable in self.run.analysis(name).data_vars:
                found[f"{name}.{variable}"] = lambda n=name, v=str(variable): self.result(n, v)  # type: ignore[misc]
        return found

    def samples(self) -> Table:
        """One row a sample: id, text, image_digest, status in words, and the reason of those left out."""
        samples = self.run.samples
        columns = {"sample": _texts(samples["id"])}
        columns |= {name: _texts(samples[name]) for name in ("text", "image_digest", "reason")}
        status = np.array([_STATUS.get(int(code), "unknown") for code in self.run.status], object)
        return {**columns, "status": status}

    def tokens(self) -> Table:
        """One row a token that is not padding: sample, stream, token (its number), text, kind, row, column."""
        parts = []
        for stream in self.run.streams:
            tokens = self.run.tokens(stream)
            kind = tokens["kind"].values
            at = np.nonzero((kind != 0) & (self.run.status == EXTRACTED)[:, None])
            parts.append(
                {
                    "sample": self._ids[at[0]],
                    "stream": np.full(len(at[0]), stream, object),
                    "token": at[1],
                    "text": tokens["token_text"].values.astype(object)[at],
                    "kind": np.array(KINDS, object)[kind[at]],
                    "row": tokens["row"].values[at],
                    "column": tokens["column"].values[at],
                }
            )
        return _together(parts)

    def edges(self) -> Table:
        """One row for each attention weight p above the threshold, with its tokens' numbers, kinds and texts."""
        parts = []
        for site in self.run.sites:
            found = strong_edges(self.run, site, self.edges_above, {})
            columns = {"site": np.full(found.size, site, object)}
            for name in ("sample", "layer", "head", "query_token", "key_token"):
                columns[name] = found[name].values
            for side in ("query", "key"):
                columns[f"{side}_kind"] = np.array(KINDS, object)[found[f"{side}_kind"].values.astype(int)]
                columns[f"{side}_text"] = found[f"{side}_text"].values.astype(object)
            parts.append({**columns, "p": found.values})
        return _together(parts)

    def heads(self) -> Table:
        """One row a sample, layer and head: mean entropy (nats) of its queries, and its largest weight."""
        parts = []
        for site in self.run.sites:
            self._need(site, "entropy", "top_value")
            entropy = self.run.array(site, "entropy").astype(np.float64).mean("query_token").astype(np.float32)
            largest = self.run.array(site, "top_value").isel(rank=0).astype(np.float32).max("query_token")
            columns = self._rows(entropy, "entropy")
            there = ~np.isnan(entropy.values)
            parts.append(
                {"site": np.full(len(columns["entropy"]), site, object), **columns, "max": largest.values[there]}
            )
        return _together(parts)

    def kinds(self) -> Table:
        """One row a sample, layer, head, kind of query and kind of key: mass, mass_max and max."""
        parts = []
        names = {"mass": "kind_mass", "mass_max": "kind_mass_max", "max": "kind_max"}
        for site in self.run.sites:
            self._need(site, *names.values())
            mass = self.run.array(site, "kind_mass").load()
            there = ~np.isnan(mass.values)
            columns = self._rows(mass, "mass")
            for name in ("mass_max", "max"):
                columns[name] = self.run.array(site, names[name]).values[there]
            parts.append({"site": np.full(int(there.sum()), site, object), **columns})
        return _together(parts)

    def result(self, analysis: str, variable: str) -> Table:
        """One row for each value of one variable that an analyser gave."""
        return self._rows(self.run.analysis(analysis)[variable], variable)

    @property
    def _ids(self) -> np.ndarray:
        return np.array(self.run.sample_ids, object)

    def _need(self, site: str, *names: str) -> None:
        absent = [name for name in names if name not in self.run.quantities(site)]
        if absent:
            raise MissingQuantity(
                f"{self.run.location} holds no {absent[0]!r} of site {site!r}; extract it again with summaries"
            )

    def _rows(self, values: xr.DataArray, name: str) -> dict[str, np.ndarray]:
        """One row for each value that is there, with its labels along every dimension."""
        loaded = np.asarray(values.values)
        there = ~np.isnan(loaded) if loaded.dtype.kind == "f" else np.ones(loaded.shape, bool)
        columns = {}
        for dim, at in zip(map(str, values.dims), np.nonzero(there), strict=True):
            labels = values.coords[dim].values if dim in values.coords else np.arange(values.sizes[dim])
            columns[dim] = (labels.astype(object) if labels.dtype.kind in "UTO" else labels)[at]
        return {**columns, name: loaded[there]}


def _texts(values: xr.DataArray) -> np.ndarray:
    return np.array([str(value) for value in values.values], object)


def _together(parts: list[dict[str, np.ndarray]]) -> Table:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
