"""Prompts of several lengths, padded on either side: what is stored of each is what it attends to when it is alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attnscope.compatibility import EXAMPLES
from attnscope.extraction import extract
from attnscope.quantities import ExtractSpec
from attnscope.recording import recording
from attnscope.run import Run
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES

EXACT = ExtractSpec(encoding="exact")
WORDS = ["a", "red", "cat", "on", "the", "left", "of", "two", "dogs"]


def alone(model: nn.Module, inputs: dict[str, Any]) -> list[np.ndarray]:
    """Attention of each call of one sample that goes through the model by itself, (head, query_token, key_token)."""
    with torch.no_grad(), recording(model) as recorded:
        model(**inputs)
    return [call.attention()[0].numpy() for call in recorded if "vision" not in call.module]


def assert_like_alone(run: Run, site: str, sample: int, own: list[np.ndarray]) -> None:
    """The sample's real tokens attend as they do alone, and its padding is nothing."""
    real = run.tokens(run.plan.sites[site].queries).kind.values[sample] != KIND_CODES["padding"]
    stored = run.attention(site).values[sample]
    assert real.sum() == own[0].shape[-1]
    assert np.isnan(stored[:, :, ~real]).all()
    assert np.isnan(stored[:, :, :, ~real]).all()
    for layer, attention in enumerate(own):
        np.testing.assert_allclose(stored[layer][:, real][:, :, real], attention, atol=2e-6)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with a tokenizer that pads on the side."""
    from transformers import BertTokenizerFast

    folders = {}
    for side in ("left", "right"):
        folder = tmp_path_factory.mktemp(side)
        EXAMPLES["llama"].build("sdpa").save_pretrained(folder)  # type: ignore[operator]
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), padding_side=side)
        tokenizer.save_pretrained(folder)
        folders[side] = folder
    return folders


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_reads_prompts_padded_on_either_side(decoders: dict[str, Path], side: str, form: str) -> None:
    texts = [" ".join(WORDS[:count]) for count in (3, 9, 1, 6)]
    samples = [Sample(f"text-{i}", text=text) for i, text in enumerate(texts)]
    run = extract(decoders[side], samples, spec=EXACT, batch_size=4, form=form)
    model = EXAMPLES["llama"].build("sdpa")
    for i, text in enumerate(texts):
        ids = torch.tensor([[2, *(5 + WORDS.index(word) for word in text.split()), 3]])
        assert_like_alone(run, "text.self", i, alone(model, {"input_ids": ids}))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "site", "image_tokens"), [("llava", "joint.self", 16), ("aya_vision", "text.self", 4)]
)
def test_a_language_model_reads_images_in_prompts_padded_on_either_side(
    name: str, site: str, image_tokens: int, side: str
) -> None:
    example = EXAMPLES[name]
    model = example.build("sdpa")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = [[1, *[95] * image_tokens, 5, 6, 7, 8, 9], [1, *[95] * image_tokens, 10, 11]]
    missing = len(prompts[0]) - len(prompts[1])
    pad = [0] * missing
    ids = [prompts[0], pad + prompts[1] if side == "left" else prompts[1] + pad]
    mask = [[1] * len(prompts[0]), [0] * missing + [1] * len(prompts[1])]
    if side == "right":
        mask[1].reverse()
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "pixel_values": pixels}
    run = extract(model, [batch], spec=EXACT, batch_size=2)
    kind = run.tokens(run.plan.sites[site].queries).kind.values
    assert ((kind == KIND_CODES["image"]).sum(axis=1) == image_tokens).all()
    for i, prompt in enumerate(prompts):
        own = alone(model, {"input_ids": torch.tensor([prompt]), "pixel_values": pixels[i : i + 1]})
        assert_like_alone(run, site, i, own)


def test_batches_padded_on_the_left_to_several_widths_are_put_together() -> None:
    model = EXAMPLES["llama"].build("sdpa")
    wide = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    narrow = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    run = extract(model, [wide, narrow], spec=EXACT, batch_size=2)
    assert_like_alone(run, "text.self", 0, alone(model, {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}))
    assert_like_alone(run, "text.self", 1, alone(model, {"input_ids": torch.tensor([[5, 6]])}))


def test_a_model_in_training_is_extracted_without_dropout_and_left_in_training() -> None:
    example = EXAMPLES["bert"]
    model, inputs = example.build("sdpa"), example.inputs()
    settled = extract(model, [inputs], spec=EXACT).attention("text.self").values
    model.train()
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.p = 0.5
    model.encoder.layer[0].eval()  # type: ignore[union-attr,index]
    stored = extract(model, [inputs], spec=EXACT).attention("text.self").values
    np.testing.assert_array_equal(stored, settled)
    assert model.training
    assert not model.encoder.layer[0].training  # type: ignore[union-attr,index]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_generation_records_the_prompt_and_every_step_with_padding_on_the_left() -> None:
    example = EXAMPLES["llama_left"]
    model, inputs = example.build("sdpa"), example.inputs()
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    with recording(model) as recorded:
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert torch.equal(tokens, plain)
    calls = [call for call in recorded if call.module.startswith("model.layers.0.")]
    assert [tuple(call.shape[2:]) for call in calls] == [(9, 9), (1, 10), (1, 11)]
    for call in calls:
        assert call.output_error() <= 1e-5
        # The padding of the second prompt stays hidden at each step.
        assert (call.attention()[1, :, -1, :3] == 0).all()
