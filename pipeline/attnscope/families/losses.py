"""Losses: how well a model tells words and image tokens, from what it gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from attnscope.families.labels import UNASKED

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel

_WORD_LOGITS = ("prediction_logits", "mlm_logits", "logits")
_IMAGE_LOGITS = ("patch_logits", "region_logits", "object_logits", "mim_logits")
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")


def writes_forward(loaded: "LoadedModel") -> bool:
    """Whether the model tells each word from those before it, so that none has to be masked to ask for it."""
    return type(loaded.model).__name__.endswith(_WRITERS)


def word_logits(outputs: object, tokens: int, loaded: "LoadedModel") -> "Tensor":
    """The logits of words at the text's tokens: (sample, token, word).

    Raises
    ------
    ValueError
        When the model has no head that tells words.
    """
    for name in _WORD_LOGITS:
        logits = getattr(outputs, name, None)
        if logits is not None and logits.ndim == 3 and logits.shape[1] >= tokens:
            # A joint stream has logits at its image tokens as well: behind the text, or in front of what reads them.
            return logits[:, -tokens:] if writes_forward(loaded) else logits[:, :tokens]
    raise ValueError(f"{loaded.name!r} tells no words: asking for a phrase needs a model with a language head")


def image_logits(outputs: object, loaded: "LoadedModel") -> "Tensor":
    """The logits of what each image token shows: (sample, image token, class).

    Raises
    ------
    ValueError
        When the model has no head that tells them.
    """
    for name in _IMAGE_LOGITS:
        logits = getattr(outputs, name, None)
        if logits is not None and logits.ndim == 3:
            return logits
    raise ValueError(f"{loaded.name!r} tells no image tokens: asking for an object needs a patch or region head")


@contextmanager
def object_head(loaded: "LoadedModel") -> Iterator["list[Tensor]"]:
    """Keeps what LXMERT's head for the class of its regions is given, which its forward uses in training alone."""
    head = getattr(loaded.model, "obj_predict_head", None)
    inner = getattr(loaded.model, "lxmert", None)
    found: list[Tensor] = []
    if head is None or inner is None:
        yield found
        return
    handle = inner.register_forward_hook(lambda module, given, made: found.append(head(made[1])["obj"]))
    try:
        yield found
    finally:
        handle.remove()


def embeddings(outputs: object, loaded: "LoadedModel") -> "dict[str, Tensor]":
    """Unit vectors of image and text, (sample, channel) each, of a model that compares them.

    Raises
    ------
    ValueError
        When the model gives no such vectors.
    """
    import torch

    found = {f"{side}_embedding": getattr(outputs, f"{side}_embeds", None) for side in ("image", "text")}
    given = {name: tensor for name, tensor in found.items() if tensor is not None and tensor.ndim == 2}
    if len(given) < len(found):
        raise ValueError(f"{loaded.name!r} gives no vectors of image and text: embeddings need a dual encoder")
    return {name: torch.nn.functional.normalize(tensor.float(), dim=-1) for name, tensor in given.items()}


def word_loss(outputs: object, labels: "Tensor", loaded: "LoadedModel") -> "tuple[Tensor, Tensor]":
    """Mean cross entropy (nats) and share told right, (sample,) each, of the words of `labels` (sample, token).

    `UNASKED` stands for words that aren't asked for; a sample without any has NaN.
    """
    import torch

    logits = word_logits(outputs, labels.shape[1], loaded).float()
    labels = labels.to(logits.device)
    if writes_forward(loaded):
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != UNASKED
    chosen = labels.clamp(min=0)[..., None]
    surprise = -torch.log_softmax(logits, dim=-1).gather(-1, chosen)[..., 0]
    right = (logits.argmax(dim=-1) == labels).float()
    count = asked.sum(dim=1)
    return tuple((v * asked).sum(dim=1) / count for v in (surprise, right))  # type: ignore[return-value]


def divergence(reference: "Tensor", logits: "Tensor") -> "tuple[Tensor, Tensor]":
    """KL divergence (nats) of a distribution from the reference, both given as logits (sample, class), and agreement.

    Zero exactly where they are equal; the second is 1 where both put the same class first.
    """
    import torch

    p, q = (torch.log_softmax(v.float(), dim=-1) for v in (reference, logits))
    return (p.exp() * (p - q)).sum(dim=-1), (p.argmax(dim=-1) == q.argmax(dim=-1)).float()
