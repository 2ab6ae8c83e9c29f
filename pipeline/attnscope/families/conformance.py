"""What a family promises, checked call by call on one batch of a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from attnscope.families import Fold, Inputs, ModelFamily, Placement
from attnscope.families.layouts import sample_count
from attnscope.families.weights import projections
from attnscope.loading import LoadedModel
from attnscope.plan import SitePlan
from attnscope.planning import check_output, fold_of, run_model
from attnscope.recording import AttentionCall, recording
from attnscope.tokens import KIND_CODES, TokenLayout

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Seen:
    """One recorded call: its role, where its tokens belong, and which keys each of its rows sees."""

    call: AttentionCall
    placement: Placement
    fold: Fold
    sees: np.ndarray  # (call_batch, query_token, key_token) bool

    @property
    def layer(self) -> tuple[str, Placement]:
        """What the call is a part of, together with the module's other calls of this role."""
        return self.call.module, self.placement


_Streams: TypeAlias = "Mapping[tuple[str, Placement], tuple[tuple[str, int], tuple[str, int]]]"


def check(family: ModelFamily, loaded: LoadedModel, inputs: Inputs) -> None:
    """Raise AssertionError naming the first point that a family does not keep."""
    with torch.no_grad(), _module_inputs(loaded.model) as given:
        seen = _record(family, loaded, inputs)
        assert seen, f"{loaded.name!r} ran no attention"
        _check_layers(seen)
        samples = sample_count(inputs)
        streams = _streams(seen)
        layouts = {
            size: _layout(family, loaded, inputs, size) for size in {s for both in streams.values() for s in both}
        }
        for (stream, tokens), layout in layouts.items():
            _check_layout(stream, tokens, layout, samples)
        _check_coverage(seen, streams, layouts)
        _check_padding(seen, streams, layouts)
        for each in seen:
            _check_weights(each.call, loaded, given)


def _record(family: ModelFamily, loaded: LoadedModel, inputs: Inputs) -> list[_Seen]:
    seen: list[_Seen] = []
    samples = sample_count(inputs)

    def look(call: AttentionCall) -> None:
        check_output(call)
        placement = family.place(call, loaded)
        where = f"module {call.module!r} (call {call.number})"
        assert not placement.guessed, f"no rule of family {family.name!r} places {where}"
        fold = fold_of(call, loaded, inputs)
        batch, _, queries, keys = call.shape
        if fold is None:
            assert batch == samples, f"{where} has a batch of {batch} for {samples} samples: the family needs a fold"
            fold = Fold(np.arange(batch), *(np.tile(np.arange(n), (batch, 1)) for n in (queries, keys)))
        for name, size in (("queries", queries), ("keys", keys)):
            shape = getattr(fold, name).shape
            assert shape == (batch, size), f"fold of {where} gives {name} {shape}, the call has {(batch, size)}"
        seen.append(_Seen(call, placement, fold, (call.attention() > 0).any(dim=1).cpu().numpy()))

    with recording(loaded.model, on_call=look):
        run_model(loaded, inputs)
    return seen


def _check_layers(seen: Sequence[_Seen]) -> None:
    """A layer of a site is one module; the layers of a query stream, over its sites, are 0, 1, 2, ..."""
    modules: dict[tuple[str, int], str] = {}
    layers: dict[str, set[int]] = {}
    for each in seen:
        place, module = (each.placement.site, each.placement.layer), each.call.module
        other = modules.setdefault(place, module)
        assert other == module, f"modules {other!r} and {module!r} are both layer {place[1]} of {place[0]!r}"
        layers.setdefault(each.placement.queries, set()).add(each.placement.layer)
    for stream, found in layers.items():
        assert found == set(range(len(found))), f"layers of stream {stream!r} are {sorted(found)}, not 0, 1, 2, ..."


def _streams(seen: Sequence[_Seen]) -> _Streams:
    """The query and the key stream of each layer, with the number of tokens that all its calls together had of them."""
    found: dict[tuple[str, Placement], tuple[tuple[str, int], tuple[str, int]]] = {}
    for each in seen:
        queries, keys = found.get(each.layer, ((each.placement.queries, 0), (each.placement.keys, 0)))
        most = max(queries[1], int(each.fold.queries.max()) + 1), max(keys[1], int(each.fold.keys.max()) + 1)
        found[each.layer] = (queries[0], most[0]), (keys[0], most[1])
    return found


def _layout(family: ModelFamily, loaded: LoadedModel, inputs: Inputs, size: tuple[str, int]) -> TokenLayout:
    stream, tokens = size
    assert stream in family.streams, f"family {family.name!r} has no layout of stream {stream!r}"
    return family.streams[stream](inputs, loaded, tokens)


def _check_layout(stream: str, tokens: int, layout: TokenLayout, samples: int) -> None:
    for name in ("kind", "text", "row", "column"):
        shape = getattr(layout, name).shape
        expected = (samples, tokens)
        assert shape == expected, f"layout of stream {stream!r}: {name} is {shape}, the model attended to {expected}"
    unknown = np.argwhere(layout.kind == KIND_CODES["unknown"])
    assert not len(unknown), f"layout of stream {stream!r}: token {unknown[0][1]} of {tokens} is of unknown kind"


