"""Every family: recorded attention equals the softmax of the model's own eager code; outputs stay what they were."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnscope.recording import AttentionCall, recording

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 99}
VISION = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37},
    **{"image_size": 16, "patch_size": 4},
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64},
}

Inputs = dict[str, Any]


def text(length: int = 9, side: str = "right") -> Inputs:
    """Two token sequences, the second one padded by three tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, slice(-3, None) if side == "right" else slice(0, 3)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(size: int = 16, batch: int = 2) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


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


def widened(model: nn.Module, std: float = 0.2) -> nn.Module:
    """The model with weights wide enough for attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + centre)
    return model.eval()


def build(name: str, kernel: str) -> tuple[nn.Module, Inputs]:
    """A family's model with the given attention implementation, and inputs for it."""
    model, config, inputs, _ = FAMILIES[name]
    return widened(getattr(hf, model)._from_config(config(), attn_implementation=kernel)), inputs()


# name: (model class, configuration, inputs, implementations)
Family = tuple[str, Callable[[], Any], Callable[[], Inputs], tuple[str, ...]]
BOTH, EAGER = ("sdpa", "eager"), ("eager",)


def _two_towers(config: Any, **extra: Any) -> Any:
    return config(text_config=TEXT | extra.pop("text", {}), vision_config=VISION | extra.pop("vision", {}), **extra)


