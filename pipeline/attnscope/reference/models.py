"""Classes of the carried models beside transformers' own: with the class of each image token, or behind a mapper."""

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.lxmert.modeling_lxmert import LxmertForPreTrainingOutput

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


class LxmertWithObjects(transformers.LxmertForPreTraining):
    """LXMERT that gives its object logits without being asked for a loss."""

    @wraps(transformers.LxmertForPreTraining.forward)
    def forward(self, *args: Any, **inputs: Any) -> AllOfLxmert:
        inputs |= {"output_hidden_states": True, "return_dict": True}
        out = super().forward(*args, **inputs)
        objects = self.obj_predict_head(out.vision_hidden_states[-1])["obj"]
        return AllOfLxmert(**{**out, "object_logits": objects})
