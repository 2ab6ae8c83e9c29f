"""What a text's mask tokens stand for, beside the model's inputs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnscope.samples import Sample, SampleError

if TYPE_CHECKING:
    from torch import Tensor

    from attnscope.loading import LoadedModel

LABELS = "_labels"
"""Name of these notes: (sample, token) word ids, UNASKED wherever no masked word is asked for."""
UNASKED = -100
WRITTEN = "_written"
"""Name of the note how many tokens the model wrote, the last of its text: (sample, 1)."""


def encoded_samples(samples: Sequence[Sample], loaded: "LoadedModel") -> "dict[str, Tensor]":
    """A batch as its family encodes it, with what the mask tokens of the texts stand for: `targets['masked']`.

    Raises
    ------
    SampleError
        When a sample lacks what the model needs, or says of other than its mask tokens what they stand for.
    """
    inputs = loaded.family.encode(samples, loaded)
    if not any("masked" in s.targets for s in samples):
        return inputs
    import torch

    ids = inputs["input_ids"]
    labels = torch.full_like(ids, UNASKED)
    mask = getattr(loaded.tokenizer, "mask_token_id", None)
    for row, sample in enumerate(samples):
        words = str(sample.targets.get("masked", ""))
        told = loaded.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []  # type: ignore[misc]
        places = (ids[row] == mask).nonzero()[:, 0] if mask is not None else ids.new_zeros(0)
        if len(told) != len(places):
            raise SampleError(
                f"sample {sample.id!r} has {len(places)} mask tokens, and its masked words {words!r} are {len(told)}"
            )
        labels[row, places] = ids.new_tensor(told)
    return {**inputs, LABELS: labels}
