"""What an example of a model family is, and the sizes and inputs that examples share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Inputs = dict[str, Any]

BOTH, EAGER = ("sdpa", "eager"), ("eager",)

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


@dataclass(frozen=True)
class Example:
    """A tiny model of a family: its class in transformers, configuration, inputs, and attention implementations.

    `other_softmaxes` of a forward are no attention, such as the router of a mixture of experts. With the kernels in
    `output_only` the eager softmax is not the attention, so that the attention's output is the only witness.
    """

    model: str
    config: Callable[[], Any]
    inputs: Callable[[], Inputs]
    kernels: tuple[str, ...]
    other_softmaxes: int = 0
    output_only: tuple[str, ...] = ()

    def build(self, kernel: str) -> nn.Module:
        """The model with the given attention implementation and wide weights, in evaluation mode."""
        return widened(getattr(hf, self.model)._from_config(self.config(), attn_implementation=kernel))


def widened(model: nn.Module, std: float = 0.2) -> nn.Module:
    """The model with weights wide enough for attention far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + centre)
    return model.eval()


def text(length: int = 9, side: str = "right") -> Inputs:
    """Two token sequences, the second one padded by three tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, slice(-3, None) if side == "right" else slice(0, 3)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(size: int = 16, batch: int = 2) -> Inputs:
    """Noise in place of images."""
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}


def numbers(*shape: int) -> Tensor:
    """Noise of any shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))
