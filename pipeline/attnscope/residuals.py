"""How much of a token goes around an attention and how much comes out of it: the two terms of each residual sum.

A torch function mode follows what an attention kernel returned through the output projection to the addition of the
residual. It stands beside a recording of the same forward, whose calls it goes by.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnscope.recording import AttentionCall, Recording

_PROJECTIONS = {F.linear: 0, torch.addmm: 1}
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
# What may stand between the projection and the sum: dropout, the scale of a layer, another shape.
_PASSING = {F.dropout, torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.view, Tensor.reshape, Tensor.to}


class ResidualTap(TorchFunctionMode):
    """Keeps, for each call of a recording, what its output is added to and what is added: `pairs` by call index."""

    def __init__(self, recorded: Recording) -> None:
        super().__init__()
        self._recorded = recorded
        self._seen = 0
        self._awaited: int | None = None
        self._following: list[Tensor] = []
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDITIONS and self._following and len(args) >= 2:
            self._add(args[0], args[1])
        result = func(*args, **(kwargs or {}))
        if len(self._recorded) > self._seen:
            self._seen = len(self._recorded)
            self._awaited, self._following = self._seen - 1, []
        if self._awaited is not None and func in _PROJECTIONS:
            given = args[_PROJECTIONS[func]] if len(args) > _PROJECTIONS[func] else None
            output = self._recorded[self._awaited].output
            if isinstance(given, Tensor) and output is not None and given.numel() == output.numel():
                self._following = [result]
        elif self._following and func in _PASSING and any(self._follows(a) for a in args):
            self._following.append(result)
        return result

    def _add(self, left: Any, right: Any) -> None:
        for addition, residual in ((left, right), (right, left)):
            if self._follows(addition) and isinstance(residual, Tensor) and residual.shape == addition.shape:
                assert self._awaited is not None
                self.pairs[self._awaited] = (residual, addition)
                self._awaited, self._following = None, []
                return

    def _follows(self, value: Any) -> bool:
        return any(value is tensor for tensor in self._following)


def residual_shares(
    call: AttentionCall, pair: tuple[Tensor, Tensor] | None, gradient: Tensor | None
) -> dict[str, Tensor]:
    """The weight of the residual of each query, (batch, query_token) in [0, 2]; that of the attention is the rest to 2.

    By the norms of the two terms, and by the positive part of gradient times value, mean over channels; `gradient` is
    the derivative of the score by what is added, and so by the sum. NaN where the sum was not found; 1 where neither
    term has any.
    """
    batch, _, queries, _ = call.shape
    unknown = torch.full((batch, queries), float("nan"))
    if pair is None or pair[0].numel() % (batch * queries):
        return {"residual_norm": unknown, "residual_gradient": unknown}
    terms = [term.detach().float().reshape(batch, queries, -1) for term in pair]
    slope = torch.zeros_like(terms[1]) if gradient is None else gradient.float().reshape(terms[1].shape)
    sizes = {
        "residual_norm": [term.norm(dim=-1) for term in terms],
        "residual_gradient": [(slope * term).clamp(min=0).mean(dim=-1) for term in terms],
    }
    return {
        name: torch.where(x + o > 0, 2 * x / (x + o).clamp(min=1e-30), torch.ones_like(x)).cpu()
        for name, (x, o) in sizes.items()
    }
