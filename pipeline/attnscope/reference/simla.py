"""SIMLA in small: one stream that reads image and text on several levels (Khan et al., ECCV 2022, sections 3.1 to 3.4).

An image encoder stands below; the text encoder above it looks at the image after each self-attention. The same layers
encode text alone (without looking), text with image, and image with text: then the patches ask and the words answer. A
slowly moving copy of everything gives soft targets, and what it made of earlier batches are further negatives.

In small: three layers each instead of twelve, patches' codes from k-means instead of a discrete autoencoder, mid-grey
pixels for masked patches; the temperature is learned as its logarithm, of which the steps that small models need are
small parts. Its own: unit logits from the image encoder (see `lessons`).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipForImageTextRetrieval
from transformers.models.blip.modeling_blip_text import BlipTextOnlyMLMHead

from attnscope.reference.corpus import PAD, PATCH, SEP
from attnscope.reference.learners import (
    WORLD,
    Hidden,
    JointLearner,
    Seen,
    Sizes,
    UnitClassifier,
    hide_patches,
    normalised,
    smooth_positions,
)
from attnscope.reference.pairs import Learnable

CODES = 128
"""How many codes there are for what a patch shows."""
_CODE_SIDE = 6
_FITTED_SCENES, _FITTING_ROUNDS = 1024, 12
QUEUE = 1024
_MOMENTUM = 0.995
_SOFT_SHARE, _SOFT_FROM = 0.4, 250
_TEMPERATURE, _TEMPERATURES = 0.07, (0.001, 0.5)


@dataclass(frozen=True)
class Encoded:
    """Text states (sample, token, channel), and of the last layer self- and of every layer cross-attention."""

    states: Tensor
    own: Tensor
    cross: tuple[Tensor, ...]


class Streams(nn.Module):
    """Everything that has a slowly moving copy: both encoders, projections, and the heads that give soft targets."""

    def __init__(self, config: transformers.BlipConfig) -> None:
        super().__init__()
        vision, text = config.vision_config, config.text_config
        whole = BlipForImageTextRetrieval(config)
        self.vision_model, self.text_encoder = whole.vision_model, whole.text_encoder
        self.vision_proj, self.text_proj = whole.vision_proj, whole.text_proj
        self.cls = BlipTextOnlyMLMHead(text)
        self.code_classifier = nn.Linear(text.hidden_size, CODES)
        self.keyword_classifier = nn.Linear(vision.hidden_size, text.vocab_size)
        with torch.no_grad():
            positions = smooth_positions(vision.image_size // vision.patch_size, vision.hidden_size)
            self.vision_model.embeddings.position_embedding[0, 1:] = positions

    def look(self, pixels: Tensor) -> Tensor:
        """States of CLS and patches (sample, patch, channel)."""
        return self.vision_model(pixel_values=pixels).last_hidden_state

    def project(self, image: Tensor) -> Tensor:
        """Unit vectors (sample, channel) of image states."""
        return nn.functional.normalize(self.vision_proj(image[:, 0]), dim=-1)

    def read(self, words: Tensor) -> Tensor:
        """Unit vectors (text, channel) of texts alone."""
        states = self.text_encoder(input_ids=words, attention_mask=(words != PAD).long()).last_hidden_state
        return nn.functional.normalize(self.text_proj(states[:, 0]), dim=-1)

    def join(self, words: Tensor, image: Tensor) -> Tensor:
        """States of the text that has seen the image (sample, token, channel)."""
        return self._joined(words, image).last_hidden_state

    def join_with_attention(self, words: Tensor, image: Tensor) -> Encoded:
        """The same with attention."""
        out = self._joined(words, image, output_attentions=True)
        return Encoded(out.last_hidden_state, out.attentions[-1], tuple(out.cross_attentions))

    def _joined(self, words: Tensor, image: Tensor, **options: bool):  # type: ignore[no-untyped-def]
        return self.text_encoder(
            input_ids=words,
            attention_mask=(words != PAD).long(),
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
            **options,
        )

    def join_image(self, image: Tensor, words: Tensor) -> Tensor:
        """States of the patches that have seen the text's embeddings (sample, patch, channel), without CLS."""
        there = (words != PAD).long()
        out = self.text_encoder(
            encoder_embeds=image,
            attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
            encoder_hidden_states=self.text_encoder.embeddings(input_ids=words),
            encoder_attention_mask=there,
        )
        return out.last_hidden_state[:, 1:]


