"""The run: one Zarr hierarchy that holds what a model attended to, sample by sample.

Arrays are made once, at full size, before anything is extracted. A block (`unit` consecutive samples) is written array
by array and its mark in `samples/status` last: a sample counts only when its mark stands, so a killed writer loses
nothing but the block in its hands, and repeating the command does only what is missing.
"""

import copy
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
import zarr
import zarr.codecs
from xarray.core import indexing
from zarr.abc.store import Store

from attnscope.arrays import (
    COMPRESSORS,
    DENSE_BOUND,
    WHOLE_RUN,
    ArrayPlan,
    arrays_of,
    create_array,
    write_layers,
    write_site_coordinates,
)
from attnscope.attention_array import (
    DIMS,
    AttentionArray,
    DecodedArray,
    DenseTiles,
    FactoredTiles,
    HeadMean,
    TileSource,
)
from attnscope.claims import FOLDER as CLAIMS_FOLDER
from attnscope.claims import POLL, Claims
from attnscope.conditions import Condition
from attnscope.labels import token_labels
from attnscope.outputs import complete_sets, read_embeddings, read_outputs
from attnscope.plan import _DENSE_DTYPE, RunPlan, SitePlan, plan_from_attrs, plan_to_attrs, unit_for
from attnscope.quantities import (
    DERIVED_FROM,
    RAGGED,
    SCHEMA_VERSION,
    SITE_QUANTITIES,
    ExtractSpec,
    quantity,
)
from attnscope.questions import strong_edges, strong_heads
from attnscope.ragged import RaggedTiles
from attnscope.samples import Sample
from attnscope.selection import Choice, select
from attnscope.stores import StoreError, delete, keys, open_group, open_store, read
from attnscope.tokens import KIND_CODES, KINDS, TokenLayout
from attnscope.whole_shards import OpenShard, open_shard, write_shard

if TYPE_CHECKING:
    from collections.abc import Hashable

MISSING, EXTRACTED, LEFT_OUT = 0, 1, 2
"""What is known of all samples before the first is extracted."""
_UNREADABLE = "{!r} has a zarr.json that can't be read; restore that file from a copy, or extract into another place"
_MAKING: dict[str, Any] = {"making": "attnscope run"}


class RunError(ValueError):
    """A run that can't be opened, extended or asked for something; the message is one sentence."""


class RunStands(RunError):
    """There is a run at the place where one is to be made."""


class BrokenRun(RunError):
    """There is a run, but what it says of itself can't be read."""


class MissingQuantity(RunError):
    """A run does not hold what was asked of it."""


