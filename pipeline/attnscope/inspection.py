"""What would be recorded of a model: its sites, layers, heads, kernels, sizes, and what is guessed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attnscope.families import Inputs
from attnscope.loading import LoadedModel, ModelError, load_model
from attnscope.plan import SitePlan
from attnscope.planning import Prepared, ProbedCall, plan_run, probe
from attnscope.quantities import SITE_QUANTITIES, ExtractSpec
from attnscope.samples import Sample, SampleError

_EXAMPLE_TEXT = "a photograph of a cat on a red chair"
_EXAMPLE_TOKENS = 16


@dataclass(frozen=True)
class Inspection:
    """What a model would give: one row a site, and notes in sentences."""

    model: str
    family: str
    sites: Sequence[tuple[str, SitePlan]]
    calls: Sequence[ProbedCall]
    notes: Sequence[str]

    def rows(self) -> list[dict[str, object]]:
        """A row a site: streams, layers, heads, tokens, kernels, tiers, and bytes per sample in both stored forms."""
        return [self._row(name, site) for name, site in self.sites]

    def _row(self, name: str, site: SitePlan) -> dict[str, object]:
        tiers = sorted({c.tier for c in self.calls if c.module in site.modules})
        attention = len(site.layers) * site.heads * site.query_tokens * site.key_tokens
        return {
            "site": name,
            "queries": site.queries,
            "keys": site.keys,
            "layers": _ranges(site.layers),
            "heads": site.heads if site.heads == site.kv_heads else f"{site.heads} ({site.kv_heads} for keys)",
            "tokens": f"{site.query_tokens} x {site.key_tokens}",
            "kernel": ", ".join(site.kernels),
            "recorded by": ", ".join(tiers),
            "dense bytes": attention * np.dtype(SITE_QUANTITIES["attention"].dtype).itemsize,
            "factored bytes": site.factored_bytes if site.recipes else "not possible",
            "roles": "guessed" if site.guessed else "known",
        }


def inspect_model(
    model: str | Path | torch.nn.Module,
    sample: Sample | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Run one sample (an example one unless given) through a model under the full audit, and say what was seen.

    Raises
    ------
    ModelError
        When the model can't be loaded, or no example input can be made for it.
    """
    loaded = load_model(
        model,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    training = loaded.model.training
    loaded.model.eval()
    try:
        calls, _ = probe(loaded, _example_inputs(loaded, sample))
    finally:
        loaded.model.train(training)
    plan = plan_run(calls, ExtractSpec(), Prepared([], np.zeros(0, np.int64), {}), None, thumbnails=False)
    sites = list(plan.sites.items())
    return Inspection(loaded.name, loaded.family.name, sites, calls, _notes(loaded, sites))


def _example_inputs(loaded: LoadedModel, sample: Sample | None) -> Inputs:
    """The encoded sample; for a model without a processor, tensors of the sizes that its config names."""
    if sample is None:
        picture = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
        sample = Sample("example", image=Image.fromarray(picture), text=_EXAMPLE_TEXT)
    try:
        return loaded.family.encode([sample], loaded)
    except SampleError as error:
        inputs = _inputs_by_config(loaded)
        if not inputs:
            raise ModelError(f"no example input can be made for {loaded.name!r}: {error}") from None
        return inputs


def _inputs_by_config(loaded: LoadedModel) -> Inputs:
    inputs: Inputs = {}
    if loaded.takes("pixel_values"):
        config = getattr(loaded.config, "vision_config", loaded.config)
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, Sequence) else (size, size)
        inputs["pixel_values"] = torch.randn(1, getattr(config, "num_channels", 3), height, width)
    if loaded.takes("input_ids"):
        words = getattr(getattr(loaded.config, "text_config", loaded.config), "vocab_size", 100)
        inputs["input_ids"] = torch.randint(min(words, 5), words, (1, _EXAMPLE_TOKENS))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def _notes(loaded: LoadedModel, sites: Sequence[tuple[str, SitePlan]]) -> list[str]:
    notes = [f"every attention kernel that ran was recorded ({loaded.name}, one sample)"]
    if loaded.family.name == "generic":
        kind = getattr(loaded.config, "model_type", "") or type(loaded.model).__name__
        notes.append(f"no family answers for {kind!r}: roles are guessed from module names and shapes")
    notes += [
        f"site {name} puts several calls of one module together: samples go through the model one at a time"
        for name, site in sites
        if -1 in site.call_numbers and loaded.family.fold is None
    ]
    return notes


def _ranges(numbers: Sequence[int]) -> str:
    """'0-11', or '0-3, 8' where there are gaps."""
    ordered = sorted(numbers)
    starts = [n for i, n in enumerate(ordered) if i == 0 or n != ordered[i - 1] + 1]
    ends = [n for i, n in enumerate(ordered) if i == len(ordered) - 1 or n != ordered[i + 1] - 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