class Simla(Streams, JointLearner):
    """SIMLA with its momentum copy and queues; `alpha` is the share of soft targets, which rises from zero."""

    momentum: Streams
    alpha: Tensor
    queue_place: Tensor
    image_queue: Tensor
    text_queue: Tensor

    def __init__(self, config: transformers.BlipConfig | None = None) -> None:
        self.config = config or simla_config()
        super().__init__(self.config)
        momentum = Streams(self.config)
        momentum.load_state_dict(self.state_dict())
        # What is no parameter has no gradient, is not trained and not carried, but is kept in checkpoints.
        self.momentum = _without_parameters(momentum)
        width = self.config.text_config.hidden_size
        self.itm_head = nn.Linear(width, 2)
        self.patch_classifier = UnitClassifier(self.config.vision_config.hidden_size)
        self.log_temperature = nn.Parameter(torch.tensor(_TEMPERATURE).log())
        self.codes = nn.Parameter(torch.zeros(CODES, 3 * _CODE_SIDE**2), requires_grad=False)
        self.register_buffer("alpha", torch.tensor(0.0))
        self.register_buffer("queue_place", torch.tensor(0))
        for name in ("image_queue", "text_queue"):
            vectors = torch.randn(QUEUE, self.config.image_text_hidden_size)
            self.register_buffer(name, nn.functional.normalize(vectors, dim=-1))

    @classmethod
    def of(cls, sizes: Sizes) -> "Simla":
        return cls(simla_config(sizes))

    @classmethod
    def like(cls, folder: Path) -> "Simla":
        return cls(transformers.BlipConfig.from_pretrained(folder))

    def prepare(self, corpus: Learnable) -> None:
        """Fit the codes of patches to the first scenes."""
        with torch.no_grad():
            patch = self.config.vision_config.patch_size
            self.codes.copy_(fit_codes(corpus.pixels[np.arange(min(len(corpus), _FITTED_SCENES))], patch))

    def follow(self, step: int) -> None:
        """Move the momentum copy, keep the temperature in its bounds, and trust soft targets a little more."""
        with torch.no_grad():
            own = dict(self.named_parameters())
            for name, kept in self.momentum.named_buffers():
                if name in own:
                    kept.lerp_(own[name], 1 - _MOMENTUM)
            self.log_temperature.clamp_(*map(math.log, _TEMPERATURES))
            self.alpha.fill_(_SOFT_SHARE * min(1.0, step / _SOFT_FROM))

    @property
    def temperature(self) -> Tensor:
        """What similarities are divided by."""
        return self.log_temperature.exp()

    def keep(self, images: Tensor, texts: Tensor) -> None:
        """Put vectors (sample, channel) into the queues in the place of the oldest; of more than a queue, the last."""
        images, texts = images[-QUEUE:], texts[-QUEUE:]
        at = (int(self.queue_place) + torch.arange(len(images), device=images.device)) % QUEUE
        self.image_queue[at], self.text_queue[at] = images, texts
        self.queue_place.fill_((int(self.queue_place) + len(images)) % QUEUE)

    def code(self, pixels: Tensor) -> Tensor:
        """The code of each patch (sample, patch) of pixels (sample, colour, row, column)."""
        patches = shrunk_patches(pixels, self.config.vision_config.patch_size)
        with torch.autocast(pixels.device.type, enabled=False):
            return torch.cdist(patches, self.codes).argmin(-1)

    def see(self, corpus: Learnable, scenes: np.ndarray) -> Seen:
        return Seen(normalised(corpus.pixels[scenes]).to(self.device))

    def hide(self, seen: Seen, units: Tensor) -> Seen:
        return hide_patches(seen, units)

    def encode(self, words: Tensor, seen: Seen) -> Hidden:
        image = self.look(seen.pixels)
        states = self.join(words.to(self.device), image)
        return Hidden(states, image[:, 1:], states[:, 0])

    def words(self, hidden: Hidden) -> Tensor:
        return self.cls(hidden.text)

    def match(self, hidden: Hidden) -> Tensor:
        scores = self.itm_head(hidden.pooled)
        return scores[:, 1] - scores[:, 0]

    def classify(self, hidden: Hidden) -> Tensor:
        return self.patch_classifier(hidden.image)

    def embed_images(self, corpus: Learnable, scenes: np.ndarray) -> tuple[Tensor, Tensor]:
        """Unit vectors (sample, channel), and class logits of the patches (sample, patch, class)."""
        image = self.look(self.see(corpus, scenes).pixels)
        return self.project(image), self.patch_classifier(image[:, 1:])

    def embed_texts(self, words: Tensor) -> Tensor:
        """Unit vectors (text, channel)."""
        return self.read(words.to(self.device))


