"""Further models: of sound, of several modalities at once, of pairs of images, and with layers that differ."""

from typing import Any

import torch
import transformers as hf

from attnscope.compatibility.examples import BOTH, EAGER, GROUPED, TEXT, VISION, Example, Inputs, numbers, text

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA = GROUPED | {"model_type": "gemma", "num_key_value_heads": 1, "use_bidirectional_attention": True}


def _experts(config: Any, **extra: Any) -> Any:
    return config(**(GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 16} | extra))


def _frames() -> Inputs:
    """Two sounds of 80 and 60 frames."""
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[1, 60:] = 0
    return {"input_features": numbers(2, 80, 16), "attention_mask": mask}


def _series() -> Inputs:
    """Past and future of two series, with a feature of the time."""
    return {
        "past_values": numbers(2, 23),
        "past_time_features": numbers(2, 23, 1),
        "past_observed_mask": torch.ones(2, 23),
        "future_values": numbers(2, 12),
        "future_time_features": numbers(2, 12, 1),
    }


def _interleaved() -> Inputs:
    """Two texts with two images each, the second of which is seen from the fifth word on."""
    seen = torch.ones(2, 9, 2, dtype=torch.long)
    seen[:, :4, 1] = 0
    return text() | {"pixel_values": numbers(2, 2, 3, 16, 16), "image_attention_mask": seen}


def _tiled() -> Inputs:
    """An image of one tile and one of two, each before its text."""
    words = text()
    words["input_ids"][:, 0] = 95
    tiles = torch.tensor([[[1, 0]], [[1, 1]]])
    return words | {
        "pixel_values": numbers(2, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": tiles[:, None].expand(2, 9, 1, 2),
    }


def _flattened() -> Inputs:
    """Twelve patches and eight, each behind its row and column."""
    patches = numbers(2, 12, 2 + 48)
    patches[..., 0] = torch.arange(12) // 4 + 1.0
    patches[..., 1] = torch.arange(12) % 4 + 1.0
    patches[1, 8:] = 0
    return {
        "flattened_patches": patches,
        "attention_mask": (patches[..., 0] > 0).long(),
        "decoder_input_ids": text(6)["input_ids"],
    }


def _prompted_actions() -> Inputs:
    """Sixteen tokens of an image and nine words, and five actions that read them."""
    words = text(25)
    words["input_ids"][:, :16] = 91
    return words | {
        "action_embeds": numbers(2, 5, 32),
        "pixel_values": numbers(2, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }


def _spoken() -> Inputs:
    """Two sounds of 4000 and 3000 samples, and words."""
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[1, 3000:] = 0
    return {
        "input_values": numbers(2, 4000),
        "attention_mask": mask,
        "decoder_input_ids": text(5)["input_ids"],
    }


EXAMPLES: dict[str, Example] = {
    "laguna": Example(
        "LagunaModel",
        lambda: _experts(
            hf.LagunaConfig,
            num_experts=4,
            shared_expert_intermediate_size=16,
            num_attention_heads_per_layer=[4, 8],
            mlp_layer_types=["dense", "sparse"],
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        text,
        BOTH,
    ),
    "longcat_flash": Example(
        "LongcatFlashModel",
        lambda: hf.LongcatFlashConfig(
            **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 99},
            **{"num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 16, "moe_topk": 2},
            **{"n_routed_experts": 4, "zero_expert_num": 2, "kv_lora_rank": 16, "q_lora_rank": 16},
            **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 8, "v_head_dim": 12},
        ),
        text,
        BOTH,
        other_softmaxes=2,
    ),
    "parakeet": Example(
        "ParakeetEncoder",
        lambda: hf.ParakeetEncoderConfig(
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37},
            **{"subsampling_conv_channels": 8, "num_mel_bins": 16, "max_position_embeddings": 64},
        ),
        _frames,
        BOTH,
    ),
    "informer": Example(
        "InformerModel",
        lambda: hf.InformerConfig(
            **{"prediction_length": 12, "context_length": 16, "num_time_features": 1, "sampling_factor": 2},
            **{"d_model": 32, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        ),
        _series,
        EAGER,
    ),
    "lightglue": Example(
        "LightGlueForKeypointMatching",
        lambda: hf.LightGlueConfig(
            **{"descriptor_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"depth_confidence": -1.0, "width_confidence": -1.0},
            keypoint_detector_config={
                **{"model_type": "superpoint", "encoder_hidden_sizes": (8, 8, 8, 8), "decoder_hidden_size": 32},
                **{"descriptor_decoder_dim": 32, "max_keypoints": 12, "keypoint_threshold": 0.0},
                **{"border_removal_distance": 1},
            },
        ),
        lambda: {"pixel_values": numbers(2, 2, 3, 32, 32)},
        EAGER,
        other_softmaxes=4,
    ),
    "lw_detr": Example(
        "LwDetrModel",
        lambda: hf.LwDetrConfig(
            backbone_config={
                **{"model_type": "lw_detr_vit", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
                **{"image_size": 64, "pretrain_image_size": 32, "patch_size": 4, "window_block_indices": [0, 2]},
                **{"out_indices": [2, 3]},
            },
            **{"projector_scale_factors": (1.0,), "projector_out_channels": 32, "d_model": 32, "decoder_ffn_dim": 37},
            **{"decoder_layers": 2, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4},
            **{"num_queries": 6, "group_detr": 1},
        ),
        lambda: {"pixel_values": numbers(2, 3, 64, 64)},
        BOTH,
    ),
    "idefics": Example(
        "IdeficsModel",
        lambda: hf.IdeficsConfig(
            **TEXT,
            use_resampler=True,
            vision_config={
                **{"embed_dim": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4},
                **{"image_size": 16, "patch_size": 4},
            },
            perceiver_config={
                **{"use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 2},
                **{"resampler_n_heads": 4, "resampler_head_dim": 8},
            },
        ),
        _interleaved,
        BOTH,
    ),
    "mllama": Example(
        "MllamaModel",
        lambda: hf.MllamaConfig(
            text_config=TEXT | _SPECIAL | {"num_key_value_heads": 2, "cross_attention_layers": [1]},
            vision_config={
                **{"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4},
                **{"intermediate_size": 37, "vision_output_dim": 64, "image_size": 16, "patch_size": 4},
                **{"max_num_tiles": 2, "intermediate_layers_indices": [1]},
                **{"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
            },
            image_token_index=95,
        ),
        _tiled,
        BOTH,
    ),
    "pix2struct": Example(
        "Pix2StructForConditionalGeneration",
        lambda: hf.Pix2StructConfig(
            text_config={
                **{"vocab_size": 99, "hidden_size": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4},
            },
            vision_config={
                **{"hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 37, "d_kv": 8, "seq_len": 16},
                **{"num_hidden_layers": 2, "num_attention_heads": 4},
            },
        ),
        _flattened,
        EAGER,
    ),
    "pi0": Example(
        "PI0Model",
        lambda: hf.PI0Config(
            vlm_config={
                **{"model_type": "paligemma", "image_token_index": 91, "projection_dim": 32, "hidden_size": 32},
                "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
                "text_config": _GEMMA,
            },
            dit_config=_GEMMA,
        ),
        _prompted_actions,
        EAGER,
    ),
    "moonshine": Example(
        "MoonshineModel",
        lambda: hf.MoonshineConfig(
            **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37},
            **{"encoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "encoder_num_key_value_heads": 4},
            **{"decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "decoder_num_key_value_heads": 4},
        ),
        _spoken,
        BOTH,
    ),
}
