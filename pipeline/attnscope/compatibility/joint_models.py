"""Models that read several modalities, sound, or plain numbers."""

from typing import Any

import torch
import transformers as hf

from attnscope.compatibility.examples import (
    BOTH,
    EAGER,
    GROUPED,
    SEQ2SEQ,
    TEXT,
    VISION,
    Example,
    Inputs,
    image,
    numbers,
    text,
)

CONVOLUTIONS = {
    **{"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}


def padded_sound() -> Inputs:
    """Two sounds of 400 and 250 samples."""
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 250:] = 0
    return {"input_values": numbers(2, 400), "attention_mask": mask}


def padded_prompt(tokens: int) -> Inputs:
    """So many image tokens before nine of text, the second sample's last three of them padding."""
    words = text()
    images = torch.full((2, tokens), 95)
    return {
        "input_ids": torch.cat([images, words["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), words["attention_mask"]], dim=1),
    }


def _two_towers(config: Any, **extra: Any) -> Any:
    return config(text_config=TEXT | extra.pop("text", {}), vision_config=VISION | extra.pop("vision", {}), **extra)


def _qwen_inputs() -> Inputs:
    """Two images of 4 x 4 and 8 x 4 patches, four and eight merged image tokens."""
    ids = torch.tensor([[97] + [95] * 4 + [98, 5, 6, 7, 8, 9, 10, 11], [97] + [95] * 8 + [98, 5, 6, 7]])
    patches = numbers(16 + 32, 3 * 2 * 4 * 4)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 8, 4]]),
        "mm_token_type_ids": (ids == 95).long(),
    }