FAMILIES: dict[str, Family] = {
    "bert": ("BertModel", lambda: hf.BertConfig(**TEXT), text, BOTH),
    "roberta": ("RobertaModel", lambda: hf.RobertaConfig(**TEXT), text, BOTH),
    "distilbert": (
        "DistilBertModel",
        lambda: hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37),
        text,
        BOTH,
    ),
    "electra": ("ElectraModel", lambda: hf.ElectraConfig(**TEXT, embedding_size=32), text, BOTH),
    "albert": ("AlbertModel", lambda: hf.AlbertConfig(**TEXT, embedding_size=16), text, BOTH),
    "modernbert": (
        "ModernBertModel",
        lambda: hf.ModernBertConfig(**TEXT, pad_token_id=0, local_attention=4, global_attn_every_n_layers=2),
        text,
        BOTH,
    ),
    "deberta": ("DebertaModel", lambda: hf.DebertaConfig(**TEXT), text, EAGER),
    "deberta_relative": (
        "DebertaModel",
        lambda: hf.DebertaConfig(
            **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16
        ),
        text,
        EAGER,
    ),
    "deberta_v2": (
        "DebertaV2Model",
        lambda: hf.DebertaV2Config(
            **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16
        ),
        text,
        EAGER,
    ),
    "mpnet": ("MPNetModel", lambda: hf.MPNetConfig(**TEXT), text, EAGER),
    "squeezebert": (
        "SqueezeBertModel",
        lambda: hf.SqueezeBertConfig(**(TEXT | {"intermediate_size": 64}), embedding_size=32),
        text,
        EAGER,
    ),
    "convbert": ("ConvBertModel", lambda: hf.ConvBertConfig(**TEXT, embedding_size=32), text, EAGER),
    "longformer": ("LongformerModel", lambda: hf.LongformerConfig(**TEXT, attention_window=4), text, EAGER),
    "big_bird": (
        "BigBirdModel",
        lambda: hf.BigBirdConfig(**TEXT, block_size=2, num_random_blocks=1, attention_type="block_sparse"),
        lambda: text(32),
        EAGER,
    ),
    "funnel": (
        "FunnelModel",
        lambda: hf.FunnelConfig(
            **{"vocab_size": 99, "d_model": 32, "n_head": 4, "d_head": 8},
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_inner=37,
        ),
        text,
        EAGER,
    ),
    "canine": (
        "CanineModel",
        lambda: hf.CanineConfig(**TEXT, local_transformer_stride=8, downsampling_rate=4),
        lambda: text(32),
        EAGER,
    ),
    "roformer": ("RoFormerModel", lambda: hf.RoFormerConfig(**TEXT), text, EAGER),
    "nystromformer": (
        "NystromformerModel",
        lambda: hf.NystromformerConfig(**TEXT, num_landmarks=4, segment_means_seq_len=8, conv_kernel_size=3),
        lambda: {"input_ids": text(8)["input_ids"]},
        EAGER,
    ),
    "ibert": ("IBertModel", lambda: hf.IBertConfig(**TEXT), text, EAGER),
    "rembert": ("RemBertModel", lambda: hf.RemBertConfig(**TEXT, input_embedding_size=32), text, EAGER),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4), text, BOTH),
    "gpt2_upcast": (
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(
            vocab_size=99,
            n_embd=32,
            n_layer=2,
            n_head=4,
            scale_attn_by_inverse_layer_idx=True,
            reorder_and_upcast_attn=True,
        ),
        text,
        BOTH,
    ),
    "gptj": (
        "GPTJModel",
        lambda: hf.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
        text,
        EAGER,
    ),
    "gpt_neo": (
        "GPTNeoModel",
        lambda: hf.GPTNeoConfig(
            vocab_size=99,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
        ),
        text,
        EAGER,
    ),
    "openai_gpt": (
        "OpenAIGPTModel",
        lambda: hf.OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4),
        text,
        EAGER,
    ),
    "codegen": (
        "CodeGenModel",
        lambda: hf.CodeGenConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        text,
        EAGER,
    ),
    "bloom": ("BloomModel", lambda: hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4), text, EAGER),
    "mpt": (
        "MptModel",
        lambda: hf.MptConfig(vocab_size=99, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
        text,
        EAGER,
    ),
    "falcon": (
        "FalconModel",
        lambda: hf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        text,
        BOTH,
    ),
    "falcon_alibi": (
        "FalconModel",
        lambda: hf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        text,
        BOTH,
    ),
    "xglm": (
        "XGLMModel",
        lambda: hf.XGLMConfig(vocab_size=99, d_model=32, num_layers=2, attention_heads=4, ffn_dim=37),
        text,
        EAGER,
    ),
    "xlnet": (
        "XLNetModel",
        lambda: hf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=37),
        text,
        EAGER,
    ),
    "xlm": ("XLMModel", lambda: hf.XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4), text, EAGER),
    "flaubert": (
        "FlaubertModel",
        lambda: hf.FlaubertConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4),
        text,
        EAGER,
    ),
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**GROUPED), text, BOTH),
    "llama_left": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**GROUPED), lambda: text(side="left"), BOTH),
    "mistral_sliding": ("MistralModel", lambda: hf.MistralConfig(**GROUPED, sliding_window=4), text, BOTH),
    "qwen3": ("Qwen3Model", lambda: hf.Qwen3Config(**GROUPED), text, BOTH),
    "gemma2": (
        "Gemma2Model",
        lambda: hf.Gemma2Config(**GROUPED, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, sliding_window=4),
        text,
        EAGER,
    ),
    "gpt_oss": (
        "GptOssModel",
        lambda: hf.GptOssConfig(
            **(GROUPED | {"intermediate_size": 64, "hidden_size": 64}),
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=4,
        ),
        text,
        EAGER,
    ),
    "granite_swa": ("GraniteSWAModel", lambda: hf.GraniteSWAConfig(**GROUPED), text, EAGER),
    "deepseek_v3": (
        "DeepseekV3Model",
        lambda: hf.DeepseekV3Config(
            **TEXT,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=2,
            moe_intermediate_size=16,
            n_shared_experts=1,
        ),
        text,
        BOTH,
    ),
    "t5": (
        "T5Model",
        lambda: hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4),
        lambda: text() | {"decoder_input_ids": text(5)["input_ids"]},
        BOTH,
    ),
    "bart": ("BartModel", lambda: hf.BartConfig(**SEQ2SEQ), text, BOTH),
    "mbart": ("MBartModel", lambda: hf.MBartConfig(**SEQ2SEQ), text, BOTH),
    "led": ("LEDModel", lambda: hf.LEDConfig(**SEQ2SEQ, attention_window=4), text, EAGER),
    "prophetnet": (
        "ProphetNetModel",
        lambda: hf.ProphetNetConfig(
            vocab_size=99,
            hidden_size=32,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=37,
            decoder_ffn_dim=37,
            max_position_embeddings=64,
        ),
        lambda: text() | {"decoder_input_ids": text(5)["input_ids"]},
        EAGER,
    ),
    "whisper": (
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
    "wav2vec2": (
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
        lambda: {"input_values": numbers(2, 400)},
        BOTH,
    ),
    "speecht5": (
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
    "vit": ("ViTModel", lambda: hf.ViTConfig(**VISION), image, BOTH),
    "deit": ("DeiTModel", lambda: hf.DeiTConfig(**VISION), image, BOTH),
    "dinov2": ("Dinov2Model", lambda: hf.Dinov2Config(**VISION), image, BOTH),
    "dinov3": ("DINOv3ViTModel", lambda: hf.DINOv3ViTConfig(**VISION), image, BOTH),
    "beit": ("BeitModel", lambda: hf.BeitConfig(**VISION, use_relative_position_bias=True), image, BOTH),
    "swin": (
        "SwinModel",
        lambda: hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4),
        image,
        BOTH,
    ),
    "swinv2": (
        "Swinv2Model",
        lambda: hf.Swinv2Config(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        image,
        EAGER,
    ),
    "swin2sr": (
        "Swin2SRModel",
        lambda: hf.Swin2SRConfig(image_size=16, patch_size=1, embed_dim=8, depths=[2], num_heads=[2], window_size=4),
        image,
        EAGER,
    ),
    "donut_swin": (
        "DonutSwinModel",
        lambda: hf.DonutSwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        image,
        EAGER,
    ),
    "maskformer_swin": (
        "MaskFormerSwinModel",
        lambda: hf.MaskFormerSwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        image,
        EAGER,
    ),
    "cvt": (
        "CvtModel",
        lambda: hf.CvtConfig(
            embed_dim=[8, 16],
            num_heads=[1, 2],
            depth=[1, 2],
            patch_sizes=[7, 3],
            patch_stride=[4, 2],
            patch_padding=[2, 1],
            mlp_ratio=[2.0, 2.0],
            attention_drop_rate=[0.0, 0.0],
            drop_rate=[0.0, 0.0],
            drop_path_rate=[0.0, 0.0],
            qkv_bias=[True, True],
            cls_token=[False, True],
            qkv_projection_method=["dw_bn", "dw_bn"],
            kernel_qkv=[3, 3],
            padding_kv=[1, 1],
            stride_kv=[2, 2],
            padding_q=[1, 1],
            stride_q=[1, 1],
        ),
        lambda: image(32),
        EAGER,
    ),
    "pvt": (
        "PvtModel",
        lambda: hf.PvtConfig(
            image_size=32, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]
        ),
        lambda: image(32),
        EAGER,
    ),
    "pvt_v2": (
        "PvtV2Model",
        lambda: hf.PvtV2Config(
            image_size=32, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]
        ),
        lambda: image(32),
        EAGER,
    ),
    "segformer": (
        "SegformerModel",
        lambda: hf.SegformerConfig(hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]),
        lambda: image(32),
        EAGER,
    ),
    "glpn": (
        "GLPNModel",
        lambda: hf.GLPNConfig(hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]),
        lambda: image(32),
        EAGER,
    ),
    "levit": (
        "LevitModel",
        lambda: hf.LevitConfig(
            image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]
        ),
        lambda: image(64),
        EAGER,
    ),
    "mobilevit": (
        "MobileViTModel",
        lambda: hf.MobileViTConfig(
            image_size=64,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
            num_attention_heads=4,
        ),
        lambda: image(64),
        EAGER,
    ),
    "mobilevitv2": (
        "MobileViTV2Model",
        lambda: hf.MobileViTV2Config(image_size=64, width_multiplier=0.25),
        lambda: image(64),
        EAGER,
    ),
    "swiftformer": (
        "SwiftFormerModel",
        lambda: hf.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 16]),
        lambda: image(64),
        EAGER,
    ),
    "hiera": (
        "HieraModel",
        lambda: hf.HieraConfig(
            image_size=[32, 32],
            patch_size=[3, 3],
            patch_stride=[4, 4],
            patch_padding=[1, 1],
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            query_stride=[2, 2],
            masked_unit_size=[2, 2],
            masked_unit_attention=[True, False],
            num_query_pool=1,
        ),
        lambda: image(32),
        EAGER,
    ),
    "groupvit_vision": (
        "GroupViTVisionModel",
        lambda: hf.GroupViTVisionConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            num_attention_heads=4,
            intermediate_size=37,
            depths=[1, 1],
            num_group_tokens=[4, 0],
            num_output_groups=[2, 8],
        ),
        image,
        EAGER,
    ),
    "vitdet": (
        "VitDetModel",
        lambda: hf.VitDetConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            window_size=2,
            window_block_indices=[0],
            use_relative_position_embeddings=True,
        ),
        image,
        EAGER,
    ),
    "timesformer": (
        "TimesformerModel",
        lambda: hf.TimesformerConfig(**VISION, num_frames=2),
        lambda: {"pixel_values": numbers(2, 2, 3, 16, 16)},
        EAGER,
    ),
    "videomae": (
        "VideoMAEModel",
        lambda: hf.VideoMAEConfig(**VISION, num_frames=4),
        lambda: {"pixel_values": numbers(2, 4, 3, 16, 16)},
        BOTH,
    ),
    "yolos": (
        "YolosModel",
        lambda: hf.YolosConfig(**(VISION | {"image_size": [16, 16]}), num_detection_tokens=3),
        image,
        BOTH,
    ),
    "sam_vision": (
        "SamVisionModel",
        lambda: hf.SamVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            window_size=2,
            global_attn_indexes=[1],
            output_channels=8,
            mlp_dim=37,
        ),
        image,
        BOTH,
    ),
    "clip": ("CLIPModel", lambda: _two_towers(hf.CLIPConfig, projection_dim=16), lambda: text() | image(), BOTH),
    "siglip": ("SiglipModel", lambda: _two_towers(hf.SiglipConfig), lambda: text() | image(), BOTH),
    "altclip": (
        "AltCLIPModel",
        lambda: _two_towers(hf.AltCLIPConfig, projection_dim=16),
        lambda: text() | image(),
        BOTH,
    ),
    "chinese_clip": (
        "ChineseCLIPModel",
        lambda: _two_towers(hf.ChineseCLIPConfig, projection_dim=16),
        lambda: text() | image(),
        BOTH,
    ),
    "owlvit": ("OwlViTModel", lambda: _two_towers(hf.OwlViTConfig, projection_dim=16), lambda: text() | image(), BOTH),
    "flava": (
        "FlavaModel",
        lambda: hf.FlavaConfig(
            text_config=TEXT, image_config=VISION, multimodal_config=TEXT, projection_dim=16, hidden_size=32
        ),
        lambda: text() | image(),
        EAGER,
    ),
    "vilt": ("ViltModel", lambda: hf.ViltConfig(**(TEXT | VISION)), lambda: text() | image(), EAGER),
    "lxmert": (
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
    "visual_bert": (
        "VisualBertModel",
        lambda: hf.VisualBertConfig(**TEXT, visual_embedding_dim=10),
        lambda: text() | {"visual_embeds": numbers(2, 6, 10), "visual_attention_mask": torch.ones(2, 6)},
        EAGER,
    ),
    "bridgetower": (
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
    "blip": (
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
    "git": ("GitModel", lambda: hf.GitConfig(**TEXT, vision_config=VISION), lambda: text() | image(), EAGER),
    "perceiver": (
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
    "tapas": ("TapasModel", lambda: hf.TapasConfig(**TEXT), text, EAGER),
    "layoutlmv3": (
        "LayoutLMv3Model",
        lambda: hf.LayoutLMv3Config(**TEXT, input_size=16, patch_size=4, coordinate_size=4, shape_size=8),
        lambda: text() | {"bbox": torch.arange(72).view(2, 9, 4) % 50},
        EAGER,
    ),
    "lilt": (
        "LiltModel",
        lambda: hf.LiltConfig(**(TEXT | {"hidden_size": 24}), channel_shrink_ratio=2, max_2d_position_embeddings=64),
        lambda: text() | {"bbox": (torch.arange(72).view(2, 9, 4) % 25).sort(-1).values},
        EAGER,
    ),
    "luke": ("LukeModel", lambda: hf.LukeConfig(**TEXT, entity_vocab_size=9, entity_emb_size=16), text, EAGER),
    "xmod": ("XmodModel", lambda: hf.XmodConfig(**TEXT, default_language="en_XX"), text, BOTH),
    "qwen2_vl": (
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
    "qwen2_5_vl": (
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
    "llava": (
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
    "blip_2": (
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
}


class SoftmaxSpy(TorchFunctionMode):
    """What every softmax returned, in order: the model's own attention, seen by other means than the taps."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.multi_head_attention_forward:
            wanted = kwargs.get("need_weights", True)
            output, weights = func(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))
            self.seen.append(weights.detach().clone())
            return output, weights if wanted else None
        result = func(*args, **kwargs)
        if func in (torch.softmax, Tensor.softmax, nn.functional.softmax):
            self.seen.append(result.detach().clone())
        return result


@contextmanager
def seeded() -> Iterator[None]:
    """A fixed random state, as some models draw positions in every forward."""
    torch.manual_seed(4)
    yield


def first_tensor(output: Any) -> Tensor:
    values = output.values() if hasattr(output, "values") else [output]
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    with seeded(), torch.no_grad():
        return first_tensor(model(**inputs))


def own_softmaxes(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    spy = SoftmaxSpy()
    with spy:
        run(model, inputs)
    return spy.seen


def call_error(call: AttentionCall, own: Tensor) -> float:
    """Largest difference between a call's attention and the model's own softmax, over valid rows; inf if none fits."""
    attention = call.attention()
    if own.shape[-1] == attention.shape[-1] + 1:
        own = own[..., :-1]
    if own.dim() == 5 and own.shape[2] * own.shape[0] == attention.shape[0]:
        own = own.transpose(1, 2)  # Hiera: (batch, head, window, ...)
    if own.dim() == 4 and own.shape != attention.shape == own.transpose(1, 2).shape:
        own = own.transpose(1, 2)  # Longformer: (batch, query_token, head, ...)
    if own.numel() != attention.numel():
        return math.inf
    difference = (attention - own.reshape(attention.shape).float()).abs().amax(dim=-1)
    valid = call.row_valid().expand(difference.shape)
    return float(difference[valid].max()) if valid.any() else math.inf


def matched_errors(calls: list[AttentionCall], own: list[Tensor]) -> list[float]:
    """Error of each call against the first of the model's softmaxes that no other call is closest to."""
    left, errors = list(own), []
    for call in calls:
        found = [call_error(call, each) for each in left]
        best = min(range(len(found)), key=found.__getitem__, default=None)
        errors.append(math.inf if best is None else found[best])
        if best is not None:
            del left[best]
    return errors


CASES = [(name, kernel) for name, (_, _, _, kernels) in FAMILIES.items() for kernel in kernels]

# Where the model's own softmax is not its attention: a gate beside it (a sink in other words), and an alibi that
# transformers scales differently in eager and sdpa. There the output is the only witness.
OUTPUT_ONLY = {("granite_swa", "eager"), ("falcon_alibi", "sdpa")}
# Softmaxes that are no attention: the router of a mixture of experts.
OTHER_SOFTMAXES = {"gpt_oss": 2}
# Attention without a product of query and key, or one that is cut into blocks: only the probabilities are known.
PROBABILITIES_ONLY = {"convbert": 2, "longformer": 2, "big_bird": 2, "led": 2, "mobilevitv2": 9, "groupvit_vision": 2}


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_recorded_attention_equals_the_models_own(name: str, kernel: str) -> None:
    model, inputs = build(name, kernel)
    plain = run(model, inputs)
    with recording(model) as rec:
        recorded = run(model, inputs)

    assert torch.equal(plain, recorded)
    assert rec.audit.ran == rec.audit.recorded
    own = own_softmaxes(build(name, "eager")[0], inputs)
    assert len(rec) == len(own) - OTHER_SOFTMAXES.get(name, 0)
    if (name, kernel) not in OUTPUT_ONLY:
        assert max(matched_errors(rec.calls, own)) <= 2e-6
    assert all(call.output_error() <= 1e-5 for call in rec if call.output is not None)
    assert sum(call.probabilities is not None for call in rec) == PROBABILITIES_ONLY.get(name, 0)
