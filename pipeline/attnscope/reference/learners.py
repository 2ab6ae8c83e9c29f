"""The tiny models: transformers' own classes with every head, and what each makes of a batch while it learns.

A learner is one module that owns a model and its heads. The models that see image and text together answer the same
calls: `see` makes image inputs of scenes, `hide` takes units (patches or regions) away from them, `encode` gives the
last hidden states. Whatever a learner's modules are called is what its weights are called in the saved file.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from attnscope.reference import carrying, mapper
from attnscope.reference.captions import ANSWERS
from attnscope.reference.corpus import (
    CLASSES,
    CLS,
    LENGTH,
    PAD,
    PATCH,
    REGION_SIDE,
    REGIONS,
    SEP,
    SIDE,
    VOCABULARY,
    Corpus,
)
from attnscope.reference.pairs import Learnable
from attnscope.reference.scenes import COLOURS, SHAPES
from attnscope.reference.sharing import ALONE, Share

_WIDTH, _HEADS, _LAYERS = 64, 4, 4
_INIT = 0.05


@dataclass(frozen=True)
class Hidden:
    """Last hidden states of the text (sample, token, channel) and the image (sample, unit, channel), and the pooled."""

    text: Tensor
    image: Tensor | None
    pooled: Tensor | None


@dataclass(frozen=True)
class Seen:
    """What a model gets of images: pixels (sample, colour, row, column), or region features and boxes.

    Nothing attends to regions that are `gone`, (sample, region) bool.
    """

    pixels: Tensor
    boxes: Tensor | None = None
    gone: Tensor | None = None

    def repeated(self, row: int, times: int) -> "Seen":
        """One image so many times."""
        one = {name: part[row : row + 1] for name, part in vars(self).items() if part is not None}
        return replace(self, **{name: part.expand(times, *part.shape[1:]) for name, part in one.items()})

    def twice(self) -> "Seen":
        """All images, and all of them again."""
        return replace(self, **{name: torch.cat([part, part]) for name, part in vars(self).items() if part is not None})


class Learner(nn.Module):
    """A model with its heads, and what it keeps beside its parameters while it learns, as persistent buffers."""

    without: frozenset[str] = frozenset()
    """Losses that it is taught without."""
    share: Share = ALONE
    """The part of each batch that it is asked about, where several processes teach it."""

    @classmethod
    def of(cls, sizes: "Sizes") -> "Learner":
        """A new one of these sizes; most have the reference world's alone."""
        return cls()

    @classmethod
    def like(cls, folder: Path) -> "Learner":
        """A new one of the sizes of the model in a folder."""
        return cls()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def prepare(self, corpus: Learnable) -> None:
        """What it has to know of a corpus before it learns from it."""

    def follow(self, step: int) -> None:
        """What follows each step of the optimizer, such as moving a momentum encoder; `step` counts from 1."""


