"""Questions by threshold: the answer of the attention itself, from summaries where they settle it."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from attnscope.extraction import extract
from attnscope.questions import strongest_edges
from attnscope.run import Run, open_run
from attnscope.samples import read_samples
from attnscope.selection import SelectionError
from attnscope.tokens import KIND_CODES

SITES = ("text.self", "vision.self")


class CountingStore(MemoryStore):
    """A memory store that remembers what was read."""

    read: ClassVar[list[str]] = []

    async def get(self, key, prototype, byte_range=None):
        self.read.append(key)
        return await super().get(key, prototype, byte_range)


@pytest.fixture(scope="module", params=["float16", "compact", "factored", "no summaries"])
def run(request: pytest.FixtureRequest, tiny_clip: Path, captioned_images: Path) -> Run:
    options = {
        "float16": {"summaries": True},
        "compact": {"encoding": "compact", "summaries": True},
        "factored": {"form": "factored", "summaries": True},
        "no summaries": {},
    }[request.param]
    return extract(tiny_clip, captioned_images, batch_size=4, out=CountingStore(), **options)


def places(run: Run, site: str, found) -> np.ndarray:
    ids = run.sample_ids
    sample = [ids.index(i) for i in found["sample"].values]
    layer = [run.plan.sites[site].layers.index(n) for n in found["layer"].values]
    rest = [found[name].values for name in ("head", "query_token", "key_token") if name in found.coords]
    return np.stack([np.array(column, int) for column in (sample, layer, *rest)], axis=1)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("above", [0.0, 0.04, 0.12, 0.3, 0.9])
def test_strong_edges_are_those_of_a_scan(run: Run, site: str, above: float) -> None:
    found = run.strong_edges(site, above=above)
    whole = run.attention(site).values
    expected = np.argwhere(whole > above)
    np.testing.assert_array_equal(places(run, site, found), expected)
    np.testing.assert_allclose(found.values, whole[whole > above], atol=2e-6)


def test_edges_are_chosen_by_the_names_of_tokens(run: Run) -> None:
    found = run.strong_edges("text.self", above=0.2, sample="2:6", layer=1, head=[0, 3], query="text", key="cls")
    whole = run.select("text.self", sample="2:6", layer=1, head=[0, 3], query="text", key="cls")
    np.testing.assert_allclose(np.sort(found.values), np.sort(whole.values[whole.values > 0.2]), atol=2e-6)
    assert set(found["query_kind"].values.tolist()) == {KIND_CODES["text"]}
    assert set(found["key_text"].values.tolist()) == {"[CLS]"}
    with pytest.raises(SelectionError, match="no key token 'bird'"):
        run.strong_edges("text.self", above=0.2, key="'bird'")


def test_from_a_ninth_on_the_strongest_keys_alone_are_read(run: Run) -> None:
    again = open_run(run.store)
    CountingStore.read.clear()
    found = again.strong_edges("vision.self", above=1 / 9)
    if "top_value" not in again.quantities("vision.self"):
        assert found.attrs["read"].startswith("the attention of 18 of 18 layers")
        return
    assert found.attrs["read"] == "top_value alone"
    assert not [k for k in CountingStore.read if k.startswith(("vision.self/attention/c/", "vision.self/query/c/"))]
    assert "the attention of" in again.strong_edges("vision.self", above=0.01).attrs["read"]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("count", [1, 7, 300, 10**6])
def test_strongest_edges_are_those_of_a_scan(run: Run, site: str, count: int) -> None:
    found = strongest_edges(run, site, count, {"layer": 1})
    whole = run.attention(site).values[:, 1]
    order = np.argsort(-whole.ravel(), kind="stable")[: min(count, int((~np.isnan(whole)).sum()))]
    expected = np.stack(np.unravel_index(order, whole.shape), axis=1)
    np.testing.assert_allclose(found.values, whole.ravel()[order], atol=2e-6)
    if run.plan.sites[site].form == "dense":
        np.testing.assert_array_equal(np.delete(places(run, site, found), 1, axis=1), expected)


@pytest.mark.parametrize(
    ("site", "query", "key"),
    [("vision.self", "cls", "image"), ("text.self", "text", "special"), ("text.self", "text", "cls")],
)
def test_strong_heads_are_those_of_a_scan(run: Run, site: str, query: str, key: str) -> None:
    found = run.strong_heads(site, above=0.3, query=query, key=key)
    part = run.select(site, query=query, key=key)
    mass = part.sum("key_token", min_count=1).max("query_token").values
    np.testing.assert_array_equal(places(run, site, found), np.argwhere(mass > 0.3))
    np.testing.assert_allclose(found.values, mass[mass > 0.3], atol=1e-5)
    assert (found.attrs["read"] == "kind_mass_max alone") == ("kind_mass_max" in run.quantities(site))


def test_heads_between_other_tokens_are_read_from_the_attention(run: Run) -> None:
    found = run.strong_heads("vision.self", above=0.2, sample=[0, 4], query="cls", key="0:2,0:2")
    mass = run.select("vision.self", sample=[0, 4], query="cls", key="0:2,0:2").sum("key_token").max("query_token")
    np.testing.assert_allclose(found.values, mass.values[mass.values > 0.2], atol=1e-5)
    assert found.attrs["read"] == "the attention of 4 of 4 layers of samples, and kind_mass_max for the others"


def test_samples_that_are_not_extracted_have_no_answer(tiny_vit: Path, captioned_images: Path) -> None:
    run = extract(tiny_vit, read_samples(captioned_images), batch_size=1, summaries=True)
    before = run.strong_edges("vision.self", above=0.2)
    run.commit(run.blocks()[0], np.zeros(len(run.blocks()[0])))
    gone = set(run.sample_ids[: len(run.blocks()[0])])
    after = run.strong_edges("vision.self", above=0.2)
    assert not gone & set(after["sample"].values)
    assert len(after) == int((~np.isin(before["sample"].values, list(gone))).sum())


@settings(max_examples=15, deadline=None)
@given(above=st.floats(0, 1), count=st.integers(1, 60), layer=st.sampled_from([None, 0, 1]), head=st.integers(0, 3))
def test_any_threshold_and_count(run: Run, above: float, count: int, layer: int | None, head: int) -> None:
    part = run.select("text.self", layer=layer, head=head).values
    edges = run.strong_edges("text.self", above=above, layer=layer, head=head)
    clear = np.abs(part - above) > 4e-6
    assert len(edges) == (part > above).sum() or not clear.all()
    best = strongest_edges(run, "text.self", count, {"layer": layer, "head": head})
    np.testing.assert_allclose(best.values, np.sort(part[~np.isnan(part)])[::-1][:count], atol=2e-6)
