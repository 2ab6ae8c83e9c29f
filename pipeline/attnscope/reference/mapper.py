"""CLIPmapper in small: CLIP's encoders, then a mapper in which text and image attend to themselves and to each other.

After Huang et al., "Generic Attention-model Explainability by Weighted Relevance Accumulation", 2023 (arXiv
2308.10240), of which the abstract alone could be read. It says: a model of two stages, CLIP's encoder and a mapper
behind it that has self-attention and cross-attention, within one modality and across both, for question answering and
for captions. Everything else here is our own reading: that CLIP stays frozen, and the mapper reads all of its last
hidden states; that a layer attends within both streams first and across both then; how many layers there are; that
answers are classes, read from the question's end token; that captions are written by a decoder of our own that looks at
the mapped image; and that a fixed question stands on the text's side of the mapper meanwhile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPMLP, eager_attention_forward


class MapperConfig(PreTrainedConfig):
    """Sizes of the mapper and of the decoder, beside those of CLIP's encoders.

    `prompt_ids` is the text that the mapper reads while a caption is written; `bos_token_id` begins captions and
    `eos_token_id` ends texts, questions among them.
    """

    model_type = "clip_mapper"
    sub_configs_defaults = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    text_config: dict | CLIPTextConfig | None = None
    vision_config: dict | CLIPVisionConfig | None = None
    hidden_size: int = 64
    num_attention_heads: int = 4
    intermediate_size: int = 256
    mapper_layers: int = 2
    decoder_layers: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    prompt_ids: list[int] | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    use_cache: bool = False


AutoConfig.register(MapperConfig.model_type, MapperConfig)


@dataclass
class MapperOutput(ModelOutput):
    """Mapped states of the text (sample, token, channel) and of the image's CLS and patches (sample, unit, channel)."""

    text_hidden_state: Tensor | None = None
    image_hidden_state: Tensor | None = None


@dataclass
class AnswersOutput(ModelOutput):
    """`logits` (sample, answer)."""

    logits: Tensor | None = None


@dataclass
class CaptionsOutput(ModelOutput):
    """`logits` (sample, token, word): what comes behind each token."""

    logits: Tensor | None = None


class Attention(nn.Module):
    """Multi-head attention of a stream to itself or to another, by whichever kernel transformers is told to use."""

    def __init__(self, config: MapperConfig, *, is_causal: bool = False) -> None:
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.head_size = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, states: Tensor, mask: Tensor | None, looked_at: Tensor | None = None) -> Tensor:
        """States (sample, query, channel) that look at themselves, or at (sample, key, channel)."""
        keys = states if looked_at is None else looked_at
        query, key, value = (
            # (sample, token, channel) to (sample, head, token, channel)
            project(given).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project, given in ((self.q_proj, states), (self.k_proj, keys), (self.v_proj, keys))
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        found, _ = attend(self, query, key, value, mask, scaling=self.head_size**-0.5, dropout=0.0)
        return self.out_proj(found.flatten(2))


class MapperLayer(nn.Module):
    """Self-attention of text and of image, attention of each to the other, and a feed-forward network for each."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.text_attention, self.image_attention = Attention(config), Attention(config)
        self.text_image_attention, self.image_text_attention = Attention(config), Attention(config)
        self.text_mlp, self.image_mlp = CLIPMLP(config), CLIPMLP(config)
        self.text_norms, self.image_norms = _norms(config, 3), _norms(config, 3)

    def forward(self, text: Tensor, image: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Text (sample, token, channel) and image (sample, unit, channel), whose padding `text_mask` hides."""
        own, across = (
            create_bidirectional_mask(self.text_attention.config, queries, text_mask, encoder_hidden_states=text)
            for queries in (text, image)
        )
        text = text + self.text_attention(self.text_norms[0](text), own)
        image = image + self.image_attention(self.image_norms[0](image), None)
        # Both look at what the other was before.
        words, units = self.text_norms[1](text), self.image_norms[1](image)
        text = text + self.text_image_attention(words, None, units)
        image = image + self.image_text_attention(units, across, words)
        return text + self.text_mlp(self.text_norms[2](text)), image + self.image_mlp(self.image_norms[2](image))


class Mapper(nn.Module):
    """What stands behind CLIP: both encoders' last hidden states, mapped to states that have seen each other."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        sizes = (config.text_config.hidden_size, config.vision_config.hidden_size)  # type: ignore[union-attr]
        self.text_entry, self.image_entry = (
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, config.hidden_size)) for size in sizes
        )
        self.layers = nn.ModuleList(MapperLayer(config) for _ in range(config.mapper_layers))
        self.text_norm, self.image_norm = _norms(config, 2)

    def forward(self, text: Tensor, image: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        text, image = self.text_entry(text), self.image_entry(image)
        for layer in self.layers:
            text, image = layer(text, image, text_mask)
        return self.text_norm(text), self.image_norm(image)


class DecoderLayer(nn.Module):
    """Attention of words to those before them and to the image, and a feed-forward network."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.self_attention, self.image_attention = Attention(config, is_causal=True), Attention(config)
        self.mlp = CLIPMLP(config)
        self.norms = _norms(config, 3)

    def forward(self, words: Tensor, image: Tensor, mask: Tensor | None) -> Tensor:
        words = words + self.self_attention(self.norms[0](words), mask)
        words = words + self.image_attention(self.norms[1](words), None, image)
        return words + self.mlp(self.norms[2](words))


class Decoder(nn.Module):
    """Writes captions word by word; the words that it reads are those that it writes."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(_text(config).vocab_size, config.hidden_size)
        self.positions = nn.Embedding(_text(config).max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(_text(config).vocab_size))

    def forward(self, ids: Tensor, image: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Logits (sample, token, word) of what comes behind each token of ids (sample, token)."""
        states = self.words(ids) + self.positions.weight[: ids.shape[1]]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=states, attention_mask=attention_mask, past_key_values=None
        )
        for layer in self.layers:
            states = layer(states, image, mask)
        return functional.linear(self.norm(states), self.words.weight, self.bias)


