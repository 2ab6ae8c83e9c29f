"""Targets: the scalar per sample that a model's outputs are judged by, and gradients are taken of."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from attnscope.families.labels import LABELS, UNASKED, WRITTEN
from attnscope.families.losses import word_logits, writes_forward

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel


def class_logits(outputs: object, inputs: object, loaded: "LoadedModel") -> "Tensor":
    """The logits of a classifier, before softmax: (sample, class)."""
    logits = _first(outputs, "logits", "question_answering_score")
    if logits is None or logits.ndim != 2:
        raise ValueError(f"{loaded.name!r} gives no class logits: a class target needs a model with a classifier")
    return logits


def predicted(outputs: object, inputs: object, loaded: "LoadedModel") -> "Tensor":
    """The largest class logit of each sample."""
    return class_logits(outputs, inputs, loaded).amax(dim=-1)


def similarity(outputs: object, inputs: object, loaded: "LoadedModel") -> "Tensor":
    """The similarity of each image with its own text, in the model's own scale."""
    logits = _first(outputs, "logits_per_image", "contrastive_logits_per_image")
    if logits is None:
        raise ValueError(f"{loaded.name!r} gives no image-text similarity")
    return logits.diagonal()


def matching(outputs: object, inputs: object, loaded: "LoadedModel") -> "Tensor":
    """The log-odds that each image and its text belong together, of a model with a matching head (nats)."""
    logits = _first(outputs, "itm_score", "itm_logits", "cross_relationship_score", "logits", "logits_per_image")
    if logits is None or logits.ndim != 2 or logits.shape[1] > 2:
        raise ValueError(f"{loaded.name!r} gives no matching score of image and text")
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def cls_norm(outputs: object, inputs: object, loaded: "LoadedModel") -> "Tensor":
    """The Euclidean norm of the first token's last hidden state.

    Where the model ends in a LayerNorm, only the spread of its gains makes this depend on the input: with equal gains
    it is a constant, and another target should be named.
    """
    return _last_hidden(outputs, loaded)[:, 0].float().norm(dim=-1)


def mean_norm(outputs: object, inputs: "Mapping[str, Tensor]", loaded: "LoadedModel") -> "Tensor":
    """The Euclidean norm of the mean of the last hidden state over tokens, padding left out."""
    hidden = _last_hidden(outputs, loaded).float()
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(dim=1).norm(dim=-1)
    weight = mask.to(hidden.dtype)[..., None]
    return ((hidden * weight).sum(dim=1) / weight.sum(dim=1)).norm(dim=-1)


def last_token(outputs: object, inputs: "Mapping[str, Tensor]", loaded: "LoadedModel") -> "Tensor":
    """The largest logit at the last real token of a language model: what it would say next."""
    return last_logits(outputs, inputs, loaded).amax(dim=-1)


def last_logits(outputs: object, inputs: "Mapping[str, Tensor]", loaded: "LoadedModel") -> "Tensor":
    """The logits of a language model at the last real token: (sample, word)."""
    import torch

    logits = getattr(outputs, "logits", None)
    if logits is None or logits.ndim != 3:
        raise ValueError(f"{loaded.name!r} gives no token logits")
    mask = inputs.get("attention_mask")
    rows = torch.arange(len(logits), device=logits.device)
    if mask is None or mask.shape != logits.shape[:2]:
        return logits[rows, -1]
    # The last attended position, whichever side the padding is on.
    places = torch.arange(mask.shape[1], device=mask.device) * mask
    return logits[rows, places.argmax(dim=1).to(logits.device)]


def masked_words(outputs: object, inputs: "Mapping[str, Tensor]", loaded: "LoadedModel") -> "Tensor":
    """The mean logit of the words that a sample's mask tokens stand for, `targets['masked']`."""
    labels = inputs.get(LABELS)
    if labels is None:
        raise ValueError("the target 'masked' needs mask tokens in the text and what they stand for, targets['masked']")
    logits = word_logits(outputs, labels.shape[1], loaded)
    labels = labels.to(logits.device)
    chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    asked = labels != UNASKED
    return (chosen * asked).sum(dim=1) / asked.sum(dim=1)


