"""From samples to model inputs, with the model's own processor."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from attnscope.samples import Sample, SampleError

if TYPE_CHECKING:
    from PIL.Image import Image
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
        images = require_images(samples, loaded)
        inputs |= _tensors(loaded.image_processor(images=images, return_tensors="pt"))
    if loaded.tokenizer is not None:
        _require([bool(s.text) for s in samples], samples, "text", loaded)
        inputs |= _tensors(loaded.tokenizer([s.text for s in samples], padding=True, return_tensors="pt"))
    if not inputs:
        raise SampleError(f"{loaded.name!r} has neither an image processor nor a tokenizer to encode samples with")
    return inputs


def require_images(samples: Sequence[Sample], loaded: "LoadedModel") -> "list[Image]":
    """The image of each sample, decoded.

    Raises
    ------
    SampleError
        When a sample has none, or it can't be decoded.
    """
    images = [s.load_image() for s in samples]
    _require([i is not None for i in images], samples, "image", loaded)
    return [image for image in images if image is not None]


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


def encode_with_decoder(
    samples: Sequence[Sample],
    loaded: "LoadedModel",
    encode: "Callable[[Sequence[Sample], LoadedModel], dict[str, Tensor]]" = encode_samples,
) -> "dict[str, Tensor]":
    """The inputs of an encoder, and its decoder's: the start token, then the target text `targets['output']`."""
    import torch

    inputs = encode(samples, loaded)
    rows = [torch.tensor(decoder_ids(s, loaded)) for s in samples]
    masks = [torch.ones_like(r) for r in rows]
    pad = getattr(loaded.tokenizer, "pad_token_id", None) or 0
    inputs["decoder_input_ids"] = torch.nn.utils.rnn.pad_sequence(rows, True, pad)
    inputs["decoder_attention_mask"] = torch.nn.utils.rnn.pad_sequence(masks, True, 0)
    return inputs


def measure_with_decoder(sample: Sample, loaded: "LoadedModel") -> "dict[str, int]":
    """Tokens of a sample's text and of what its decoder is given."""
    return {**measure_text(sample, loaded), "decoder": len(decoder_ids(sample, loaded))}


def decoder_ids(sample: Sample, loaded: "LoadedModel") -> list[int]:
    """What the decoder is given while it writes the sample's target text: all but its end, one token to the right."""
    text = sample.targets.get("output")
    if text is None:
        return [start_token(loaded)]
    import torch

    labels = loaded.tokenizer(text_target=str(text))["input_ids"]  # type: ignore[misc]
    shift = getattr(loaded.model, "prepare_decoder_input_ids_from_labels", None)
    return [start_token(loaded), *labels[:-1]] if shift is None else shift(labels=torch.tensor([labels]))[0].tolist()


def start_token(loaded: "LoadedModel") -> int:
    """The token that a decoder begins with."""
    configs = (loaded.config, getattr(loaded.model, "generation_config", None))
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    found = (getattr(c, name, None) for name in names for c in configs)
    return next((int(token) for token in found if token is not None), 0)


def _require(present: Sequence[bool], samples: Sequence[Sample], what: str, loaded: "LoadedModel") -> None:
    for sample, has in zip(samples, present, strict=True):
        if not has:
            raise SampleError(f"sample {sample.id!r} has no {what}, which {loaded.name!r} needs")


def _tensors(batch: object) -> "dict[str, Tensor]":
    import torch

    return {k: v for k, v in dict(batch).items() if isinstance(v, torch.Tensor)}  # type: ignore[call-overload]
