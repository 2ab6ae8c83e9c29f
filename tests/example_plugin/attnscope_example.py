"""How far attention reaches on the patch grid: one analyser and one model family, from outside attnscope.

Mean attention distance as in Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, figure 7, in patches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from attnscope import ExtractSpec, Run, hookimpl
from attnscope.families import ModelFamily, SiteRule
from attnscope.report import Element, HeatMap, Paragraph

FAMILY = ModelFamily(
    name="example",
    model_types=("example_vit",),
    sites=(SiteRule(r"blocks\.(?P<layer>\d+)\.attn", "vision.self"),),
)


def mean_distance(attention: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Mean distance that attention (..., query_token, key_token) bridges, (...) in patches, given all distances."""
    return (attention * distance).sum((-2, -1)) / attention.sum((-2, -1))


@dataclass(frozen=True)
class AttentionDistance:
    """Mean attention distance of each head between patches of one site."""

    name: ClassVar[str] = "attention_distance"
    site: str = "vision.self"

    def requires(self) -> ExtractSpec:
        return ExtractSpec(frozenset({"attention"}), sites=frozenset({self.site}))

    def analyse(self, run: Run) -> xr.Dataset:
        attention = run.attention(self.site)
        found = np.full(attention.shape[:3], np.nan)
        for sample in np.flatnonzero(run.status == 1):
            one = attention.isel(sample=sample).load()
            place = np.stack([one["query_row"], one["query_column"]], -1).astype(float)  # (token, 2)
            patches = np.flatnonzero(place[:, 0] >= 0)
            distance = np.linalg.norm(place[patches, None] - place[None, patches], axis=-1)
            found[sample] = mean_distance(one.values[..., patches[:, None], patches], distance)
        attrs = {"long_name": "mean attention distance between patches", "units": "patch"}
        coordinates = {d: attention[d] for d in ("layer", "head")} | {"sample": run.sample_ids}
        return xr.Dataset({"distance": (("sample", "layer", "head"), found, attrs)}, coordinates)

    def report(self, result: xr.Dataset) -> Iterator[Element]:
        mean = result["distance"].mean("sample")
        yield Paragraph("How far each head looks, in patches, over all samples: dark is near, bright is far.")
        yield HeatMap(mean.values, mean["layer"].values, mean["head"].values, "layer", "head", "distance in patches")


@hookimpl
def attnscope_register_analysers(register: Callable[[type], None]) -> None:
    register(AttentionDistance)


@hookimpl
def attnscope_register_families(register: Callable[[ModelFamily], None]) -> None:
    register(FAMILY)
