"""Families of text and sound models: what is stored is the model's own softmax, and every token has its name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from attnscope import loading
from attnscope.extraction import extract
from attnscope.families import GENERIC
from attnscope.loading import load_model
from attnscope.quantities import ExtractSpec
from attnscope.run import Run
from attnscope.samples import Sample
from attnscope.testing import check_family
from attnscope.tokens import KINDS

EXACT = ExtractSpec(encoding="exact")
MakeModel = Callable[..., torch.nn.Module]
Spy = Callable[..., dict[str, list[np.ndarray]]]
TEXT = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 99},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 99},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
}
T5 = {
    **{"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0, "pad_token_id": 0},
}
LATENT = TEXT | {
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    **{"first_k_dense_replace": 2, "moe_intermediate_size": 16, "n_shared_experts": 1},
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LENGTH, PADDING = 9, 3
PARTS = ("input_ids", "attention_mask")


def texts(side: str = "right", name: str = "", length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Ids and mask of two texts, the second one padded."""
    ids = torch.randint(5, 90, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, slice(-PADDING, None) if side == "right" else slice(0, PADDING)] = 0
    ids[mask == 0] = 0
    return {f"{name}input_ids": ids, f"{name}attention_mask": mask}


def assert_same(run: Run, site: str, layer: int, own: np.ndarray) -> None:
    """Equal to 2e-6 wherever both tokens are real, and nothing is stored elsewhere."""
    stored = run.attention(site).sel(layer=layer)
    real = [stored[f"{side}_kind"].values != KINDS.index("padding") for side in ("query", "key")]
    expected = real[0][:, None, :, None] & real[1][:, None, None, :]
    assert (~np.isnan(stored.values) == expected).all()
    # GPT-OSS has a sink: a further column, which is no token's.
    own = own.reshape(*stored.shape[:3], -1)[..., : stored.shape[-1]]
    difference = np.abs(stored.values - own)[np.broadcast_to(expected, stored.shape)]
    assert difference.max() <= 2e-6


def kinds(run: Run, stream: str, sample: int) -> list[str]:
    return [KINDS[k] for k in run.tokens(stream).kind.values[sample]]


@dataclass(frozen=True)
class Case:
    """A model of one text stream: its module of each layer, or the one that is called for all of them."""

    model: str
    config: str
    sizes: dict[str, object]
    module: str
    kernel: str = "eager"
    side: str = "right"
    calls: bool = False


