"""The tap for torch's own attention modules, which leave Python when they can.

`nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` take a native fast path in inference,
unless a torch function mode is open or a hook is attached. While they may take it they run with torch functions off,
exactly as without a recording, and query, key and value are found again from their input projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnscope.recording.calls import AttentionCall, quietly
from attnscope.recording.state import Recording, observing

Fields = dict[str, Any]


def tapped_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.MultiheadAttention.forward`, recorded."""

    @functools.wraps(original)
    def forward(
        self: nn.MultiheadAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        def run() -> Any:
            return original(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )

        recordings = _watching()
        fast = query is key and key is value and self.batch_first and _may_leave_python(self, (query,))
        if not recordings or not (fast or torch._C._is_torch_function_all_disabled()):
            return run()
        with _inside(recordings), torch._C.DisableTorchFunction():
            result = run()
            fields = _attention_fields(self, (query, key, value), key_padding_mask, attn_mask, recordings)
        _record(recordings, self, fields)
        return result

    return forward


def tapped_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.TransformerEncoderLayer.forward`, recorded also where it never calls its attention module."""

    @functools.wraps(original)
    def forward(
        self: nn.TransformerEncoderLayer,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        recordings = _watching()
        if not recordings or not _may_leave_python(self, (src,)):
            return original(self, src, src_mask, src_key_padding_mask, is_causal)
        with ExitStack() as stack:
            settled = [stack.enter_context(each.undecided()) for each in recordings]
            before = [each.total for each in recordings]
            stack.enter_context(torch._C.DisableTorchFunction())
            result = original(self, src, src_mask, src_key_padding_mask, is_causal)
            taken = before == [each.total for each in recordings]
            if taken:
                for settle in settled:
                    settle()
        if taken:
            with torch._C.DisableTorchFunction(), quietly():
                states = self.norm1(_padded(src, recordings)) if self.norm_first else src
                fields = _attention_fields(self.self_attn, (states,) * 3, src_key_padding_mask, src_mask, recordings)
                if src.is_nested:
                    fields |= _lengths_mask(src, fields)
            _record(recordings, self.self_attn, fields)
        return result

    return forward


def tapped_encoder(original: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.TransformerEncoder.forward`: packs padded batches into nested tensors where it can."""

    @functools.wraps(original)
    def forward(self: nn.TransformerEncoder, src: Tensor, *args: Any, **kwargs: Any) -> Any:
        recordings = _watching()
        plain = all(type(layer) is nn.TransformerEncoderLayer for layer in self.layers)
        if not recordings or not plain or not _may_leave_python(self, (src,)):
            return original(self, src, *args, **kwargs)
        outer = [each.padded_shape for each in recordings]
        for each in recordings:
            each.padded_shape = src.shape
        try:
            with torch._C.DisableTorchFunction():
                return original(self, src, *args, **kwargs)
        finally:
            for each, shape in zip(recordings, outer, strict=True):
                each.padded_shape = shape

    return forward


def _watching() -> list[Recording]:
    return [each for each in observing() if not each.is_inside and each.where() is not None]


def _inside(recordings: Iterable[Recording]) -> Any:
    stack = ExitStack()
    for each in recordings:
        stack.enter_context(each.inside())
    return stack


def _may_leave_python(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a native path is open to the module: inference on plain tensors, without a graph."""
    if module.training:
        return False
    tensors = (*inputs, *module.parameters())
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _record(recordings: Iterable[Recording], module: nn.Module, fields: Fields) -> None:
    for each in recordings:
        name = each.name_of(module)
        if name is not None:
            each.add(
                name,
                lambda name, number, index: AttentionCall(
                    name, number, index, "MultiheadAttention", "multihead", **fields
                ),
            )


def _padded(states: Tensor, recordings: list[Recording]) -> Tensor:
    if not states.is_nested:
        return states
    return torch.nested.to_padded_tensor(states, 0.0, recordings[0].padded_shape)


def _attention_fields(
    module: nn.MultiheadAttention,
    inputs: tuple[Tensor, Tensor, Tensor],
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    recordings: list[Recording],
) -> Fields:
    """What the module's kernel got, found again from its inputs: (batch, head, token, channel)."""
    with quietly():
        states = [_batch_first(module, _padded(each, recordings)) for each in inputs]
        query, key, value = (_heads(module, each) for each in _projected(module, states))
        mask = _merged_mask(key_padding_mask, attn_mask, query, key)
        key, value, mask = _extended(module, key, value, mask)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        scale = float(query.shape[-1]) ** -0.5
    return {"query": query, "key": key, "value": value, "output": output, "mask": mask, "scale": scale}


def _batch_first(module: nn.MultiheadAttention, states: Tensor) -> Tensor:
    if states.dim() == 2:
        return states[None]
    return states if module.batch_first else states.transpose(0, 1)


def _projected(module: nn.MultiheadAttention, states: list[Tensor]) -> list[Tensor]:
    """Input projections of query, key and value: (batch, token, feature)."""
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [F.linear(each, weight, bias) for each, weight, bias in zip(states, weights, biases, strict=True)]


def _heads(module: nn.MultiheadAttention, states: Tensor) -> Tensor:
    return states.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)


def _merged_mask(padding: Tensor | None, attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Both masks as one: bool (True = may attend), or additive where one of them is."""
    terms = []
    if padding is not None:
        padding = padding[None] if padding.dim() == 1 else padding
        terms.append(padding[:, None, None, :])
    if attn_mask is not None:
        sizes = (-1, query.shape[1], query.shape[2], key.shape[2]) if attn_mask.dim() == 3 else attn_mask.shape
        terms.append(attn_mask.reshape(sizes) if attn_mask.dim() == 3 else attn_mask[None, None])
    if not terms:
        return None
    if all(term.dtype == torch.bool for term in terms):
        return ~functools.reduce(torch.logical_or, terms)
    return functools.reduce(torch.add, (_additive(term, query.dtype) for term in terms))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _extended(
    module: nn.MultiheadAttention, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Key and value with the learned and the zero token that a module may append; every query may attend to them."""
    batch, head, _, channel = key.shape
    added = 0
    if module.bias_k is not None and module.bias_v is not None:
        shape = (1, head, 1, channel)
        learned = [bias.reshape(shape).expand(batch, -1, -1, -1) for bias in (module.bias_k, module.bias_v)]
        key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), learned, strict=True))
        added += 1
    if module.add_zero_attn:
        key, value = (F.pad(each, (0, 0, 0, 1)) for each in (key, value))
        added += 1
    if mask is not None and added:
        mask = F.pad(mask, (0, added), value=mask.dtype == torch.bool)
    return key, value, mask


def _lengths_mask(nested: Tensor, fields: Fields) -> Fields:
    """Rules of a nested tensor: keys and queries beyond a sample's length do not exist."""
    lengths = torch.tensor([each.shape[0] for each in nested.unbind()], device=fields["query"].device)
    real = torch.arange(fields["key"].shape[2], device=lengths.device)[None, :] < lengths[:, None]
    mask = real[:, None, None, :]
    query, key, value = fields["query"], fields["key"], fields["value"]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    return {"mask": mask, "rows_computed": real, "output": output}