def _check_coverage(seen: Sequence[_Seen], streams: _Streams, layouts: Mapping[tuple[str, int], TokenLayout]) -> None:
    """In each layer every real token is a query exactly once, and a key at least once."""
    for layer, sizes in streams.items():
        module, group = layer[0], [each for each in seen if each.layer == layer]
        for side, (stream, tokens) in zip(("queries", "keys"), sizes, strict=True):
            counts = np.zeros(layouts[stream, tokens].kind.shape, np.int64)
            for each in group:
                places = getattr(each.fold, side)
                rows = np.broadcast_to(each.fold.samples[:, None], places.shape)
                np.add.at(counts, (rows[places >= 0], places[places >= 0]), 1)
            real = layouts[stream, tokens].kind != KIND_CODES["padding"]
            wrong = np.argwhere(real & ((counts != 1) if side == "queries" else (counts == 0)))
            assert not len(wrong), (
                f"token {wrong[0][1]} of stream {stream!r}, sample {wrong[0][0]}, is among the {side} of module"
                f" {module!r} {counts[tuple(wrong[0])]} times"
            )


def _check_padding(seen: Sequence[_Seen], streams: _Streams, layouts: Mapping[tuple[str, int], TokenLayout]) -> None:
    """Padding is what the mask hides from every real query, and nothing else is."""
    visible = {size: np.zeros(layout.kind.shape, bool) for size, layout in layouts.items()}
    attended = set()
    for each in seen:
        sizes = streams[each.layer]
        attended.add(sizes[1])
        padded = layouts[sizes[0]].kind == KIND_CODES["padding"]
        for row, sample in enumerate(each.fold.samples):
            queries, keys = each.fold.queries[row], each.fold.keys[row]
            real = (queries >= 0) & ~padded[sample, queries]
            found = each.sees[row][real].any(axis=0) & (keys >= 0)
            visible[sizes[1]][sample, keys[found]] = True
    for size in sorted(attended):
        marked = layouts[size].kind == KIND_CODES["padding"]
        for name, wrong in (
            ("marked as padding, but attended to", np.argwhere(marked & visible[size])),
            ("never attended to, but not marked as padding", np.argwhere(~marked & ~visible[size])),
        ):
            assert not len(wrong), f"token {wrong[0][1]} of stream {size[0]!r}, sample {wrong[0][0]}, is {name}"


def _check_weights(call: AttentionCall, loaded: LoadedModel, given: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Projections of what the module was given are the query and key that were recorded.

    Up to a factor, or to the rotation of rotary positions; nothing is said where the module normalises them.
    """
    if call.query is None or call.key is None:
        return
    site = SitePlan(
        queries="",
        keys="",
        layers=(),
        modules=(),
        heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        query_tokens=0,
        key_tokens=0,
        channels=call.query.shape[-1],
    )
    arrays = projections(loaded.model, call.module, site)
    if arrays is None or any("norm" in name for name, _ in loaded.model.get_submodule(call.module).named_modules()):
        return
    hidden = [t for name, tensors in given.items() if f"{name}.".startswith(f"{call.module}.") for t in tensors]
    for side, recorded in (("query", call.query), ("key", call.key)):
        weight, bias = torch.tensor(arrays[side]), torch.tensor(arrays[f"{side}_bias"])
        made = [torch.einsum("btf,hcf->bhtc", x, weight) + bias[:, None] for x in _fitting(hidden, recorded, weight)]
        assert not made or any(_agree(m, recorded.float().cpu()) for m in made), (
            f"the {side} projection of module {call.module!r} does not give the {side} that was recorded"
        )


def _fitting(hidden: Sequence[torch.Tensor], recorded: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Those tensors that can be the hidden states (batch, token, feature) of a recorded query or key.

    Torch's own attention modules may take them as (token, batch, feature).
    """
    batch, _, tokens, _ = recorded.shape
    size = (batch, tokens, weight.shape[-1])
    sized = [x.float().cpu() for x in hidden if x.numel() == np.prod(size) and x.shape[-1] == size[-1]]
    turned = [x.transpose(0, 1) for x in sized if x.shape[:2] == (tokens, batch)]
    return [*(x.reshape(size) for x in sized), *turned]


def _agree(made: torch.Tensor, recorded: torch.Tensor) -> bool:
    # The same direction, whatever the length; or the same length up to one factor, as a (scaled) rotation leaves it.
    lengths = made.norm(dim=-1), recorded.norm(dim=-1)
    some = (lengths[0] > 0) | (lengths[1] > 0)
    cosine = torch.nn.functional.cosine_similarity(made, recorded, dim=-1)[some]
    ratio = (lengths[1] / lengths[0])[some]
    return bool((cosine > 1 - _TOLERANCE).all() or (ratio / ratio.mean() - 1).abs().max() <= _TOLERANCE)


@contextmanager
def _module_inputs(model: torch.nn.Module) -> "Iterator[dict[str, list[torch.Tensor]]]":
    """Every tensor that each module is given, by the module's name, filled while the model runs."""
    given: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> object:
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            given.setdefault(name, []).extend(tensors)

        return hook

    handles = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in model.named_modules()]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()
