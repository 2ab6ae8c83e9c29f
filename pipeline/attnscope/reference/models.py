"""Classes of the carried models beside transformers' own: with image tokens' classes, a mapper, or another score."""

from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.blip.modeling_blip import BlipPreTrainedModel, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextOnlyMLMHead
from transformers.models.lxmert.modeling_lxmert import LxmertForPreTrainingOutput

from attnscope.reference.alignments import CONFIG_KEY, swap_scores
from attnscope.reference.corpus import CLASSES
from attnscope.reference.mapper import MapperForConditionalGeneration, MapperForQuestionAnswering

__all__ = [
    "AllOfLxmert",
    "LxmertWithObjects",
    "MapperForConditionalGeneration",
    "MapperForQuestionAnswering",
    "ViltForWordsAndPatches",
    "WordsAndPatches",
]


@dataclass
class WordsAndPatches(MaskedLMOutput):
    """`patch_logits` (sample, patch, class), in the order that the forward put the patches in."""

    patch_logits: torch.FloatTensor | None = None


@dataclass
class AllOfLxmert(LxmertForPreTrainingOutput):
    """`object_logits` (sample, region, class)."""

    object_logits: torch.FloatTensor | None = None


class ViltForWordsAndPatches(transformers.ViltForMaskedLM):
    """ViLT that tells masked words and the class of each patch; its patch head is a file of its own."""

    def __init__(self, config: transformers.ViltConfig) -> None:
        super().__init__(config)
        self.patch_classifier = nn.Linear(config.hidden_size, len(CLASSES))

    # Wrapped, so that its signature says which inputs it takes.
    @wraps(transformers.ViltForMaskedLM.forward)
    def forward(self, *args: Any, **inputs: Any) -> WordsAndPatches:
        inputs |= {"output_hidden_states": True, "return_dict": True}
        words = super().forward(*args, **inputs)
        texts = words.logits.shape[1]
        # Behind the texts comes the image's CLS token.
        image = self.vilt.layernorm(words.hidden_states[-1][:, texts + 1 :])
        return WordsAndPatches(
            loss=words.loss,
            logits=words.logits,
            attentions=words.attentions,
            patch_logits=self.patch_classifier(image),
        )


class SimlaForWordsAndPatches(BlipPreTrainedModel):
    """SIMLA's encoders that tell masked words from the image, and the class of each patch from the image alone."""

    config: transformers.BlipConfig

    def __init__(self, config: transformers.BlipConfig) -> None:
        super().__init__(config)
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.cls = BlipTextOnlyMLMHead(config.text_config)
        self.patch_classifier = nn.Linear(config.vision_config.hidden_size, len(CLASSES))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The words' embeddings."""
        return self.text_encoder.get_input_embeddings()

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> WordsAndPatches:
        """Logits of words (sample, token, word) and of patches (sample, patch, class)."""
        image = self.vision_model(pixel_values=pixel_values).last_hidden_state
        text = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
        )
        logits = self.cls(text.last_hidden_state)
        return WordsAndPatches(logits=logits, patch_logits=self.patch_classifier(image[:, 1:]))


class LxmertWithObjects(transformers.LxmertForPreTraining):
    """LXMERT that gives its object logits without being asked for a loss."""

    @wraps(transformers.LxmertForPreTraining.forward)
    def forward(self, *args: Any, **inputs: Any) -> AllOfLxmert:
        inputs |= {"output_hidden_states": True, "return_dict": True}
        out = super().forward(*args, **inputs)
        objects = self.obj_predict_head(out.vision_hidden_states[-1])["obj"]
        return AllOfLxmert(**{**out, "object_logits": objects})


_OURS = {c.__name__: c for c in (ViltForWordsAndPatches, LxmertWithObjects)}


def class_of(architecture: str, config: transformers.PreTrainedConfig) -> Any:
    """The class behind a name in a config: transformers', or one of these; `AutoModel` for a name that neither has."""
    found = _OURS.get(architecture) or getattr(transformers, architecture, transformers.AutoModel)
    return _with_alignment(found) if hasattr(config, CONFIG_KEY) and found is not transformers.AutoModel else found


@cache
def _with_alignment(cls: Any) -> Any:
    """The same model with the score in its attention that its config names."""

    class Scored(cls):
        def __init__(self, config: transformers.PreTrainedConfig) -> None:
            super().__init__(config)
            swap_scores(self, getattr(config, CONFIG_KEY))

    Scored.__name__, Scored.__qualname__ = cls.__name__, cls.__qualname__
    return Scored
