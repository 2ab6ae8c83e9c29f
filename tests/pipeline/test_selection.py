"""Choosing parts of a run: by number, name, kind, text and place; reading no more than that."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from attnscope.plan import RunPlan, SitePlan
from attnscope.quantities import ExtractSpec
from attnscope.run import EXTRACTED, Run
from attnscope.samples import Sample
from attnscope.selection import SelectionError, choose
from attnscope.testing import make_run
from attnscope.tokens import KIND_CODES, text_layout

SENTENCES = {
    "walk": ["[CLS]", "the", "dog", "walks", "[SEP]"],
    "two": ["[CLS]", "dog", "##gy", "and", "Dog", "[SEP]"],
    "none": ["[CLS]", "a", "cat", "[SEP]"],
}
LAYERS = (3, 5, 9)
HEADS, TOKENS = 2, 6


class CountingStore(MemoryStore):
    """A memory store that remembers what was read."""

    read: ClassVar[list[str]] = []

    async def get(self, key, prototype, byte_range=None):
        self.read.append(key)
        return await super().get(key, prototype, byte_range)


def text_run(store: MemoryStore | None = None) -> tuple[Run, np.ndarray]:
    """A run of three sentences of different lengths, whose layers are not 0, 1, 2; and its attention, NaN outside."""
    site = SitePlan("text", "text", LAYERS, ("a", "b", "c"), HEADS, HEADS, TOKENS, TOKENS)
    plan = RunPlan({"text": TOKENS}, {"text.self": site}, unit=1)
    samples = [Sample(name, text=" ".join(words)) for name, words in SENTENCES.items()]
    run = Run.create(store, plan, ExtractSpec(encoding="exact", summaries=False), samples, {"model": "made"})
    generator = np.random.default_rng(5)
    attention = np.full((len(SENTENCES), len(LAYERS), HEADS, TOKENS, TOKENS), np.nan, np.float32)
    for block, words in zip(run.blocks(), SENTENCES.values(), strict=True):
        length = len(words)
        kind = np.full((1, TOKENS), KIND_CODES["padding"])
        kind[0, :length] = [KIND_CODES["special" if w.startswith("[") else "text"] for w in words]
        run.write_tokens("text", block, text_layout([words + [""] * (TOKENS - length)], kind))
        rows = generator.dirichlet(np.ones(length), (len(LAYERS), HEADS, length))
        attention[block.start, :, :, :length, :length] = rows
        for layer in range(len(LAYERS)):
            run.write_layer("text.self", "query_valid", block, layer, kind != KIND_CODES["padding"])
            run.write_layer("text.self", "attention", block, layer, attention[block.start : block.stop, layer])
        run.commit(block, np.full(1, EXTRACTED))
    return run, attention


@pytest.fixture(scope="module")
def sentences() -> tuple[Run, np.ndarray]:
    return text_run()


@pytest.fixture(scope="module")
def pictures() -> Iterator[Run]:
    return make_run(samples=3, layers=2, heads=3, grid=(3, 4))


def test_a_number_drops_its_dimension_and_a_slice_keeps_it(sentences):
    run, attention = sentences
    one = run.select("text.self", sample="two", layer=5, head=1, query=0)
    np.testing.assert_array_equal(one, attention[1, 1, 1, 0])
    some = run.select("text.self", sample="0:2", layer="5:", head=[1], query="0:1")
    np.testing.assert_array_equal(some, attention[:2, 1:, 1:, :1])


def test_layers_are_the_models_own_numbers(sentences):
    run, attention = sentences
    np.testing.assert_array_equal(run.select("text.self", layer="3:9"), attention[:, :2])
    np.testing.assert_array_equal(run.select("text.self", layer="9,3"), attention[:, [2, 0]])
    np.testing.assert_array_equal(run.select("text.self", layer=np.int64(9)), attention[:, 2])
    with pytest.raises(SelectionError, match="has no layer 2; it has 3, 5, 9"):
        run.select("text.self", layer=2)


def test_a_text_means_other_tokens_in_other_samples(sentences):
    run, attention = sentences
    found = run.select("text.self", layer=3, head=0, key="'dog'")
    # 'dog' is token 2 of "walk", tokens 1 and 4 of "two" (whatever its case), and in "none" there is none.
    assert found.shape == (3, TOKENS, 3)
    np.testing.assert_array_equal(
        found[0], np.stack([[np.nan] * TOKENS, attention[0, 0, 0, :, 2], [np.nan] * TOKENS], 1)
    )
    np.testing.assert_array_equal(found[1][:, [0, 2]], attention[1, 0, 0][:, [1, 4]])
    assert np.isnan(found[1][:, 1]).all()
    assert np.isnan(found[2]).all()


def test_a_text_may_be_spelled_by_several_tokens(sentences):
    run, attention = sentences
    found = run.select("text.self", sample="two", query="doggy")
    np.testing.assert_array_equal(found, attention[1][:, :, 1:3])
    phrase = run.select("text.self", sample="walk", query="'The dog'")
    np.testing.assert_array_equal(phrase, attention[0][:, :, 1:3])


def test_kinds_leave_padding_out(sentences):
    run, attention = sentences
    found = run.select("text.self", query="special", layer=3, head=0)
    assert found.dims == ("sample", "query_token", "key_token")
    expected = np.full((3, 4, TOKENS), np.nan)
    for sample, (first, last) in enumerate([(0, 4), (0, 5), (0, 3)]):
        expected[sample, 0] = attention[sample, 0, 0, first]
        expected[sample, last - 2] = attention[sample, 0, 0, last]
    np.testing.assert_array_equal(found, expected)


def test_lists_of_names_are_united(sentences):
    run, attention = sentences
    found = run.select("text.self", sample="walk", query=["'walks'", "'the'", 0])
    np.testing.assert_array_equal(found, attention[0][:, :, [0, 1, 3]])


def test_a_box_is_rows_and_columns_of_the_grid(pictures):
    dense = pictures.attention("vision.self").values
    found = pictures.select("vision.self", key="0:2,1:3", query="cls")
    np.testing.assert_array_equal(found, dense[..., :1, [2, 3, 6, 7]])
    assert found["key_row"].isel(sample=0).values.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(pictures.select("vision.self", key="2,:"), dense[..., [9, 10, 11, 12]])


def test_other_quantities_carry_their_tokens(pictures):
    found = pictures.select("vision.self", quantity="attention_relevance", sample="sample-1", layer=1, query="image")
    np.testing.assert_array_equal(found, pictures.array("vision.self", "attention_relevance")[1, 1, 1:])
    assert set(found["query_kind"].values.tolist()) == {KIND_CODES["image"]}
    with pytest.raises(SelectionError, match="has no head to choose"):
        pictures.select("vision.self", quantity="attention_relevance", head=0)


def test_masked_booleans_stay_boolean(sentences):
    run, _ = sentences
    found = run.select("text.self", quantity="query_valid", query="'dog'", layer=3)
    assert found.dtype == bool
    assert found.values.tolist() == [[False, True, False], [True, False, True], [False, False, False]]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"sample": "tow"}, "no sample 'tow' .did you mean 'two'..; it has walk, two, none"),
        ({"sample": 3}, "no sample 3"),
        ({"sample": "7:9"}, "no sample '7:9'"),
        ({"head": "x"}, "no head 'x'; it has 0, 1"),
        ({"layer": "4:5"}, "no layer '4:5'; it has 3, 5, 9"),
        ({"layer": []}, "no layer"),
        ({"query": 6}, "no query token 6; it has 0 to 5"),
        ({"key": "'bird'"}, "no key token 'bird' in the chosen samples; its texts are"),
        ({"key": "image"}, "no key token 'image' in the chosen samples; its kinds are padding, text, special"),
        ({"key": "0:2,0:2"}, "the grid has 0 rows"),
        ({"sample": "none", "query": "dog"}, "no query token 'dog' in the chosen samples"),
        ({"quantity": "values"}, "has no 'values'; it has attention, attention_mean, query_valid"),
    ],
)
def test_what_is_not_there_is_named_beside_what_is(sentences, choice, message):
    run, _ = sentences
    with pytest.raises(SelectionError, match=message):
        run.select("text.self", **choice)


def test_only_the_chosen_chunks_are_read():
    store = CountingStore()
    run, attention = text_run(store)
    store.read.clear()
    found = run.select("text.self", sample="two", layer=5, query="'dog'").values
    np.testing.assert_array_equal(found, attention[1, 1][:, [1, 4]])
    chunks = {key for key in store.read if key.startswith("text.self/attention/c/")}
    assert chunks == {"text.self/attention/c/1/1/0/0/0"}


def test_pieces_are_the_selection_sample_by_sample(sentences):
    run, _ = sentences
    choices = {"key": "'dog'", "layer": "3:6"}
    whole = run.select("text.self", **choices)
    pieces = list(choose(run, "text.self", "attention", choices).by_sample())
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def _slices(length: int) -> st.SearchStrategy[slice]:
    return st.slices(length).filter(lambda s: len(range(length)[s]) > 0)


def _positions(length: int) -> st.SearchStrategy[int | slice | list[int]]:
    numbers = st.integers(-length, length - 1)
    return st.one_of(numbers, _slices(length), st.lists(numbers, min_size=1, max_size=4), st.just(slice(None)))


@settings(max_examples=150, deadline=None)
@given(
    sample=_positions(3), layer=st.sampled_from([0, 1, slice(None), [1, 0]]), head=_positions(3), query=_positions(13),
    key=_positions(13),
)  # fmt: skip
def test_select_equals_numpy_indexing(pictures, sample, layer, head, query, key):
    found = pictures.select("vision.self", sample=sample, layer=layer, head=head, query=query, key=key)
    expected = pictures.attention("vision.self").values
    for axis, choice in reversed(list(enumerate([sample, layer, head, query, key]))):
        expected = expected[(slice(None),) * axis + (choice,)]
    np.testing.assert_array_equal(found, expected)
