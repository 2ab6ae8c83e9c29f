"""Modules that a recording leaves alone: nothing is missed by that, and nobody else's mode misses an operation."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnscope.recording import AttentionCall, UnrecordedAttention, audit, recording
from attnscope.recording.bystanders import modes_aside


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operations that audits have met, each once a recording."""
    names: list[str] = []
    kind_of = audit._kind

    def noted(func: Any) -> str:
        names.append(audit._name(func))
        return kind_of(func)

    monkeypatch.setattr(audit, "_kind", noted)
    return names


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = hf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                          image_size=16, patch_size=8)  # fmt: skip
    return hf.ViTModel(config, add_pooling_layer=False).eval()


def attend(tokens: Tensor) -> Tensor:
    """Attention of tokens to each other by a kernel that no function tap is asked for."""
    heads = tokens.unsqueeze(1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads)[0].squeeze(1)


class Around(nn.Module):
    """A linear layer, and whatever was done to it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens)


class Attending(nn.Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        return attend(super().forward(tokens))


class Wrapped(Tensor):
    """A weight whose operations are code of its own, as those of quantised weights are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, Tensor.add):
            with torch._C.DisableTorchFunctionSubclass():
                return attend(args[0])
        return super().__torch_function__(func, types, args, kwargs)


class Adding(nn.Module):
    """Adds a weight whose sums are code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8).as_subclass(Wrapped))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.weight


def with_forward() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.forward = attend  # type: ignore[method-assign]
    return linear


def with_hook() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda module, args, output: attend(output))
    return linear


def with_hook_before() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.register_forward_pre_hook(lambda module, args: attend(*args))
    return linear


def with_compiled_call() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear._compiled_call_impl = attend  # type: ignore[assignment]
    return linear


def with_weight() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.randn(8, 8).as_subclass(Wrapped))
    return linear


def test_the_audit_meets_no_operation_inside_of_torch_s_own_layers(learned: list[str]) -> None:
    with torch.no_grad(), recording(vit()) as rec:
        rec.model(torch.randn(1, 3, 16, 16))
    assert len(rec) == rec.audit.recorded == rec.audit.ran == 2
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in learned
    assert not {"aten::addmm", "aten::native_layer_norm", "aten::gelu", "aten::convolution"} & set(learned)
    assert not {"aten::view", "aten::transpose", "aten::add"} & set(learned)


@pytest.mark.parametrize(
    "make",
    [lambda: Attending(8, 8), with_forward, with_hook, with_hook_before, with_compiled_call, with_weight, Adding],
)
def test_attention_in_a_layer_that_is_not_quite_torch_s_own_is_an_error(make: Callable[[], nn.Module]) -> None:
    missed = pytest.raises(UnrecordedAttention, match="scaled_dot_product")
    with missed, torch.no_grad(), recording(Around(make())) as rec:
        rec.model(torch.randn(2, 5, 8))


@pytest.mark.parametrize("other", [nn.Module._call_impl, lambda self, tokens: attend(self.forward(tokens))])
def test_what_somebody_else_has_put_in_the_place_of_torch_s_call_runs(
    other: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attends = other is not nn.Module._call_impl
    monkeypatch.setattr(nn.Module, "__call__", other)
    told = pytest.raises(UnrecordedAttention, match="scaled_dot_product") if attends else nullcontext()
    with told, torch.no_grad(), recording(nn.Linear(8, 8)) as rec:
        rec.model(torch.randn(2, 5, 8))


def test_a_layer_is_traced_as_a_module() -> None:
    model, tokens = Around(nn.Linear(8, 8)).eval(), torch.randn(2, 5, 8)
    with torch.no_grad(), recording(model, audit=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, (tokens,))
    assert torch.equal(traced(tokens), model(tokens))
    assert "CallMethod" in str(traced.graph)


def test_attention_in_a_hook_of_every_module_is_an_error() -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: attend(output) if type(module) is nn.Linear else None
    )
    try:
        missed = pytest.raises(UnrecordedAttention, match="scaled_dot_product")
        with missed, torch.no_grad(), recording(Around(nn.Linear(8, 8))) as rec:
            rec.model(torch.randn(2, 5, 8))
    finally:
        handle.remove()


class TalkingHeads(nn.Module):
    """Attention whose probabilities go through layers on their way: dropout, identity, and a linear one over heads."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.between = nn.Sequential(nn.Dropout(0.1), nn.Identity())
        self.mix = nn.Linear(2, 2, bias=False) if mixes else None

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attention = self.between((query @ key.transpose(-1, -2) / math.sqrt(4)).softmax(dim=-1))
        if self.mix is not None:
            attention = self.mix(attention.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (attention @ value).transpose(1, 2).flatten(2)


def test_probabilities_are_followed_through_layers(learned: list[str]) -> None:
    torch.manual_seed(0)
    model = TalkingHeads(mixes=False).eval()
    tokens = torch.randn(2, 5, 8)
    with torch.no_grad(), recording(model) as rec:
        model(tokens)
    (call,) = rec
    assert call.query is not None
    assert call.output_error() < 1e-6
    assert rec.audit.recorded == rec.audit.ran == 1


class LooseAttention(nn.Module):
    """Attention whose parts no tap is asked for, by operations under names that torch has for itself."""

    def __init__(self, mapped: bool) -> None:
        super().__init__()
        self.mapped = mapped

    def forward(self, tokens: Tensor) -> Tensor:
        scores = torch.ops.aten.bmm(tokens, tokens.transpose(1, 2))
        doubled = (scores * 2).view(scores.shape)
        attention = torch.ops.aten._softmax(doubled, -1, False)
        attention = attention.view(attention.shape) * 0.5
        if self.mapped:
            attention = torch.vmap(lambda row: row * 2)(attention)
        return torch.ops.aten.bmm(attention, tokens)


@pytest.mark.parametrize("mapped", [False, True])
def test_sums_and_views_of_what_the_audit_follows_are_looked_at(mapped: bool) -> None:
    missed = pytest.raises(UnrecordedAttention, match="softmax and product")
    with missed, torch.no_grad(), recording(LooseAttention(mapped)) as rec:
        rec.model(torch.randn(2, 5, 8))


class MappedLayer(nn.Module):
    """Attention with a layer over its probabilities that runs under `vmap`."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = torch.ops.aten.bmm(tokens, tokens.transpose(1, 2))
        attention = torch.ops.aten._softmax(scores, -1, False)
        return torch.ops.aten.bmm(torch.vmap(self.between)(attention), tokens)


def test_a_layer_under_vmap_is_looked_into() -> None:
    missed = pytest.raises(UnrecordedAttention, match="softmax and product")
    with missed, torch.no_grad(), recording(MappedLayer().eval()) as rec:
        rec.model(torch.randn(2, 5, 8))


def test_a_layer_over_probabilities_is_looked_into(learned: list[str]) -> None:
    model = TalkingHeads(mixes=True).eval()
    with torch.no_grad(), recording(model, audit=True) as rec:
        model(torch.randn(2, 5, 8))
    assert len(rec) == 1
    assert "aten::mm" in learned


class CountsFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        self.linear = self.sums = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.linear += func is F.linear
        self.sums += func is Tensor.add
        return func(*args, **(kwargs or {}))


class CountsOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.linear = self.sums = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.linear += func is torch.ops.aten.addmm.default
        self.sums += func is torch.ops.aten.add.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [CountsFunctions, CountsOperations])
@pytest.mark.parametrize("inside", [True, False])
def test_a_mode_of_somebody_else_sees_every_operation(make: Callable[[], Any], inside: bool) -> None:
    model, pixels = vit(), torch.randn(1, 3, 16, 16)
    with torch.no_grad(), make() as alone:
        model(pixels)
    counts = make()
    with torch.no_grad():
        if inside:
            with recording(model), counts:
                model(pixels)
        else:
            with counts, recording(model):
                model(pixels)
    assert counts.linear == alone.linear == 12
    assert counts.sums == alone.sums == 5


def test_two_recordings_at_once_look_at_the_same_forward() -> None:
    model, pixels = vit(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
        with recording(model) as one, recording(model) as other:
            recorded = model(pixels).last_hidden_state
    assert torch.equal(plain, recorded)
    assert len(one) == len(other) == one.audit.ran == other.audit.ran == 2


class Products(TorchDispatchMode):
    """Counts products that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "bmm" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("audited", [True, False])
def test_what_is_computed_of_a_call_passes_no_mode_of_a_recording(learned: list[str], audited: bool) -> None:
    found = []

    def compute(call: AttentionCall) -> None:
        beside = call.attention()
        with modes_aside(call):
            torch.testing.assert_close(call.attention(), beside, rtol=0, atol=0)
            found.append(torch.linalg.inv(torch.eye(3)))
        assert torch._C._len_torch_function_stack() == 1

    with torch.no_grad(), recording(vit(), on_call=compute, audit=audited) as rec:
        rec.model(torch.randn(1, 3, 16, 16))
    assert len(found) == 2
    assert "aten::linalg_inv_ex" not in learned


def test_a_mode_of_others_still_sees_what_is_computed_of_a_call() -> None:
    seen = []

    def compute(call: AttentionCall) -> None:
        before = outer.count
        with modes_aside(call):
            call.attention()
        seen.append(outer.count - before)

    with torch.no_grad(), Products() as outer, recording(vit(), on_call=compute) as rec:
        rec.model(torch.randn(1, 3, 16, 16))
    assert seen == [1, 1]


def test_a_call_of_other_tensors_is_computed_by_their_own_code() -> None:
    asked = []

    class Counted(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    def compute(call: AttentionCall) -> None:
        call.query = call.query.as_subclass(Counted)  # type: ignore[union-attr]
        asked.clear()
        with modes_aside(call):
            call.query * 2
        assert asked

    with torch.no_grad(), recording(vit(), on_call=compute) as rec:
        rec.model(torch.randn(1, 3, 16, 16))
