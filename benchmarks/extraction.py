"""What extraction costs beside the bare forward, and beside what else reads attention.

    python benchmarks/extraction.py [--rounds 5] [--case NAME]

Each case runs the contenders one after the other, round after round, in one process, and gives medians and the ratio
of medians; peak memory is that of a process of its own for each contender. Weights are random and wide. Wall time of
extraction is that of the blocks, writing to disk included; what a run pays once (digest of the weights, probe, plan,
making the run) stands below it.
"""

import argparse
import importlib.util
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from attnscope import ExtractSpec, extract
from attnscope.extraction import Extraction

Batches = list[dict[str, torch.Tensor]]
SPEC = ExtractSpec(summaries=False)
ONCE: list[float] = []
"""Seconds that each extraction spent before its first block."""


def wide(model: torch.nn.Module) -> torch.nn.Module:
    """The model with matrices drawn wide enough that attention isn't uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.05)
    return model.eval()


def vit(batch: int, batches: int) -> tuple[torch.nn.Module, Batches]:
    """A ViT-B/16: 197 tokens, 12 layers, 12 heads."""
    torch.manual_seed(0)
    model = wide(transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False))
    return model, [{"pixel_values": torch.randn(batch, 3, 224, 224)} for _ in range(batches)]


def decoder(batch: int, batches: int, tokens: int = 2048) -> tuple[torch.nn.Module, Batches]:
    """A 12-layer decoder of GPT-2's size with rotary positions."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=1000,
        max_position_embeddings=4096,
    )  # fmt: skip
    model = wide(transformers.LlamaModel(config))
    ids = [torch.randint(5, 1000, (batch, tokens)) for _ in range(batches)]
    return model, [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def bert(batch: int, batches: int, tokens: int = 128) -> tuple[torch.nn.Module, Batches]:
    """A BERT-base."""
    torch.manual_seed(0)
    model = wide(transformers.BertModel(transformers.BertConfig(vocab_size=1000), add_pooling_layer=False))
    ids = [torch.randint(5, 1000, (batch, tokens)) for _ in range(batches)]
    return model, [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


CASES: dict[str, Callable[[], tuple[torch.nn.Module, Batches]]] = {
    "ViT-B/16, batch 8": lambda: vit(8, 6),
    "ViT-B/16, batch 1": lambda: vit(1, 16),
    "decoder, 2048 tokens, batch 1": lambda: decoder(1, 1),
    "BERT-base, 128 tokens, batch 8": lambda: bert(8, 3),
}


def bare(model: torch.nn.Module, batches: Batches, folder: Path) -> float:
    """Seconds of the forward alone."""
    started = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return time.perf_counter() - started


def extracted(model: torch.nn.Module, batches: Batches, folder: Path) -> float:
    """Seconds of extraction into a run on disk, from the first block to the end."""
    begun: list[float] = []

    def drive(extraction: Extraction) -> None:
        begun.append(time.perf_counter())
        extraction.finish()

    started = time.perf_counter()
    size = len(next(iter(batches[0].values())))
    extract(model, batches, out=folder / "run.zarr", spec=SPEC, batch_size=size, drive=drive)
    ONCE.append(begun[-1] - started)
    return time.perf_counter() - begun[-1]


def output_attentions(model: torch.nn.Module, batches: Batches, folder: Path) -> float:
    """Seconds of eager forwards that return every attention, saved with torch.save."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    started = time.perf_counter()
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                torch.save(model(**batch, output_attentions=True).attentions, folder / f"{number}.pt")
        return time.perf_counter() - started
    finally:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]


def nnsight_trace(model: torch.nn.Module, batches: Batches, folder: Path) -> float:
    """Seconds of nnsight tracing eager BERT and saving the attention of each layer."""
    import nnsight

    model.set_attn_implementation("eager")  # type: ignore[operator]
    traced = nnsight.NNsight(model)
    started = time.perf_counter()
    try:
        for number, batch in enumerate(batches):
            found = []
            with torch.no_grad(), traced.trace(**batch):
                for layer in traced.encoder.layer:
                    found.append(layer.attention.self.output[1].save())
            torch.save([f.detach() for f in found], folder / f"{number}.pt")
        return time.perf_counter() - started
    finally:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]


def transformer_lens_cache(model: torch.nn.Module, batches: Batches, folder: Path) -> float:
    """Seconds of TransformerLens (before 4.0) running a BERT of the same size with a cache of its patterns."""
    import transformer_lens

    config = transformer_lens.HookedTransformerConfig(
        n_layers=12, d_model=768, n_ctx=512, d_head=64, n_heads=12, d_mlp=3072, d_vocab=1000, act_fn="gelu",
        attention_dir="bidirectional",
    )  # fmt: skip
    hooked = transformer_lens.HookedTransformer(config)
    started = time.perf_counter()
    with torch.no_grad():
        for number, batch in enumerate(batches):
            _, cache = hooked.run_with_cache(batch["input_ids"], names_filter=lambda n: n.endswith("hook_pattern"))
            torch.save([v.clone() for v in cache.values()], folder / f"{number}.pt")
    return time.perf_counter() - started


CONTENDERS = {
    "bare sdpa forward": bare,
    "attnscope extract": extracted,
    "output_attentions + torch.save": output_attentions,
}
PEERS = {"nnsight": nnsight_trace, "transformer_lens": transformer_lens_cache}


def timed(case: str, contenders: dict[str, Callable[..., float]], rounds: int) -> None:
    """Print medians of the contenders, interleaved, and their ratios to the first."""
    model, batches = CASES[case]()
    ONCE.clear()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            folder = Path(tempfile.mkdtemp(prefix="attnscope-benchmark-"))
            try:
                took = run(model, batches, folder)
            finally:
                shutil.rmtree(folder)
            if number:  # the first round warms up
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    print(f"\n{case}: {len(batches)} batches, {rounds} rounds")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"  {name:32} {median:8.2f} s  ({spread})  {median / first:5.2f} x bare")
    print(f"  before its first block, extract takes {statistics.median(ONCE):.2f} s once")


def peak_memory(case: str) -> None:
    """Print what each contender adds to the peak memory of the bare forward, each in a process of its own."""
    peaks = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--peak", name, "--case", case]
        peaks[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    base = peaks["bare sdpa forward"]
    eager = peaks["output_attentions + torch.save"] - base
    print(f"\n{case}: peak memory above the bare forward's {base} MiB")
    for name, peak in list(peaks.items())[1:]:
        print(f"  {name:32} {peak - base:6d} MiB  {100 * (peak - base) / max(eager, 1):5.0f} % of output_attentions")


def _peak_of(case: str, name: str) -> None:
    model, batches = CASES[case]()
    bare(model, batches[:1], Path())
    with tempfile.TemporaryDirectory() as folder:
        CONTENDERS[name](model, batches, Path(folder))
    # Not `ru_maxrss`, which a process inherits from the one that starts it.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024)  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="leave peak memory out")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.peak:
        _peak_of(arguments.case, arguments.peak)
        return
    for case in [arguments.case] if arguments.case else CASES:
        peers = {n: f for n, f in PEERS.items() if "BERT" in case and importlib.util.find_spec(n)}
        timed(case, CONTENDERS | peers, arguments.rounds)
        if not arguments.quick:
            peak_memory(case)


if __name__ == "__main__":
    main()