EXAMPLES: dict[str, Example] = {
    "whisper": Example(
        "WhisperModel",
        lambda: hf.WhisperConfig(
            **(SEQ2SEQ | {"max_position_embeddings": 64}),
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        lambda: {"input_features": numbers(2, 8, 20), "decoder_input_ids": text(5)["input_ids"]},
        BOTH,
    ),
    "wav2vec2": Example(
        "Wav2Vec2Model",
        lambda: hf.Wav2Vec2Config(
            **TEXT,
            conv_dim=(8, 8),
            conv_stride=(4, 4),
            conv_kernel=(8, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        padded_sound,
        BOTH,
    ),
    "speecht5": Example(
        "SpeechT5Model",
        lambda: hf.SpeechT5Config(
            **{
                "hidden_size": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 37,
                "decoder_ffn_dim": 37,
            }
        ),
        lambda: {"input_values": numbers(2, 9, 32), "decoder_input_values": numbers(2, 5, 32)},
        EAGER,
    ),
    "clip": Example("CLIPModel", lambda: _two_towers(hf.CLIPConfig, projection_dim=16), lambda: text() | image(), BOTH),
    "siglip": Example("SiglipModel", lambda: _two_towers(hf.SiglipConfig), lambda: text() | image(), BOTH),
    "altclip": Example(
        "AltCLIPModel", lambda: _two_towers(hf.AltCLIPConfig, projection_dim=16), lambda: text() | image(), BOTH
    ),
    "chinese_clip": Example(
        "ChineseCLIPModel", lambda: _two_towers(hf.ChineseCLIPConfig, projection_dim=16), lambda: text() | image(), BOTH
    ),
    "owlvit": Example(
        "OwlViTModel", lambda: _two_towers(hf.OwlViTConfig, projection_dim=16), lambda: text() | image(), BOTH
    ),
    "flava": Example(
        "FlavaModel",
        lambda: hf.FlavaConfig(
            text_config=TEXT, image_config=VISION, multimodal_config=TEXT, projection_dim=16, hidden_size=32
        ),
        lambda: text() | image(),
        EAGER,
    ),
    "vilt": Example("ViltModel", lambda: hf.ViltConfig(**(TEXT | VISION)), lambda: text() | image(), EAGER),
    "lxmert": Example(
        "LxmertModel",
        lambda: hf.LxmertConfig(
            **{key: TEXT[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")},
            l_layers=2,
            x_layers=2,
            r_layers=2,
            visual_feat_dim=10,
        ),
        lambda: text() | {"visual_feats": numbers(2, 6, 10), "visual_pos": numbers(2, 6, 4)},
        EAGER,
    ),
    "visual_bert": Example(
        "VisualBertModel",
        lambda: hf.VisualBertConfig(**TEXT, visual_embedding_dim=10),
        lambda: text() | {"visual_embeds": numbers(2, 6, 10), "visual_attention_mask": torch.ones(2, 6)},
        EAGER,
    ),
    "bridgetower": Example(
        "BridgeTowerModel",
        lambda: hf.BridgeTowerConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            text_config=TEXT | {"hidden_size": 64},
            vision_config={"hidden_size": 64, "num_hidden_layers": 3, "image_size": 16, "patch_size": 4},
        ),
        lambda: text() | image(),
        EAGER,
    ),
    "blip": Example(
        "BlipForConditionalGeneration",
        lambda: _two_towers(
            hf.BlipConfig,
            text={
                "encoder_hidden_size": 32,
                "is_decoder": True,
                "bos_token_id": 1,
                "sep_token_id": 2,
                "pad_token_id": 0,
            },
        ),
        lambda: text() | image(),
        EAGER,
    ),
    "git": Example("GitModel", lambda: hf.GitConfig(**TEXT, vision_config=VISION), lambda: text() | image(), EAGER),
    "perceiver": Example(
        "PerceiverModel",
        lambda: hf.PerceiverConfig(
            num_latents=4,
            d_latents=16,
            d_model=32,
            num_blocks=1,
            num_self_attends_per_block=2,
            num_self_attention_heads=2,
            num_cross_attention_heads=2,
        ),
        lambda: {"inputs": numbers(2, 9, 32)},
        EAGER,
    ),
    "layoutlmv3": Example(
        "LayoutLMv3Model",
        lambda: hf.LayoutLMv3Config(**TEXT, input_size=16, patch_size=4, coordinate_size=4, shape_size=8),
        lambda: text() | {"bbox": torch.arange(72).view(2, 9, 4) % 50},
        EAGER,
    ),
    "lilt": Example(
        "LiltModel",
        lambda: hf.LiltConfig(**(TEXT | {"hidden_size": 24}), channel_shrink_ratio=2, max_2d_position_embeddings=64),
        lambda: text() | {"bbox": (torch.arange(72).view(2, 9, 4) % 25).sort(-1).values},
        EAGER,
    ),
    "qwen2_vl": Example(
        "Qwen2VLForConditionalGeneration",
        lambda: hf.Qwen2VLConfig(
            text_config=GROUPED
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            image_token_id=95,
            video_token_id=96,
            vision_start_token_id=97,
            vision_end_token_id=98,
            vocab_size=99,
        ),
        _qwen_inputs,
        BOTH,
    ),
    "qwen2_5_vl": Example(
        "Qwen2_5_VLForConditionalGeneration",
        lambda: hf.Qwen2_5_VLConfig(
            text_config=GROUPED
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "num_heads": 4,
                "intermediate_size": 37,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            image_token_id=95,
            video_token_id=96,
            vision_start_token_id=97,
            vision_end_token_id=98,
            vocab_size=99,
        ),
        _qwen_inputs,
        BOTH,
    ),
    "llava": Example(
        "LlavaForConditionalGeneration",
        lambda: hf.LlavaConfig(
            text_config=GROUPED | {"model_type": "llama"},
            vision_config=VISION | {"model_type": "clip_vision_model"},
            image_token_id=95,
            vision_feature_layer=-1,
        ),
        lambda: {"input_ids": torch.tensor([[1] + [95] * 16 + [5, 6, 7]] * 2), "pixel_values": numbers(2, 3, 16, 16)},
        BOTH,
    ),
    "blip_2": Example(
        "Blip2ForConditionalGeneration",
        lambda: hf.Blip2Config(
            vision_config=VISION,
            qformer_config=TEXT | {"encoder_hidden_size": 32, "cross_attention_frequency": 2},
            text_config={
                "model_type": "opt",
                "vocab_size": 99,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffn_dim": 37,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": 64,
            },
            num_query_tokens=4,
            image_token_index=95,
        ),
        lambda: {"input_ids": torch.tensor([[95] * 4 + [5, 6, 7]] * 2), "pixel_values": numbers(2, 3, 16, 16)},
        BOTH,
    ),
    "hubert": Example("HubertModel", lambda: hf.HubertConfig(**TEXT, **CONVOLUTIONS), padded_sound, BOTH),
    "wavlm": Example("WavLMModel", lambda: hf.WavLMConfig(**TEXT, **CONVOLUTIONS), padded_sound, EAGER),
    "sew": Example("SEWModel", lambda: hf.SEWConfig(**TEXT, **CONVOLUTIONS, squeeze_factor=2), padded_sound, EAGER),
    "ast": Example(
        "ASTModel",
        lambda: hf.ASTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            patch_size=4,
            max_length=16,
            num_mel_bins=16,
            frequency_stride=4,
            time_stride=4,
        ),
        lambda: {"input_values": numbers(2, 16, 16)},
        BOTH,
    ),
    "clap_audio": Example(
        "ClapAudioModel",
        lambda: hf.ClapAudioConfig(
            window_size=4,
            num_mel_bins=16,
            spec_size=32,
            patch_size=4,
            patch_stride=[4, 4],
            patch_embeds_hidden_size=8,
            hidden_size=32,
            depths=[1, 1],
            num_attention_heads=[2, 2],
            num_hidden_layers=2,
            num_classes=3,
            patch_embed_input_channels=1,
        ),
        lambda: {"input_features": numbers(2, 1, 64, 16)},
        EAGER,
    ),
    "patchtst": Example(
        "PatchTSTModel",
        lambda: hf.PatchTSTConfig(
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            d_model=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=37,
        ),
        lambda: {"past_values": numbers(2, 16, 2)},
        BOTH,
    ),
    "decision_transformer": Example(
        "DecisionTransformerModel",
        lambda: hf.DecisionTransformerConfig(
            state_dim=5, act_dim=3, hidden_size=32, n_layer=2, n_head=4, max_ep_len=20
        ),
        lambda: {
            "states": numbers(2, 4, 5),
            "actions": numbers(2, 4, 3),
            "rewards": numbers(2, 4, 1),
            "returns_to_go": numbers(2, 4, 1),
            "timesteps": torch.arange(4).repeat(2, 1),
            "attention_mask": torch.ones(2, 4),
        },
        BOTH,
    ),
    "aya_vision": Example(
        "AyaVisionForConditionalGeneration",
        lambda: hf.AyaVisionConfig(
            text_config=GROUPED | {"model_type": "cohere2"},
            vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_id=95,
            downsample_factor=2,
            adapter_layer_norm_eps=1e-6,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        lambda: padded_prompt(4) | image(),
        BOTH,
    ),
    "mistral3": Example(
        "Mistral3ForConditionalGeneration",
        lambda: hf.Mistral3Config(
            text_config=GROUPED | {"model_type": "mistral"},
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
            image_token_index=95,
            vision_feature_layer=-1,
            spatial_merge_size=2,
        ),
        lambda: padded_prompt(4) | image() | {"image_sizes": torch.tensor([[16, 16]] * 2)},
        BOTH,
    ),
}
