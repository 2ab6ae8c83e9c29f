"""How many samples the model sees at once: what fits the memory there is, and less when that was too much."""

import os

import torch

from attnscope.chunks import processor_cores
from attnscope.loading import LoadedModel
from attnscope.plan import RunPlan
from attnscope.quantities import ExtractSpec

# More gains nothing: processors with many lanes are busy by then.
_LIMITS = {"cuda": 64, "cpu": 16}
_SHARE = 0.5
_MOST_WRITERS = 8
# A transformer layer keeps about 34 activations of the hidden size a token for its backward pass (Korthikanti et al.,
# Reducing Activation Recomputation in Large Transformer Models, MLSys 2023, section 4.1), besides the attention itself.
_ACTIVATIONS = 34
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


def batch_that_fits(loaded: LoadedModel, plan: RunPlan, spec: ExtractSpec) -> int:
    """Samples a batch: a power of two, within half of the free memory by estimate, and at most a block."""
    fitting = int(_SHARE * free_memory(loaded.device)) // max(1, sample_memory(plan, spec))
    most = min(max(1, fitting), _LIMITS.get(loaded.device.type, 16), plan.unit)
    return 1 << (most.bit_length() - 1)


def sample_memory(plan: RunPlan, spec: ExtractSpec) -> int:
    """Bytes that one sample takes on the device at the peak, by estimate: float32 activations and attention tiles."""
    peak = 0
    kept = 0
    for site in plan.sites.values():
        tokens = max(site.query_tokens, site.key_tokens)
        hidden = site.heads * max(site.channels, 1)
        layer = 4 * _ACTIVATIONS * tokens * hidden
        attention = 4 * 3 * site.heads * site.query_tokens * site.key_tokens
        peak = max(peak, layer + attention)
        kept += len(site.layers) * layer
    return peak + (kept if spec.needs_gradient else 0)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free for us."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return 2**31


def writer_threads(device: torch.device) -> int:
    """Threads that compress and write: all cores of a model that waits for them, half of those beside a GPU."""
    cores = processor_cores()
    return max(1, min(_MOST_WRITERS, cores if device.type == "cpu" else cores // 2))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in _MESSAGES)
