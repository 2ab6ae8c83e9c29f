"""Ready inputs: cut into samples and put together again, so that nothing attends to what another sample brought."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from attnscope.compatibility import EXAMPLES
from attnscope.compatibility.examples import numbers, widened
from attnscope.extraction import extract
from attnscope.families.layouts import sample_count
from attnscope.quantities import ExtractSpec
from attnscope.ready import alike, cut_batch, largest_inputs
from attnscope.recording import recording
from attnscope.samples import SampleError
from attnscope.tokens import KIND_CODES

EXACT = ExtractSpec(encoding="exact")


def alone(model: nn.Module, inputs: dict[str, Any]) -> list[np.ndarray]:
    """Attention of each call, (head, query_token, key_token), of one sample that goes through the model by itself."""
    with torch.no_grad(), recording(model) as recorded:
        model(**inputs)
    return [call.attention()[0].numpy() for call in recorded]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_texts_without_a_mask_are_not_padded_together(name: str) -> None:
    model = EXAMPLES[name].build("sdpa")
    texts = [{"input_ids": torch.arange(5, 5 + length)[None]} for length in (7, 4, 9)]
    stored = extract(model, texts, spec=EXACT, batch_size=3).attention("text.self").values
    for sample, text in enumerate(texts):
        length = text["input_ids"].shape[1]
        for layer, own in enumerate(alone(model, text)):
            np.testing.assert_allclose(stored[sample, layer, :, :length, :length], own, atol=2e-6)
        assert np.isnan(stored[sample, :, :, length:]).all()
        assert np.isnan(stored[sample, :, :, :, length:]).all()


def test_texts_with_a_mask_share_a_batch() -> None:
    rows = [{"input_ids": torch.ones(1, n), "attention_mask": torch.ones(1, n)} for n in (4, 7, 7)]
    assert list(alike(rows, [0, 1, 2])) == [[0, 1, 2]]
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    assert list(alike(bare, [0, 1, 2])) == [[0], [1, 2]]


def test_images_of_other_sizes_share_no_batch_without_a_mask() -> None:
    rows = [{"pixel_values": torch.ones(1, 3, n, n)} for n in (8, 16)]
    assert list(alike(rows, [0, 1])) == [[0], [1]]
    masked = [row | {"pixel_mask": torch.ones(1, *row["pixel_values"].shape[2:])} for row in rows]
    assert list(alike(masked, [0, 1])) == [[0, 1]]


def test_packed_images_go_to_the_samples_whose_tokens_they_are() -> None:
    inputs = EXAMPLES["qwen2_vl"].inputs()
    first, second = cut_batch(inputs)
    assert torch.equal(first["pixel_values"], inputs["pixel_values"][:16])
    assert torch.equal(second["pixel_values"], inputs["pixel_values"][16:])
    assert second["image_grid_thw"].tolist() == [[1, 8, 4]]


def test_one_packed_sample_at_a_time_is_as_good_as_a_batch() -> None:
    example = EXAMPLES["qwen2_vl"]
    model, inputs = example.build("sdpa"), example.inputs()
    batch = extract(model, [inputs], spec=EXACT)
    single = extract(model, cut_batch(inputs), spec=EXACT)
    for site in batch.sites:
        np.testing.assert_array_equal(batch.attention(site).values, single.attention(site).values)


def test_the_longest_text_and_the_largest_image_may_be_two_samples() -> None:
    example = EXAMPLES["qwen2_vl"]
    small, large = cut_batch(example.inputs())
    longer = {
        name: torch.cat([tensor, tensor[:, -4:]], dim=1) if tensor.ndim == 2 and len(tensor) == 1 else tensor
        for name, tensor in small.items()
        if name != "image_grid_thw"
    } | {"image_grid_thw": small["image_grid_thw"]}
    run = extract(example.build("sdpa"), [longer, large], spec=EXACT)
    assert run.plan.streams == {"vision": 32, "joint": 17}


def test_tensors_that_nothing_tells_apart_are_refused() -> None:
    with pytest.raises(SampleError, match="input_ids: 2, pixel_values: 5"):
        cut_batch({"input_ids": torch.ones(2, 4), "pixel_values": torch.ones(5, 3)})


def test_image_tokens_that_no_image_accounts_for_are_refused() -> None:
    inputs = EXAMPLES["qwen2_vl"].inputs()
    inputs["mm_token_type_ids"][0, 1] = 0
    with pytest.raises(SampleError, match="image_grid_thw"):
        cut_batch(inputs)


class Doubling(nn.Module):
    """A vision model that changes its pixels in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                              image_size=16, patch_size=8, initializer_range=0.3)  # fmt: skip
        self.vit = hf.ViTModel(config, add_pooling_layer=False)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.vit(pixel_values.mul_(2))


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_that_changes_its_inputs_in_place_leaves_the_samples_as_they_are(size: int) -> None:
    model, pixels = Doubling().eval(), torch.randn(3, 3, 16, 16)
    before = pixels.clone()
    run = extract(model, [{"pixel_values": pixels}], spec=ExtractSpec(encoding="exact"), batch_size=size)
    assert torch.equal(pixels, before)
    with torch.no_grad(), recording(model) as rec:
        model(pixels)
    (site,) = run.sites
    np.testing.assert_allclose(run.attention(site).values[:, 0], rec[0].attention(), atol=2e-6)