class JointLearner(Learner):
    """A model that reads image and text together, or text alone, and then has no more than words."""

    units: Literal["patches", "regions"] = "patches"
    """What it sees of an image."""

    def see(self, corpus: Corpus, scenes: np.ndarray) -> Seen:
        """The image inputs of scenes."""
        raise NotImplementedError

    def hide(self, seen: Seen, units: Tensor) -> Seen:
        """The same without some units, (sample, unit) bool."""
        raise NotImplementedError

    def encode(self, words: Tensor, seen: Seen) -> Hidden:
        """The last hidden states for texts (sample, token)."""
        raise NotImplementedError

    def words(self, hidden: Hidden) -> Tensor:
        """Logits of each token's word (sample, token, word)."""
        raise NotImplementedError

    def match(self, hidden: Hidden) -> Tensor:
        """Log-odds that text and image belong together (sample,)."""
        raise NotImplementedError

    def answer(self, hidden: Hidden) -> Tensor:
        """Logits of the answers (sample, answer)."""
        raise NotImplementedError

    def classify(self, hidden: Hidden) -> Tensor:
        """Logits of each unit's class (sample, unit, class)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sizes:
    """How large a model is: entries of the vocabulary, most tokens of a text, sides of image and patch, and so on.

    Each encoder has `heads` and `width` channels; an image's has `layers`, a text's `text_layers`.
    """

    vocabulary: int = len(VOCABULARY)
    length: int = LENGTH
    side: int = SIDE
    patch: int = PATCH
    width: int = _WIDTH
    heads: int = _HEADS
    layers: int = _LAYERS
    text_layers: int = 2


WORLD = Sizes()
"""The sizes of the models that attnscope carries."""


class Retriever(Protocol):
    """What brings images and texts into one space, each by itself."""

    def embed_images(self, corpus: Learnable, scenes: np.ndarray) -> tuple[Tensor, Tensor]:
        """Unit vectors (sample, channel), and class logits of the patches (sample, patch, class)."""
        ...

    def embed_texts(self, words: Tensor) -> Tensor:
        """Unit vectors (text, channel)."""
        ...


def normalised(images: np.ndarray) -> Tensor:
    """Images (..., row, column, colour) uint8 as numbers from -1 to 1 (..., colour, row, column)."""
    return torch.from_numpy(np.moveaxis(images, -1, -3).astype(np.float32) / 127.5 - 1)


def hide_patches(seen: Seen, units: Tensor) -> Seen:
    """Mid-grey patches where `units` (sample, patch) says so."""
    grid = math.isqrt(units.shape[1])
    patch = seen.pixels.shape[-1] // grid
    hidden = units.reshape(-1, 1, grid, 1, grid, 1).expand(-1, 3, -1, patch, -1, patch)
    return Seen(seen.pixels.masked_fill(hidden.reshape(seen.pixels.shape), 0))


def smooth_positions(grid: int, width: int, scale: float = 0.4) -> Tensor:
    """Sines and cosines of the row and of the column of each patch (patch, channel), of low frequencies."""
    axis = (torch.arange(grid, dtype=torch.float32) + 0.5) / grid
    turns = torch.arange(1, width // 4 + 1, dtype=torch.float32) * torch.pi / 2
    waves = torch.cat([(axis[:, None] * turns).sin(), (axis[:, None] * turns).cos()], 1)
    # Higher frequencies count for less.
    waves = waves / torch.arange(1, width // 4 + 1).sqrt().repeat(2)
    rows = waves[:, None].expand(grid, grid, -1)
    columns = waves[None].expand(grid, grid, -1)
    return scale * torch.cat([rows, columns], -1).reshape(grid * grid, width)


class UnitClassifier(nn.Module):
    """Class logits of image units: an object's are the sum of its colour's and its shape's, the ground has its own."""

    def __init__(self, width: int = _WIDTH) -> None:
        super().__init__()
        self.parts = nn.Linear(width, len(COLOURS) + len(SHAPES) + 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., channel) to (..., class)."""
        return self.parts(hidden) @ _class_parts().to(hidden.device).T

    def whole(self) -> nn.Linear:
        """The same as one linear layer."""
        head = nn.Linear(self.parts.in_features, len(CLASSES))
        with torch.no_grad():
            head.weight.copy_(_class_parts() @ self.parts.weight)
            head.bias.copy_(_class_parts() @ self.parts.bias)
        return head


def _class_parts() -> Tensor:
    """Which parts (colours, shapes, ground) make up each class: (class, part)."""
    parts = torch.zeros(len(CLASSES), len(COLOURS) + len(SHAPES) + 1)
    for number, name in enumerate(CLASSES[:-1]):
        colour, shape = name.split()
        parts[number, list(COLOURS).index(colour)] = 1
        parts[number, len(COLOURS) + SHAPES.index(shape)] = 1
    parts[-1, -1] = 1
    return parts


def _extended(mask: Tensor) -> Tensor:
    """An attention mask (sample, token) as what is added to scores (sample, 1, 1, token)."""
    return (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min


class Vilt(JointLearner):
    """ViLT with heads for masked words, matching, answers, and the class of each patch."""

    def __init__(self, config: transformers.ViltConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or vilt_config()
        words = transformers.ViltForMaskedLM(config)
        self.vilt = words.vilt
        self.mlm_score = words.mlm_score
        self.rank_output = transformers.ViltForImageAndTextRetrieval(config).rank_output
        self.classifier = transformers.ViltForQuestionAnswering(config).classifier
        self.patch_classifier = UnitClassifier(config.hidden_size)
        positions = smooth_positions(config.image_size // config.patch_size, config.hidden_size)
        with torch.no_grad():
            self.vilt.embeddings.position_embeddings[0, 1:] = positions

    @classmethod
    def of(cls, sizes: Sizes) -> "Vilt":
        return cls(vilt_config(sizes))

    @classmethod
    def like(cls, folder: Path) -> "Vilt":
        return cls(transformers.ViltConfig.from_pretrained(folder))

    def see(self, corpus: Learnable, scenes: np.ndarray) -> Seen:
        return Seen(normalised(corpus.pixels[scenes]).to(self.device))

    def hide(self, seen: Seen, units: Tensor) -> Seen:
        return hide_patches(seen, units)

    def encode(self, words: Tensor, seen: Seen) -> Hidden:
        words = words.to(self.device)
        # The model's own forward shuffles the patches in a loop over samples; with every patch of every image real,
        # this is the same in fixed order.
        parts = self.vilt.embeddings
        patches = parts.patch_embeddings(seen.pixels).flatten(2).transpose(1, 2)
        image = torch.cat([parts.cls_token.expand(len(patches), -1, -1), patches], 1) + parts.position_embeddings
        kinds = parts.token_type_embeddings.weight
        states = torch.cat([parts.text_embeddings(words) + kinds[0], image + kinds[1]], 1)
        mask = torch.cat([words != PAD, torch.ones(image.shape[:2], dtype=torch.bool, device=words.device)], 1)
        states = self.vilt.encoder(states, attention_mask=_extended(mask)).last_hidden_state
        states = self.vilt.layernorm(states)
        count = words.shape[1]
        return Hidden(states[:, :count], states[:, count + 1 :], self.vilt.pooler(states))

    def words(self, hidden: Hidden) -> Tensor:
        return self.mlm_score(hidden.text)

    def match(self, hidden: Hidden) -> Tensor:
        return self.rank_output(hidden.pooled)[:, 0]

    def answer(self, hidden: Hidden) -> Tensor:
        return self.classifier(hidden.pooled)

    def classify(self, hidden: Hidden) -> Tensor:
        return self.patch_classifier(hidden.image)


class Lxmert(JointLearner):
    """LXMERT, which has all heads itself; the classes of its objects are the world's."""

    units = "regions"

    def __init__(self, config: transformers.LxmertConfig | None = None) -> None:
        super().__init__()
        self.config = config or lxmert_config()
        whole = transformers.LxmertForPreTraining(self.config)
        self.lxmert = whole.lxmert
        self.cls = whole.cls
        self.obj_predict_head = whole.obj_predict_head
        self.answer_head = whole.answer_head

    @classmethod
    def of(cls, sizes: Sizes) -> "Lxmert":
        return cls(lxmert_config(sizes))

    @classmethod
    def like(cls, folder: Path) -> "Lxmert":
        return cls(transformers.LxmertConfig.from_pretrained(folder))

    def see(self, corpus: Learnable, scenes: np.ndarray) -> Seen:
        crops, boxes = normalised(corpus.crops[scenes]).flatten(2), torch.from_numpy(corpus.boxes[scenes])
        return Seen(crops.to(self.device), boxes.to(self.device))

    def hide(self, seen: Seen, units: Tensor) -> Seen:
        """Features of zero where `units` (sample, region) says so; boxes stay."""
        return Seen(seen.pixels.masked_fill(units[..., None], 0), seen.boxes)

    def encode(self, words: Tensor, seen: Seen) -> Hidden:
        words = words.to(self.device)
        out = self.lxmert(
            input_ids=words, attention_mask=(words != PAD).float(), visual_feats=seen.pixels, visual_pos=seen.boxes
        )
        return Hidden(out.language_output, out.vision_output, out.pooled_output)

    def words(self, hidden: Hidden) -> Tensor:
        return self.cls.predictions(hidden.text)

    def match(self, hidden: Hidden) -> Tensor:
        scores = self.cls.seq_relationship(hidden.pooled)
        return scores[:, 1] - scores[:, 0]

    def answer(self, hidden: Hidden) -> Tensor:
        return self.answer_head(hidden.pooled)

    def classify(self, hidden: Hidden) -> Tensor:
        return self.obj_predict_head(hidden.image)["obj"]


