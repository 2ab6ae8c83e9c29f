"""On a CUDA device: what is recorded and stored there is the attention of the model's own eager code."""

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from attnscope.compatibility import EXAMPLES
from attnscope.compatibility.examples import GROUPED, widened
from attnscope.compatibility.witness import first_tensor, forward, matched_errors, own_softmaxes
from attnscope.extraction import extract
from attnscope.quantities import ExtractSpec
from attnscope.recording import recording

pytestmark = pytest.mark.gpu

EXACT = ExtractSpec(encoding="exact")
# Eager code rounds the products of half-precision queries and keys before its softmax.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def full_precision() -> None:
    """Products in float32 as they are, not in TensorFloat32."""
    torch.backends.cuda.matmul.allow_tf32 = False


def on_device(name: str, kernel: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return EXAMPLES[name].build(kernel).to("cuda", dtype)


def moved(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {k: v.to("cuda", dtype if v.is_floating_point() else None) for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", ["vit", "llama", "llama_left", "mistral_sliding"])
def test_recorded_attention_on_a_device_equals_the_eager_softmax(name: str, dtype: torch.dtype) -> None:
    model, inputs = on_device(name, "sdpa", dtype), moved(EXAMPLES[name].inputs(), dtype)
    plain = first_tensor(forward(model, inputs))
    with recording(model) as recorded:
        assert torch.equal(first_tensor(forward(model, inputs)), plain)
    assert recorded.audit.ran == recorded.audit.recorded == len(recorded)
    if dtype == torch.float32:
        own = own_softmaxes(on_device(name, "eager", dtype), inputs)
        assert max(matched_errors(recorded.calls, own)) <= BOUNDS[dtype]
        assert max(call.output_error() for call in recorded) <= 1e-5
    else:
        # The first layer alone: later ones see what the two kernels rounded differently.
        own = own_softmaxes(on_device(name, "eager", dtype), inputs)
        assert matched_errors(recorded.calls[:1], own[:1])[0] <= BOUNDS[dtype]
        assert max(call.output_error() for call in recorded) <= 5e-2


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize(("name", "site"), [("vit", "vision.self"), ("llama", "text.self")])
def test_what_is_stored_from_a_device_is_what_a_cpu_gives(name: str, site: str, form: str) -> None:
    inputs = EXAMPLES[name].inputs()
    device = extract(on_device(name, "sdpa"), [moved(inputs)], spec=EXACT, form=form).attention(site)
    cpu = extract(EXAMPLES[name].build("sdpa"), [inputs], spec=EXACT, form=form).attention(site)
    np.testing.assert_allclose(device.values, cpu.values, atol=5e-6)


FUSED = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
    "flex_attention": lambda: True,
}


def mistral(kernel: str, window: int | None) -> nn.Module:
    # A configuration of its own: the model reads its kernel from there at each call.
    config = hf.MistralConfig(**(GROUPED | {"head_dim": 64}), sliding_window=window)
    return widened(hf.MistralModel._from_config(config, attn_implementation=kernel)).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("kernel", FUSED)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_fused_kernels_are_recorded_by_their_rules(kernel: str, side: str | None, window: int | None) -> None:
    if not FUSED[kernel]():
        pytest.skip(f"{kernel} is not installed")
    inputs = moved(EXAMPLES["llama_left" if side == "left" else "llama"].inputs())
    if side is None:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    models = [mistral(each, window) for each in (kernel, "eager")]
    plain = first_tensor(forward(models[0], inputs))
    with recording(models[0]) as recorded:
        assert torch.equal(first_tensor(forward(models[0], inputs)), plain)
    assert [call.kernel for call in recorded] == [kernel] * 2
    assert recorded.audit.ran == recorded.audit.recorded == 2
    assert max(call.output_error() for call in recorded) <= 5e-2
    own = own_softmaxes(models[1], inputs)
    assert matched_errors(recorded.calls[:1], own[:1])[0] <= BOUNDS[torch.bfloat16]
