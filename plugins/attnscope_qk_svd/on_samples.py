"""What the modes do on samples: their maps over the tokens, what they add to the attention, which objects they join."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from attnscope import Run
from attnscope.reading import MODALITIES, allowed_keys, directions, extracted_in, read_pictures, read_tokens
from attnscope.statistics import add_sums, sample_sums, sums_in

GROUPS = ("same", "different", "background")
DIRECTIONS = tuple(f"{query} to {key}" for query in MODALITIES for key in MODALITIES)
_MEANINGS = {
    "preference": "attention from a token of an object that falls on the same object, others, the background",
    "layer_preference": "mean of preference over heads",
    "area_preference": "preference of attention that is the same for all tokens: shares of the area",
    "sample_cosine": "cosine of the modes, weighted by what each adds to the score of attended tokens, mean over heads",
    "contribution_total": "sum over samples of what each mode adds to the score of attended tokens over that of others",
    "contribution_count": "samples in contribution_total",
    "top_score": "largest projection of a token on the left vector times largest on the right one, best samples first",
    "top_sample": "position of that sample in the run, -1 for none",
    "top_same": "whether the object of the largest mean projection is the same for both vectors (1 or 0)",
    "top_chance": "the chance of that if all objects of the sample, and its background, were alike",
    "display_score": "top_score of the samples that the report shows for some modes",
    "display_query_map": "projection of each token on the left vector, by the sign that scores higher",
    "display_key_map": "projection of each token on the right vector, by the same sign",
}
_UNITS = {"contribution_total": "score before scale", "top_score": "projection^2", "display_score": "projection^2",
          "display_query_map": "projection", "display_key_map": "projection"}  # fmt: skip
_ADDITIVE = ("contribution_total", "contribution_count")
_TOKEN_MAPS = ("display_query_map", "display_key_map", "display_query_row", "display_query_column", "display_key_row",
               "display_key_column", "display_query_text", "display_key_text")  # fmt: skip
_DISPLAYED = (*_TOKEN_MAPS, "display_id", "display_picture")
_RANKED = ("top_score", "top_sample", "top_same", "top_chance")


def contributions(
    attention: np.ndarray, allowed: np.ndarray, query_map: np.ndarray, key_map: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """What each mode adds to the score of the keys that are attended to, over the mean key: (head, mode).

    Mean over queries i of s_n (x_i . u_n) sum_j (a_ij - 1/m_i) (v_n . x_j), with the m_i keys that i may attend to.
    Summed over the modes it is how far attended keys score above the mean key, which the part of a score that is the
    same for all keys doesn't change. `attention` is (head, query_token, key_token), `allowed` the same in bool, the
    maps (head, token, mode), `values` (head, mode). Queries without a key are left out.
    """
    weights = np.nan_to_num(attention)
    count = allowed.sum(-1, keepdims=True)
    over_mean = weights - np.divide(allowed, count, out=np.zeros_like(weights), where=count > 0)
    live = count[..., 0] > 0
    gained = (np.where(live[..., None], query_map, 0) * (over_mean @ key_map)).sum(-2) * values
    number = live.sum(-1)[:, None]
    return np.divide(gained, number, out=np.full(gained.shape, np.nan), where=number > 0)


def score_tokens(query_map: np.ndarray, key_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest projection on u_n times largest on v_n, (head, mode), and the sign of the pair (u, v) that gives more.

    The maps are (head, token, mode). A pair (u, v) is as good as (-u, -v): both are features.
    """
    both = [np.clip((s * query_map).max(-2), 0, None) * np.clip((s * key_map).max(-2), 0, None) for s in (1, -1)]
    return np.maximum(*both), np.where(both[0] >= both[1], 1, -1)


