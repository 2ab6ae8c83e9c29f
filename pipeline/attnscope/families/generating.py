"""What a model writes by itself: its greedy answer goes behind the prompt, and is recorded in one forward with it.

A decoder's attention looks back only, so that the rows of the written tokens are those of the steps that wrote them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from attnscope.families import LayoutFunction, ModelFamily
from attnscope.families.labels import LABELS, UNASKED, WRITTEN
from attnscope.families.layouts import DEFAULT_LAYOUTS
from attnscope.samples import Sample
from attnscope.tokens import KIND_CODES, TokenLayout

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def generating(family: ModelFamily, loaded: "LoadedModel", most: int) -> ModelFamily:
    """The family, whose samples are encoded with what the model writes after them, at most so many tokens.

    Decoding is greedy, so that a run which is resumed reads the same tokens. One sample at a time: padding between a
    prompt and its answer would be neither's.

    Raises
    ------
    ValueError
        When the model has no head that writes.
    """
    if not getattr(loaded.model, "can_generate", bool)():
        raise ValueError(
            f"{type(loaded.model).__name__!r} can't generate: it has no language modelling head; extract without it"
        )
    stream = _written_stream(family, loaded)
    layout = family.streams.get(stream, DEFAULT_LAYOUTS["text"])

    def encode(samples: Sequence[Sample], model: "LoadedModel") -> "dict[str, Tensor]":
        (sample,) = samples
        return _with_answer(family.encode([sample], model), model, most)

    def measure(sample: Sample, model: "LoadedModel") -> Mapping[str, int]:
        found = dict(family.measure(sample, model))
        start = 1 if stream == "decoder" else 0
        return {**found, stream: max(found.get(stream, 0), start) + most}

    streams = {**family.streams, stream: _marked(layout)}
    return replace(family, encode=encode, measure=measure, streams=streams, one_by_one=True)


def _written_stream(family: ModelFamily, loaded: "LoadedModel") -> str:
    if getattr(loaded.config, "is_encoder_decoder", False) or "decoder" in family.streams:
        return "decoder"
    return "joint" if "joint" in family.streams else "text"


def _with_answer(inputs: "dict[str, Tensor]", loaded: "LoadedModel", most: int) -> "dict[str, Tensor]":
    """The inputs of one sample with the tokens that the model writes, and a note of how many those are."""
    import torch

    given = {
        k: v.to(loaded.device, loaded.dtype if v.is_floating_point() else None)
        for k, v in inputs.items()
        if not k.startswith("_")
    }
    decoder = given.pop("decoder_input_ids", None)
    given.pop("decoder_attention_mask", None)
    with torch.no_grad():
        ids = loaded.model.generate(**given, max_new_tokens=most, do_sample=False, num_beams=1).cpu()  # type: ignore[operator]
    if decoder is not None or getattr(loaded.config, "is_encoder_decoder", False):
        rest = {k: v for k, v in inputs.items() if k != "decoder_attention_mask"}
        return {**rest, "decoder_input_ids": ids, **_notes(ids, ids.shape[1] - 1)}
    prompt = inputs["input_ids"]
    begins_with_it = ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt.cpu())
    answer = ids[:, prompt.shape[1] :] if begins_with_it else ids
    # Whatever says something of each token of the prompt says it of the answer: it is read, and no image.
    longer = {
        k: torch.cat([v, answer.to(v) if k == "input_ids" else _beside(k, v, answer)], dim=1)
        for k, v in inputs.items()
        if v.shape == prompt.shape
    }
    return {**inputs, **longer, **_notes(longer["input_ids"], answer.shape[1])}


def _notes(ids: "Tensor", written: int) -> "dict[str, Tensor]":
    """How many of these tokens (sample, token) the model wrote, the last ones, and what it is asked for there."""
    import torch

    labels = torch.full_like(ids, UNASKED)
    labels[:, ids.shape[1] - written :] = ids[:, ids.shape[1] - written :]
    return {WRITTEN: torch.tensor([[written]]), LABELS: labels}


def _beside(name: str, prompt: "Tensor", answer: "Tensor") -> "Tensor":
    return prompt.new_full(answer.shape, int(name == "attention_mask"))


def _marked(layout: LayoutFunction) -> LayoutFunction:
    """The layout, with the written tokens told from those of the prompt."""

    def marked(inputs: "dict[str, Tensor]", loaded: "LoadedModel", tokens: int) -> TokenLayout:
        made = layout(inputs, loaded, tokens)
        written = int(inputs[WRITTEN][0, 0])
        if not written:
            return made
        kind = made.kind.copy()
        kind[:, -written:] = KIND_CODES["generated"]
        return replace(made, kind=kind)

    return marked
