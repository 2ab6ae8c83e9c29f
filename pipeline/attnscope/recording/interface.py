"""The interface tap: attention functions that transformers looks up by name.

Models ask `AttentionInterface` for the function of their configured implementation at every call (transformers 5,
`modeling_utils.py`). While a recording is open, what they get back calls the same function with the same arguments and
records them, so that kernel, masks and outputs stay what they were.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnscope.recording.bystanders import functions_aside
from attnscope.recording.calls import AttentionCall, quietly
from attnscope.recording.state import Recording, observing

AttentionFunction = Callable[..., Any]
Arguments = dict[str, Any]


def tap(function: AttentionFunction, kernel: str) -> AttentionFunction:
    """The attention function, which also records its calls where a recording of the calling module is open."""
    if getattr(function, "_attnscope_tapped", False):
        return function
    return _tapped(function, kernel)


def _kept(made: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what is made of attention functions, which every layer asks for.

    Of plain ones: what else can be called may be equal to another, or not be hashable.
    """
    cached = functools.lru_cache(maxsize=256)(made)

    @functools.wraps(made)
    def get(function: AttentionFunction, *args: Any) -> Any:
        return (cached if isinstance(function, FunctionType) else made)(function, *args)

    return get


@_kept
def _tapped(function: AttentionFunction, kernel: str) -> AttentionFunction:
    @functools.wraps(function)
    def tapped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        recordings = [each for each in observing() if not each.is_inside and each.name_of(module) is not None]
        if not recordings:
            return function(module, query, key, value, *args, **kwargs)
        return _record(recordings, function, kernel, (module, query, key, value, *args), kwargs)

    tapped._attnscope_tapped = True  # type: ignore[attr-defined]
    return tapped


def _record(
    recordings: list[Recording], function: AttentionFunction, kernel: str, args: tuple[Any, ...], kwargs: Arguments
) -> Any:
    with ExitStack() as stack:
        for each in recordings:
            stack.enter_context(each.inside())
        if kernel == "flex_attention":
            stack.enter_context(_compiled(recordings))
        seen = [each.kernels_seen for each in recordings]
        result = function(*args, **kwargs)
        for each, before in zip(recordings, seen, strict=True):
            # Kernels of flash attention 4 don't pass through torch's dispatcher, where the audit counts.
            if "flash" in kernel and each.kernels_seen == before:
                each.count(kernel)
    module, query, key, value = args[:4]
    arguments = _arguments(function, args, kwargs)
    if arguments.get("cache") is not None:
        raise NotImplementedError(f"attention of {type(module).__name__} reads a paged cache, which recording cannot")
    recipe = _recipe(function, kernel, arguments)
    output, weights = result if isinstance(result, tuple) else (result, None)
    for each in recordings:
        name = each.name_of(module)
        assert name is not None
        if each.frames and each.frames[-1].module is module:
            each.frames[-1].attended = True
        recipe["kernel_log_sum_exp"] = each.kernel_log_sum_exp()

        def make(name: str, number: int, index: int) -> AttentionCall:
            with functions_aside(query, key, value, output):
                call = AttentionCall(name, number, index, kernel, "interface", query, key, value, output, **recipe)
            return _verified(call, function, weights, _dropout(arguments))

        each.add(name, make)
    return result


@contextmanager
def _compiled(recordings: list[Recording]) -> Iterator[None]:
    """Let flex attention compile as it does without a recording; the modes that would keep it from that step aside.

    The audit cannot see it then, so that the tap counts it.
    """
    with ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.compiler.set_stance("default"))
        yield
    for each in recordings:
        each.count("flex_attention")