def strongest_object(token_map: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The object with the largest mean projection over its area, (head, mode), background last.

    `token_map` is (head, token, mode), `shares` (object, token) how much of each token lies in each object.
    """
    background = np.clip(1 - shares.sum(0), 0, None)
    areas = np.concatenate([shares, background[None]])
    sizes = areas.sum(-1)
    means = np.einsum("rt,htn->rhn", areas / np.where(sizes > 0, sizes, 1)[:, None], token_map)
    return np.where(sizes[:, None, None] > 0, means, -np.inf).argmax(0)


def prefer(attention: np.ndarray, query_shares: np.ndarray, key_shares: np.ndarray) -> np.ndarray:
    """Where attention from objects falls: (head, 3) same object, different objects, background; each row sums to 1.

    From the token of each object that lies most within it, over the given keys alone, mean over objects (the
    odd-one-out protocol of Pan et al., with every object as target in turn). `attention` is (head, query, key), the
    shares (object, token).
    """
    found = []
    for number, share in enumerate(key_shares):
        weights = np.nan_to_num(attention[:, query_shares[number].argmax()])
        total = weights.sum(-1, keepdims=True)
        weights = np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)
        others = np.minimum(np.delete(key_shares, number, 0).max(0), 1 - share)
        found.append(np.stack([weights @ share, weights @ others, weights @ (1 - share - others)], -1))
    return np.mean(found, axis=0)


def merge_ranked(parts: Iterable[xr.Dataset], rank: str, by: str, count: int) -> xr.Dataset:
    """Of several rankings of the same length or less the best `count` entries, along the dimension `rank`."""
    total: xr.Dataset | None = None
    for part in parts:
        both = part if total is None else xr.concat([total, part], rank, data_vars="minimal", coords="minimal",
                                                    compat="override", join="outer")  # fmt: skip
        order = np.argsort(-both[by].transpose(..., rank).values, -1, kind="stable")[..., :count]
        dims = both[by].transpose(..., rank).dims
        total = both.isel({rank: xr.DataArray(order, dims=dims)}) if both.sizes[rank] else both
    assert total is not None
    return total


@dataclass(frozen=True)
class SiteModes:
    """The modes of one site: readers (layer, head, channel, mode), values and cosines (layer, head, mode), biases.

    `shown` are the (layer position, head, mode) that the report shows.
    """

    layers: tuple[int, ...]
    query_reader: np.ndarray
    key_reader: np.ndarray
    query_bias: np.ndarray
    key_bias: np.ndarray
    values: np.ndarray
    cosines: np.ndarray
    shown: tuple[tuple[int, int, int], ...]

    def maps(self, position: int, query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Projections of the tokens of one sample on the left and right vectors of a layer: (head, token, mode)."""
        key = np.repeat(key, len(query) // len(key), axis=0)
        return ((query - self.query_bias[position][:, None]) @ self.query_reader[position],
                (key - self.key_bias[position][:, None]) @ self.key_reader[position])  # fmt: skip


@dataclass(frozen=True)
class Options:
    """How samples are counted and shown; see the analyser's options of the same names."""

    top_images: int
    shown_images: int
    largest: float
    draws: int
    seed: int


def tally_block(
    run: Run, block: range, layers: Mapping[str, Mapping[int, int]], modes: Mapping[str, SiteModes], options: Options
) -> dict[str, xr.Dataset]:
    """What a block of samples adds, by site; `layers` are numbers and positions, `modes` the sites that have maps."""
    positions = extracted_in(run, block)
    return {
        site: _Site(run, site, positions, chosen, modes.get(site), options).tally() for site, chosen in layers.items()
    }


def merge_tallies(parts: Iterable[xr.Dataset], top_images: int, shown_images: int) -> xr.Dataset:
    """One tally of several."""
    kept: dict[str, xr.Dataset] = {}

    def passing() -> Iterable[xr.Dataset]:
        for part in parts:
            for name, names, rank, by, count in (
                ("top", _RANKED, "rank", "top_score", top_images),
                ("display", ("display_score", *_DISPLAYED), "display_rank", "display_score", shown_images),
            ):
                own = part[[n for n in names if n in part]]
                if by in own:
                    kept[name] = merge_ranked([kept[name], own] if name in kept else [own], rank, by, count)
            added = part[[n for n in _ADDITIVE if n in part]]
            with xr.set_options(keep_attrs=True):
                kept["added"] = kept["added"] + added if "added" in kept else added
            yield part

    sums = add_sums(passing())
    return xr.merge([sums, *kept.values()], compat="override", join="outer")


def sample_variables(result: xr.Dataset) -> list[str]:
    """Names of what a result has of samples, as they are merged."""
    names = (*_ADDITIVE, *_RANKED, "display_score", *_DISPLAYED)
    return [*sums_in(result), *(n for n in names if n in result)]


class _Site:
    """Goes through the samples of a block at one site."""

    def __init__(
        self, run: Run, site: str, positions: np.ndarray, layers: Mapping[int, int], modes: SiteModes | None,
        options: Options,
    ) -> None:  # fmt: skip
        plan = run.plan.sites[site]
        self._run, self._site, self._positions = run, site, positions
        self._layers, self._modes, self._options = layers, modes, options
        self._queries = read_tokens(run, plan.queries, positions)
        self._keys = read_tokens(run, plan.keys, positions)
        self._pairs = directions(self._queries, self._keys)
        shape = (len(positions), len(DIRECTIONS), len(layers), plan.heads, len(GROUPS))
        self._preference = np.full(shape, np.nan)
        self._area = np.full((len(positions), len(DIRECTIONS), len(GROUPS)), np.nan)
        if modes is not None:
            shape = (*modes.values.shape, len(positions))
            self._score, self._same, self._chance = np.full((3, *shape), np.nan)
            self._cosine = np.full((len(positions), len(layers)), np.nan)
            self._total = np.zeros(modes.values.shape)
            self._count = np.zeros(len(layers))
            sizes = (len(modes.shown), len(positions))
            self._display = [
                np.full((*sizes, side.kind.shape[1]), np.nan, np.float32) for side in (self._queries, self._keys)
            ]

    def tally(self) -> xr.Dataset:
        for place, position in enumerate(self._layers.values() if len(self._positions) else ()):
            at = slice(self._positions[0], self._positions[-1] + 1)
            sides = [self._read(name, at, position) for name in ("query", "key")] if self._modes is not None else []
            attention = self._run.attention(self._site).isel(sample=at, layer=position).values
            for sample, row in enumerate(self._positions - self._positions[0]):
                self._prefer(sample, place, attention[row])
                if self._modes is not None:
                    allowed = allowed_keys(self._run, self._site, position, attention[row])
                    self._follow(sample, place, (attention[row], allowed), (sides[0][row], sides[1][row]))
        return self._described()

    def _read(self, name: str, at: slice, position: int) -> np.ndarray:
        return self._run.array(self._site, name).isel(sample=at, layer=position).values.astype(np.float64)

    def _prefer(self, sample: int, place: int, attention: np.ndarray) -> None:
        for query, key in self._pairs:
            asking, asked = (
                side.is_of(*MODALITIES[m])[sample] for side, m in ((self._queries, query), (self._keys, key))
            )
            shares = [self._queries.region_share[sample][:, asking], self._keys.region_share[sample][:, asked]]
            objects = self._objects(*shares)
            if objects.sum() < 2:
                continue
            direction = DIRECTIONS.index(f"{query} to {key}")
            of = attention[:, asking][..., asked]
            self._preference[sample, direction, place] = prefer(of, shares[0][objects], shares[1][objects])
            if place == 0:
                self._area[sample, direction] = prefer(np.ones_like(of[:1]), shares[0][objects], shares[1][objects])[0]

    def _objects(self, query_shares: np.ndarray, key_shares: np.ndarray) -> np.ndarray:
        """Which regions are objects on both sides: known, there, and no larger than a ground is."""
        found = np.ones(len(query_shares), bool)
        for shares in (query_shares, key_shares):
            known = np.isfinite(shares).all(-1) & (shares.size > 0)
            part = np.where(known, np.nan_to_num(shares).mean(-1) if shares.size else 0, 0)
            found &= known & (part > 0) & (part <= self._options.largest)
        return found

    def _follow(
        self, sample: int, place: int, attention: tuple[np.ndarray, np.ndarray], sides: tuple[np.ndarray, np.ndarray]
    ) -> None:
        """Take in one sample and layer: its attention and the keys that are allowed, its query and key."""
        modes = self._modes
        assert modes is not None
        query_map, key_map = modes.maps(place, *sides)
        # Padding holds anything.
        real = [~side.is_of("padding")[sample] for side in (self._queries, self._keys)]
        query_map, key_map = (np.where(r[None, :, None], m, 0) for r, m in zip(real, (query_map, key_map), strict=True))
        gained = contributions(*attention, query_map, key_map, modes.values[place])
        if np.isfinite(gained).all():
            self._total[place] += gained
            self._count[place] += 1
            weight = np.abs(gained).sum(-1)
            cosines = np.nan_to_num(modes.cosines[place])
            if (weight > 0).all() and np.isfinite(modes.cosines[place]).any():
                self._cosine[sample, place] = ((gained * cosines).sum(-1) / weight).mean()
        if not self._pairs:
            return
        pair = next((p for p in (("image", "image"), ("text", "image")) if p in self._pairs), self._pairs[0])
        asking, asked = (
            side.is_of(*MODALITIES[m])[sample] for side, m in zip((self._queries, self._keys), pair, strict=True)
        )
        if not asking.any() or not asked.any():
            return
        score, sign = score_tokens(query_map[:, asking], key_map[:, asked])
        self._score[place, ..., sample] = score
        self._join(
            sample, place, (query_map[:, asking] * sign[:, None], key_map[:, asked] * sign[:, None]), asking, asked
        )
        for number, (layer, head, mode) in enumerate(modes.shown):
            if layer == place:
                for into, chosen, token_map in zip(self._display, (asking, asked), (query_map, key_map), strict=True):
                    into[number, sample, chosen] = token_map[head, chosen, mode] * sign[head, mode]

    def _join(
        self, sample: int, place: int, maps: tuple[np.ndarray, np.ndarray], asking: np.ndarray, asked: np.ndarray
    ) -> None:
        shares = [self._queries.region_share[sample][:, asking], self._keys.region_share[sample][:, asked]]
        objects = self._objects(*shares)
        if objects.any():
            found = [strongest_object(m, s[objects]) for m, s in zip(maps, shares, strict=True)]
            self._same[place, ..., sample] = found[0] == found[1]
            self._chance[place, ..., sample] = 1 / (objects.sum() + 1)

    def _described(self) -> xr.Dataset:
        heads = np.arange(self._preference.shape[3])
        names = {"layer": list(self._layers), "head": heads, "direction": list(DIRECTIONS), "group": list(GROUPS)}
        values = {
            "preference": (("sample", "direction", "layer", "head", "group"), self._preference),
            "layer_preference": (("sample", "direction", "layer", "group"), self._preference.mean(3)),
            "area_preference": (("sample", "direction", "group"), self._area),
        }
        if self._modes is not None:
            values["sample_cosine"] = (("sample", "layer"), self._cosine)
        per_sample = xr.Dataset({n: _variable(n, *v) for n, v in values.items()}, names)
        sums = sample_sums(per_sample, self._positions, draws=self._options.draws, seed=self._options.seed)
        return sums if self._modes is None else xr.merge([sums, self._ranked(), self._displayed()], compat="override")

    def _ranked(self) -> xr.Dataset:
        by_mode = ("layer", "head", "mode")
        sample = np.broadcast_to(self._positions, self._score.shape)
        ranked = {"top_score": self._score, "top_sample": sample, "top_same": self._same, "top_chance": self._chance}
        _, heads, modes, _ = self._score.shape
        names = {"layer": list(self._layers), "head": np.arange(heads), "mode": np.arange(modes)}
        found = xr.Dataset({n: _variable(n, (*by_mode, "rank"), v) for n, v in ranked.items()}, names)
        found["top_score"] = found["top_score"].fillna(-np.inf)
        best = merge_ranked([found], "rank", "top_score", self._options.top_images)
        best = best.pad(rank=(0, self._options.top_images - best.sizes["rank"]), constant_values={
            "top_score": -np.inf, "top_sample": -1, "top_same": np.nan, "top_chance": np.nan})  # fmt: skip
        added = {"contribution_total": _variable("contribution_total", by_mode, self._total),
                 "contribution_count": _variable("contribution_count", ("layer",), self._count)}  # fmt: skip
        return best.assign(added)

    def _displayed(self) -> xr.Dataset:
        assert self._modes is not None
        shown = self._modes.shown
        score = np.stack([self._score[at] for at in shown]) if shown else np.zeros((0, len(self._positions)))
        order = np.argsort(-np.nan_to_num(score, nan=-np.inf), -1, kind="stable")[:, : self._options.shown_images]
        across = ("display", "display_rank")
        chosen = np.take_along_axis(np.nan_to_num(score, nan=-np.inf), order, -1)
        found = {"display_score": _variable("display_score", across, chosen)}
        for side, tokens, maps in zip(("query", "key"), (self._queries, self._keys), self._display, strict=True):
            values = np.take_along_axis(maps, order[..., None], 1)
            found[f"display_{side}_map"] = _variable(f"display_{side}_map", (*across, f"{side}_token"), values)
            for name, field in (("row", tokens.row), ("column", tokens.column), ("text", tokens.text)):
                attrs = {"long_name": f"{name} of the {side} token", "units": "1"}
                found[f"display_{side}_{name}"] = xr.Variable((*across, f"{side}_token"), field[order], attrs)
        ids = np.array(self._run.sample_ids, object)[self._positions]
        found["display_id"] = xr.Variable(across, ids[order], {"long_name": "name of the sample", "units": "1"})
        used = np.unique(order)
        pictures = read_pictures(self._run, self._positions[used]) if len(used) else None
        if pictures is not None:
            small = pictures[:, ::2, ::2]
            attrs = {"long_name": "the image as the model saw it, red green blue", "units": "1"}
            at = np.searchsorted(used, order)
            found["display_picture"] = xr.Variable((*across, "image_row", "image_column", "colour"), small[at], attrs)
        names = {"display_layer": [list(self._layers)[at[0]] for at in shown], "display_head": [at[1] for at in shown],
                 "display_mode": [at[2] for at in shown]}  # fmt: skip
        return xr.Dataset(found, {n: ("display", v) for n, v in names.items()})


def _variable(name: str, dims: tuple[str, ...], values: np.ndarray) -> xr.Variable:
    return xr.Variable(dims, values, {"long_name": _MEANINGS[name], "units": _UNITS.get(name, "1")})
