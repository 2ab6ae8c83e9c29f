"""Regions of samples on the tokens: whatever a processor does to an image, and wherever the text stands in a prompt."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import attnscope
from attnscope import Region, Sample
from attnscope.loading import load_model
from attnscope.regions import find_offsets, find_view
from attnscope.samples import encode_mask


@pytest.fixture
def scene() -> Sample:
    """A grey image, 80 wide and 60 high, with a white box over (20, 15, 50, 45)."""
    pixels = np.full((60, 80, 3), 40, np.uint8)
    pixels[15:45, 20:50] = 255
    regions = (Region("red cat", (20, 15, 50, 45), (6, 13)), Region("box"), Region("the box", None, (17, 24)))
    return Sample("scene", Image.fromarray(pixels), "a two red cat on the box", regions)


def with_processor(folder: Path, model: Path, **options: object) -> Path:
    """A copy of a model whose images are prepared otherwise."""
    from transformers import CLIPImageProcessorPil

    shutil.copytree(model, folder)
    CLIPImageProcessorPil(**options).save_pretrained(folder)
    return folder


WAYS = {
    "stretched": {"do_resize": True, "size": {"height": 32, "width": 32}, "do_center_crop": False},
    "cropped": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "padded": {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 96, "width": 96}},
}


@pytest.mark.parametrize("way", WAYS)
def test_shares_are_how_much_of_the_box_each_patch_shows(
    way: str, tiny_clip: Path, tmp_path: Path, scene: Sample
) -> None:
    loaded = load_model(str(with_processor(tmp_path / "model", tiny_clip, **WAYS[way])))
    view = find_view(loaded, scene, (80, 60))
    assert view is not None
    pixels = loaded.family.encode([scene], loaded)["pixel_values"][0, 0].numpy()
    # What the model sees is dark around the white box (darker still where it is padded, by the lowest value or 0).
    seen = (pixels > pixels.max() * 0.5 + pixels.min() * 0.5).astype(float)
    size = pixels.shape[0] // 8
    expected = seen.reshape(size, 8, size, 8).mean((1, 3))
    down, across = view.edges(0, size), view.edges(1, size)
    overlap = [
        np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) / np.diff(edges)
        for edges, low, high in ((down, 15, 45), (across, 20, 50))
    ]
    np.testing.assert_allclose(np.outer(*overlap), expected, atol=0.1)
    np.testing.assert_allclose(np.outer(*overlap).sum(), expected.sum(), rtol=0.05)


def test_extraction_stores_the_share_of_every_token_in_every_region(tiny_clip: Path, scene: Sample) -> None:
    plain = Sample("plain", scene.image, "a dog")
    run = attnscope.extract(str(tiny_clip), [scene, plain])
    patches = run.tokens("vision")["region_share"]
    assert patches.dims == ("sample", "region", "token")
    shares = patches.values[0, 0]
    assert shares[0] == 0, "CLS lies nowhere"
    # Stretched to 32 pixels, 4 by 4 patches of 20 by 15 pixels of the original.
    expected = np.zeros((4, 4))
    expected[1:3, 1], expected[1:3, 2] = 1, 0.5
    np.testing.assert_allclose(shares[1:].reshape(4, 4), expected, atol=0.02)
    assert np.isnan(patches.values[0, 1:, 1:]).all(), "regions without a box say nothing of patches"
    assert np.isnan(patches.values[1]).all(), "a sample without regions has none"
    tokens = run.tokens("text")
    words = tokens["token_text"].values[0]
    inside = tokens["region_share"].values[0]
    assert list(words[inside[0] == 1]) == ["red", "cat"]
    assert list(words[inside[2] == 1]) == ["the", "box"]
    real = tokens["kind"].values[0] != 0
    assert np.isfinite(inside[0, real]).all()
    assert np.isnan(inside[1][np.isin(words, ["a", "red"])]).all(), "a region without a span says nothing of words"


def test_a_mask_goes_before_its_box(tiny_clip: Path, scene: Sample) -> None:
    pixels = np.zeros((60, 80), bool)
    pixels[15:30, 20:45] = True
    masked = replace(scene, regions=(Region("red cat", (20, 15, 50, 45), None, encode_mask(pixels)),))
    shares = attnscope.extract(str(tiny_clip), [masked]).tokens("vision")["region_share"].values[0, 0, 1:]
    expected = np.zeros((4, 4))
    expected[1, 1:3] = 1, 0.25
    np.testing.assert_allclose(shares.reshape(4, 4), expected, atol=0.02)


def test_runs_without_regions_store_none(tiny_clip: Path, captioned_images: Path) -> None:
    run = attnscope.extract(str(tiny_clip), str(captioned_images), limit=2)
    assert "region_share" not in run.tokens("text")


def test_a_text_is_found_inside_a_prompt_and_not_where_it_is_not(tiny_bert: Path) -> None:
    tokenizer = load_model(str(tiny_bert)).tokenizer
    offsets = find_offsets(tokenizer, "red cat", ["[CLS]", "the", "red", "cat", "of"])
    assert offsets is not None
    np.testing.assert_array_equal(offsets, [[0, 0], [0, 0], [0, 3], [4, 7], [0, 0]])
    # The first token may have been joined to what stands before it.
    joined = find_offsets(tokenizer, "red cat", ["[CLS]", "xred", "cat"])
    assert joined is not None
    np.testing.assert_array_equal(joined, [[0, 0], [0, 3], [4, 7]])
    assert find_offsets(tokenizer, "red cat", ["[CLS]", "dog"]) is None
