"""Models that no family answers for: their tokens are told as far as the inputs tell, and padding is padding."""

import numpy as np
import pytest
import torch
import transformers as hf

from attnscope.compatibility import EXAMPLES
from attnscope.compatibility.examples import numbers, widened
from attnscope.extraction import extract
from attnscope.families.layouts import DEFAULT_LAYOUTS, text_kinds
from attnscope.loading import load_model
from attnscope.quantities import ExtractSpec
from attnscope.recording import recording
from attnscope.run import Run
from attnscope.tokens import KIND_CODES, KINDS

EXACT = ExtractSpec(encoding="exact")


def extracted(name: str, kernel: str = "eager") -> Run:
    example = EXAMPLES[name]
    return extract(example.build(kernel), [example.inputs()], spec=EXACT, batch_size=2)


def is_padding(run: Run, stream: str) -> np.ndarray:
    return run.tokens(stream).kind.values == KIND_CODES["padding"]


@pytest.mark.parametrize("name", ["squeezebert", "xlnet", "tapas", "granite_swa", "layoutlmv3", "aya_vision"])
def test_padding_of_a_guessed_text_is_what_the_mask_says(name: str) -> None:
    run = extracted(name)
    hidden = EXAMPLES[name].inputs()["attention_mask"].numpy() == 0
    assert all(site.guessed for site in run.plan.sites.values())
    np.testing.assert_array_equal(is_padding(run, "text"), hidden)
    attention = run.attention("text.self").values
    nothing = hidden[:, :, None] | hidden[:, None, :]
    assert (np.isnan(attention) == nothing[:, None, None]).all()


def test_padding_of_a_guessed_sound_is_by_the_models_own_rule_of_lengths() -> None:
    run = extracted("hubert")
    example = EXAMPLES["hubert"]
    own = example.build("eager")._get_feature_vector_attention_mask(24, example.inputs()["attention_mask"])
    np.testing.assert_array_equal(is_padding(run, "audio"), ~own.numpy().astype(bool))
    assert is_padding(run, "audio").any()


def test_patches_that_the_pixel_mask_hides_are_padding() -> None:
    loaded = load_model(EXAMPLES["dpt"].build("eager"))
    mask = torch.ones(2, 16, 16, dtype=torch.long)
    mask[1, :, 8:] = 0
    layout = DEFAULT_LAYOUTS["vision"]({"pixel_values": torch.ones(2, 3, 16, 16), "pixel_mask": mask}, loaded, 17)
    hidden = layout.kind == KIND_CODES["padding"]
    assert not hidden[0].any()
    np.testing.assert_array_equal(hidden[1], [False, *[False, False, True, True] * 4])
    assert (layout.column[1][hidden[1]] == -1).all()


def test_image_tokens_among_a_guessed_text_are_image_tokens() -> None:
    run = extracted("aya_vision")
    kind = run.tokens("text").kind.values
    np.testing.assert_array_equal(kind[0], [KIND_CODES["image"]] * 4 + [KIND_CODES["text"]] * 9)


def test_a_mask_that_says_who_sees_whom_hides_no_token() -> None:
    loaded = load_model(EXAMPLES["squeezebert"].build("eager"))
    ids = torch.ones(2, 5, dtype=torch.long)
    kind = text_kinds(ids, torch.zeros(2, 1, 5, 5), loaded)
    assert (kind == KIND_CODES["text"]).all()


def test_a_model_that_packs_its_images_into_one_row_sees_one_sample_at_a_time() -> None:
    both = extracted("mistral3")
    example = EXAMPLES["mistral3"]
    one = extract(example.build("eager"), [example.inputs()], spec=EXACT, batch_size=1)
    for site in both.sites:
        np.testing.assert_allclose(both.attention(site).values, one.attention(site).values, atol=2e-6)


def test_the_main_stream_of_a_model_that_takes_images_alone_is_vision() -> None:
    assert extracted("mgp_str").sites == ("vision.self",)


