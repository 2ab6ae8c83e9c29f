"""One training over several processes: which part of a batch each takes, and what they tell each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class Share:
    """The part of each batch that one of several processes takes: an equal run of its rows.

    Gradients are averaged over processes, so each loss is scaled to have the whole batch's loss as its mean over
    processes.
    """

    number: int = 0
    of: int = 1

    def part(self, rows: np.ndarray) -> np.ndarray:
        """This process' rows of a whole batch."""
        size = len(rows) // self.of
        return rows[self.number * size : (self.number + 1) * size]

    def gather(self, own: Tensor) -> Tensor:
        """The rows of the whole batch from the rows (row, ...) of this process.

        A loss of gathered rows is the whole batch's, and the same in every process; gradients reach the process that
        made a row.
        """
        return own if self.of == 1 else _Gather.apply(own, self)

    def mean(self, total: Tensor, count: int) -> Tensor:
        """What this process adds to the mean over `count` items of the whole batch, from the sum over its own."""
        return total * self.of / max(count, 1)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over processes into each tensor; all processes give as many, of the same shapes."""
        if self.of == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = (flat / self.of).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def agree(self, number: int | None) -> int | None:
        """The number that the first process has, in every process."""
        if self.of == 1:
            return number
        said = torch.tensor([-1 if number is None else number], device=_device())
        torch.distributed.broadcast(said, 0)
        return None if said.item() < 0 else int(said.item())


ALONE = Share()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: FunctionCtx, own: Tensor, share: Share) -> Tensor:
        context.share = share  # type: ignore[attr-defined]
        parts = [torch.empty_like(own) for _ in range(share.of)]
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        # Every process has the same loss, and the mean over processes is taken later: so the sum belongs here.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        share = context.share  # type: ignore[attr-defined]
        return total.chunk(share.of)[share.number], None


def _device() -> torch.device:
    backend = torch.distributed.get_backend()
    return torch.device("cuda" if backend == "nccl" else "cpu")
