"""Hiding tokens from all attention: what no query sees any more, in no layer, is dropped without moving the rest.

A torch function mode adds to the mask of every attention kernel of the modules that a run has recorded. Where tokens
meet in attention alone, as in transformers, what the other tokens become is what they would be without the hidden ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attnscope.capturing import Places
from attnscope.plan import RunPlan
from attnscope.planning import RecordingError

Hidden = Callable[[str, int], "Tensor | None"]
"""Which of so many tokens of a stream are hidden: (sample, token) bool, or None for none."""

_SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)


class _Hiding(TorchFunctionMode):
    def __init__(self, plan: RunPlan, places: Places, hidden: Hidden) -> None:
        super().__init__()
        self._plan = plan
        self._places = places.by_call
        self._hidden = hidden
        self.running: list[str] = []
        self.counts: dict[str, int] = {}
        self.met: set[tuple[str, int]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not self.running:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(func, args, kwargs)
        if func in _SOFTMAXES:
            return self._softmax(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._multihead(func, args, kwargs)
        return func(*args, **kwargs)

    def _keys(self, count: int) -> "Tensor | None":
        """The hidden keys of the kernel that runs now, (sample, key) bool."""
        module = self.running[-1]
        number = self.counts.get(module, 0)
        self.counts[module] = number + 1
        for place in ((module, number), (module, -1)):
            if place in self._places:
                self.met.add(place)
                return self._hidden(self._plan.sites[self._places[place][0]].keys, count)
        return None

    def _fused(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key = given["query"], given["key"]
        hidden = self._keys(key.shape[-2])
        if hidden is None:
            return func(*args, **kwargs)
        _check_batch(len(hidden), query.shape[0], self.running[-1])
        allowed = ~hidden.to(query.device)[:, None, None, :]
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            allowed, given["is_causal"] = allowed & causal, False
        if mask is None:
            given["attn_mask"] = allowed
        elif mask.dtype == torch.bool:
            given["attn_mask"] = mask & allowed
        else:
            given["attn_mask"] = mask.masked_fill(~allowed, float("-inf"))
        return func(**given)

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        scores = args[0] if args else kwargs["input"]
        hidden = self._keys(scores.shape[-1]) if isinstance(scores, Tensor) and scores.ndim >= 3 else None
        if hidden is None:
            return func(*args, **kwargs)
        hidden = hidden.to(scores.device)
        if scores.shape[0] != len(hidden) and scores.ndim == 3 and scores.shape[0] % len(hidden) == 0:
            hidden = hidden.repeat_interleave(scores.shape[0] // len(hidden), dim=0)
        _check_batch(len(hidden), scores.shape[0], self.running[-1])
        wide = hidden.view(len(hidden), *[1] * (scores.ndim - 2), -1)
        scores = scores.masked_fill(wide, torch.finfo(scores.dtype).min)
        return func(scores, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})

    def _multihead(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = args[1] if len(args) > 1 else kwargs["key"]
        hidden = self._keys(key.shape[0])
        if hidden is None:
            return func(*args, **kwargs)
        _check_batch(len(hidden), key.shape[1], self.running[-1])
        if kwargs.get("key_padding_mask") is None:
            # A float mask goes with whatever the other mask is.
            mask = torch.zeros(hidden.shape, dtype=key.dtype, device=key.device)
        else:
            mask = kwargs["key_padding_mask"]
        filled = True if mask.dtype == torch.bool else float("-inf")
        return func(*args, **{**kwargs, "key_padding_mask": mask.masked_fill(hidden.to(mask.device), filled)})


@contextmanager
def hiding(model: torch.nn.Module, plan: RunPlan, places: Places, hidden: Hidden) -> Iterator[None]:
    """Hide tokens, stream by stream, from every attention kernel that the run's plan knows.

    Raises
    ------
    RecordingError
        On exit, when a kernel that should have been met ran where no mask can be added to it.
    """
    mode = _Hiding(plan, places, hidden)
    modules = {name for name, _ in places.by_call}
    handles = []
    for name, module in model.named_modules():
        if name in modules:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: mode.running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: (mode.running.pop(), None)[1]))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted({name for name, _ in places.by_call} - {name for name, _ in mode.met})
    if missed:
        raise RecordingError(
            f"tokens can't be hidden from module {missed[0]!r}: its attention kernel takes no mask of ours; use the"
            " attention implementation 'eager' or 'sdpa', or another operator than 'drop'"
        )


def _check_batch(samples: int, batch: int, module: str) -> None:
    if samples != batch:
        raise RecordingError(
            f"tokens can't be hidden from module {module!r}, whose batch of {batch} is not that of {samples} samples;"
            " use another operator than 'drop'"
        )