@_kept
def _parameters(function: AttentionFunction) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _arguments(function: AttentionFunction, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """The arguments by their names, the first five under the names that every attention function gives them."""
    positional = ("module", "query", "key", "value", "attention_mask", *_parameters(function)[5:])
    return dict(zip(positional, args, strict=False)) | kwargs


def _dropout(arguments: Arguments) -> bool:
    return bool(arguments.get("dropout") or 0.0) and arguments["module"].training


def _recipe(function: AttentionFunction, kernel: str, arguments: Arguments) -> Arguments:
    """What the attention function does beside query and key, as fields of an AttentionCall."""
    for known, rule in ((sdpa_attention_forward, _sdpa), (flash_attention_forward, _flash)):
        if function is known:
            return rule(arguments)
    if function is flex_attention_forward or kernel == "flex_attention":
        return _flex(arguments)
    if kernel.endswith("sdpa"):
        return _sdpa(arguments)
    if "flash" in kernel or "/" in kernel:
        return _flash(arguments)
    return _eager(function, arguments)


def _scale(arguments: Arguments) -> float:
    scaling = arguments.get("scaling")
    return float(arguments["query"].shape[-1] ** -0.5 if scaling is None else scaling)


def _sdpa(arguments: Arguments) -> Arguments:
    """As `sdpa_attention_forward`: the causal rule only without a mask and for more than one query."""
    module, mask, is_causal = arguments["module"], arguments.get("attention_mask"), arguments.get("is_causal")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    return {
        "mask": mask,
        "causal": bool(mask is None and arguments["query"].shape[2] > 1 and is_causal),
        "scale": _scale(arguments),
        "bias": arguments.get("position_bias"),
    }


def _eager(function: AttentionFunction, arguments: Arguments) -> Arguments:
    """As the modeling files' own functions: they add the mask, a boolean one as 0 and 1, and know no causal rule."""
    module, mask = arguments["module"], arguments.get("attention_mask")
    accepted = _parameters(function)
    sinks = arguments.get("sinks") if "sinks" in accepted else None
    if "sinks" in getattr(getattr(function, "__code__", None), "co_names", ()):
        sinks = module.sinks
    scaling = arguments.get("scaling")
    if scaling is None and "softcap" in accepted:
        arguments = arguments | {"scaling": module.head_dim**-0.5}
    return {
        "mask": mask if mask is None or mask.is_floating_point() else mask.to(arguments["query"].dtype),
        "scale": _scale(arguments),
        "softcap": arguments.get("softcap") if "softcap" in accepted else None,
        "sinks": _sinks(sinks, arguments["query"]),
        "bias": arguments.get("position_bias") if "position_bias" in accepted else None,
    }


def _sinks(sinks: Tensor | None, query: Tensor) -> Tensor | None:
    """One sink a head, or one for each row of each head; None for what is neither."""
    if sinks is None:
        return None
    if sinks.shape == (*query.shape[:3], 1):
        return sinks
    return sinks.reshape(-1) if sinks.numel() == query.shape[1] else None


def _flash(arguments: Arguments) -> Arguments:
    """As `_flash_attention_forward`: aligned bottom right, a padding mask over keys, padded queries left out."""
    query, key = arguments["query"], arguments["key"]
    is_causal = arguments.get("is_causal")
    is_causal = arguments["module"].is_causal if is_causal is None else is_causal
    window, padding = arguments.get("sliding_window"), arguments.get("attention_mask")
    queries, keys = query.shape[2], key.shape[2]
    recipe: Arguments = {
        "causal": bool(is_causal),
        "causal_offset": keys - queries,
        "window": window if window is not None and keys > window else None,
        "scale": _scale(arguments),
        "softcap": arguments.get("softcap"),
        "sinks": arguments.get("s_aux"),
    }
    if padding is not None:
        recipe["mask"] = padding[:, None, None, -keys:].bool()
        recipe["rows_computed"] = padding[:, -queries:].bool()
    else:
        recipe["mask"] = _packed_mask(arguments, queries, keys)
    return recipe


def _packed_mask(arguments: Arguments, queries: int, keys: int) -> Tensor | None:
    """True inside each of the sequences that are packed end to end into one row, (1, 1, query_token, key_token)."""
    ends_query, ends_key = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    position = arguments.get("position_ids")
    with quietly():
        if ends_query is not None and ends_key is not None:
            owner_query = _owner(ends_query, queries)
            owner_key = _owner(ends_key, keys)
            return (owner_query[:, None] == owner_key[None, :])[None, None]
        if position is None or arguments["query"].shape[0] != 1 or queries != keys or position.shape[-1] != queries:
            return None
        position = position.reshape(-1, queries)[0]
        owner = torch.cumsum((position == 0).long(), dim=0)
        return (owner[:, None] == owner[None, :])[None, None] if int(owner[-1] - owner[0]) > 0 else None


def _owner(ends: Tensor, length: int) -> Tensor:
    return torch.bucketize(torch.arange(length, device=ends.device), ends[1:].contiguous(), right=True)


def _flex(arguments: Arguments) -> Arguments:
    """As `flex_attention_forward`: the block mask's own rule, or a float mask of which it reads the first head."""
    mask, query, key = arguments.get("attention_mask"), arguments["query"], arguments["key"]
    if mask is not None and not isinstance(mask, Tensor):
        mask = _block_mask(mask.mask_mod, query, key)
    elif mask is not None:
        mask = mask[:, :1, :, : key.shape[-2]]
    return {
        "mask": mask,
        "scale": _scale(arguments),
        "softcap": arguments.get("softcap"),
        "sinks": arguments.get("s_aux"),
        "bias": arguments.get("position_bias"),
    }


def _block_mask(rule: Callable[..., Tensor], query: Tensor, key: Tensor) -> Tensor:
    batch, head, queries = query.shape[:3]
    with quietly():
        return create_mask(rule, batch, head, queries, key.shape[2], device=str(query.device))


# -- proof -------------------------------------------------------------------------------------------------------------

ROWS_VERIFIED = 4
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def _verified(call: AttentionCall, function: AttentionFunction, weights: Tensor | None, dropout: bool) -> AttentionCall:
    """The call, its recipe proven on a few rows where the attention function is a model's own.

    A function that does something else keeps the probabilities that it returned; one that returns none is an error.
    """
    known = (sdpa_attention_forward, flash_attention_forward, flex_attention_forward)
    if dropout or function in known or _reproduces_output(call):
        return call
    if weights is None or weights.dim() != 4:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise NotImplementedError(
            f"attention function {name!r} of {call.module!r} computes something else than its arguments say and returns"
            " no weights, so that its attention cannot be recorded"
        )
    call.probabilities, call.mask, call.bias, call.sinks = weights.detach(), None, None, None
    call.__post_init__()
    return call


def _reproduces_output(call: AttentionCall) -> bool:
    assert call.query is not None and call.output is not None
    queries = call.query.shape[2]
    rows = torch.linspace(0, queries - 1, min(queries, ROWS_VERIFIED)).long().unique().to(call.query.device)
    limit = max(1.0, float(call.output.detach().abs().max())) * TOLERANCE.get(call.output.dtype, 1e-1)
    error = call.output_error(rows)
    return error <= limit or math.isnan(error)