class Run:
    """An extracted run; open it with `open_run`, make it with `Run.create`."""

    def __init__(self, store: Store, location: str) -> None:
        self.store = store
        self.location = location
        self._group = open_group(store, mode="r" if store.read_only else "r+")
        self._arrays: dict[str, zarr.Array] = {}
        self._part: range | None = None
        self.plan = plan_from_attrs(self._group.attrs["plan"])  # type: ignore[arg-type]

    # -- making -----------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        location: str | Path | Store | None,
        plan: RunPlan,
        spec: ExtractSpec,
        samples: Sequence[Sample],
        attrs: Mapping[str, object],
        fill: Callable[["Run"], None] | None = None,
    ) -> "Run":
        """An empty run with every array at full size.

        `fill` writes what belongs to the run as a whole: a run counts only when that is there too. Of several
        processes that make one at once, one does, and the others wait for it.

        Raises
        ------
        RunStands
            When there is a run at the location already, or another process has made one meanwhile.
        RunError
            When there is anything else at the location.
        """
        store = open_store(location, read_only=False)
        name = "memory" if location is None else str(location)
        _check_free(store, name)
        with Claims(store) as claims:
            while not claims.take("making"):
                time.sleep(POLL)
                _check_free(store, name)
            _check_free(store, name)
            root = _empty_root(store)
            for array in arrays_of(plan, spec, len(samples)):
                create_array(root, array, plan.unit)
            for site_name, site in plan.sites.items():
                write_site_coordinates(root.require_group(site_name), site)
            root.require_group("outputs").attrs["conditions"] = list(plan.conditions)
            root.require_group("analyses")
            header: dict[str, Any] = {
                **attrs,
                "plan": plan_to_attrs(plan),
                "spec": spec.to_json(),
                "versions": versions(),
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            root.attrs.put({**header, **_MAKING})
            begun = cls(store, name)
            begun.describe(samples)
            if fill is not None:
                fill(begun)
            # The schema number makes it a run: it is written last, so that a run half made is not taken for one.
            root.attrs.put({**header, "members": _note_members(root), "schema": SCHEMA_VERSION})
            return cls(store, name)

    def describe(self, samples: Sequence[Sample], start: int = 0) -> None:
        """Write the ids, texts and regions of all samples from the place `start` on."""
        self._array("samples/id")[start:] = _strings(s.id for s in samples)
        self._array("samples/text")[start:] = _strings(s.text or "" for s in samples)
        self._array("samples/regions")[start:] = _strings(json.dumps([asdict(r) for r in s.regions]) for s in samples)

    def grow(self, samples: Sequence[Sample]) -> "Run":
        """The same run with room for further samples behind those that it has; only one process may do so at a time.

        The marks grow last, and their number is the number of samples: killed at any moment, the run is what it was.
        """
        before = self.sample_count
        count = before + len(samples)
        for planned in arrays_of(self.plan, self.spec, count):
            if {"sample", "element"} & set(planned.row.dims) and planned.path != "samples/status":
                self._array(planned.path).resize(planned.shape)
        self.describe(samples, before)
        self._array("samples/status").resize((count,))
        return type(self)(self.store, self.location)

    def write_layer(self, site: str, name: str, block: range, place: int | tuple[int, int], values: np.ndarray) -> None:
        """Write one quantity of one layer (a position, not a number) for a whole block; values are (sample, ...).

        Of what is recorded for each written token, the place is that of the layer and of the token.
        """
        array = self._array(f"{site}/{name}")
        at = place if isinstance(place, tuple) else (place,)
        if not write_shard(array, (block.start, *at, *(0 for _ in values.shape[1:])), values):
            array[(slice(block.start, block.stop), *at)] = values

    def open_layer(
        self, site: str, name: str, block: range, place: int | tuple[int, int], expected: int, dtype: np.dtype
    ) -> OpenShard | None:
        """What writes the same for each of the expected samples as it comes; None where they have to come together."""
        array = self._array(f"{site}/{name}")
        at = place if isinstance(place, tuple) else (place,)
        first = (block.start, *at, *(0 for _ in array.shape[1 + len(at) :]))
        return open_shard(array, first, len(block), expected, dtype)

    def write_ragged(self, site: str, block: range, layer: int, values: np.ndarray, begins: np.ndarray) -> None:
        """Write the attention of one layer of a whole block without padding: (head, element).

        `begins` says where in there each sample begins, -1 for one that has none. Of a block that the run has grown
        into, the new samples come behind the others.
        """
        start = self._free_element(site, block)
        array, chunk = self._array(f"{site}/attention_values"), self.plan.sites[site].chunk_elements
        whole_chunks = np.pad(values, ((0, 0), (0, -values.shape[1] % chunk)), constant_values=array.fill_value)
        if not write_shard(array, (layer, 0, start), whole_chunks):
            array[layer, :, start : start + values.shape[1]] = values
        if layer == 0:
            offsets = np.where(begins < 0, -1, begins + start)
            self._array(f"{site}/attention_offset")[block.start : block.stop] = offsets

    def write_layers(self, site: str, name: str, block: range, values: np.ndarray) -> None:
        """Write one quantity of all layers for a whole block; values are (sample, layer, ...)."""
        array = self._array(f"{site}/{name}")
        if not write_shard(array, (block.start, *(0 for _ in values.shape[1:])), values):
            array[block.start : block.stop] = values

    def write_block(self, path: str, block: range, values: np.ndarray) -> None:
        """Write an array of `samples`, of a stream, or of `outputs` for a whole block; values are (sample, ...)."""
        array = self._array(path)
        if path.startswith("outputs/"):
            array[:, block.start : block.stop] = values
        else:
            array[block.start : block.stop] = values

    def write_tokens(self, stream: str, block: range, layout: TokenLayout) -> None:
        """Write the tokens of one stream for a whole block; shorter layouts are padded."""
        for name in ("token_text", "kind", "row", "column"):
            values = layout.text if name == "token_text" else getattr(layout, name)
            array = self._array(f"{stream}/{name}")
            padded = np.full((len(block), array.shape[1]), quantity("stream", name).fill, dtype=values.dtype)
            padded[:, : values.shape[1]] = values
            array[block.start : block.stop] = padded

    def write_weights(self, site: str, layer: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the projections of one layer (a position); the arrays are made with the first layer that comes."""
        plan = self.plan.sites[site]
        rectangular = arrays["query"].shape[-1] != arrays["key"].shape[-1]
        for name, values in arrays.items():
            path = f"weights/{site}/{name}"
            row = quantity("weights", name)
            if rectangular and name == "key":
                row = replace(row, dims=(*row.dims[:-1], "key_feature"))
            if path not in self._group:
                create_array(self._group, ArrayPlan(path, row, (len(plan.layers), *values.shape), row.dtype), 1)
                write_layers(self._group[f"weights/{site}"], plan)  # type: ignore[arg-type]
                self._group["weights"].attrs["members"] = _note_members(self._group["weights"])  # type: ignore[arg-type]
            self._array(path)[layer] = values

    def describe_weights(self, site: str, **attrs: str | int | float) -> None:
        """Add to what the weights of a site say of themselves."""
        self._group[f"weights/{site}"].attrs.update(attrs)

    def commit(self, block: range, status: np.ndarray) -> None:
        """Mark a block as done; everything of it must have been written."""
        self._array("samples/status")[block.start : block.stop] = status.astype(np.uint8)

    def arrays_of_blocks(self) -> dict[str, zarr.Array]:
        """Every array that is written block by block, by path."""
        planned = [a for a in self._planned() if {"sample", "element"} & set(a.row.dims)]
        return {a.path: self._array(a.path) for a in planned if a.row.group != "samples" or a.row.name not in WHOLE_RUN}

    def restore(self, path: str) -> bool:
        """Write the metadata of a group or an array again, as the plan has it; False for what it doesn't name."""
        site, _, name = path.rpartition("/")
        arrays = {a.path: a for a in self._planned()}
        groups = {*self.plan.sites, *self.plan.streams, "samples", "outputs", "analyses"}
        labels = site in self.plan.sites and name in ("layer", "head")
        if not labels and path not in arrays.keys() | groups:
            return False
        delete(self.store, f"{path}/zarr.json")
        if path in arrays:
            create_array(self._group, arrays[path], self.plan.unit)
        elif path in groups:
            self._group.require_group(path)
        for of_site in {site, path} & set(self.plan.sites):
            write_site_coordinates(self._group.require_group(of_site), self.plan.sites[of_site])
        if path == "outputs":
            self._group["outputs"].attrs["conditions"] = list(self.plan.conditions)
        self._arrays.clear()
        return True

    # -- state ------------------------------------------------------------------------------------------------------

    @property
    def attrs(self) -> dict[str, object]:
        """What the run says of itself: model, digests, kernel, versions."""
        return dict(self._group.attrs)

    @property
    def lost(self) -> list[str]:
        """What a repair found broken of the run as a whole, and the next extraction writes again."""
        return list(self._group.attrs.get("lost", []))  # type: ignore[arg-type]

    def set_attrs(self, **attrs: str | int | float | list[str]) -> None:
        """Add to what the run says of itself."""
        self._group.attrs.update(attrs)

    @property
    def spec(self) -> ExtractSpec:
        """What was asked to be recorded."""
        return ExtractSpec.from_json(str(self._group.attrs["spec"]))

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the kinds of attention, such as 'vision.self' or 'text.vision' (queries text, keys vision)."""
        return tuple(self.plan.sites)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the token sequences."""
        return tuple(self.plan.streams)

    @property
    def sample_count(self) -> int:
        """How many samples the run has, extracted or not."""
        return int(self._array("samples/status").shape[0])

    @property
    def status(self) -> np.ndarray:
        """(sample,) uint8: 0 missing, 1 extracted, 2 left out."""
        status = np.asarray(self._array("samples/status")[:])
        if self._part is not None:
            status[: self._part.start] = status[self._part.stop :] = MISSING
        return status

    def blocks(self) -> list[range]:
        """The write units, in order; of a part of a run, what of them lies in the part."""
        count = self.sample_count
        part = range(count) if self._part is None else self._part
        blocks = (range(i, min(i + self.plan.unit, count)) for i in range(0, count, self.plan.unit))
        within = (range(max(b.start, part.start), min(b.stop, part.stop)) for b in blocks)
        return [b for b in within if b]

    def part(self, samples: range) -> "Run":
        """The same run in which the samples outside of a range of positions count as not extracted.

        What an analyser gives on the parts of a run it can `combine` into what it gives on the whole.
        """
        part = copy.copy(self)
        part._part = range(samples.start, samples.stop)
        return part

    def missing(self, spec: ExtractSpec | None = None) -> list[range]:
        """The blocks of samples that are still to be extracted; empty for a finished run.

        Of a block that the run has grown into, the missing part.

        Raises
        ------
        MissingQuantity
            When the run was made for less than `spec` asks, so that no further extraction can meet it.
        """
        if spec is not None:
            self.require(spec)
        missing = self.status == MISSING
        blocks = [b for b in self.blocks() if missing[b.start : b.stop].any()]
        return [range(b.start + int(missing[b.start : b.stop].argmax()), b.stop) for b in blocks]

    def require(self, spec: ExtractSpec, asker: str = "the request") -> None:
        """Raise MissingQuantity unless the run holds what `spec` asks for."""
        mine = self.spec
        if mine.covers(spec):
            self._require_conditions(spec, asker)
            return
        absent = sorted(q for q in spec.quantities if not mine.covers(ExtractSpec(frozenset({q}))))
        if absent:
            wanted = f"needs {', '.join(map(repr, absent))}, which {self.location} does not hold"
        elif spec.target not in (None, mine.target):
            wanted = f"needs the target {spec.target!r}, but {self.location} was extracted for {mine.target!r}"
        else:
            wanted = f"needs sites or layers which {self.location} does not hold"
        raise MissingQuantity(
            f"{asker} {wanted}; extract again into another run with --for {asker.rsplit(maxsplit=1)[-1]}"
        )

    def _require_conditions(self, spec: ExtractSpec, asker: str) -> None:
        if not spec.conditions:
            return
        held = set(self.conditions)
        absent = [c.name for c in spec.conditions if c not in held]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise MissingQuantity(
                f"{asker} needs the model's outputs under {absent[0]!r}{more}, which {self.location} does not hold;"
                f" the same attnscope extract with --for {asker.rsplit(maxsplit=1)[-1].strip(chr(39))} adds them"
            )

    def is_missing(self, block: range) -> bool:
        """Whether a block lacks its mark, as the store says now."""
        return bool((np.asarray(self._array("samples/status")[block.start : block.stop]) == MISSING).any())

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def samples(self) -> xr.Dataset:
        """What is known of each sample: id, text, regions (JSON), image digest, status, reason."""
        return self._dataset("samples")

    @property
    def sample_ids(self) -> list[str]:
        """Names of the samples, in stored order."""
        return [str(s) for s in np.asarray(self._array("samples/id")[self._known])]

    def tokens(self, stream: str) -> xr.Dataset:
        """Text, kind (a code, see its `flag_meanings`), row and column of every token of a stream."""
        if stream not in self.plan.streams:
            raise MissingQuantity(f"{self.location} has no stream {stream!r}; it has {', '.join(self.streams)}")
        return self._dataset(stream)

    def token_labels(self, stream: str) -> "Iterable[tuple[str, xr.Variable]]":
        """What `tokens` gives, by name, read only when it is asked for."""
        return token_labels(self.store, stream, (self.sample_count, self.plan.streams[stream]))

    def attention(self, site: str) -> xr.DataArray:
        """Attention weights of a site, lazily: (sample, layer, head, query_token, key_token) float32.

        Rows sum to 1 over real tokens within the array's stated `bound`; padding, samples not extracted, and query
        rows without a valid key are NaN.
        """
        plan = self._site(site)
        array = AttentionArray(
            self._tiles(site),
            self._array("samples/status"),
            self._array(f"{site}/query_valid"),
            self._array(f"{plan.queries}/kind"),
            self._array(f"{plan.keys}/kind"),
        )
        row = SITE_QUANTITIES["attention"]
        attrs = {"long_name": row.meaning, "units": row.units, "bound": self._bound(plan)}
        variable = xr.Variable(DIMS, indexing.LazilyIndexedArray(array), attrs)[self._known]
        return xr.DataArray(variable, coords=self._coordinates(site), name="attention")

    def array(self, site: str, name: str) -> xr.DataArray:
        """A quantity of a site, lazily, by its name in the schema; 'attention_mean' is computed where not stored."""
        if name == "attention":
            return self.attention(site)
        self._site(site)
        if f"{site}/{name}" in self._group:
            stored = self._dataset(site)[name].assign_coords({"sample": self._sample_coordinate()})
            if "query_kind" in stored.dims:
                return stored.assign_coords(query_kind=list(KINDS), key_kind=list(KINDS))
            if "encoded" not in stored.attrs:
                return stored
            array = indexing.LazilyIndexedArray(DecodedArray(self._array(f"{site}/{name}")))
            attrs = {k: v for k, v in stored.attrs.items() if k != "encoded"}
            return stored.copy(data=xr.Variable(stored.dims, array)[self._known]).assign_attrs(attrs)
        if name == "attention_mean":
            return self._head_mean(site, name, self.attention(site))
        if name == "attention_relevance" and f"{site}/attention_grad" in self._group:
            return self._head_mean(site, name, self.array(site, "attention_grad"), self.attention(site))
        raise MissingQuantity(f"{self.location} does not hold {name!r} at site {site!r}")

    def stored(self, group: str, name: str) -> zarr.Array:
        """An array of a site or a stream as it is stored."""
        return self._array(f"{group}/{name}")

    def quantities(self, site: str) -> tuple[str, ...]:
        """Names of the quantities that `array` gives for a site."""
        self._site(site)
        wanted = self.spec.recorded
        derived = {small for small, full in DERIVED_FROM.items() if {full, "attention"} <= wanted}
        held = wanted | derived | self.plan.sites[site].stored(self.spec) - RAGGED
        return tuple(name for name in SITE_QUANTITIES if name in held)

    def select(
        self,
        site: str,
        *,
        quantity: str = "attention",
        sample: Choice = None,
        layer: Choice = None,
        head: Choice = None,
        query: Choice = None,
        key: Choice = None,
    ) -> xr.DataArray:
        """A part of a quantity of a site, by the names that people use; see `attnscope.selection.select`."""
        return select(self, site, quantity=quantity, sample=sample, layer=layer, head=head, query=query, key=key)

    def strong_edges(
        self,
        site: str,
        *,
        above: float,
        sample: Choice = None,
        layer: Choice = None,
        head: Choice = None,
        query: Choice = None,
        key: Choice = None,
    ) -> xr.DataArray:
        """Every attention weight above a threshold, (edge), with its sample, layer, head and tokens as coordinates.

        Exact, and from 1/9 on answered from the eight strongest keys of each query alone; attrs `read` says what was
        read. Parts of a run are chosen as in `select`.
        """
        self._site(site)
        chosen = {"sample": sample, "layer": layer, "head": head, "query": query, "key": key}
        return strong_edges(self, site, above, chosen)

    def strong_heads(
        self,
        site: str,
        *,
        above: float,
        sample: Choice = None,
        layer: Choice = None,
        head: Choice = None,
        query: Choice = None,
        key: Choice = None,
    ) -> xr.DataArray:
        """The heads in which a query puts more than `above` on all the chosen keys together, sample by sample.

        (case), with sample, layer and head as coordinates; the value is the most that a query puts there. Between
        kinds of tokens, such as query 'text' and key 'image', it is answered from summaries alone; attrs `read` says.
        """
        self._site(site)
        chosen = {"sample": sample, "layer": layer, "head": head, "query": query, "key": key}
        return strong_heads(self, site, above, chosen)

    def weights(self, site: str) -> xr.Dataset:
        """Query and key projections of a site: `query` (layer, head, channel, feature), `key` with kv_head, biases."""
        self._site(site)
        if f"weights/{site}" not in self._group:
            raise MissingQuantity(f"{self.location} does not hold the weights of site {site!r}")
        return self._dataset(f"weights/{site}")

    @property
    def outputs(self) -> xr.Dataset:
        """What the model gave: `score` (condition, sample) and others."""
        found = self._dataset("outputs").assign_coords({"sample": self._sample_coordinate()})
        return found.assign_coords(condition=list(self.plan.conditions))

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions under which the run holds the model's outputs for every sample."""
        return tuple(c for made in complete_sets(self._group) for c in made.conditions)

    def outputs_under(self, conditions: Sequence[Condition]) -> xr.Dataset:
        """What the model gave under these conditions: (condition, sample), with `phrase` where they are by phrase.

        `score`, `loss` (nats), `correct`, and how many tokens were asked for, changed, and could have been. NaN (and
        `changed` -1) where a condition doesn't apply to a sample, such as one without a box.
        """
        try:
            return read_outputs(self._group, conditions, self.sample_ids)
        except KeyError as error:
            raise MissingQuantity(f"{self.location} holds no outputs under {error.args[0]!r}") from None

    @property
    def embeddings(self) -> xr.Dataset:
        """Unit vectors of image and text, (sample, channel) each, of a run under a condition that asks for them."""
        found = read_embeddings(self._group, self.sample_ids)
        if found is None:
            raise MissingQuantity(f"{self.location} holds no embeddings; extract under Condition(ask='embedding')")
        return found

    # -- analyses ---------------------------------------------------------------------------------------------------

    @property
    def analyses(self) -> tuple[str, ...]:
        """Names of the finished analyses."""
        group = self._group["analyses"]
        return tuple(sorted(n for n, g in group.groups() if g.attrs.get("complete")))  # type: ignore[union-attr]

    def save_analysis(self, name: str, result: xr.Dataset) -> None:
        """Store what an analyser gave under `analyses/<name>`, in place of what stood there."""
        if self.store.read_only:
            raise RunError(f"{self.location} was opened for reading only")
        group = f"analyses/{name}"
        plain = _without_text_dtypes(result)
        checked: dict[Hashable, object] = {name: {"compressors": COMPRESSORS} for name in plain.variables}
        plain.to_zarr(
            self.store,
            group=group,
            mode="w",
            consolidated=False,
            zarr_format=3,
            encoding=checked,
            write_empty_chunks=True,
        )
        self._group[group].attrs["complete"] = True
        self._group["analyses"].attrs["members"] = _note_members(self._group["analyses"])  # type: ignore[arg-type]

    def analysis(self, name: str) -> xr.Dataset:
        """What an analyser gave, lazily."""
        if name not in self.analyses:
            known = ", ".join(self.analyses) or "none"
            raise MissingQuantity(f"{self.location} has no analysis {name!r}; it has {known}")
        return self._dataset(f"analyses/{name}")

    # -- inside -----------------------------------------------------------------------------------------------------

    def _planned(self) -> "list[ArrayPlan]":
        for path in ("samples/status", "samples/id"):
            try:
                return list(arrays_of(self.plan, self.spec, self._array(path).shape[0]))
            except (KeyError, ValueError):
                continue
        raise BrokenRun(f"{self.location} has lost the number of its samples; restore it from a copy")

    def _free_element(self, site: str, block: range) -> int:
        """Where the elements of a block can be written: behind those of the samples before it in its shard."""
        plan = self.plan.sites[site]
        first = block.start // self.plan.unit * self.plan.unit
        free = first // self.plan.unit * plan.block_elements
        if block.start == first:
            return free
        before = slice(first, block.start)
        begins = np.asarray(self._array(f"{site}/attention_offset")[before])
        kinds = (np.asarray(self._array(f"{stream}/kind")[before]) for stream in (plan.queries, plan.keys))
        queries, keys = ((kind != KIND_CODES["padding"]).sum(axis=1) for kind in kinds)
        there = (begins >= 0) & (self.status[before] == EXTRACTED)
        ends = (begins + queries * keys)[there]
        return int(ends.max(initial=free))

    def _site(self, site: str) -> SitePlan:
        if site not in self.plan.sites:
            raise MissingQuantity(f"{self.location} has no site {site!r}; it has {', '.join(self.sites)}")
        return self.plan.sites[site]

    def _head_mean(self, site: str, name: str, *factors: xr.DataArray) -> xr.DataArray:
        row = SITE_QUANTITIES[name]
        array = indexing.LazilyIndexedArray(HeadMean(*(f.variable for f in factors)))
        variable = xr.Variable(row.dims, array, {"long_name": row.meaning, "units": row.units})
        coordinates = {n: c for n, c in self._coordinates(site).items() if n != "head"}
        return xr.DataArray(variable, coords=coordinates, name=name)

    def _tiles(self, site: str) -> TileSource:
        plan = self.plan.sites[site]
        needed = plan.stored(ExtractSpec())
        if any(f"{site}/{name}" not in self._group for name in needed):
            raise MissingQuantity(f"{self.location} does not hold the attention of site {site!r}")
        arrays = {name: self._array(f"{site}/{name}") for name in needed}
        if plan.form == "factored":
            return FactoredTiles(arrays, plan.recipes)
        codes = self.spec.encoding == "compact"
        table = self._array(f"{site}/attention_of_code") if codes else None
        if plan.form == "dense":
            return DenseTiles(arrays["attention"], table)
        arrays |= {
            f"{side}_kind": self._array(f"{s}/kind") for side, s in (("query", plan.queries), ("key", plan.keys))
        }
        shape = (len(self.sample_ids), len(plan.layers), plan.heads, plan.query_tokens, plan.key_tokens)
        return RaggedTiles(arrays, shape, table)

    def _bound(self, plan: SitePlan) -> str:
        """Largest difference from the softmax of the model's own query and key."""
        return DENSE_BOUND["float32" if plan.form == "factored" else _DENSE_DTYPE[self.spec.encoding]]

    def _array(self, path: str) -> zarr.Array:
        # Opening an array reads its metadata file: keep what was opened.
        if path not in self._arrays:
            array = self._group[path]
            # Looking whether a chunk is empty costs more than compressing it, and an absent chunk could not be told
            # from a lost one. Only masks live from being absent where they say nothing.
            sparse = path.endswith("/mask")
            self._arrays[path] = array if sparse else array.with_config({"write_empty_chunks": True})  # type: ignore[union-attr, assignment]
        return self._arrays[path]

    def _dataset(self, group: str) -> xr.Dataset:
        found = self._open_dataset(group)
        found.attrs.pop("members", None)
        whole = found.sizes.get("sample", 0) <= self.sample_count or group.startswith("analyses/")
        return found if whole else found.isel(sample=self._known)

    def _open_dataset(self, group: str, without: Iterable[str] = ()) -> xr.Dataset:
        try:
            return xr.open_zarr(
                self.store, group=group, consolidated=False, chunks=None, decode_timedelta=False, drop_variables=without
            )
        except ValueError:
            arrays: Any = self._group[group].arrays()  # type: ignore[union-attr]
            lengths = {n: a.shape[0] for n, a in arrays if "sample" in (a.metadata.dimension_names or ())}
            if len(set(lengths.values())) < 2 or without:
                raise
        parts = [self._open_dataset(group, lengths.keys() - {name}) for name in lengths]
        known = slice(0, int(self._array("samples/status").shape[0]))
        return xr.merge([part.isel(sample=known) for part in parts], compat="override", join="override")

    @property
    def _known(self) -> slice:
        """The places of the samples: a process that was killed while the run grew leaves arrays longer than the run."""
        return slice(0, self.sample_count)

    def _sample_coordinate(self) -> np.ndarray:
        return np.asarray(self._array("samples/id")[self._known]).astype(object)

    def _coordinates(self, site: str) -> "dict[Hashable, object]":
        plan = self.plan.sites[site]
        coordinates: dict[Hashable, object] = {
            "sample": self._sample_coordinate(),
            "layer": np.array(plan.layers),
            "head": np.arange(plan.heads),
        }
        for side, stream in (("query", plan.queries), ("key", plan.keys)):
            for name, label in self.token_labels(stream):
                coordinates[f"{side}_{name.removeprefix('token_')}"] = xr.Variable(
                    ("sample", f"{side}_token"), label._data, label.attrs
                )
        return coordinates


def open_run(location: str | Path | Store, read_only: bool = True) -> Run:
    """The run at a folder or URL.

    Raises
    ------
    RunError
        When there is no run, or one of another schema version.
    """
    if isinstance(location, str | Path) and "://" not in str(location) and not Path(location).exists():
        raise RunError(f"there is no run at {str(location)!r}")
    store = open_store(location, read_only)
    try:
        attrs = open_group(store).attrs
    except (FileNotFoundError, KeyError, ValueError, TypeError):
        if _is_json(read(store, "zarr.json")):
            raise RunError(f"{str(location)!r} is not a run: it holds no zarr group") from None
        raise BrokenRun(_UNREADABLE.format(str(location))) from None
    schema = attrs.get("schema")
    if schema is None:
        raise RunError(f"{str(location)!r} is not a finished run header: it names no schema; extract it again")
    if schema != SCHEMA_VERSION:
        raise RunError(
            f"{str(location)!r} has schema {schema!r}, this attnscope reads {SCHEMA_VERSION};"
            " extract it again, or use the attnscope that wrote it"
        )
    try:
        return Run(store, str(location))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BrokenRun(_UNREADABLE.format(str(location))) from None


def _is_json(content: bytes | None) -> bool:
    try:
        json.loads(b"{}" if content is None else content)
    except ValueError:
        return False
    return True


def versions() -> dict[str, str]:
    """Versions of attnscope, Python and what the numbers depend on, as far as they are installed."""
    names = ("attnscope", "torch", "transformers", "zarr", "xarray", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "platform": sys.platform}


def _check_free(store: Store, location: str) -> None:
    """Raise unless a run can be made here: where there is nothing, or what a maker that was killed left."""
    attrs = _root_attrs(store)
    if attrs is None:
        if all(key.startswith(CLAIMS_FOLDER) or key.endswith(".partial") for key in keys(store, "")):
            return
        # Another process may just have begun: the root is the first thing that it writes.
        attrs = _root_attrs(store)
    if attrs is not None and "schema" in attrs:
        raise RunStands(f"{location!r} already holds a run; open it, or choose another place")
    if attrs is None or not set(_MAKING) <= set(attrs):
        raise RunError(f"{location!r} is not empty and holds no run; choose another place")


def _root_attrs(store: Store) -> Mapping[str, object] | None:
    try:
        return open_group(store).attrs
    except (FileNotFoundError, KeyError, ValueError):
        return None


def _empty_root(store: Store) -> zarr.Group:
    """The root group of a run that is being made, and nothing else but claims."""
    root = zarr.open_group(store, mode="a", zarr_format=3, use_consolidated=False, attributes=dict(_MAKING))
    for key in keys(store, ""):
        if key != "zarr.json" and not key.startswith(CLAIMS_FOLDER):
            delete(store, key)
    return root


def _note_members(group: zarr.Group) -> list[str]:
    """Write into each group below what it holds, since not every store can be listed; the names in this one."""
    for _, child in group.groups():
        child.attrs["members"] = _note_members(child)
    return sorted(name for name, _ in group.members())


def _strings(values: Iterable[str]) -> np.ndarray:
    return np.array(list(values), dtype=object)


def _without_text_dtypes(result: xr.Dataset) -> xr.Dataset:
    """Fixed-width text has no stable place in the zarr specification; object strings have."""
    changed = {n: v.astype(object) for n, v in result.variables.items() if v.dtype.kind == "U"}
    return result.assign_coords({n: v for n, v in changed.items() if n in result.coords}).assign(
        {n: v for n, v in changed.items() if n not in result.coords}
    )


__all__ = [
    "BrokenRun",
    "MissingQuantity",
    "Run",
    "RunError",
    "RunPlan",
    "SitePlan",
    "StoreError",
    "open_run",
    "unit_for",
]