ENCODER, LAYERS, BLOCKS = "encoder.layer.{}.attention.self", "layers.{}.self_attn", "h.{}.attn"
ENCODERS = {
    "bert": Case("BertModel", "BertConfig", TEXT, ENCODER, "sdpa"),
    "roberta": Case("RobertaModel", "RobertaConfig", TEXT, ENCODER, "sdpa"),
    "roberta-prelayernorm": Case("RobertaPreLayerNormModel", "RobertaPreLayerNormConfig", TEXT, ENCODER),
    "xlm-roberta": Case("XLMRobertaModel", "XLMRobertaConfig", TEXT, ENCODER, "sdpa"),
    "xlm-roberta-xl": Case("XLMRobertaXLModel", "XLMRobertaXLConfig", TEXT, ENCODER),
    "camembert": Case("CamembertModel", "CamembertConfig", TEXT, ENCODER, "sdpa"),
    "data2vec-text": Case("Data2VecTextModel", "Data2VecTextConfig", TEXT, ENCODER),
    "distilbert": Case(
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37},
        "transformer.layer.{}.attention",
        "sdpa",
    ),
    "electra": Case("ElectraModel", "ElectraConfig", TEXT | {"embedding_size": 32}, ENCODER, "sdpa"),
    "ernie": Case("ErnieModel", "ErnieConfig", TEXT, ENCODER),
    "megatron-bert": Case("MegatronBertModel", "MegatronBertConfig", TEXT, ENCODER),
    "mpnet": Case("MPNetModel", "MPNetConfig", TEXT, "encoder.layer.{}.attention.attn"),
    "rembert": Case("RemBertModel", "RemBertConfig", TEXT | {"input_embedding_size": 32}, ENCODER),
    "roformer": Case("RoFormerModel", "RoFormerConfig", TEXT, ENCODER),
    "ibert": Case("IBertModel", "IBertConfig", TEXT, ENCODER + ".softmax"),
    "xmod": Case("XmodModel", "XmodConfig", TEXT | {"default_language": "en_XX"}, ENCODER),
    "splinter": Case("SplinterModel", "SplinterConfig", TEXT, ENCODER),
    "modernbert": Case(
        "ModernBertModel",
        "ModernBertConfig",
        TEXT | {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        "layers.{}.attn",
        "sdpa",
    ),
    "deberta": Case(
        "DebertaModel", "DebertaConfig", TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, ENCODER
    ),
    "deberta-v2": Case(
        "DebertaV2Model",
        "DebertaV2Config",
        TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        ENCODER,
    ),
    "esm": Case("EsmModel", "EsmConfig", TEXT | {"mask_token_id": 4, "position_embedding_type": "rotary"}, ENCODER),
    "albert": Case(
        "AlbertModel",
        "AlbertConfig",
        TEXT | {"embedding_size": 16, "num_hidden_layers": 3},
        "encoder.albert_layer_groups.0.albert_layers.0.attention",
        "sdpa",
        calls=True,
    ),
}
DECODERS = {
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", GPT, "transformer.h.{}.attn", "sdpa"),
    "gpt_neo": Case(
        "GPTNeoModel",
        "GPTNeoConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
        "h.{}.attn.attention",
    ),
    "gpt_neox": Case("GPTNeoXModel", "GPTNeoXConfig", TEXT, "layers.{}.attention", "sdpa"),
    "gpt_bigcode": Case("GPTBigCodeModel", "GPTBigCodeConfig", GPT, BLOCKS),
    "gpt_bigcode by head": Case("GPTBigCodeModel", "GPTBigCodeConfig", GPT | {"multi_query": False}, BLOCKS),
    "gptj": Case("GPTJModel", "GPTJConfig", GPT | {"rotary_dim": 4}, BLOCKS),
    "codegen": Case("CodeGenModel", "CodeGenConfig", GPT | {"rotary_dim": 4}, BLOCKS),
    "openai-gpt": Case("OpenAIGPTModel", "OpenAIGPTConfig", GPT, BLOCKS),
    "opt": Case(
        "OPTModel",
        "OPTConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 37}
        | {"word_embed_proj_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0},
        "decoder.layers.{}.self_attn",
        "sdpa",
        "left",
    ),
    "xglm": Case(
        "XGLMModel",
        "XGLMConfig",
        {"vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 37, "pad_token_id": 0},
        LAYERS,
    ),
    "bloom": Case(
        "BloomModel",
        "BloomConfig",
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "h.{}.self_attention",
        side="left",
    ),
    "falcon": Case("FalconModel", "FalconConfig", TEXT, "h.{}.self_attention"),
    "falcon by head": Case("FalconModel", "FalconConfig", TEXT | {"multi_query": False}, "h.{}.self_attention"),
    "mpt": Case(
        "MptModel",
        "MptConfig",
        {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        "blocks.{}.attn",
    ),
    "biogpt": Case("BioGptModel", "BioGptConfig", TEXT, LAYERS, "sdpa"),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", GROUPED, "model.layers.{}.self_attn", "sdpa", "left"),
    "mistral": Case("MistralModel", "MistralConfig", GROUPED | {"sliding_window": 4}, LAYERS, "sdpa"),
    "mixtral": Case(
        "MixtralModel", "MixtralConfig", GROUPED | {"num_local_experts": 2, "intermediate_size": 64}, LAYERS, "sdpa"
    ),
    "qwen2": Case("Qwen2Model", "Qwen2Config", GROUPED, LAYERS, "sdpa"),
    "qwen2_moe": Case(
        "Qwen2MoeModel",
        "Qwen2MoeConfig",
        GROUPED | EXPERTS | {"shared_expert_intermediate_size": 16},
        LAYERS,
    ),
    "qwen3": Case("Qwen3Model", "Qwen3Config", GROUPED, LAYERS, "sdpa", "left"),
    "qwen3_moe": Case(
        "Qwen3MoeModel",
        "Qwen3MoeConfig",
        GROUPED | EXPERTS,
        LAYERS,
    ),
    "gemma": Case("GemmaModel", "GemmaConfig", GROUPED, LAYERS),
    "gemma2": Case(
        "Gemma2Model",
        "Gemma2Config",
        GROUPED | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16, "sliding_window": 4},
        LAYERS,
    ),
    "gemma3_text": Case("Gemma3TextModel", "Gemma3TextConfig", GROUPED | {"sliding_window": 4}, LAYERS, "sdpa"),
    "phi": Case("PhiModel", "PhiConfig", TEXT, LAYERS, "sdpa"),
    "phi3": Case("Phi3Model", "Phi3Config", TEXT, LAYERS, "sdpa"),
    "stablelm": Case("StableLmModel", "StableLmConfig", TEXT | {"num_key_value_heads": 2}, LAYERS),
    "starcoder2": Case("Starcoder2Model", "Starcoder2Config", TEXT | {"num_key_value_heads": 2}, LAYERS),
    "olmo": Case("OlmoModel", "OlmoConfig", TEXT, LAYERS),
    "olmo2": Case("Olmo2Model", "Olmo2Config", TEXT, LAYERS),
    "cohere": Case("CohereModel", "CohereConfig", TEXT | {"num_key_value_heads": 2}, LAYERS),
    "cohere2": Case("Cohere2Model", "Cohere2Config", GROUPED | {"sliding_window": 4}, LAYERS),
    "granite": Case("GraniteModel", "GraniteConfig", TEXT, LAYERS),
    "smollm3": Case("SmolLM3Model", "SmolLM3Config", TEXT | {"num_key_value_heads": 2}, LAYERS),
    "glm": Case("GlmModel", "GlmConfig", GROUPED, LAYERS),
    "glm4": Case("Glm4Model", "Glm4Config", GROUPED, LAYERS),
    "persimmon": Case("PersimmonModel", "PersimmonConfig", TEXT, LAYERS),
    "nemotron": Case("NemotronModel", "NemotronConfig", GROUPED, LAYERS),
    "helium": Case("HeliumModel", "HeliumConfig", GROUPED, LAYERS),
    "deepseek_v2": Case("DeepseekV2Model", "DeepseekV2Config", LATENT, LAYERS),
    "deepseek_v3": Case("DeepseekV3Model", "DeepseekV3Config", LATENT, LAYERS, "sdpa"),
    "gpt_oss": Case(
        "GptOssModel",
        "GptOssConfig",
        GROUPED
        | {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"sliding_window": 4},
        LAYERS,
    ),
}


@pytest.mark.parametrize("case", [*ENCODERS.values(), *DECODERS.values()], ids=[*ENCODERS, *DECODERS])
def test_one_stream_of_text(case: Case, made_model: MakeModel, own_attention: Spy) -> None:
    inputs = texts(case.side)
    config = getattr(hf, case.config)
    own = own_attention(made_model(case.model, config(**case.sizes)), inputs)
    model = made_model(case.model, config(**case.sizes), case.kernel)
    run = extract(model, [inputs], spec=EXACT, batch_size=2)
    assert run.sites == ("text.self",)
    plan = run.plan.sites["text.self"]
    assert not plan.guessed
    assert plan.heads == 4
    count = 3 if case.calls else 2
    assert plan.layers == tuple(range(count))
    for layer in range(count):
        softmaxes = own[case.module.format(layer)]
        assert_same(run, "text.self", layer, softmaxes[layer if case.calls else 0])
    real, padding = ["text"] * (LENGTH - PADDING), ["padding"] * PADDING
    assert kinds(run, "text", 0) == ["text"] * LENGTH
    assert kinds(run, "text", 1) == (real + padding if case.side == "right" else padding + real)
    check_family(model.config.model_type, model, inputs)


def test_all_model_types_of_one_stream_are_tested() -> None:
    from attnscope.families import bert, decoder

    tested = {name.split(" ")[0] for name in (*ENCODERS, *DECODERS)}
    assert tested == {*bert.FAMILY.model_types, *bert.ALBERT.model_types, *decoder.FAMILY.model_types}


_BART_SITES = {
    "text.self": "encoder.layers.{}.self_attn",
    "decoder.self": "decoder.layers.{}.self_attn",
    "decoder.text": "decoder.layers.{}.encoder_attn",
}
_T5_SITES = {
    "text.self": "encoder.block.{}.layer.0.SelfAttention",
    "decoder.self": "decoder.block.{}.layer.0.SelfAttention",
    "decoder.text": "decoder.block.{}.layer.1.EncDecAttention",
}
_EXPERTS = {"num_experts": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
PAIRS = {
    "bart": ("BartModel", hf.BartConfig, BART, _BART_SITES, "sdpa"),
    "mbart": ("MBartModel", hf.MBartConfig, BART, _BART_SITES, "sdpa"),
    "pegasus": ("PegasusModel", hf.PegasusConfig, BART, _BART_SITES, "sdpa"),
    "blenderbot": ("BlenderbotModel", hf.BlenderbotConfig, BART, _BART_SITES, "eager"),
    "blenderbot-small": ("BlenderbotSmallModel", hf.BlenderbotSmallConfig, BART, _BART_SITES, "eager"),
    "marian": ("MarianModel", hf.MarianConfig, BART, _BART_SITES, "sdpa"),
    "m2m_100": ("M2M100Model", hf.M2M100Config, BART, _BART_SITES, "sdpa"),
    "plbart": ("PLBartModel", hf.PLBartConfig, BART, _BART_SITES, "eager"),
    "mvp": ("MvpModel", hf.MvpConfig, BART, _BART_SITES, "eager"),
    "t5": ("T5Model", hf.T5Config, T5, _T5_SITES, "eager"),
    "mt5": ("MT5Model", hf.MT5Config, T5, _T5_SITES, "eager"),
    "umt5": ("UMT5Model", hf.UMT5Config, T5, _T5_SITES, "eager"),
    "switch_transformers": (
        "SwitchTransformersModel", hf.SwitchTransformersConfig, T5 | _EXPERTS, _T5_SITES, "eager",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_and_a_decoder(name: str, made_model: MakeModel, own_attention: Spy) -> None:
    cls, config, sizes, sites, kernel = PAIRS[name]
    inputs = texts() | texts(name="decoder_", length=6)
    own = own_attention(made_model(cls, config(**sizes)), inputs)
    model = made_model(cls, config(**sizes), kernel)
    run = extract(model, [inputs], spec=EXACT, batch_size=2)
    assert set(run.sites) == set(sites)
    for site, module in sites.items():
        assert run.plan.sites[site].layers == (0, 1)
        for layer in range(2):
            assert_same(run, site, layer, own[module.format(layer)][0])
    assert kinds(run, "decoder", 1) == ["text"] * 3 + ["padding"] * 3
    check_family(name, model, inputs)


def test_all_model_types_of_two_streams_are_tested() -> None:
    from attnscope.families import encoder_decoder

    assert set(PAIRS) == {*encoder_decoder.BART.model_types, *encoder_decoder.T5.model_types}


WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "a",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "left",
    "of",
    "big",
    "small",
    "box",
]


def save(folder: Path, model: torch.nn.Module) -> Path:
    """The model with a tokenizer of single words, which ends every text."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    tokenizer.save_pretrained(folder)
    return folder


PAIRED = {
    "bart": ("BartForConditionalGeneration", hf.BartConfig, BART, _BART_SITES, "<unk>"),
    "t5": ("T5ForConditionalGeneration", hf.T5Config, T5, _T5_SITES, "<pad>"),
}


@pytest.mark.parametrize(("name", "batch_size"), [("bart", 1), ("bart", 3), ("t5", 3)])
def test_a_decoder_is_given_the_target_text(
    name: str, batch_size: int, made_model: MakeModel, own_attention: Spy, tmp_path: Path
) -> None:
    cls, config, sizes, sites, start = PAIRED[name]
    folder = save(tmp_path, made_model(cls, config(**(sizes | {"vocab_size": len(WORDS)}))))
    samples = [
        Sample("long", text="a red cat left of a big green box", targets={"output": "a dog"}),
        Sample("short", text="blue dog", targets={"output": "left of a small box"}),
        Sample("alone", text="a cat"),
    ]
    run = extract(folder, samples, spec=EXACT, batch_size=batch_size, attn_implementation="eager")
    loaded = load_model(folder, attn_implementation="eager")
    own = own_attention(loaded.model, loaded.family.encode(samples, loaded))
    prefix = "" if name == "t5" else "model."
    for site, module in sites.items():
        for layer in range(2):
            assert_same(run, site, layer, own[prefix + module.format(layer)][0])
    strings = run.tokens("decoder").token_text.values.tolist()
    assert [s.split() for s in map(" ".join, strings)][1] == [start, "left", "of", "a", "small", "box"]
    assert kinds(run, "decoder", 0) == ["special", "text", "text"] + ["padding"] * 3
    assert kinds(run, "decoder", 2) == ["special"] + ["padding"] * 5
    assert kinds(run, "text", 1) == ["text", "text", "special"] + ["padding"] * 7


def test_a_language_model_reads_sentences(made_model: MakeModel, own_attention: Spy, tmp_path: Path) -> None:
    config = hf.LlamaConfig(**(GROUPED | {"vocab_size": len(WORDS)}))
    folder = save(tmp_path, made_model("LlamaForCausalLM", config))
    samples = [Sample("long", text="a red cat left of a big green box"), Sample("short", text="blue dog")]
    run = extract(folder, samples, spec=EXACT, batch_size=2)
    loaded = load_model(folder, attn_implementation="eager")
    own = own_attention(loaded.model, loaded.family.encode(samples, loaded))
    for layer in range(2):
        assert_same(run, "text.self", layer, own[f"model.layers.{layer}.self_attn"][0])
    stored = run.attention("text.self").isel(sample=0).values
    assert (stored[:, :, ~np.tri(stored.shape[-1], dtype=bool)] == 0).all()
    assert run.tokens("text").token_text.values[1, :3].tolist() == ["blue", "dog", "</s>"]


def test_sound_is_heard_by_an_encoder_and_read_by_a_decoder(made_model: MakeModel, own_attention: Spy) -> None:
    sizes = BART | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(3))
    inputs = {"input_features": features} | texts(name="decoder_", length=6)
    own = own_attention(made_model("WhisperModel", hf.WhisperConfig(**sizes)), inputs)
    model = made_model("WhisperModel", hf.WhisperConfig(**sizes), "sdpa")
    run = extract(model, [inputs], spec=EXACT, batch_size=2)
    names = {"text.self": "audio.self", "decoder.self": "text.self", "decoder.text": "text.audio"}
    assert set(run.sites) == set(names.values())
    for other, site in names.items():
        for layer in range(2):
            assert_same(run, site, layer, own[_BART_SITES[other].format(layer)][0])
    assert kinds(run, "audio", 0) == ["audio"] * 10
    assert run.tokens("audio").column.values[0].tolist() == list(range(10))
    assert kinds(run, "text", 1) == ["text"] * 3 + ["padding"] * 3
    check_family("whisper", model, inputs)


@dataclass(frozen=True)
class Unknown:
    """A model that no family answers for: for each site that is guessed, the modules of its layers, in order."""

    model: str
    config: Callable[[], object]
    inputs: Callable[[], dict[str, torch.Tensor]]
    sites: dict[str, list[str]]


def _layers(module: str, count: int = 2) -> list[str]:
    return [module.format(i) for i in range(count)]


_HEARING = BART | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
UNKNOWN = {
    "bert": Unknown("BertModel", lambda: hf.BertConfig(**TEXT), texts, {"text.self": _layers(ENCODER)}),
    "opt": Unknown(
        "OPTModel",
        lambda: hf.OPTConfig(**DECODERS["opt"].sizes),
        texts,
        {"text.self": _layers("decoder.layers.{}.self_attn")},
    ),
    "albert": Unknown(
        "AlbertModel",
        lambda: hf.AlbertConfig(**ENCODERS["albert"].sizes),
        texts,
        {"text.self": [ENCODERS["albert"].module] * 3},
    ),
    "bart": Unknown(
        "BartModel",
        lambda: hf.BartConfig(**BART),
        lambda: texts() | texts(name="decoder_", length=6),
        {site: _layers(module) for site, module in _BART_SITES.items()},
    ),
    "t5": Unknown(
        "T5Model",
        lambda: hf.T5Config(**T5),
        lambda: texts() | texts(name="decoder_", length=6),
        {site: _layers(module) for site, module in _T5_SITES.items()},
    ),
    "whisper": Unknown(
        "WhisperModel",
        lambda: hf.WhisperConfig(**_HEARING),
        lambda: {"input_features": torch.ones(2, 8, 20)} | texts(name="decoder_", length=6),
        {
            "audio.self": _layers("encoder.layers.{}.self_attn"),
            "decoder.self": _layers("decoder.layers.{}.self_attn"),
            "decoder.audio": _layers("decoder.layers.{}.encoder_attn"),
        },
    ),
}


@pytest.mark.parametrize("case", UNKNOWN.values(), ids=UNKNOWN)
def test_roles_of_an_unknown_model_are_guessed(
    case: Unknown, made_model: MakeModel, own_attention: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_family", lambda _: GENERIC)
    inputs = case.inputs()
    own = own_attention(made_model(case.model, case.config()), inputs)
    run = extract(made_model(case.model, case.config()), [inputs], spec=EXACT, batch_size=2)
    assert set(run.sites) == set(case.sites)
    for site, modules in case.sites.items():
        plan = run.plan.sites[site]
        assert plan.guessed
        assert plan.layers == tuple(range(len(modules)))
        for layer, module in enumerate(modules):
            turn = layer if len(set(modules)) == 1 else 0
            assert_same(run, site, layer, own[module][turn])


def test_two_softmaxes_of_one_module_are_two_sites(made_model: MakeModel, own_attention: Spy) -> None:
    inputs = texts() | {"bbox": (torch.arange(72).view(2, 9, 4) % 25).sort(-1).values}
    sizes = TEXT | {"channel_shrink_ratio": 2, "max_2d_position_embeddings": 64, "hidden_size": 24}
    own = own_attention(made_model("LiltModel", hf.LiltConfig(**sizes)), inputs)
    run = extract(made_model("LiltModel", hf.LiltConfig(**sizes)), [inputs], spec=EXACT, batch_size=2)
    assert run.sites == ("text.self", "text.self.2")
    for layer in range(2):
        softmaxes = own[f"encoder.layer.{layer}.attention.self"]
        stored = [run.attention(site).sel(layer=layer).values for site in run.sites]
        for one in softmaxes:
            assert min(np.nanmax(np.abs(other - one)) for other in stored) <= 2e-6


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_longest_text_and_the_longest_target_may_be_two_samples(made_model: MakeModel, batch_size: int) -> None:
    sizes = ((9, 3), (4, 7))
    inputs = [
        {
            f"{name}{part}": torch.ones(1, n, dtype=torch.long)
            for name, n in (("", a), ("decoder_", b))
            for part in PARTS
        }
        for a, b in sizes
    ]
    run = extract(made_model("BartModel", hf.BartConfig(**BART)), inputs, spec=EXACT, batch_size=batch_size)
    for sample, (text, target) in enumerate(sizes):
        stored = run.attention("decoder.text").isel(sample=sample, layer=0, head=0).values
        assert stored.shape == (7, 9)
        assert (~np.isnan(stored)).sum() == text * target