def written_logits(outputs: object, inputs: "Mapping[str, Tensor]", loaded: "LoadedModel") -> "Tensor":
    """The logit of each token that the model wrote behind its prompt, where it wrote it: (sample, written token).

    What is read from left to right tells a token from those before it alone, so that one forward over the whole text
    gives each of these logits, and its gradients, as the step did that wrote the token.
    """
    if WRITTEN not in inputs:
        raise ValueError(
            "the target 'generated' is what the model writes by itself: extract with generate=N (--generate N)"
        )
    labels = inputs[LABELS]
    logits = word_logits(outputs, labels.shape[1], loaded)
    rows, places = (labels != UNASKED).nonzero(as_tuple=True)
    asked = logits[rows.to(logits.device), (places - 1).to(logits.device)]
    return asked.gather(-1, labels[rows, places].to(logits.device)[:, None])[:, 0].reshape(len(labels), -1)


def generated(outputs: object, inputs: "Mapping[str, Tensor]", loaded: "LoadedModel") -> "Tensor":
    """The mean logit of the tokens that the model wrote behind its prompt."""
    return written_logits(outputs, inputs, loaded).mean(dim=1)


def at_place(outputs: object, inputs: "Mapping[str, Tensor]", loaded: "LoadedModel", target: str) -> "Tensor":
    """The logit that a target of a place asks for: 'token:K' or 'word:K', K counted from the end when negative.

    'token:K' is the largest logit at the K-th position (a detector's query, or what a language model says there);
    'word:K' the logit of the word that stands there, which a model that writes from left to right tells one before it.
    """
    kind, _, number = target.partition(":")
    place = int(number)
    if kind == "token":
        logits = _first(outputs, "prediction_logits", "logits")
        if logits is None or logits.ndim != 3:
            raise ValueError(f"{loaded.name!r} gives no logits of tokens, which the target {target!r} asks for")
        return logits[:, place].amax(dim=-1)
    import torch

    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else (mask > 0).long()
    wanted = real.sum(dim=1) + place if place < 0 else torch.full((len(ids),), place, device=ids.device)
    # The position of the wanted one among the real tokens.
    at = ((real.cumsum(dim=1) - 1 == wanted[:, None]) & (real > 0)).long().argmax(dim=1)
    rows = torch.arange(len(ids), device=ids.device)
    logits = word_logits(outputs, ids.shape[1], loaded)
    before = at - 1 if writes_forward(loaded) else at
    return logits[rows, before.clamp(min=0), ids[rows, at]]


def answer_logits(
    outputs: object, inputs: "Mapping[str, Tensor]", loaded: "LoadedModel", target: str | int
) -> "Tensor | None":
    """The logits (sample, class or word) among which a target is one; None where the target is no logit."""
    if isinstance(target, int) or target == "predicted" or target.lstrip("-").isdigit():
        return class_logits(outputs, inputs, loaded)
    return last_logits(outputs, inputs, loaded) if target == "last_token" else None


def default_target(outputs: object) -> str:
    """The name of the target that suits these outputs: similarity, matching, predicted, last_token or cls_norm."""
    if _first(outputs, "logits_per_image", "contrastive_logits_per_image") is not None:
        return "similarity"
    if getattr(outputs, "itm_score", None) is not None:
        return "matching"
    logits = _first(outputs, "logits", "question_answering_score")
    if logits is not None:
        return "predicted" if logits.ndim == 2 else "last_token"
    return "cls_norm"


def _first(outputs: object, *names: str) -> "Tensor | None":
    """The first of these outputs that the model gives."""
    return next((found for name in names if (found := getattr(outputs, name, None)) is not None), None)


def _last_hidden(outputs: object, loaded: "LoadedModel") -> "Tensor":
    hidden = _first(outputs, "multimodal_embeddings", "language_output", "last_hidden_state")
    if hidden is None or hidden.ndim != 3:
        raise ValueError(f"{loaded.name!r} gives no last hidden state of tokens to take the norm of")
    return hidden


SCORES: "Mapping[str, Callable[[object, dict[str, Tensor], LoadedModel], Tensor]]" = {
    "class": class_logits,
    "predicted": predicted,
    "similarity": similarity,
    "matching": matching,
    "cls_norm": cls_norm,
    "mean_norm": mean_norm,
    "last_token": last_token,
    "masked": masked_words,
    "generated": generated,
}
