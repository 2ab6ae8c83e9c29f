"""What orchestration costs: the extraction flow beside the plain library, and two local workers beside one.

    python benchmarks/flows.py [--samples 1200] [--rounds 2] [--workers]

The same extraction, turn by turn: a ViT of 12 layers of 192 channels over images of 96 x 96 pixels (37 tokens), with
its attention and gradients for `relevance`. The flow runs in this process against a server that is started before, in
tasks of half a minute as it does anywhere. Seconds are of the wall, and of the processor for this process (the flow's
server has its own). `--workers` measures one and two workers of a local Dask cluster in place of that, each started
anew, from the first block that is done to the last.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from attnscope.extraction import Progress
from attnscope.study import AnalyserChoice, ClusterChoice, ExtractOptions, extract_run

CHOICES = [AnalyserChoice(name="relevance", options={"target": 1})]
OPTIONS = ExtractOptions(batch_size=16)


def make_model(folder: Path) -> Path:
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=96, num_labels=3
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder


def make_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        noise = generator.integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:06}.png", compress_level=0)
    return folder


def timed(call: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def compare_flow(folder: Path, model: Path, images: Path, rounds: int) -> None:
    from attnscope_flows import embedded

    found: dict[str, list[tuple[float, float]]] = {"library": [], "flow": []}
    with embedded():
        from attnscope_flows.extract import extract_flow

        ask = (str(model), str(images))
        extract_flow(*ask, str(folder / "first.zarr"), CHOICES, OPTIONS.model_copy(update={"limit": 16}))
        for number in range(rounds):
            calls = {
                "library": partial(extract_run, *ask, str(folder / f"{number}-library.zarr"), CHOICES, OPTIONS),
                "flow": partial(extract_flow, *ask, str(folder / f"{number}-flow.zarr"), CHOICES, OPTIONS),
            }
            for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
                found[name].append(timed(calls[name]))
                print(name, *(f"{seconds:.1f} s" for seconds in found[name][-1]), flush=True)
    for column, kind in enumerate(("wall", "processor")):
        library, flow = (statistics.median(t[column] for t in found[name]) for name in found)
        print(f"{kind}: library {library:.1f} s, flow {flow:.1f} s, {100 * (flow / library - 1):+.1f} %")


def compare_workers(folder: Path, model: Path, images: Path, rounds: int) -> None:
    found: dict[str, list[float]] = {"1": [], "2": []}
    for number in range(rounds):
        for count, seconds in found.items():
            done: list[Progress] = []
            out = str(folder / f"{number}-{count}.zarr")
            extract_run(str(model), str(images), out, CHOICES, OPTIONS, ClusterChoice(at=count), listener=done.append)
            first, *_, last = (p for p in done if p.stage == "extract")
            seconds.append((last.seconds - first.seconds) / (last.done - first.done) * 1000)
            print(f"{count} workers: {seconds[-1]:.2f} s for 1,000 samples", flush=True)
    one, two = (statistics.median(seconds) for seconds in found.values())
    print(f"two workers are {one / two:.2f} times as fast as one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", action="store_true")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, images = make_model(folder / "model"), make_images(folder / "images", chosen.samples)
        (compare_workers if chosen.workers else compare_flow)(folder, model, images, chosen.rounds)


if __name__ == "__main__":
    main()