def test_stacks_of_layers_are_sites_of_their_own() -> None:
    stacks = {site.modules[0].partition(".")[0] for site in extracted("blt").plan.sites.values()}
    assert stacks == {"patcher", "local_encoder", "global_transformer", "local_decoder"}
    for site in extracted("blt").plan.sites.values():
        assert len({module.partition(".")[0] for module in site.modules}) == 1
        assert site.layers == (0, 1)


def test_a_model_without_anything_to_see_has_no_vision_whatever_it_calls_patches() -> None:
    assert not any("vision" in site for site in extracted("blt").sites)


def test_the_encoder_of_an_images_codes_is_vision() -> None:
    assert extracted("emu3").sites == ("vision.self", "vision.self.2", "text.self")


def test_two_directions_of_one_module_are_two_sites() -> None:
    sites = extracted("grounding_dino").plan.sites
    fused = [site for site in sites.values() if "fusion_layer" in site.modules[0]]
    assert [site.call_numbers for site in fused] == [(0, 0), (1, 1)]
    assert (fused[0].queries, fused[0].keys) == (fused[1].keys, fused[1].queries)
    assert sites["queries.text"].modules[0] == "decoder.layers.0.encoder_attn_text"


def test_a_token_of_several_codes_is_named_by_all_of_them_and_padding_goes_by_the_mask() -> None:
    loaded = load_model(EXAMPLES["dia"].build("eager"))
    inputs = {"input_ids": torch.arange(12).view(1, 4, 3), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    layout = DEFAULT_LAYOUTS["text"](inputs, loaded, 4)
    assert layout.text[0].tolist() == ["0 1 2", "3 4 5", "6 7 8", "9 10 11"]
    assert [KINDS[code] for code in layout.kind[0]] == ["text"] * 3 + ["padding"]


def test_packed_patches_without_places_are_unknown_tokens_of_their_sample() -> None:
    kind = extracted("glm4v").tokens("vision").kind.values
    assert (kind[0] == KIND_CODES["unknown"]).all()
    assert (kind[1] == KIND_CODES["unknown"]).sum() == 16


def test_a_tower_whose_inputs_say_nothing_is_called_after_its_class() -> None:
    tower = EXAMPLES["glm4v"].build("eager").visual
    images = {"hidden_states": torch.randn(16 + 32, 96), "grid_thw": torch.tensor([[1, 4, 4], [1, 8, 4]])}
    run = extract(tower, [images], spec=EXACT)
    assert run.sites == ("vision.self",)
    assert run.plan.streams == {"vision": 32}
    with torch.no_grad(), recording(tower) as recorded:
        tower(**images)
    stored = run.attention("vision.self").values
    first = [call for call in recorded if call.module == "blocks.0.attn"]
    np.testing.assert_allclose(stored[0, 0, :, :16, :16], first[0].attention()[0].numpy(), atol=2e-6)
    np.testing.assert_allclose(stored[1, 0], first[1].attention()[0].numpy(), atol=2e-6)


def test_what_a_decoder_looks_at_is_told_by_every_name_of_cross_attention() -> None:
    assert extracted("pix2struct").sites == ("vision.self", "decoder.self", "decoder.vision")


def test_a_stack_of_a_model_whose_main_input_is_neither_seen_nor_read_is_of_tokens() -> None:
    assert extracted("pi0").sites == ("vision.self", "text.self", "tokens.self")


def test_patches_of_a_series_are_not_seen() -> None:
    config = hf.PatchTSMixerConfig(num_input_channels=2, self_attn=True, self_attn_heads=2, num_layers=1)
    run = extract(widened(hf.PatchTSMixerModel(config)), [{"past_values": numbers(2, 32, 2)}], spec=EXACT)
    assert all(site.startswith("tokens.") for site in run.sites)


def test_ids_of_other_rows_than_the_samples_name_no_token() -> None:
    loaded = load_model(EXAMPLES["t5"].build("eager"))
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long), "decoder_input_ids": torch.ones(8, 7, dtype=torch.long)}
    layout = DEFAULT_LAYOUTS["decoder"](inputs, loaded, 7)
    assert layout.kind.shape == (2, 7)
    assert (layout.kind == KIND_CODES["unknown"]).all()