class Text(JointLearner):
    """BERT that reads captions alone: what the words by themselves give away."""

    def __init__(self, config: transformers.BertConfig | None = None) -> None:
        super().__init__()
        self.config = config or text_config()
        whole = transformers.BertForMaskedLM(self.config)
        self.bert, self.cls = whole.bert, whole.cls

    @classmethod
    def of(cls, sizes: Sizes) -> "Text":
        return cls(text_config(sizes))

    @classmethod
    def like(cls, folder: Path) -> "Text":
        return cls(transformers.BertConfig.from_pretrained(folder))

    def see(self, corpus: Learnable, scenes: np.ndarray) -> Seen:
        return Seen(torch.zeros(len(scenes), 0))

    def encode(self, words: Tensor, seen: Seen) -> Hidden:
        words = words.to(self.device)
        out = self.bert(input_ids=words, attention_mask=(words != PAD).float())
        return Hidden(out.last_hidden_state, None, None)

    def words(self, hidden: Hidden) -> Tensor:
        return self.cls(hidden.text)


class Clip(Learner):
    """CLIP with a class for each patch beside it."""

    def __init__(self, config: transformers.CLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config or clip_config()
        vision = self.config.vision_config
        whole = transformers.CLIPModel(self.config)
        self.text_model, self.vision_model = whole.text_model, whole.vision_model
        self.text_projection, self.visual_projection = whole.text_projection, whole.visual_projection
        self.logit_scale = whole.logit_scale
        self.patch_classifier = UnitClassifier(vision.hidden_size)
        with torch.no_grad():
            positions = smooth_positions(vision.image_size // vision.patch_size, vision.hidden_size)
            self.vision_model.embeddings.position_embedding.weight[1:] = positions

    @classmethod
    def of(cls, sizes: Sizes) -> "Clip":
        return cls(clip_config(sizes))

    @classmethod
    def like(cls, folder: Path) -> "Clip":
        return cls(transformers.CLIPConfig.from_pretrained(folder))

    def embed_images(self, corpus: Learnable, scenes: np.ndarray) -> tuple[Tensor, Tensor]:
        """Unit vectors (sample, channel), and class logits of the patches (sample, patch, class)."""
        out = self.vision_model(pixel_values=normalised(corpus.pixels[scenes]).to(self.device))
        vectors = nn.functional.normalize(self.visual_projection(out.pooler_output), dim=-1)
        return vectors, self.patch_classifier(out.last_hidden_state[:, 1:])

    def embed_texts(self, words: Tensor) -> Tensor:
        """Unit vectors (text, channel)."""
        words = words.to(self.device)
        out = self.text_model(input_ids=words, attention_mask=(words != PAD).long())
        return nn.functional.normalize(self.text_projection(out.pooler_output), dim=-1)


class Mapper(JointLearner):
    """The mapper behind a CLIP, which stays as it is, with answers, captions, and the class of each patch.

    Without a config it stands behind the carried CLIP; with one its encoders have no weights yet but random ones.
    """

    def __init__(self, config: mapper.MapperConfig | None = None) -> None:
        super().__init__()
        carried = carrying.path("clip") if config is None else None
        config = config or mapper_config()
        answers = mapper.MapperForQuestionAnswering(config)
        self.model, self.classifier = answers.model, answers.classifier
        self.decoder = mapper.Decoder(config)
        self.decoder.apply(answers._init_weights)
        self.patch_classifier = UnitClassifier(config.hidden_size)
        for encoder in (self.model.text_model, self.model.vision_model):
            encoder.requires_grad_(False)
        if carried is not None:
            self._take_encoders(carried)

    @classmethod
    def behind(cls, clip: Path) -> "Mapper":
        """A new one behind the CLIP in a folder, of its sizes, which writes captions of what that has learned from."""
        learner = cls(caption_config(transformers.CLIPConfig.from_pretrained(clip)))
        learner._take_encoders(clip)
        return learner

    @classmethod
    def like(cls, folder: Path) -> "Mapper":
        return cls(mapper.MapperConfig.from_pretrained(folder))

    def _take_encoders(self, clip: Path) -> None:
        weights = load_file(clip / "model.safetensors")
        for name in ("text_model", "vision_model"):
            encoder = getattr(self.model, name)
            encoder.load_state_dict({n: weights[f"{name}.{n}"] for n, _ in encoder.named_parameters()})

    def see(self, corpus: Learnable, scenes: np.ndarray) -> Seen:
        return Seen(normalised(corpus.pixels[scenes]).to(self.device))

    def encode(self, words: Tensor, seen: Seen) -> Hidden:
        words = words.to(self.device)
        out = self.model(words, seen.pixels, (words != PAD).long())
        return Hidden(
            out.text_hidden_state, out.image_hidden_state, mapper.end_states(out.text_hidden_state, words, self.config)
        )

    def answer(self, hidden: Hidden) -> Tensor:
        return self.classifier(hidden.pooled)

    def classify(self, hidden: Hidden) -> Tensor:
        return self.patch_classifier(hidden.image[:, 1:])  # type: ignore[index]

    def prompts(self, count: int) -> Tensor:
        """The text (sample, token) to encode images with that are to be described."""
        return mapper.prompts(count, self.config)

    def look(self, corpus: Learnable, scenes: np.ndarray) -> Tensor:
        """Images mapped with the prompt (sample, unit, channel)."""
        image = self.encode(self.prompts(len(scenes)), self.see(corpus, scenes)).image
        assert image is not None
        return image

    def tell(self, words: Tensor, image: Tensor) -> Tensor:
        """Logits (sample, token, word) of what comes behind each token, for images mapped with the prompt."""
        words = words.to(self.device)
        return self.decoder(words, image, (words != PAD).long())

    @property
    def config(self) -> mapper.MapperConfig:
        return self.model.config


_ANSWER_NAMES = dict(enumerate(ANSWERS))
_ANSWER_IDS = {answer: number for number, answer in enumerate(ANSWERS)}


def vilt_config(sizes: Sizes = WORLD) -> transformers.ViltConfig:
    return transformers.ViltConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=sizes.length,
        image_size=sizes.side,
        patch_size=sizes.patch,
        max_image_length=-1,
        pad_token_id=PAD,
        initializer_range=_INIT,
        id2label=_ANSWER_NAMES,
        label2id=_ANSWER_IDS,
        tie_word_embeddings=True,
        architectures=["ViltForImageAndTextRetrieval"],
    )


def lxmert_config(sizes: Sizes = WORLD) -> transformers.LxmertConfig:
    """Of its layers half are cross-modal, and a quarter read regions alone, rounded up."""
    return transformers.LxmertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        l_layers=sizes.text_layers,
        r_layers=math.ceil(sizes.layers / 4),
        x_layers=math.ceil(sizes.layers / 2),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=sizes.length,
        visual_feat_dim=3 * REGION_SIDE**2,
        num_object_labels=len(CLASSES),
        num_qa_labels=len(ANSWERS),
        visual_attr_loss=False,
        visual_feat_loss=False,
        initializer_range=_INIT,
        pad_token_id=PAD,
        # Not LXMERT's: its features usually come from a detector, here they are what each box shows.
        region_pixels={"count": REGIONS, "side": REGION_SIDE},
        architectures=["LxmertForPreTraining"],
    )


