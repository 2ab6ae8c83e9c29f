"""Models whose attention no other example has: to chosen keys, over bytes or codebooks, in two directions at once."""

from typing import Any

import torch
import transformers as hf

from attnscope.compatibility.examples import BOTH, EAGER, GROUPED, TEXT, VISION, Example, Inputs, image, numbers, text
from attnscope.compatibility.joint_models import padded_prompt

_IMAGE, _SOUND = 95, 93
_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"num_key_value_heads": 4, "n_shared_experts": 1},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
}
_CONVOLUTIONS = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [1]}


def _bytes() -> Any:
    """BLT: an entropy model cuts bytes into patches, which read them and are read by them."""
    layers = TEXT | {"num_key_value_heads": 4}
    local = layers | {"cross_attn_all_layers": True, "cross_attn_k": 2, "hidden_size_global": 64}
    return hf.BltConfig(
        vocab_size=99,
        use_cache=False,
        encoder_hash_byte_group_size=[2, 3],
        encoder_hash_byte_group_vocab=64,
        max_position_embeddings=64,
        patcher_config=layers,
        encoder_config=local,
        decoder_config=local,
        global_config=layers | {"hidden_size": 64},
    )


def _codebooks() -> Inputs:
    """A text, and targets of three codes a frame."""
    generator = torch.Generator().manual_seed(4)
    return text() | {"decoder_input_ids": torch.randint(5, 90, (2, 7, 3), generator=generator)}


def _packed_images() -> Inputs:
    """Two images of 4 x 4 and 8 x 4 patches, and the second text padded."""
    ids = torch.tensor([[97] + [_IMAGE] * 8 + [98, 5, 6, 7, 8], [97] + [_IMAGE] * 4 + [98, 5, 6] + [0] * 6])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "pixel_values": numbers(32 + 16, 3 * 2 * 4 * 4) / 2,
        "image_grid_thw": torch.tensor([[1, 8, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == _IMAGE).long(),
    }


def _image_and_sound() -> Inputs:
    """Two images of 4 x 4 patches with their places, and two sounds, the second one padded."""
    ids = torch.tensor(
        [
            [97] + [_IMAGE] * 4 + [98, 5, 6] + [_SOUND] * 6 + [7, 8],
            [97] + [_IMAGE] * 4 + [98, 5] + [_SOUND] * 4 + [0] * 5,
        ]
    )
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
    heard = torch.ones(2, 24, dtype=torch.bool)
    heard[1, 16:] = False
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "pixel_values": numbers(2, 16, 3 * 4 * 4).sigmoid(),
        "image_position_ids": places.expand(2, 16, 2),
        "input_features": numbers(2, 24, 8),
        "input_features_mask": heard,
        "mm_token_type_ids": (ids == _IMAGE).long() + 3 * (ids == _SOUND).long(),
    }


def _padded_image() -> Inputs:
    """Two images of 64 x 64 pixels, the second one padded from column 40 on."""
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 40:] = 0
    return image(64) | {"pixel_mask": mask}


EXAMPLES: dict[str, Example] = {
    "deepseek_v32": Example(
        "DeepseekV32Model",
        lambda: hf.DeepseekV32Config(**TEXT, **_LATENT, index_topk=4, index_head_dim=16, index_n_heads=2),
        text,
        BOTH,
    ),
    "blt": Example("BltModel", _bytes, lambda: text(16), EAGER, other_softmaxes=1),
    "dia": Example(
        "DiaModel",
        lambda: hf.DiaConfig(
            encoder_config=GROUPED | {"num_key_value_heads": 4},
            decoder_config=GROUPED
            | {"num_channels": 3, "cross_hidden_size": 32, "cross_head_dim": 8}
            | {"cross_num_attention_heads": 4, "cross_num_key_value_heads": 4}
            | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            delay_pattern=[0, 1, 2],
        ),
        _codebooks,
        EAGER,
    ),
    "aimv2_vision": Example("Aimv2VisionModel", lambda: hf.Aimv2VisionConfig(**VISION), image, BOTH, output_only=BOTH),
    "grounding_dino": Example(
        "GroundingDinoModel",
        lambda: hf.GroundingDinoConfig(
            backbone_config=hf.SwinConfig(
                embed_dim=16, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=4, out_features=["stage2", "stage3"]
            ),
            text_config=TEXT,
            d_model=32,
            num_queries=6,
            encoder_layers=2,
            encoder_ffn_dim=37,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_ffn_dim=37,
            decoder_attention_heads=4,
            num_feature_levels=2,
            disable_custom_kernels=True,
        ),
        lambda: text() | _padded_image(),
        EAGER,
    ),
    "glm4v": Example(
        "Glm4vModel",
        lambda: hf.Glm4vConfig(
            text_config=GROUPED | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={
                **{"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 37, "out_hidden_size": 32},
                **{"image_size": 16, "patch_size": 4},
            },
            image_token_id=_IMAGE,
            video_token_id=96,
            image_start_token_id=97,
            image_end_token_id=98,
        ),
        _packed_images,
        EAGER,
    ),
    "gemma4": Example(
        "Gemma4Model",
        lambda: hf.Gemma4Config(
            text_config=GROUPED
            | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "global_head_dim": 16}
            | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99},
            vision_config=VISION | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 2},
            audio_config={
                **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "output_proj_dims": 32},
                **{"subsampling_conv_channels": [8, 4], "attention_chunk_size": 4, "attention_context_left": 5},
            },
            image_token_id=_IMAGE,
            audio_token_id=_SOUND,
        ),
        _image_and_sound,
        EAGER,
    ),
    "emu3": Example(
        "Emu3Model",
        lambda: hf.Emu3Config(
            text_config=GROUPED | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            vq_config=_CONVOLUTIONS
            | {"codebook_size": 32, "embed_dim": 8, "latent_channels": 8, "hidden_size": 64}
            | {"temporal_downsample_factor": 1},
            vocabulary_map={"<image>": _IMAGE, "<|extra_200|>": 90}
            | {f"<|visual token {code:06d}|>": 20 + code for code in range(32)},
        ),
        lambda: padded_prompt(72) | image() | {"image_sizes": torch.tensor([[16, 16]] * 2)},
        EAGER,
    ),
}