class MapperPreTrainedModel(PreTrainedModel):
    """What the models of a mapper have in common for transformers."""

    config: MapperConfig
    config_class = MapperConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class MapperModel(MapperPreTrainedModel):
    """CLIP's two encoders and the mapper, without a head."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__(config)
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        self.mapper = Mapper(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> MapperOutput:
        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        image = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return MapperOutput(*self.mapper(text, image, attention_mask))


class MapperForQuestionAnswering(MapperPreTrainedModel):
    """Answers a question about an image with one of the config's labels, read from the question's end token."""

    def __init__(self, config: MapperConfig) -> None:
        super().__init__(config)
        self.model = MapperModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> AnswersOutput:
        text = self.model(input_ids, pixel_values, attention_mask).text_hidden_state
        return AnswersOutput(self.classifier(end_states(text, input_ids, self.config)))


class MapperForConditionalGeneration(MapperPreTrainedModel, GenerationMixin):
    """Writes a caption of an image behind the words that it is given."""

    main_input_name = "input_ids"

    def __init__(self, config: MapperConfig) -> None:
        super().__init__(config)
        self.model = MapperModel(config)
        self.decoder = Decoder(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> CaptionsOutput:
        image = self.model(prompts(len(input_ids), self.config).to(input_ids), pixel_values).image_hidden_state
        return CaptionsOutput(self.decoder(input_ids, image, attention_mask))

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers writes; of `max_new_tokens`, those that the decoder has positions for."""
        given = kwargs.get("input_ids") if inputs is None else inputs
        if given is not None and "max_new_tokens" in kwargs:
            room = self.decoder.positions.num_embeddings - given.shape[1]
            if room < 1:
                return given
            kwargs["max_new_tokens"] = min(kwargs["max_new_tokens"], room)
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: object) -> dict[str, object]:
        """Everything is run again for each word: there is no cache."""
        return {"input_ids": input_ids, **{n: kwargs[n] for n in ("pixel_values", "attention_mask") if n in kwargs}}


def end_states(text: Tensor, ids: Tensor, config: MapperConfig) -> Tensor:
    """The states (sample, channel) of the first end token of each text."""
    return text[torch.arange(len(ids), device=ids.device), torch.eq(ids, config.eos_token_id).int().argmax(1)]  # type: ignore[arg-type]


def prompts(count: int, config: MapperConfig) -> Tensor:
    """The text that stands in the question's place while captions are written, (sample, token)."""
    return torch.tensor(config.prompt_ids).expand(count, -1)


def _norms(config: MapperConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(count))


def _text(config: MapperConfig) -> CLIPTextConfig:
    assert isinstance(config.text_config, CLIPTextConfig)
    return config.text_config
