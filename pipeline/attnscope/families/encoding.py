"""From samples to model inputs, with the model's own processor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnscope.samples import Sample, SampleError

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def encode_samples(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """The model's inputs for a batch: images by its image processor, texts by its tokenizer, padded to the longest.

    Raises
    ------
    SampleError
        When a sample lacks what the model needs; call with one sample to learn whose fault it is.
    """
    inputs: dict[str, Tensor] = {}
    if loaded.image_processor is not None:
        images = [s.load_image() for s in samples]
        _require([i is not None for i in images], samples, "image", loaded)
        inputs |= _tensors(loaded.image_processor(images=images, return_tensors="pt"))
    if loaded.tokenizer is not None:
        _require([bool(s.text) for s in samples], samples, "text", loaded)
        inputs |= _tensors(loaded.tokenizer([s.text for s in samples], padding=True, return_tensors="pt"))
    if not inputs:
        raise SampleError(f"{loaded.name!r} has neither an image processor nor a tokenizer to encode samples with")
    return inputs


def measure_text(sample: Sample, loaded: "LoadedModel") -> "dict[str, int]":
    """Tokens of a sample's text, special ones included; nothing for a model without a tokenizer.

    Raises
    ------
    SampleError
        When there is no text, or it is longer than the model takes.
    """
    if loaded.tokenizer is None:
        return {}
    _require([bool(sample.text)], [sample], "text", loaded)
    length = len(loaded.tokenizer(sample.text, verbose=False)["input_ids"])
    limit = loaded.text_limit
    if limit is not None and length > limit:
        raise SampleError(f"text has {length} tokens, {loaded.name!r} takes {limit}")
    return {"text": length}


def _require(present: Sequence[bool], samples: Sequence[Sample], what: str, loaded: "LoadedModel") -> None:
    for sample, has in zip(samples, present, strict=True):
        if not has:
            raise SampleError(f"sample {sample.id!r} has no {what}, which {loaded.name!r} needs")


def _tensors(batch: object) -> "dict[str, Tensor]":
    import torch

    return {k: v for k, v in dict(batch).items() if isinstance(v, torch.Tensor)}  # type: ignore[call-overload]
