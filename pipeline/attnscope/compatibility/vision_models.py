"""Vision models."""

import torch
import transformers as hf

from attnscope.compatibility.examples import BOTH, EAGER, VISION, Example, image, numbers

EXAMPLES: dict[str, Example] = {
    "vit": Example("ViTModel", lambda: hf.ViTConfig(**VISION), image, BOTH),
    "deit": Example("DeiTModel", lambda: hf.DeiTConfig(**VISION), image, BOTH),
    "dinov2": Example("Dinov2Model", lambda: hf.Dinov2Config(**VISION), image, BOTH),
    "dinov3": Example("DINOv3ViTModel", lambda: hf.DINOv3ViTConfig(**VISION), image, BOTH),
    "beit": Example("BeitModel", lambda: hf.BeitConfig(**VISION, use_relative_position_bias=True), image, BOTH),
    "swin": Example(
        "SwinModel",
        lambda: hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4),
        image,
        BOTH,
    ),
    "swinv2": Example(
        "Swinv2Model",
        lambda: hf.Swinv2Config(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        image,
        EAGER,
    ),
    "swin2sr": Example(
        "Swin2SRModel",
        lambda: hf.Swin2SRConfig(image_size=16, patch_size=1, embed_dim=8, depths=[2], num_heads=[2], window_size=4),
        image,
        EAGER,
    ),
    "donut_swin": Example(
        "DonutSwinModel",
        lambda: hf.DonutSwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        image,
        EAGER,
    ),
    "maskformer_swin": Example(
        "MaskFormerSwinModel",
        lambda: hf.MaskFormerSwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        image,
        EAGER,
    ),
    "cvt": Example(
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
    "pvt": Example(
        "PvtModel",
        lambda: hf.PvtConfig(
            image_size=32, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]
        ),
        lambda: image(32),
        EAGER,
    ),
    "pvt_v2": Example(
        "PvtV2Model",
        lambda: hf.PvtV2Config(
            image_size=32, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]
        ),
        lambda: image(32),
        EAGER,
    ),
    "segformer": Example(
        "SegformerModel",
        lambda: hf.SegformerConfig(hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]),
        lambda: image(32),
        EAGER,
    ),
    "glpn": Example(
        "GLPNModel",
        lambda: hf.GLPNConfig(hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1]),
        lambda: image(32),
        EAGER,
    ),
    "levit": Example(
        "LevitModel",
        lambda: hf.LevitConfig(
            image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]
        ),
        lambda: image(64),
        EAGER,
    ),
    "mobilevit": Example(
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
    "mobilevitv2": Example(
        "MobileViTV2Model", lambda: hf.MobileViTV2Config(image_size=64, width_multiplier=0.25), lambda: image(64), EAGER
    ),
    "swiftformer": Example(
        "SwiftFormerModel",
        lambda: hf.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 16]),
        lambda: image(64),
        EAGER,
    ),
    "hiera": Example(
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
    "groupvit_vision": Example(
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
    "vitdet": Example(
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
    "timesformer": Example(
        "TimesformerModel",
        lambda: hf.TimesformerConfig(**VISION, num_frames=2),
        lambda: {"pixel_values": numbers(2, 2, 3, 16, 16)},
        EAGER,
    ),
    "videomae": Example(
        "VideoMAEModel",
        lambda: hf.VideoMAEConfig(**VISION, num_frames=4),
        lambda: {"pixel_values": numbers(2, 4, 3, 16, 16)},
        BOTH,
    ),
    "yolos": Example(
        "YolosModel", lambda: hf.YolosConfig(**(VISION | {"image_size": [16, 16]}), num_detection_tokens=3), image, BOTH
    ),
    "sam_vision": Example(
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
    "dpt": Example("DPTModel", lambda: hf.DPTConfig(**VISION), image, BOTH),
    "vit_mae": Example("ViTMAEModel", lambda: hf.ViTMAEConfig(**VISION, mask_ratio=0.5), image, BOTH),
    "vjepa2": Example(
        "VJEPA2Model",
        lambda: hf.VJEPA2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2,
            crop_size=16,
            patch_size=4,
            frames_per_clip=4,
            tubelet_size=2,
            pred_hidden_size=24,
            pred_num_attention_heads=4,
            pred_num_hidden_layers=2,
        ),
        lambda: {"pixel_values_videos": numbers(2, 4, 3, 16, 16)},
        BOTH,
    ),
    "vivit": Example(
        "VivitModel",
        lambda: hf.VivitConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            image_size=16,
            num_frames=4,
            tubelet_size=[2, 4, 4],
        ),
        lambda: {"pixel_values": numbers(2, 4, 3, 16, 16)},
        BOTH,
    ),
    "deformable_detr": Example(
        "DeformableDetrModel",
        lambda: hf.DeformableDetrConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=37,
            decoder_ffn_dim=37,
            num_queries=5,
            num_feature_levels=2,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=hf.ResNetConfig(
                num_channels=3,
                embeddings_size=8,
                hidden_sizes=[8, 8, 8, 8],
                depths=[1, 1, 1, 1],
                out_features=["stage3", "stage4"],
            ),
        ),
        lambda: image(64),
        EAGER,
    ),
    "mask2former": Example(
        "Mask2FormerModel",
        lambda: hf.Mask2FormerConfig(
            backbone_config=hf.SwinConfig(
                image_size=32,
                patch_size=4,
                embed_dim=8,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 2, 2],
                window_size=4,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            hidden_dim=32,
            mask_feature_size=32,
            feature_size=32,
            num_attention_heads=4,
            encoder_layers=1,
            decoder_layers=2,
            encoder_feedforward_dim=37,
            dim_feedforward=37,
            num_queries=5,
        ),
        lambda: image(64) | {"pixel_mask": torch.ones(2, 64, 64, dtype=torch.long)},
        EAGER,
    ),
    "mgp_str": Example(
        "MgpstrModel",
        lambda: hf.MgpstrConfig(
            image_size=[16, 16],
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_token_length=5,
        ),
        image,
        EAGER,
    ),
    "sam2_vision": Example(
        "Sam2VisionModel",
        lambda: hf.Sam2VisionConfig(
            backbone_config=hf.Sam2HieraDetConfig(
                **{"image_size": [32, 32], "hidden_size": 8, "embed_dim_per_stage": [8, 16]},
                **{"num_attention_heads_per_stage": [1, 2], "blocks_per_stage": [1, 2], "num_query_pool_stages": 1},
                **{"window_size_per_stage": [4, 2], "global_attention_blocks": [2]},
                window_positional_embedding_background_size=[4, 4],
            ),
            backbone_channel_list=[16, 8],
            backbone_feature_sizes=[[8, 8], [4, 4]],
            fpn_top_down_levels=[1],
            fpn_hidden_size=32,
            num_feature_levels=2,
        ),
        lambda: image(32),
        BOTH,
        # Over heads, made and dropped.
        other_softmaxes=3,
    ),
    "rt_detr": Example(
        "RTDetrModel",
        lambda: hf.RTDetrConfig(
            backbone_config=hf.RTDetrResNetConfig(
                **{"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
                **{"layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
            ),
            **{"encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 16], "encoder_ffn_dim": 37},
            **{"decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 37, "decoder_layers": 2, "decoder_n_points": 2},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "num_queries": 5},
        ),
        lambda: image(64),
        EAGER,
    ),
    "siglip2_vision": Example(
        "Siglip2VisionModel",
        lambda: hf.Siglip2VisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            num_patches=16,
            patch_size=4,
        ),
        lambda: {
            "pixel_values": numbers(2, 16, 48),
            "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 12 + [0] * 4]),
            "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
        },
        BOTH,
    ),
}
