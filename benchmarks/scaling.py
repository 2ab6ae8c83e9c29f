"""What a run costs beside the model, as the number of its samples grows: does anything grow faster than they do?

    python benchmarks/scaling.py [--samples 1000 10000] [--unit 8]

The model is a BERT of 12 layers that is as small as can be, over texts of four words, and blocks hold 8 samples, as
those of a ViT-B/16 do: so there are as many blocks, files, marks and claims as for that model, and next to no bytes.
Most runs of smaller outputs have blocks of 64 (`--unit 64`).
Everything runs in one process but `units`: calls that do nothing, with the samples of a block, on a Dask cluster of two
processes. `first tenth` and `last tenth` are of the blocks in the order of their extraction.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import transformers

import attnscope.plan
from attnscope.clusters import cluster_client, on_cluster
from attnscope.extraction import Extraction, extract
from attnscope.loading import load_model
from attnscope.run import open_run
from attnscope.samples import read_samples

WORDS = ("the", "dog", "sees", "a", "cat")
Result = TypeVar("Result")


def fake_model(folder: Path) -> Path:
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=4, num_hidden_layers=12, num_attention_heads=2, intermediate_size=4,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    return folder


def write_texts(path: Path, count: int) -> Path:
    with path.open("w") as lines:
        for i in range(count):
            lines.write(json.dumps({"id": f"t{i}", "text": " ".join(WORDS[(i + j) % 5] for j in range(4))}) + "\n")
    return path


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    found = call()
    return found, time.perf_counter() - started


def nothing(block: range, samples: Sequence[object]) -> tuple[int, int]:
    """What a unit of no work gives."""
    return 0, len(samples)


def begun_at(out: Path, model: Path, texts: Path, grow: bool = False) -> Extraction:
    """An extraction before its first block."""
    begun: list[Extraction] = []
    extract(str(model), str(texts), out=out, batch_size=8, grow=grow, drive=begun.append)
    return begun[0]


def measure(folder: Path, model: Path, count: int, unit: int) -> dict[str, float]:
    """Seconds of each part."""
    texts, out = write_texts(folder / "texts.jsonl", count), folder / "run.zarr"
    process = psutil.Process()
    before = process.memory_info().rss
    samples, reading = timed(lambda: read_samples(texts))
    listed = process.memory_info().rss - before
    begun, beginning = timed(lambda: begun_at(out, model, texts))
    times = [time.perf_counter()]
    for _ in begun.blocks():
        times.append(time.perf_counter())
    tenth = max(1, (len(times) - 1) // 10)
    run, opening = timed(lambda: open_run(out, read_only=False))
    _, marks = timed(run.missing)
    _, names = timed(lambda: run.sample_ids)
    again, resuming = timed(lambda: begun_at(out, model, texts))
    _, nothing_left = timed(lambda: list(again.blocks()))
    write_texts(texts, count + unit)
    grown, growing = timed(lambda: begun_at(out, model, texts, grow=True))
    assert sum(map(len, grown.blocks())) == unit
    loaded = load_model(model)
    inputs = loaded.family.encode(samples[:8], loaded)
    with torch.no_grad():
        _, forward = timed(lambda: [loaded.model(**inputs) for _ in range(50)])
    blocks = run.blocks()
    with cluster_client("2", {}) as client:
        list(on_cluster(client, nothing, ((b, samples[b.start : b.stop]) for b in blocks[:100])))
        memory, processor = process.memory_info().rss, time.process_time()
        parts = ((block, samples[block.start : block.stop]) for block in blocks)
        done, units = timed(lambda: sum(1 for _ in on_cluster(client, nothing, parts)))
        memory, processor = process.memory_info().rss - memory, time.process_time() - processor
    assert done == len(blocks)
    files = [path for path in out.rglob("*") if path.is_file()]
    return {
        "read the samples": reading,
        "measure them, make the run": beginning,
        "extract": times[-1] - times[0],
        "  first tenth": 10 * (times[tenth] - times[0]),
        "  last tenth": 10 * (times[-1] - times[-1 - tenth]),
        "  of it the bare forward": forward / 50 / 8 * count,
        "open": opening,
        "read all marks": marks,
        "read all names": names,
        "begin again, nothing new": resuming,
        "  look for missing blocks": nothing_left,
        "grow by a block": growing,
        "units on a cluster": units,
        "  processor of who drives it": processor,
        "files": len(files) / 1e6,
        "bytes of metadata": sum(p.stat().st_size for p in files if p.name == "zarr.json") / 1e6,
        "memory that units leave behind": memory / 1e6,
        "memory of the listed samples": listed / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--unit", type=int, default=8, help="samples in a block")
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()), help="where the runs go, and are deleted"
    )
    chosen = parser.parse_args()
    attnscope.plan._UNIT_LIMIT = chosen.unit
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    for count in chosen.samples:
        with tempfile.TemporaryDirectory(dir=chosen.out) as folder:
            model = fake_model(Path(folder) / "model")
            found[count] = measure(Path(folder), model, count, chosen.unit)
            shutil.rmtree(Path(folder) / "run.zarr")
    print(f"{'microseconds (files, bytes) a sample':38}" + "".join(f"{count:>12,}" for count in found))
    for name in next(iter(found.values())):
        print(f"{name:38}" + "".join(f"{1e6 * found[count][name] / count:12,.2f}" for count in found))


if __name__ == "__main__":
    main()