def _without_parameters(module: Streams) -> Streams:
    """The module with buffers in the place of its parameters."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return module


def shrunk_patches(pixels: Tensor, patch: int = PATCH) -> Tensor:
    """What is compared with codes (sample, patch, number): patches of pixels (sample, colour, row, column), shrunk."""
    small = nn.functional.adaptive_avg_pool2d(pixels, pixels.shape[-1] // patch * _CODE_SIDE)
    return nn.functional.unfold(small, _CODE_SIDE, stride=_CODE_SIDE).transpose(1, 2)


def fit_codes(pixels: np.ndarray, patch: int = PATCH) -> Tensor:
    """The middles (code, number) of patches that look alike, by k-means from evenly spaced patches.

    `pixels` (scene, row, column, colour) uint8. Patches are sorted by their brightness first, so that the start is
    spread out and nothing is drawn.
    """
    patches = shrunk_patches(normalised(pixels), patch).flatten(0, 1)
    patches = patches[patches.mean(1).argsort(stable=True)]
    codes = patches[torch.linspace(0, len(patches) - 1, CODES).long()].clone()
    for _ in range(_FITTING_ROUNDS):
        nearest = torch.cdist(patches, codes).argmin(1)
        counts = torch.bincount(nearest, minlength=CODES)
        sums = torch.zeros_like(codes).index_add_(0, nearest, patches)
        filled = counts > 0
        codes[filled] = sums[filled] / counts[filled, None]
    return codes


SIZES = replace(WORLD, layers=3, text_layers=3)
"""The sizes of the model that attnscope carries."""


def simla_config(sizes: Sizes = SIZES) -> transformers.BlipConfig:
    shared = {"hidden_size": sizes.width, "intermediate_size": 4 * sizes.width, "num_attention_heads": sizes.heads}
    return transformers.BlipConfig(
        text_config={
            **shared,
            "vocab_size": sizes.vocabulary,
            "num_hidden_layers": sizes.text_layers,
            "encoder_hidden_size": sizes.width,
            "projection_dim": sizes.width,
            "max_position_embeddings": sizes.length,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.05,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": SEP,
            "sep_token_id": SEP,
        },
        vision_config={
            **shared,
            "num_hidden_layers": sizes.layers,
            "image_size": sizes.side,
            "patch_size": sizes.patch,
            "projection_dim": sizes.width,
            "initializer_range": 0.05,
        },
        projection_dim=sizes.width,
        image_text_hidden_size=sizes.width,
        initializer_range=0.05,
        architectures=["BlipForImageTextRetrieval"],
    )
