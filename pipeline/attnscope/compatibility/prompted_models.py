"""Language models that read an image among the words of a prompt."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers as hf

from attnscope.compatibility.examples import BOTH, GROUPED, SEQ2SEQ, TEXT, VISION, Example, Inputs, image, numbers
from attnscope.compatibility.joint_models import padded_prompt

_LLAMA = GROUPED | {"model_type": "llama"}
_IMAGE = 95
_PADDING = 1


def _tiles(count: int, size: int = 16) -> Inputs:
    """Two samples of so many tiles each."""
    return {"pixel_values": numbers(2, count, 3, size, size)}


def _qwen3_inputs() -> Inputs:
    """Two images of 4 x 4 and 8 x 4 patches, four and eight merged image tokens."""
    ids = torch.tensor([[97] + [_IMAGE] * 4 + [98, 5, 6, 7, 8, 9, 10, 11], [97] + [_IMAGE] * 8 + [98, 5, 6, 7]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": numbers(16 + 32, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 8, 4]]),
        "mm_token_type_ids": (ids == _IMAGE).long(),
    }


def _idefics(name: str) -> Example:
    return Example(
        f"{name}ForConditionalGeneration",
        lambda: getattr(hf, f"{name}Config")(
            text_config=_LLAMA,
            vision_config=VISION | {"model_type": f"{name.lower()}_vision"},
            image_token_id=_IMAGE,
            scale_factor=2,
            pad_token_id=_PADDING,
        ),
        lambda: padded_prompt(8) | _tiles(2) | {"pixel_attention_mask": torch.ones(2, 2, 16, 16, dtype=torch.long)},
        BOTH,
    )


def _asked_in_words() -> Inputs:
    """Florence-2: image tokens and a question for the encoder, the beginning of an answer for the decoder."""
    return padded_prompt(10) | image(24) | {"decoder_input_ids": torch.tensor([[2, 5, 9], [2, 5, 8]])}


def _q_former(**more: Any) -> Mapping[str, Any]:
    return TEXT | {"encoder_hidden_size": 32, "cross_attention_frequency": 2} | more


EXAMPLES: dict[str, Example] = {
    "llava_next": Example(
        "LlavaNextForConditionalGeneration",
        lambda: hf.LlavaNextConfig(
            text_config=_LLAMA,
            vision_config=VISION | {"model_type": "clip_vision_model"},
            image_token_index=_IMAGE,
            image_grid_pinpoints=[[16, 32]],
            vision_feature_layer=-1,
        ),
        # An overview of 16 tokens, four rows of eight tokens, and a line's end behind each row.
        lambda: padded_prompt(16 + 4 * 9) | _tiles(3) | {"image_sizes": torch.tensor([[16, 32]] * 2)},
        BOTH,
    ),
    "qwen3_vl": Example(
        "Qwen3VLForConditionalGeneration",
        lambda: hf.Qwen3VLConfig(
            text_config=GROUPED
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}},
            vision_config={
                **{"depth": 2, "num_heads": 4, "hidden_size": 32, "intermediate_size": 64, "patch_size": 4},
                **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32},
                **{"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
            },
            image_token_id=_IMAGE,
            video_token_id=96,
            vision_start_token_id=97,
            vision_end_token_id=98,
        ),
        _qwen3_inputs,
        BOTH,
    ),
    "paligemma": Example(
        "PaliGemmaForConditionalGeneration",
        lambda: hf.PaliGemmaConfig(
            # Of one layer: Gemma's large embeddings carry what two kernels round differently into a second one.
            text_config=GROUPED | {"model_type": "gemma", "num_hidden_layers": 1},
            vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": True},
            image_token_index=_IMAGE,
            projection_dim=32,
        ),
        lambda: padded_prompt(16) | image(),
        BOTH,
    ),
    "gemma3": Example(
        "Gemma3ForConditionalGeneration",
        lambda: hf.Gemma3Config(
            text_config=GROUPED
            | {"model_type": "gemma3_text", "sliding_window": 4}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            mm_tokens_per_image=4,
            image_token_index=_IMAGE,
        ),
        lambda: padded_prompt(4) | image() | {"token_type_ids": (padded_prompt(4)["input_ids"] == _IMAGE).long()},
        BOTH,
    ),
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "florence2": Example(
        "Florence2ForConditionalGeneration",
        lambda: hf.Florence2Config(
            text_config=SEQ2SEQ | {"model_type": "bart", "decoder_start_token_id": 2, "pad_token_id": _PADDING},
            vision_config={
                **{"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]},
                **{"patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4]},
                **{"window_size": 4, "projection_dim": 32, "max_position_embeddings": 10},
            },
            image_token_id=_IMAGE,
        ),
        _asked_in_words,
        BOTH,
    ),
    "instructblip": Example(
        "InstructBlipForConditionalGeneration",
        lambda: hf.InstructBlipConfig(
            vision_config=VISION,
            qformer_config=_q_former(),
            text_config=TEXT | {"model_type": "llama"},
            num_query_tokens=4,
            image_token_index=_IMAGE,
        ),
        lambda: (
            padded_prompt(4)
            | image()
            | {"qformer_input_ids": torch.tensor([[5, 6, 7]] * 2), "qformer_attention_mask": torch.ones(2, 3).long()}
        ),
        BOTH,
    ),
}
