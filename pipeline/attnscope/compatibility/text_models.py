"""Text models: encoders, decoders, and both."""

import transformers as hf

from attnscope.compatibility.examples import BOTH, EAGER, GROUPED, SEQ2SEQ, TEXT, Example, text

EXAMPLES: dict[str, Example] = {
    "bert": Example("BertModel", lambda: hf.BertConfig(**TEXT), text, BOTH),
    "roberta": Example("RobertaModel", lambda: hf.RobertaConfig(**TEXT), text, BOTH),
    "distilbert": Example(
        "DistilBertModel",
        lambda: hf.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37),
        text,
        BOTH,
    ),
    "electra": Example("ElectraModel", lambda: hf.ElectraConfig(**TEXT, embedding_size=32), text, BOTH),
    "albert": Example("AlbertModel", lambda: hf.AlbertConfig(**TEXT, embedding_size=16), text, BOTH),
    "modernbert": Example(
        "ModernBertModel",
        lambda: hf.ModernBertConfig(**TEXT, pad_token_id=0, local_attention=4, global_attn_every_n_layers=2),
        text,
        BOTH,
    ),
    "deberta": Example("DebertaModel", lambda: hf.DebertaConfig(**TEXT), text, EAGER),
    "deberta_relative": Example(
        "DebertaModel",
        lambda: hf.DebertaConfig(
            **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16
        ),
        text,
        EAGER,
    ),
    "deberta_v2": Example(
        "DebertaV2Model",
        lambda: hf.DebertaV2Config(
            **TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16
        ),
        text,
        EAGER,
    ),
    "mpnet": Example("MPNetModel", lambda: hf.MPNetConfig(**TEXT), text, EAGER),
    "squeezebert": Example(
        "SqueezeBertModel",
        lambda: hf.SqueezeBertConfig(**(TEXT | {"intermediate_size": 64}), embedding_size=32),
        text,
        EAGER,
    ),
    "convbert": Example("ConvBertModel", lambda: hf.ConvBertConfig(**TEXT, embedding_size=32), text, EAGER),
    "longformer": Example("LongformerModel", lambda: hf.LongformerConfig(**TEXT, attention_window=4), text, EAGER),
    "big_bird": Example(
        "BigBirdModel",
        lambda: hf.BigBirdConfig(**TEXT, block_size=2, num_random_blocks=1, attention_type="block_sparse"),
        lambda: text(32),
        EAGER,
    ),
    "funnel": Example(
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
    "canine": Example(
        "CanineModel",
        lambda: hf.CanineConfig(**TEXT, local_transformer_stride=8, downsampling_rate=4),
        lambda: text(32),
        EAGER,
    ),
    "roformer": Example("RoFormerModel", lambda: hf.RoFormerConfig(**TEXT), text, EAGER),
    "reformer": Example(
        "ReformerModel",
        lambda: hf.ReformerConfig(
            **{"hidden_size": 32, "feed_forward_size": 37, "num_attention_heads": 4, "attention_head_size": 8},
            **{"vocab_size": 99, "max_position_embeddings": 64},
            **{"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "is_decoder": True},
            **{"attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
            **{"num_buckets": 2, "num_hashes": 1, "hash_seed": 0},
        ),
        lambda: text(40),
        EAGER,
        output_only=EAGER,
    ),
    "nystromformer": Example(
        "NystromformerModel",
        lambda: hf.NystromformerConfig(**TEXT, num_landmarks=4, segment_means_seq_len=8, conv_kernel_size=3),
        lambda: {"input_ids": text(8)["input_ids"]},
        EAGER,
    ),
    "ibert": Example("IBertModel", lambda: hf.IBertConfig(**TEXT), text, EAGER),
    "rembert": Example("RemBertModel", lambda: hf.RemBertConfig(**TEXT, input_embedding_size=32), text, EAGER),
    "gpt2": Example(
        "GPT2LMHeadModel", lambda: hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4), text, BOTH
    ),
    "gpt2_upcast": Example(
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
    "gptj": Example(
        "GPTJModel",
        lambda: hf.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
        text,
        EAGER,
    ),
    "gpt_neo": Example(
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
    "openai_gpt": Example(
        "OpenAIGPTModel", lambda: hf.OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4), text, EAGER
    ),
    "codegen": Example(
        "CodeGenModel",
        lambda: hf.CodeGenConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        text,
        EAGER,
    ),
    "bloom": Example(
        "BloomModel", lambda: hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4), text, EAGER
    ),
    "mpt": Example(
        "MptModel", lambda: hf.MptConfig(vocab_size=99, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), text, EAGER
    ),
    "falcon": Example(
        "FalconModel",
        lambda: hf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        text,
        BOTH,
    ),
    # transformers scales the alibi differently in eager and sdpa.
    "falcon_alibi": Example(
        "FalconModel",
        lambda: hf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        text,
        BOTH,
        output_only=("sdpa",),
    ),
    "xglm": Example(
        "XGLMModel",
        lambda: hf.XGLMConfig(vocab_size=99, d_model=32, num_layers=2, attention_heads=4, ffn_dim=37),
        text,
        EAGER,
    ),
    "xlnet": Example(
        "XLNetModel", lambda: hf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=37), text, EAGER
    ),
    "xlm": Example("XLMModel", lambda: hf.XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4), text, EAGER),
    "flaubert": Example(
        "FlaubertModel", lambda: hf.FlaubertConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4), text, EAGER
    ),
    "llama": Example("LlamaForCausalLM", lambda: hf.LlamaConfig(**GROUPED), text, BOTH),
    "llama_left": Example("LlamaForCausalLM", lambda: hf.LlamaConfig(**GROUPED), lambda: text(side="left"), BOTH),
    "mistral_sliding": Example("MistralModel", lambda: hf.MistralConfig(**GROUPED, sliding_window=4), text, BOTH),
    "qwen3": Example("Qwen3Model", lambda: hf.Qwen3Config(**GROUPED), text, BOTH),
    "gemma2": Example(
        "Gemma2Model",
        lambda: hf.Gemma2Config(**GROUPED, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, sliding_window=4),
        text,
        EAGER,
    ),
    "gpt_oss": Example(
        "GptOssModel",
        lambda: hf.GptOssConfig(
            **(GROUPED | {"intermediate_size": 64, "hidden_size": 64}),
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=4,
        ),
        text,
        EAGER,
        other_softmaxes=2,
    ),
    # Its sinks are a gate beside the softmax.
    "granite_swa": Example(
        "GraniteSWAModel", lambda: hf.GraniteSWAConfig(**GROUPED), text, EAGER, output_only=("eager",)
    ),
    # A sink for each row, made of the row's own state; beside it, attention over a few states of each token.
    "inkling2": Example(
        "Inkling2TextModel",
        lambda: hf.Inkling2TextConfig(
            **(GROUPED | {"intermediate_size": 64}),
            **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 4},
            **{"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2},
            layer_types=["hybrid_sliding", "hybrid"],
        ),
        text,
        EAGER,
        output_only=("eager",),
    ),
    "deepseek_v3": Example(
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
    "t5": Example(
        "T5Model",
        lambda: hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4),
        lambda: text() | {"decoder_input_ids": text(5)["input_ids"]},
        BOTH,
    ),
    "bart": Example("BartModel", lambda: hf.BartConfig(**SEQ2SEQ), text, BOTH),
    "mbart": Example("MBartModel", lambda: hf.MBartConfig(**SEQ2SEQ), text, BOTH),
    "led": Example("LEDModel", lambda: hf.LEDConfig(**SEQ2SEQ, attention_window=4), text, EAGER),
    "prophetnet": Example(
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
    "tapas": Example("TapasModel", lambda: hf.TapasConfig(**TEXT), text, EAGER),
    "luke": Example("LukeModel", lambda: hf.LukeConfig(**TEXT, entity_vocab_size=9, entity_emb_size=16), text, EAGER),
    "xmod": Example("XmodModel", lambda: hf.XmodConfig(**TEXT, default_language="en_XX"), text, BOTH),
    "opt": Example(
        "OPTModel",
        lambda: hf.OPTConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=37,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        ),
        text,
        BOTH,
    ),
    "trocr": Example(
        "TrOCRForCausalLM",
        lambda: hf.TrOCRConfig(
            vocab_size=99,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=37,
            max_position_embeddings=64,
        ),
        text,
        EAGER,
    ),
    "bigbird_pegasus": Example(
        "BigBirdPegasusModel",
        lambda: hf.BigBirdPegasusConfig(**SEQ2SEQ, attention_type="original_full"),
        lambda: text(16) | {"decoder_input_ids": text(5)["input_ids"]},
        EAGER,
    ),
    "longt5": Example(
        "LongT5Model",
        lambda: hf.LongT5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, local_radius=4),
        lambda: text(12) | {"decoder_input_ids": text(5)["input_ids"]},
        EAGER,
    ),
    "fsmt": Example(
        "FSMTModel",
        lambda: hf.FSMTConfig(
            langs=["a", "b"],
            src_vocab_size=99,
            tgt_vocab_size=99,
            **{k: v for k, v in SEQ2SEQ.items() if k != "vocab_size"},
        ),
        lambda: text() | {"decoder_input_ids": text(5)["input_ids"]},
        EAGER,
    ),
    "recurrent_gemma": Example(
        "RecurrentGemmaModel",
        lambda: hf.RecurrentGemmaConfig(
            **(TEXT | {"num_hidden_layers": 3}), num_key_value_heads=1, lru_width=32, attention_window_size=4
        ),
        text,
        EAGER,
    ),
    "gemma3n_text": Example(
        "Gemma3nTextModel",
        lambda: hf.Gemma3nTextConfig(
            **(GROUPED | {"intermediate_size": [37, 37]}),
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=99,
            laurel_rank=4,
            num_kv_shared_layers=0,
            layer_types=["full_attention", "sliding_attention"],
            sliding_window=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0, 0.0],
        ),
        text,
        BOTH,
    ),
    "markuplm": Example(
        "MarkupLMModel", lambda: hf.MarkupLMConfig(**TEXT, max_depth=4, xpath_unit_hidden_size=4), text, EAGER
    ),
}
