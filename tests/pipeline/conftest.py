"""Tiny models with wide random weights (so that attention is far from uniform), saved as users save theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import torch

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "circle",
    "square",
    "on",
    "left",
    "of",
    "the",
    "big",
    "small",
    "box",
    "with",
    "two",
]
WIDTH = 0.3


def _wide(model: "object", seed: int = 0) -> "object":
    """The model with every parameter drawn anew, normal with standard deviation 0.3 (gains around 1).

    What a model freezes from the start (sinusoids) stays as it is.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
            if not parameter.requires_grad:
                continue
            is_gain = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * WIDTH + is_gain)
    return model.eval()  # type: ignore[attr-defined]


def _save_tokenizer(folder: Path) -> None:
    from transformers import BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)


def _save_image_processor(folder: Path, size: int) -> None:
    from transformers import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT classifier: 2 layers, 4 heads, 8 x 8 patches of a 32-pixel image, 5 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    _wide(ViTForImageClassification(config)).save_pretrained(folder)  # type: ignore[attr-defined]
    _save_image_processor(folder, 32)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT: 2 layers, 4 heads, 22 words, at most 16 tokens."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    _wide(BertModel(config)).save_pretrained(folder)  # type: ignore[attr-defined]
    _save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP: 2 + 2 layers, 4 heads each, 4 x 4 patches."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"vocab_size": 5 + len(WORDS), "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    config = CLIPConfig(
        text_config={**small, **text}, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    _wide(CLIPModel(config)).save_pretrained(folder)  # type: ignore[attr-defined]
    _save_tokenizer(folder)
    _save_image_processor(folder, 32)
    return folder


@pytest.fixture(scope="session")
def tiny_vilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViLT that tells masked words: 2 layers, 4 heads, 4 x 4 patches of a 32-pixel image."""
    from transformers import ViltConfig, ViltForMaskedLM, ViltImageProcessorPil

    folder = tmp_path_factory.mktemp("vilt")
    config = ViltConfig(
        vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, image_size=32, patch_size=8, max_image_length=-1, type_vocab_size=2,
    )  # fmt: skip
    _wide(ViltForMaskedLM(config)).save_pretrained(folder)  # type: ignore[attr-defined]
    _save_tokenizer(folder)
    ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def captioned_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine noise images of several sizes with captions of several lengths, in a folder with metadata.jsonl."""
    import json

    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    records = []
    for number in range(9):
        height, width = generator.integers(20, 60, 2)
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        text = " ".join(WORDS[(number + k) % len(WORDS)] for k in range(1 + number))
        records.append({"id": f"s{number}", "file_name": f"{number}.png", "text": text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="session")
def made_model() -> "Callable[..., torch.nn.Module]":
    """A function that makes a model of a class and a configuration, with wide random weights."""

    def make(name: str, config: "object", kernel: str = "eager") -> "torch.nn.Module":
        import torch
        import transformers

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, name)._from_config(config, attn_implementation=kernel)
        return _wide(model)  # type: ignore[return-value]

    return make


@pytest.fixture(scope="session")
def own_attention() -> "Callable[..., dict[str, list[np.ndarray]]]":
    """A function that gives the softmaxes of a model's forward by the name of the module that ran them."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class Spy(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.running: list[str] = []
            self.seen: dict[str, list[np.ndarray]] = {}

        def __torch_function__(self, func: "Any", types: "Any", args: "Any" = (), kwargs: "Any" = None) -> "Any":
            kwargs = dict(kwargs or {})
            if func is functional.multi_head_attention_forward:
                kwargs |= {"need_weights": True, "average_attn_weights": False}
            result = func(*args, **kwargs)
            if func is functional.multi_head_attention_forward:
                self.keep(result[1])
            elif func in (torch.softmax, torch.Tensor.softmax, functional.softmax):
                self.keep(result)
            return result

        def keep(self, attention: torch.Tensor) -> None:
            self.seen.setdefault(self.running[-1], []).append(attention.detach().float().numpy().copy())

    def spy_on(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, list[np.ndarray]]:
        spy = Spy()
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: spy.running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: spy.running.pop() and None))
        with torch.no_grad(), spy:
            model(**inputs)
        for handle in handles:
            handle.remove()
        return spy.seen

    return spy_on