def test_packed_images_without_a_text_are_samples() -> None:
    patches = torch.arange(48.0)[:, None]
    batch = {"hidden_states": patches, "grid_thw": torch.tensor([[1, 4, 4], [1, 8, 4]])}
    first, second = cut_batch(batch)
    assert torch.equal(first["hidden_states"], patches[:16])
    assert torch.equal(second["hidden_states"], patches[16:])
    assert second["grid_thw"].tolist() == [[1, 8, 4]]
    assert sample_count(batch) == 2
    assert len(cut_batch(second)) == sample_count(second) == 1


def test_packed_images_that_do_not_agree_with_their_sizes_are_an_error() -> None:
    with pytest.raises(SampleError, match="different batch sizes"):
        cut_batch({"hidden_states": torch.ones(15, 1), "grid_thw": torch.tensor([[1, 4, 4]])})


@pytest.mark.parametrize("value", [2, torch.tensor(2)])
def test_a_ready_input_without_a_batch_axis_is_named(value: object) -> None:
    with pytest.raises(SampleError, match="'codebook_idx'"):
        cut_batch({"input_ids": torch.ones(2, 4), "codebook_idx": value})  # type: ignore[dict-item]


def test_the_largest_image_may_be_told_by_its_size_alone() -> None:
    ids, pixels = torch.ones(1, 4), torch.ones(1, 3, 8, 8)
    sizes = ([[4, 4]], [[8, 4]], [[4, 8]])
    rows = [{"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor(size)} for size in sizes]
    assert [row["image_sizes"].tolist() for row in largest_inputs(rows)] == [[[4, 4]], [[8, 4]]]


def test_images_whose_patches_lie_side_by_side_are_extracted_one_by_one() -> None:
    config = hf.MiniCPMV4_7VisionConfig(
        **{"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"image_size": 32, "patch_size": 4, "insert_layer_id": 0},
    )
    model = widened(hf.MiniCPMV4_7VisionModel._from_config(config, attn_implementation="sdpa"))
    grids = ([4, 4], [8, 4])
    samples = [
        {"pixel_values": numbers(1, 3, 4, 4 * rows * columns), "target_sizes": torch.tensor([[rows, columns]])}
        for rows, columns in grids
    ]
    run = extract(model, samples, spec=EXACT, batch_size=2)
    assert run.plan.streams["vision"] == 32
    values = run.attention("vision.self").values
    for sample, (rows, columns) in enumerate(grids):
        size = rows * columns
        np.testing.assert_allclose(values[sample, 0, :, :size, :size], alone(model, samples[sample])[0], atol=2e-6)
        assert np.isnan(values[sample, 0, :, size:]).all()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_videos_stand_behind_the_images_frame_by_frame(name: str, kernel: str) -> None:
    model = EXAMPLES[name].build(kernel)
    (image, _), video_id = cut_batch(EXAMPLES["qwen2_vl"].inputs()), model.config.video_token_id
    more = torch.full((1, 8), video_id)
    both = image | {
        "input_ids": torch.cat([image["input_ids"], more], dim=1),
        "attention_mask": torch.cat([image["attention_mask"], torch.ones_like(more)], dim=1),
        "mm_token_type_ids": torch.cat([image["mm_token_type_ids"], torch.full_like(more, 2)], dim=1),
        "pixel_values_videos": torch.randn(32, 96, generator=torch.Generator().manual_seed(6)),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    run = extract(model, [both], spec=EXACT)
    stored = run.attention("vision.self").values[0]
    with torch.no_grad(), recording(model) as recorded:
        model(**both)
    calls = [call for call in recorded if call.module.endswith("blocks.1.attn")]
    own = [call.attention()[0].numpy() for call in calls]
    # The image of 16 patches, then two frames of 16; the second block of Qwen2.5-VL has no windows.
    assert [each.shape[-1] for each in own] == [16, 16, 16]
    for frame, attention in enumerate(own):
        at = slice(16 * frame, 16 * frame + 16)
        np.testing.assert_allclose(stored[1][:, at, at], attention, atol=2e-6)
        assert not stored[1][:, at, : at.start].any()
    kinds = run.tokens("joint").kind.values[0]
    assert (kinds[-8:] == KIND_CODES["image"]).all()
    assert run.tokens("joint").row.values[0][-8:].tolist() == [0, 0, 1, 1] * 2
