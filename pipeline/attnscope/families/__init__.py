"""Model families: which role each attention call and each token plays.

A family is a table: patterns of module names and the sites that they belong to, the token layout of each stream, and,
where the usual ones don't fit, its own encoding and scores. Everything else is shared. A model without a family is
recorded whole; its roles are guessed from module names and shapes, and the run says so.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from attnscope.families.encoding import encode_samples, measure_text
from attnscope.families.guesses import guess_placement
from attnscope.families.scores import SCORES, at_place, default_target
from attnscope.plugins import load_plugins
from attnscope.samples import Sample
from attnscope.tokens import TokenLayout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel
    from attnscope.recording import AttentionCall

Inputs: TypeAlias = "dict[str, Tensor]"
LayoutFunction: TypeAlias = "Callable[[Inputs, LoadedModel, int], TokenLayout]"
ScoreFunction: TypeAlias = "Callable[[object, Inputs, LoadedModel], Tensor]"


@dataclass(frozen=True)
class Placement:
    """Where a call belongs: queries of one stream attend to keys of another, at a layer of the model's numbering."""

    site: str
    queries: str
    keys: str
    layer: int
    guessed: bool = False


@dataclass(frozen=True)
class Fold:
    """Where a call's rows and tokens belong when its batch is not the batch of samples: windows, tiles, packed images.

    `samples` (call_batch,) are positions in the batch of samples; `queries` and `keys` (call_batch, token) are token
    positions in the stream, -1 for tokens that belong nowhere.
    """

    samples: np.ndarray
    queries: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class SiteRule:
    """Calls of modules whose name matches `pattern` belong to `site`.

    The pattern's group `layer` is the layer number, to which `first_layer` is added (a number, or the name of the
    config's entry that holds it: 'text_config.num_hidden_layers'), and, where the pattern has a group `stage`, the
    layers of the stages before it (`config.depths`). The site is named after its streams: 'vision.self', or
    'text.vision' for queries from the text and keys from the image. `call` picks one where a module is called several
    times in a forward.
    """

    pattern: str
    site: str
    first_layer: int | str = 0
    call: int | None = None

    def place(self, module: str, number: int, config: object = None) -> Placement | None:
        """The placement of a call in a model with this config, or None when the rule isn't about it."""
        match = re.search(self.pattern, module)
        if match is None or self.call not in (None, number):
            return None
        queries, keys = self.site.split(".")[:2]
        found = match.groupdict()
        before = sum(stage_depths(config)[: int(found.get("stage") or 0)])
        first = attrgetter(self.first_layer)(config) if isinstance(self.first_layer, str) else self.first_layer
        layer = int(found.get("layer") or 0) + first + before
        return Placement(self.site, queries, queries if keys == "self" else keys, layer)


@dataclass(frozen=True)
class ModelFamily:
    """What attnscope must know of a kind of model beyond what it records by itself.

    `model_types` are the `config.model_type` names that it answers for; `streams` gives the layout of each stream's
    tokens from the model's inputs (and the number of tokens seen in the batch); `scores` are further targets by name,
    beside the common ones; `measure` gives the tokens of a sample by stream before anything is encoded in batches;
    `fold` tells where the parts of a call belong whose batch isn't the batch of samples. Without it such a model sees
    one sample at a time, and the parts of its calls are put one behind the other. `one_by_one` keeps every sample in a
    batch of its own, for models that don't mask the padding that a larger neighbour brings.
    """

    name: str
    model_types: tuple[str, ...]
    sites: tuple[SiteRule, ...] = ()
    streams: Mapping[str, LayoutFunction] = field(default_factory=dict)
    scores: Mapping[str, ScoreFunction] = field(default_factory=dict)
    encode: "Callable[[Sequence[Sample], LoadedModel], Inputs]" = encode_samples
    measure: "Callable[[Sample, LoadedModel], Mapping[str, int]]" = measure_text
    fold: "Callable[[AttentionCall, Inputs, LoadedModel], Fold | None] | None" = None
    one_by_one: bool = False

    def place(self, call: "AttentionCall", loaded: "LoadedModel") -> Placement:
        """The placement of a call by the family's rules, or guessed from its module's name and its shape."""
        for rule in self.sites:
            placement = rule.place(call.module, call.number, loaded.config)
            if placement is not None:
                return placement
        site, queries, keys, layer = guess_placement(call, loaded)
        return Placement(site, queries, keys, layer, guessed=True)

    def target(self, outputs: object) -> str:
        """The name of the target that is taken where none is asked for."""
        return default_target(outputs)

    def score(self, outputs: object, target: str | int | None, inputs: Inputs, loaded: "LoadedModel") -> "Tensor":
        """The scalar of each sample that gradients are taken of: (sample,)."""
        known = {**SCORES, **self.scores}
        chosen = self.target(outputs) if target is None else target
        if isinstance(chosen, int) or chosen.lstrip("-").isdigit():
            return known["class"](outputs, inputs, loaded)[:, int(chosen)]
        if re.fullmatch(r"(token|word):-?\d+", chosen):
            return at_place(outputs, inputs, loaded, chosen)
        if chosen not in known:
            listed = ", ".join(sorted(known))
            raise ValueError(f"unknown target {chosen!r}; known are a class number, token:K, word:K, {listed}")
        return known[chosen](outputs, inputs, loaded)


def stage_depths(config: object) -> tuple[int, ...]:
    """How many layers each stage of the (vision) model has; nothing for a model without stages."""
    depths = getattr(getattr(config, "vision_config", config), "depths", None)
    return tuple(depths) if isinstance(depths, Sequence) else ()


GENERIC = ModelFamily(name="generic", model_types=())


def find_family(model_type: str) -> ModelFamily:
    """The registered family that answers for a model type; the generic one when none does."""
    for family in load_plugins().families.values():
        if model_type in family.model_types:
            return family
    return GENERIC
