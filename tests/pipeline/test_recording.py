"""What a recording promises: closed forms, unchanged outputs, isolation, restoration, and that no call is lost."""

import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

import attnscope.recording as module_under_test
from attnscope.recording import AttentionCall, UnrecordedAttention, interface, recording, taps_kept

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 99}
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def widened(model: nn.Module, std: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + centre)
    return model.eval()


def bert(kernel: str = "sdpa", layers: int = 2) -> nn.Module:
    config = hf.BertConfig(**(SIZES | {"num_hidden_layers": layers}))
    return widened(hf.BertModel._from_config(config, attn_implementation=kernel))


def llama(kernel: str = "sdpa") -> nn.Module:
    config = hf.LlamaConfig(**SIZES, num_key_value_heads=2)
    return widened(hf.LlamaForCausalLM._from_config(config, attn_implementation=kernel))


def gptj() -> nn.Module:
    config = hf.GPTJConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    return widened(hf.GPTJModel._from_config(config, attn_implementation="eager"))


def inputs(padding: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, slice(-3, None) if padding == "right" else slice(0, 3)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call_of(**fields: Any) -> AttentionCall:
    defaults = {"query": random(2, 4, 6, 8), "key": random(2, 2, 7, 8, seed=4), "value": random(2, 2, 7, 5, seed=5)}
    return AttentionCall("m", 0, 0, "sdpa", "interface", **({"output": None, "scale": 0.7} | defaults | fields))


def by_hand(call: AttentionCall) -> Tensor:
    """Attention entry by entry, in float64."""
    batch, head, queries, keys = call.shape
    result = torch.zeros(batch, head, queries, keys, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(torch.arange(batch), torch.arange(head), torch.arange(queries)).tolist():
        weights = torch.zeros(keys, dtype=torch.float64)
        for j in range(keys):
            score = float(call.query[b, h, i].double() @ call.key[b, h // 2, j].double()) * call.scale
            if call.softcap is not None:
                score = call.softcap * torch.tanh(torch.tensor(score / call.softcap)).item()
            if call.bias is not None:
                score += float(call.bias.expand(call.shape)[b, h, i, j])
            distance = i + call.causal_offset - j
            allowed = call.mask is None or bool(call.mask.expand(call.shape)[b, h, i, j])
            allowed &= not (call.causal and distance < 0)
            allowed &= call.window is None or abs(distance) < call.window
            weights[j] = torch.tensor(score, dtype=torch.float64).exp() if allowed else 0.0
        sink = 0.0
        if call.sinks is not None:
            sink = float((call.sinks[h] if call.sinks.dim() == 1 else call.sinks[b, h, i, 0]).double().exp())
        total = weights.sum() + sink
        result[b, h, i] = weights / total if total > 0 else weights
    return result


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal top left": {"causal": True},
    "causal bottom right": {"causal": True, "causal_offset": 1},
    "window": {"causal": True, "causal_offset": 1, "window": 3},
    "symmetric window": {"window": 2},
    "bool mask": {"mask": random(2, 1, 6, 7, seed=6) > 0},
    "softcap and sinks": {"softcap": 1.5, "sinks": random(4, seed=7), "causal": True},
    "a sink for each row": {"sinks": random(2, 4, 6, 1, seed=10), "mask": random(2, 1, 6, 7, seed=6) > 0},
    "bias per head": {"bias": random(1, 4, 6, 7, seed=8), "mask": random(1, 1, 1, 7, seed=9) > -0.5},
}


@pytest.mark.parametrize("rule", RULES)
def test_attention_equals_the_formula_entry_by_entry(rule: str) -> None:
    call = call_of(**RULES[rule])
    expected = by_hand(call)
    assert (call.attention() - expected).abs().max() < 1e-6
    normaliser = torch.exp(call.scores() - call.log_sum_exp()[..., None]).nan_to_num()
    assert (normaliser - expected).abs().max() < 2e-6


@pytest.mark.parametrize("rule", RULES)
def test_rows_and_heads_select_from_the_whole(rule: str) -> None:
    call = call_of(**RULES[rule])
    whole = call.attention()
    for rows, heads in (
        (slice(2, 5), slice(1, 3)),
        ([0, 5], slice(None)),
        (slice(None), torch.tensor([3, 0])),
        (4, 2),
    ):
        as_index = [slice(each, each + 1) if isinstance(each, int) else each for each in (rows, heads)]
        part = call.attention(rows=rows, heads=heads)
        assert torch.allclose(part, whole[:, as_index[1]][:, :, as_index[0]], atol=1e-6)


def test_fully_masked_rows_are_zero_and_not_valid() -> None:
    mask = torch.ones(2, 1, 6, 7, dtype=torch.bool)
    mask[1, :, 2] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for each in (mask, additive):
        call = call_of(mask=each)
        assert call.attention()[1, :, 2].eq(0).all()
        assert call.log_sum_exp()[1, :, 2].eq(float("-inf")).all()
        valid = call.row_valid().expand(2, 4, 6)
        assert not valid[1, :, 2].any()
        assert valid.sum() == 2 * 4 * 6 - 4


def test_the_kernels_log_sum_exp_is_what_the_scores_give() -> None:
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, :, 4] = False
    model = llama()
    with recording(model) as rec, torch.no_grad():
        model(input_ids=inputs()["input_ids"], attention_mask=mask)
    for call in rec:
        assert call.kernel_log_sum_exp is not None
        given, call.kernel_log_sum_exp = call.log_sum_exp(), None
        assert torch.allclose(given, call.log_sum_exp(), atol=2e-6)
        assert given[1, :, 4].eq(float("-inf")).all()


WITHOUT_SINKS = [rule for rule, fields in RULES.items() if "sinks" not in fields]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rule", [*WITHOUT_SINKS, "softcap"])
def test_attention_by_the_kernels_log_sum_exp_is_the_softmax(rule: str, groups: int) -> None:
    fields = RULES.get(rule, {"softcap": 1.5}) | {"key": random(2, 4 // groups, 7, 8, seed=4)}
    fields |= {"kernel_log_sum_exp": call_of(**fields).log_sum_exp()}
    call = call_of(**fields)
    for heads in (slice(None), slice(1, 3), [3, 0]):
        found = call.attention_by_kernel(heads)
        assert found is not None
        assert (found - call.attention(heads=heads)).abs().max() < 2e-6
    for sinks in (random(4), random(2, 4, 6, 1)):
        assert call_of(**fields, sinks=sinks).attention_by_kernel() is None
    assert call_of(**fields, probabilities=call.attention()).attention_by_kernel() is None
    assert call_of(**(fields | {"kernel_log_sum_exp": None})).attention_by_kernel() is None


def test_a_row_without_a_key_is_zero_whatever_its_log_sum_exp() -> None:
    mask = torch.ones(2, 1, 6, 7, dtype=torch.bool)
    mask[1, :, 2] = False
    for nothing in (0.0, float("-inf"), float("nan")):
        given = call_of(mask=mask).log_sum_exp()
        given[1, :, 2] = nothing
        call = call_of(mask=mask, kernel_log_sum_exp=given)
        found = call.attention_by_kernel()
        assert found is not None
        assert found[1, :, 2].eq(0).all()
        assert (found - call.attention()).abs().max() < 2e-6


@pytest.mark.parametrize("ruled", [False, True])
def test_a_log_sum_exp_that_is_not_that_of_the_scores_is_not_used(ruled: bool) -> None:
    fields: dict[str, Any] = {"mask": torch.ones(1, 1, 6, 7, dtype=torch.bool)} if ruled else {}
    right = call_of(**fields).log_sum_exp()
    assert call_of(**fields, kernel_log_sum_exp=right).attention_by_kernel() is not None
    for wrong in (1e-5, -1e-5, 40.0, float("nan"), float("inf"), float("-inf")):
        given = right.clone()
        given[1, 3, 5] += wrong
        assert call_of(**fields, kernel_log_sum_exp=given).attention_by_kernel() is None
    query = random(2, 4, 6, 8)
    query[0, 1, 2, 3] = float("nan")
    assert call_of(**fields, query=query, kernel_log_sum_exp=right).attention_by_kernel() is None
    # Rounded differently, scores of thousands differ by more than what is stored of weights may.
    large = call_of(**fields, scale=3000.0)
    large.kernel_log_sum_exp = (large.scores() * (1 + 1e-7)).logsumexp(dim=-1)
    assert large.attention_by_kernel() is None


@pytest.mark.parametrize("rule", RULES)
def test_some_samples_of_a_call_are_those_of_the_whole(rule: str) -> None:
    computed = torch.ones(2, 6, dtype=torch.bool)
    computed[0, 4:] = False
    call = call_of(**RULES[rule], output=random(2, 6, 4, 5, seed=11), rows_computed=computed)
    call.kernel_log_sum_exp = call.log_sum_exp()
    part = call.of_samples(slice(1, 2))
    assert part.shape == (1, 4, 6, 7)
    assert torch.equal(part.attention(), call.attention()[1:])
    assert torch.equal(part.log_sum_exp(), call.log_sum_exp()[1:])
    assert torch.equal(part.row_valid().expand(1, 4, 6), call.row_valid().expand(2, 4, 6)[1:])
    assert part.output_error() == pytest.approx(call_of(**vars_of(call, 1)).output_error(), abs=1e-6)
    assert call.of_samples(slice(0, 2)) is call
    call.query.add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        call.of_samples(slice(1, 2))


def vars_of(call: AttentionCall, sample: int) -> dict[str, Any]:
    """The fields of a call for one sample, by hand."""
    found = {}
    for name in ("query", "key", "value", "output", "mask", "bias", "sinks", "rows_computed"):
        tensor = getattr(call, name)
        shared = tensor is None or tensor.shape[0] == 1 or (name == "sinks" and tensor.dim() == 1)
        found[name] = tensor if shared else tensor[sample : sample + 1]
    return found | {name: getattr(call, name) for name in ("scale", "softcap", "causal", "causal_offset", "window")}


def test_a_rule_of_fewer_axes_is_that_of_every_sample() -> None:
    """Also where its first axis is as long as the batch: two queries, two heads."""
    query, key, value = random(2, 2, 2, 8), random(2, 2, 7, 8, seed=4), random(2, 2, 7, 5, seed=5)
    mask, bias, sinks = random(2, 7, seed=6) > 0, random(2, 2, 7, seed=7), random(2, seed=8)
    call = call_of(query=query, key=key, value=value, mask=mask, bias=bias, sinks=sinks)
    assert torch.equal(call.of_samples(slice(1, 2)).attention(), call.attention()[1:])


def test_rows_that_the_kernel_left_out_are_not_valid() -> None:
    computed = torch.ones(2, 6, dtype=torch.bool)
    computed[0, 4:] = False
    assert call_of(rows_computed=computed).row_valid().expand(2, 4, 6).sum() == 4 * 4 + 4 * 6


def test_attention_gradient_is_what_autograd_finds() -> None:
    call = call_of()
    attention = call.attention().requires_grad_()
    output = (attention @ call.value.repeat_interleave(2, dim=1)).transpose(1, 2)
    gradient = random(*output.shape, seed=11)
    expected = torch.autograd.grad((output * gradient).sum(), attention)[0]
    assert torch.allclose(call.attention_gradient(gradient), expected, atol=1e-6)
    part = call.attention_gradient(gradient, rows=slice(1, 3), heads=[3])
    assert torch.allclose(part, expected[:, [3], 1:3], atol=1e-6)


def test_a_tensor_changed_in_place_is_an_error() -> None:
    call = call_of()
    call.key.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        call.attention()


# -- outputs and order -------------------------------------------------------------------------------------------------


def models() -> Iterator[Any]:
    yield pytest.param(bert, inputs, id="bert")
    yield pytest.param(llama, inputs, id="llama")
    yield pytest.param(lambda: llama("eager"), inputs, id="llama-eager")
    yield pytest.param(gptj, inputs, id="gptj")
    for batch_first in (True, False):
        yield pytest.param(lambda first=batch_first: encoder(first), encoder_inputs, id=f"encoder-{batch_first}")
    yield pytest.param(CrossAttention, lambda: {"query": random(2, 5, 16), "key": random(2, 7, 16)}, id="cross")


def encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first, norm_first=not batch_first)
    return widened(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first))


def encoder_inputs() -> dict[str, Tensor]:
    padding = torch.zeros(2, 2, dtype=torch.bool)
    padding[1, 1:] = True
    return {"src": random(2, 2, 16), "src_key_padding_mask": padding}


class CrossAttention(nn.Module):
    """Torch's own attention, where queries and keys differ."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True)
        widened(self)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.attention(query, key, key, need_weights=False)[0]


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Converting mask without torch.bool dtype")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("build", "given"), list(models()))
def test_outputs_are_the_same_to_the_last_bit(build: Callable[[], nn.Module], given: Any, mode: Any) -> None:
    model = build().eval()
    with mode():
        plain = first_tensor(model(**given()))
        with recording(model) as rec:
            recorded = first_tensor(model(**given()))
    assert torch.equal(plain, recorded)
    assert rec.audit.ran == rec.audit.recorded == len(rec) > 0
    assert max(call.output_error() for call in rec) < 2e-6


def test_calls_come_in_order_with_their_numbers() -> None:
    model = bert()
    with recording(model) as rec:
        model(**inputs())
        model(**inputs())
    assert [call.index for call in rec] == [0, 1, 2, 3]
    assert [call.number for call in rec] == [0, 0, 1, 1]
    assert [call.module for call in rec] == [f"encoder.layer.{layer}.attention.self" for layer in (0, 1)] * 2
    assert rec[0] is rec.calls[0]
    assert all(dict(model.named_modules())[call.module] is not model for call in rec)


def test_grouped_keys_are_not_repeated() -> None:
    model = llama()
    with recording(model) as rec:
        model(**inputs())
    assert rec[0].query.shape[1] == 4
    assert rec[0].key.shape[1] == 2


def test_generate_records_the_prompt_and_every_step() -> None:
    model = llama()
    model.generation_config.eos_token_id = None
    for cache in (None, "static"):
        with recording(model) as rec:
            model.generate(
                **inputs("left"), max_new_tokens=3, do_sample=False, pad_token_id=0, cache_implementation=cache
            )
        assert [(call.number, call.query.shape[2]) for call in rec] == [(0, 9)] * 2 + [(1, 1)] * 2 + [(2, 1)] * 2
        assert max(call.output_error() for call in rec) < 2e-6


def test_half_precision_stays_within_its_bound() -> None:
    for dtype, bound in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        model = llama("eager").to(dtype)
        with recording(model) as rec, torch.no_grad():
            weights = model(**inputs(), output_attentions=True).attentions
        for call, own in zip(rec, weights, strict=True):
            assert call.attention().dtype == torch.float32
            assert (call.attention() - own.float()).abs().max() < bound


def test_a_boolean_mask_is_added_by_eager_code_and_recorded_so() -> None:
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    for kernel, dtype in (("sdpa", torch.bool), ("eager", torch.float32)):
        model = llama(kernel)
        with recording(model) as rec, torch.no_grad():
            model(input_ids=inputs()["input_ids"], attention_mask=mask)
        assert rec[0].mask.dtype == dtype
        assert max(call.output_error() for call in rec) < 2e-6


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [bert, gptj, lambda: bert("eager")])
def test_closed_form_gradient_equals_eager_autograd(build: Callable[[], nn.Module]) -> None:
    model = build()
    with recording(model) as rec:
        score = first_tensor(model(**inputs()))[:, 0].square().sum()
    closed = [
        call.attention_gradient(gradient)
        for call, gradient in zip(rec, torch.autograd.grad(score, [call.output for call in rec]), strict=True)
    ]
    eager = bert("eager") if isinstance(model, hf.BertModel) else model
    output = eager(**inputs(), output_attentions=True)
    expected = torch.autograd.grad(output[0][:, 0].square().sum(), output.attentions)
    for ours, theirs in zip(closed, expected, strict=True):
        assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_output_of_torch_attention_is_in_the_graph() -> None:
    model = CrossAttention()
    with recording(model) as rec:
        score = model(random(2, 5, 16), random(2, 7, 16)).sum()
    assert torch.autograd.grad(score, rec[0].output)[0].abs().sum() > 0


@pytest.mark.parametrize("build", [bert, gptj])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_forward_is_recorded_once(build: Callable[[], nn.Module], use_reentrant: bool) -> None:
    model = build().train()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    gradients = []
    for context in (recording(model), None):
        torch.manual_seed(0)
        model.zero_grad()
        if context is None:
            model(**inputs())[0].sum().backward()
        else:
            with context as rec:
                model(**inputs())[0].sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert len(rec) == 2
    assert [call.output.requires_grad for call in rec] == [not use_reentrant] * 2
    assert all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# -- streaming ---------------------------------------------------------------------------------------------------------


def test_on_call_gets_each_call_while_the_forward_goes_on() -> None:
    model, seen = bert(), []
    finished: list[int] = []
    model.encoder.layer[0].register_forward_hook(lambda *_: finished.append(len(seen)))
    with recording(model, on_call=lambda call: seen.append(call.attention().sum())) as rec, torch.no_grad():
        model(**inputs())
    assert finished == [1]
    assert len(seen) == 2
    assert len(rec) == 0
    assert rec.audit.recorded == 2


def test_a_streamed_call_is_not_kept() -> None:
    model, alive = bert(layers=4), []
    counts = []

    def on_call(call: AttentionCall) -> None:
        alive.append(weakref.ref(call.query))
        gc.collect()
        counts.append(sum(each() is not None for each in alive))

    with recording(model, on_call=on_call), torch.no_grad():
        model(**inputs())
    assert max(counts) <= 2


def test_what_on_call_computes_is_neither_recorded_nor_counted() -> None:
    def on_call(call: AttentionCall) -> None:
        weights = torch.softmax(call.query @ call.query.mT, dim=-1)
        assert (weights @ call.query).isfinite().all()
        nn.functional.scaled_dot_product_attention(call.query, call.query, call.query)

    with recording(model := bert(), on_call=on_call) as rec:
        model(**inputs())
    assert rec.audit.ran == rec.audit.recorded == 2


def test_exceptions_of_on_call_leave_the_forward() -> None:
    def fail(call: AttentionCall) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), recording(model := bert(), on_call=fail):
        model(**inputs())
    assert_restored()


# -- isolation and restoration -----------------------------------------------------------------------------------------

ORIGINALS = {
    (owner, name): owner.__dict__.get(name)
    for owner, name in (
        (AttentionInterface, "get_interface"),
        (AttentionInterface, "__getitem__"),
        (nn.Module, "__call__"),
        (nn.MultiheadAttention, "forward"),
        (nn.TransformerEncoderLayer, "forward"),
        (nn.TransformerEncoder, "forward"),
    )
}


def assert_restored() -> None:
    for (owner, name), original in ORIGINALS.items():
        assert owner.__dict__.get(name) is original
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0


def test_nothing_stays_patched() -> None:
    model = encoder(batch_first=True)
    with recording(model):
        assert AttentionInterface.__dict__["get_interface"] is not ORIGINALS[AttentionInterface, "get_interface"]
        with pytest.raises(ZeroDivisionError), recording(bert()):
            raise ZeroDivisionError
        model(random(2, 3, 16))
    assert_restored()
    assert not any("forward" in vars(module) for module in model.modules())


def test_taps_stay_in_place_between_the_recordings_of_a_run() -> None:
    model = bert()
    expected = model(**inputs())[0]
    with taps_kept(model):
        for _ in range(2):
            with recording(model) as rec:
                assert torch.equal(model(**inputs())[0], expected)
            assert [call.module for call in rec] == [f"encoder.layer.{n}.attention.self" for n in (0, 1)]
            assert torch.equal(model(**inputs())[0], expected)
            assert nn.Module.__dict__["__call__"] is not ORIGINALS[nn.Module, "__call__"]
        with recording(llama()) as other:
            other.model(**inputs())
        assert len(other) == 2
    assert_restored()
    with pytest.raises(ZeroDivisionError), taps_kept(model):
        raise ZeroDivisionError
    assert_restored()


def test_a_model_that_is_compiled_between_the_recordings_of_a_run_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs())
    with ExitStack() as stack:
        with monkeypatch.context() as earlier:
            earlier.delitem(sys.modules, "torch._dynamo")
            stack.enter_context(taps_kept(compiled))
            assert torch._dynamo.eval_frame._stance.stance == "default"
        with recording(compiled) as rec:
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
            compiled(**inputs())
    assert len(rec) == rec.audit.ran == 2
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert_restored()


def test_another_model_in_the_context_is_not_recorded() -> None:
    first, second = bert(), llama()
    with recording(first) as rec:
        second(**inputs())
        first(**inputs())
    assert len(rec) == rec.audit.ran == 2


def test_two_recordings_in_one_thread_each_see_their_model() -> None:
    first, second = gptj(), llama()
    with recording(first) as one, recording(second) as two:
        second(**inputs())
        first(**inputs())
        second(**inputs())
    assert (len(one), len(two)) == (2, 4)
    assert (one.audit.ran, two.audit.ran) == (2, 4)


def test_recordings_in_two_threads_do_not_mix() -> None:
    results: dict[str, Any] = {}
    barrier = threading.Barrier(2)

    def work(name: str, model: nn.Module) -> None:
        with recording(model) as rec, torch.no_grad():
            barrier.wait()
            for _ in range(5):
                model(**inputs())
        results[name] = rec

    threads = [threading.Thread(target=work, args=each) for each in (("bert", bert(layers=3)), ("gptj", gptj()))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(results["bert"]) == 15
    assert len(results["gptj"]) == 10
    assert {call.module.split(".")[0] for call in results["bert"]} == {"encoder"}
    assert all(each.audit.ran == len(each) for each in results.values())
    assert_restored()


def test_a_thread_without_a_recording_passes_through() -> None:
    model = bert()
    with recording(model) as rec, torch.no_grad():
        thread = threading.Thread(target=lambda: bert()(**inputs()))
        thread.start()
        thread.join()
        model(**inputs())
    assert len(rec) == 2


# -- never silently incomplete -----------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Attention where no torch function mode can see it."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, states: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            if self.fused:
                return torch._C._nn.scaled_dot_product_attention(states, states, states)
            return torch.dropout((states @ states.mT / 2.0).softmax(-1), 0.0, train=False) @ states


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("fused", "kernel"), [(True, "scaled_dot_product"), (False, "softmax and product")])
def test_hidden_attention_is_an_error_that_names_the_module(fused: bool, kernel: str, mode: Any) -> None:
    model = nn.Sequential(nn.Identity(), Hidden(fused))
    with mode(), pytest.raises(UnrecordedAttention, match=f"'1': .*{kernel}"), recording(model):
        model(random(2, 4, 5, 8))
    assert_restored()


def test_attention_of_an_unknown_kind_is_not_recorded_as_nothing() -> None:
    model = widened(hf.RwkvModel(hf.RwkvConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2)))
    with pytest.raises(UnrecordedAttention, match=r"'blocks\.0\.attention': no softmax"), recording(model):
        model(input_ids=inputs()["input_ids"])


class WrittenOut(nn.Module):
    """A softmax without torch's: the exponentials of scores less their log-sum-exp."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT / 2.0
        return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ value


class HiddenWrittenOut(WrittenOut):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return super().forward(query, key, value)


@pytest.mark.parametrize("mode", MODES)
def test_a_softmax_that_is_written_out_is_one(mode: Any) -> None:
    query, key, value = random(2, 4, 5, 8), random(2, 4, 6, 8, seed=4), random(2, 4, 6, 3, seed=5)
    with mode(), recording(WrittenOut()) as rec:
        output = rec.model(query, key, value)
    (call,) = rec
    assert (rec.audit.ran, rec.audit.recorded) == (1, 1)
    assert call.probabilities is None
    torch.testing.assert_close(call.attention(), (query @ key.mT / 2.0).softmax(-1), atol=2e-6, rtol=0)
    torch.testing.assert_close(output, call.attention() @ value, atol=2e-6, rtol=0)
    with (
        mode(),
        pytest.raises(UnrecordedAttention, match="softmax and product"),
        recording(hidden := HiddenWrittenOut()),
    ):
        hidden(query, key, value)


@pytest.mark.parametrize("length", [8, 40])
def test_reformer_attends_in_chunks_and_to_itself_where_nothing_else_is_left(length: int) -> None:
    config = hf.ReformerConfig(
        **{"hidden_size": 32, "feed_forward_size": 37, "num_attention_heads": 4, "attention_head_size": 8},
        **{"vocab_size": 99, "max_position_embeddings": 64, "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
        **{"attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
        **{"num_buckets": 2, "num_hashes": 1, "hash_seed": 0, "is_decoder": True},
    )
    model, ids = widened(hf.ReformerModel(config)), torch.arange(5, 5 + 2 * length).view(2, length) % 90
    mask = (torch.arange(length) < torch.tensor([[length], [length - 3]])).long()
    with torch.no_grad(), recording(model) as rec:
        model(ids, attention_mask=mask, use_cache=False)
    with torch.no_grad():
        own = model(ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    assert rec.audit.ran == rec.audit.recorded == len(rec) == 2
    for call, given in zip(rec, own, strict=True):
        expected = given.transpose(1, 2).flatten(0, 1) if given.dim() == 5 else given
        torch.testing.assert_close(call.attention(), expected, atol=2e-6, rtol=0)
        assert call.output_error() < 1e-5


class IdleAttention(nn.Module):
    """Makes a softmax over heads that it has no use for, as SAM 2 does, and leaves its attention to the interface."""

    def forward(self, states: Tensor) -> Tensor:
        torch.softmax(states.transpose(1, 2) @ states.transpose(1, 2).mT, dim=-1)
        attend = AttentionInterface().get_interface("sdpa", None)
        return attend(self, states, states, states, None, is_causal=False)[0]


def test_a_softmax_that_nothing_uses_is_no_attention_where_the_interface_attends() -> None:
    with recording(model := IdleAttention()) as rec:
        model(random(2, 4, 5, 8))
    assert [call.kernel for call in rec] == ["sdpa"]
    assert (rec.audit.ran, rec.audit.plain_softmaxes) == (1, 1)


def test_without_the_audit_nothing_is_counted() -> None:
    model = Hidden(fused=True)
    with recording(model, audit=False) as rec:
        model(random(2, 4, 5, 8))
    assert rec.audit.ran is None
    assert len(rec) == 0


def test_an_exception_under_way_is_not_replaced() -> None:
    class Failing(Hidden):
        def forward(self, states: Tensor) -> Tensor:
            super().forward(states)
            raise KeyError

    with pytest.raises(KeyError), recording(model := Failing(fused=True)):
        model(random(2, 4, 5, 8))


def test_part_of_the_model_in_another_thread_is_an_error() -> None:
    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, **given: Tensor) -> None:
            thread = threading.Thread(target=lambda: self.inner(**given))
            thread.start()
            thread.join()

    model = Threaded()
    with pytest.raises(UnrecordedAttention, match="'inner': ran in another thread"), recording(model):
        model(**inputs())


def test_a_compiled_model_is_recorded() -> None:
    model = llama()
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs())
    with recording(compiled) as rec:
        compiled(**inputs())
    assert [call.module for call in rec] == [f"model.layers.{layer}.self_attn" for layer in (0, 1)]


def test_scripted_and_replicated_models_are_refused() -> None:
    with pytest.raises(TypeError, match="replicas"), recording(nn.DataParallel(nn.Linear(2, 2))):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    with pytest.raises(TypeError, match="'0' is a ScriptModule"), recording(scripted):
        pass
    with pytest.raises(TypeError, match="'int'"), recording(3):  # type: ignore[arg-type]
        pass
    assert_restored()


def test_an_attention_function_that_computes_something_else_is_not_believed() -> None:
    def halved(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        weights = torch.softmax(query @ key.repeat_interleave(2, dim=1).mT, dim=-1) / 2
        return (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2).contiguous(), weights

    model = llama()
    model.config._attn_implementation = "halved"
    AttentionInterface.register("halved", halved)
    try:
        with recording(model) as rec, torch.no_grad():
            model(input_ids=inputs()["input_ids"])
    finally:
        del AttentionInterface._global_mapping["halved"]
    assert all(torch.allclose(call.attention().sum(-1), torch.tensor(0.5)) for call in rec)
    assert max(call.output_error() for call in rec) < 2e-6


class Equal:
    """An attention function that is equal to all of its kind, and so has no hash."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self.calls = 0

    def __call__(self, module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        output, _ = sdpa_attention_forward(module, query, *args, **kwargs)
        return output * self.share, None


def test_attention_functions_that_are_equal_are_not_taken_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    model.config._attn_implementation = "equal_sdpa"
    for _ in range(2):
        function = Equal()
        monkeypatch.setitem(AttentionInterface._global_mapping, "equal_sdpa", function)
        with recording(model) as rec, torch.no_grad():
            model(**inputs())
        assert len(rec) == rec.audit.recorded == function.calls == 2
    monkeypatch.setitem(AttentionInterface._global_mapping, "equal_sdpa", Equal(0.5))
    with pytest.raises(NotImplementedError, match="'Equal' of 'encoder"), recording(model):
        model(**inputs())


MUTATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "mask dropped": lambda recipe: recipe | {"mask": None},
    "scale dropped": lambda recipe: recipe | {"scale": 1.0},
    "causal rule dropped": lambda recipe: recipe | {"causal": False, "mask": None},
}


def own_attention(model: Callable[[str], nn.Module]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model("eager")(**inputs(), output_attentions=True).attentions


def largest_error(rec: Any, own: tuple[Tensor, ...]) -> float:
    errors = [(call.attention() - each).abs().amax(-1) for call, each in zip(rec, own, strict=True)]
    valid = inputs()["attention_mask"].bool()[:, None].expand(errors[0].shape)
    return max(float(each[valid].max()) for each in errors)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_recipe_fails_the_comparison(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = own_attention(llama)
    right = interface._sdpa
    model = llama()
    with recording(model) as rec, torch.no_grad():
        model(**inputs())
    assert largest_error(rec, own) < 2e-6
    monkeypatch.setattr(interface, "_sdpa", lambda arguments: MUTATIONS[mutation](right(arguments)))
    with recording(model) as rec, torch.no_grad():
        model(**inputs())
    assert largest_error(rec, own) > 1e-2
    assert max(call.output_error() for call in rec) > 1e-2


def test_swapped_query_and_key_fail_the_comparison() -> None:
    own = own_attention(bert)
    model = bert()
    with recording(model) as rec, torch.no_grad():
        model(**inputs())
    assert largest_error(rec, own) < 2e-6
    for call in rec:
        call.query, call.key = call.key, call.query
        call.__post_init__()
    assert largest_error(rec, own) > 1e-2


@pytest.mark.parametrize("mutation", ["mask dropped", "scale dropped"])
def test_a_wrong_recipe_of_eager_code_is_noticed_while_recording(
    mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = interface._eager
    monkeypatch.setattr(interface, "_eager", lambda *given: MUTATIONS[mutation](right(*given)))
    model = llama("eager")
    with recording(model) as rec, torch.no_grad():
        model(**inputs())
    assert all(call.probabilities is not None for call in rec)
    assert largest_error(rec, own_attention(llama)) < 2e-6


def test_flash_arguments_become_their_rules() -> None:
    module = nn.Module()
    module.is_causal = True
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    given = {"module": module, "query": random(2, 4, 3, 8), "key": random(2, 2, 4, 8), "attention_mask": padding}
    recipe = interface._flash(given | {"sliding_window": 3, "softcap": 2.0, "scaling": 0.5})
    assert (recipe["causal"], recipe["causal_offset"], recipe["window"]) == (True, 1, 3)
    assert recipe["mask"].shape == (2, 1, 1, 4)
    assert recipe["rows_computed"].tolist() == [[True] * 3, [True] * 3]
    assert interface._flash(given | {"sliding_window": 4})["window"] is None
    ends = torch.tensor([0, 2, 5])
    packed = given | {"attention_mask": None, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    packed |= {"query": random(1, 4, 5, 8), "key": random(1, 2, 5, 8)}
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    assert torch.equal(interface._flash(packed)["mask"][0, 0], expected)
    positions = packed | {"cu_seq_lens_q": None, "cu_seq_lens_k": None, "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    assert torch.equal(interface._flash(positions)["mask"][0, 0], expected)


def test_the_module_can_be_called_as_the_function() -> None:
    context: AbstractContextManager[Any] = module_under_test(nn.Linear(2, 2))
    with context as rec:
        assert len(rec) == 0


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys", "offset"), [(7, 7, 0), (4, 9, 5), (9, 4, -5), (6, 6, 2), (5, 3, 8)])
def test_rows_that_the_positions_leave_a_key_are_those_with_a_finite_score(
    queries: int, keys: int, offset: int, causal: bool, window: int | None
) -> None:
    query, key = torch.randn(1, 2, queries, 4), torch.randn(1, 2, keys, 4)
    call = AttentionCall(
        "m", 0, 0, "flash", "interface", query, key, None, None, causal=causal, window=window, causal_offset=offset
    )
    for rows in (slice(None), slice(1, 4), torch.tensor([3, 0])):
        scores = call.scores(rows)
        for row, i in enumerate(torch.arange(queries)[rows].tolist()):
            position = i + offset
            near = [j for j in range(keys) if window is None or abs(position - j) < window]
            expected = [j for j in near if j <= position or not causal]
            assert torch.isfinite(scores[0, 0, row]).nonzero().flatten().tolist() == expected
    finite = torch.isfinite(call.scores()).any(-1)
    assert torch.equal(call.row_valid().expand(1, 2, queries), finite)
    assert torch.equal(call.attention().sum(-1) > 0, finite)


@pytest.mark.parametrize("row", [0, 2000, 2047])
@pytest.mark.parametrize(("causal", "wrong"), [(False, 0.5), (True, float("nan"))])
def test_a_wrong_output_is_found_in_any_row_of_a_long_text(row: int, causal: bool, wrong: float) -> None:
    query, key, value = torch.randn(3, 1, 3, 2048, 4, generator=torch.Generator().manual_seed(0))
    output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).clone()
    call = AttentionCall("attention", 0, 0, "sdpa", "interface", query, key, value, output, causal=causal, scale=0.5)
    assert call.output_error() < 2e-6
    output[0, row, 1, 2] += wrong
    assert call.output_error() == pytest.approx(wrong, abs=2e-6, nan_ok=True)