def text_config(sizes: Sizes = WORLD) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=sizes.length,
        pad_token_id=PAD,
        initializer_range=_INIT,
        architectures=["BertForMaskedLM"],
    )


def clip_config(sizes: Sizes = WORLD) -> transformers.CLIPConfig:
    shared = {"hidden_size": sizes.width, "intermediate_size": 4 * sizes.width, "num_attention_heads": sizes.heads}
    return transformers.CLIPConfig(
        text_config={
            **shared,
            "vocab_size": sizes.vocabulary,
            "num_hidden_layers": sizes.text_layers,
            "max_position_embeddings": sizes.length,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": SEP,
            "projection_dim": sizes.width,
        },
        vision_config={
            **shared,
            "num_hidden_layers": sizes.layers,
            "image_size": sizes.side,
            "patch_size": sizes.patch,
            "projection_dim": sizes.width,
        },
        projection_dim=sizes.width,
        architectures=["CLIPModel"],
    )


def mapper_config() -> mapper.MapperConfig:
    prompt = (VOCABULARY.index(word) for word in ("what", "is", "there", "?"))
    return _config_behind(
        clip_config(),
        prompt_ids=[CLS, *prompt, SEP],
        id2label=_ANSWER_NAMES,
        label2id=_ANSWER_IDS,
        architectures=["MapperForQuestionAnswering"],
    )


def caption_config(clip: transformers.CLIPConfig) -> mapper.MapperConfig:
    """The sizes of a mapper that writes captions behind a CLIP; its prompt is a text without words."""
    return _config_behind(clip, prompt_ids=[CLS, SEP], architectures=["MapperForConditionalGeneration"])


def _config_behind(clip: transformers.CLIPConfig, **own: Any) -> mapper.MapperConfig:
    width = clip.vision_config.hidden_size
    return mapper.MapperConfig(
        text_config=clip.text_config.to_dict(),
        vision_config=clip.vision_config.to_dict(),
        hidden_size=width,
        num_attention_heads=clip.vision_config.num_attention_heads,
        intermediate_size=2 * width,
        initializer_range=_INIT,
        pad_token_id=PAD,
        bos_token_id=CLS,
        eos_token_id=SEP,
        **own,
    )
