"""Prompts of models that read image tokens among the text's: encoded whole, and measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from attnscope.samples import Sample, SampleError

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def prompt_of(sample: Sample, loaded: "LoadedModel", placeholder: str, before: str = "") -> str:
    """The sample's text with the image's placeholder: as it stands, by the chat template, or in front of the text.

    `before` is what is put in front of the text where there is no template; the placeholder alone by default.
    """
    text, before = sample.text or "", before or placeholder
    if not placeholder or placeholder in text:
        return text
    tokenizer = loaded.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return before + text
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    for content in (parts, f"{placeholder}\n{text}"):
        message = [{"role": "user", "content": content}]
        made = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        if made.count(placeholder) == 1:
            return made
    return before + text


def encode_prompts(
    samples: Sequence[Sample],
    loaded: "LoadedModel",
    *,
    placeholder: str | None = None,
    nested: bool = False,
    options: Mapping[str, object] | None = None,
) -> "dict[str, Tensor]":
    """The inputs of a batch by the model's joint processor.

    `placeholder` stands in the prompt for the image; None for the processor's own. `nested` gives the processor a list
    of images for each sample; `options` are further ones of the processor's.

    Raises
    ------
    SampleError
        When a sample has no image or no text.
    """
    require_both(samples, loaded)
    processor = loaded.processor
    if processor is None:
        raise SampleError(f"{loaded.name!r} has no processor to put images into texts; give ready inputs")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    image = str(getattr(processor, "image_token", "") or "") if placeholder is None else placeholder
    prompts = [prompt_of(s, loaded, image) for s in samples]
    images = [[s.load_image()] if nested else s.load_image() for s in samples]
    chosen = {**text_options(prompts, loaded), **(options or {})}
    return taken(processor(images=images, text=prompts, return_tensors="pt", **chosen), loaded)


def encode_expanded(
    samples: Sequence[Sample],
    loaded: "LoadedModel",
    placeholder: str,
    expand: "Callable[[Mapping[str, Tensor], int], str]",
    *,
    before: str = "",
    options: Mapping[str, object] | None = None,
) -> "dict[str, Tensor]":
    """The inputs of a batch by image processor and tokenizer alone, where the joint processor asks for video as well.

    `expand` gives what the placeholder of the n-th sample becomes, from what the image processor made of all;
    `before` is put in front of a text without a template; `options` are the image processor's.
    """
    require_both(samples, loaded)
    if loaded.image_processor is None or loaded.tokenizer is None:
        raise SampleError(f"{loaded.name!r} has no image processor or no tokenizer; give ready inputs")
    seen = loaded.image_processor(images=[[s.load_image()] for s in samples], return_tensors="pt", **(options or {}))
    prompts = [prompt_of(s, loaded, placeholder, before) for s in samples]
    prompts = [p.replace(placeholder, expand(seen, i)) for i, p in enumerate(prompts)]
    read = loaded.tokenizer(prompts, return_tensors="pt", **text_options(prompts, loaded))
    return taken({**read, **seen}, loaded)


def text_options(prompts: Sequence[str], loaded: "LoadedModel") -> dict[str, bool]:
    """How prompts are read: padded, and without a second BOS token where the chat template wrote one."""
    start = getattr(loaded.tokenizer, "bos_token", None)
    written = bool(start) and all(p.startswith(str(start)) for p in prompts)
    return {"padding": True, **({"add_special_tokens": False} if written else {})}


def taken(inputs: "Mapping[str, object]", loaded: "LoadedModel") -> "dict[str, Tensor]":
    """The tensors that the model's forward names; labels are for training."""
    import inspect

    import torch

    names = inspect.signature(loaded.model.forward).parameters.keys() - {"labels"}
    return {k: v for k, v in inputs.items() if k in names and isinstance(v, torch.Tensor)}


def require_both(samples: Sequence[Sample], loaded: "LoadedModel") -> None:
    """Raise SampleError for a sample without an image or without a text."""
    for sample in samples:
        for what, value in (("image", sample.image), ("text", sample.text)):
            if not value:
                raise SampleError(f"sample {sample.id!r} has no {what}, which {loaded.name!r} needs")


def measured_by(
    encode: "Callable[[Sequence[Sample], LoadedModel], dict[str, Tensor]]",
    lengths: "Callable[[dict[str, Tensor], LoadedModel], Mapping[str, int]]",
) -> "Callable[[Sample, LoadedModel], Mapping[str, int]]":
    """Measures a sample by encoding it alone: how many tokens an image makes is the processor's business."""

    def measure(sample: Sample, loaded: "LoadedModel") -> Mapping[str, int]:
        found = lengths(encode([sample], loaded), loaded)
        limit, read = loaded.text_limit, found.get("joint", 0)
        if limit is not None and read > limit:
            raise SampleError(f"text and image have {read} tokens, {loaded.name!r} takes {limit}")
        return found

    return measure
