"""What stored attention costs in bytes and in seconds, beside `torch.save` of what `output_attentions` gives.

    python benchmarks/store.py [--rounds 5] [--samples 16] [--warm] [--only bytes|queries|summaries]

Bytes are of models with random weights, wide enough that attention isn't uniform, of 12 heads of 64 channels; two
layers are run, and the bytes scaled to twelve. Trained weights stand beside them: DINOv2-small (6 heads) over a
photograph of 14 x 14 patches, and all-MiniLM-L6-v2 over English sentences.

Queries are asked of a run that holds sharp synthetic attention of ViT-B's size (12 layers, 12 heads, 197 tokens: CLS,
149 patches, 47 words), and of one file a sample that torch saved of the same weights, float32 as a model gives them.
Every query opens the run anew, and reads its files from the disk (`--warm`: from the page cache). Contenders take
turns, their answers are compared, and medians given.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
import xarray as xr
import zarr
from numpy.testing import assert_array_equal

from attnscope import ExtractSpec, Sample, chunks, extract, open_run
from attnscope.embedded import embedded_photographs, embedded_sentences
from attnscope.loading import load_model
from attnscope.plan import RunPlan, SitePlan
from attnscope.quantities import SUMMARIES
from attnscope.questions import strongest_edges
from attnscope.run import EXTRACTED, Run
from attnscope.summaries import Summaries, TokenKinds
from attnscope.tokens import KIND_CODES, plain_layout

Inputs = dict[str, torch.Tensor]
LAYERS, HEADS, TOKENS, PATCHES = 12, 12, 197, 149
RUN_LAYERS = 2
SITE = "joint.self"
KINDS = np.array([KIND_CODES[k] for k in ["cls"] + ["image"] * PATCHES + ["text"] * (TOKENS - 1 - PATCHES)], np.int8)


def wide(model: torch.nn.Module) -> torch.nn.Module:
    """The model with matrices drawn wide enough that attention isn't uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.05, generator=generator)
    return model.eval()


def vision(pixels: int) -> tuple[torch.nn.Module, Inputs]:
    config = transformers.ViTConfig(num_hidden_layers=RUN_LAYERS, image_size=pixels)
    images = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    return wide(transformers.ViTModel(config, add_pooling_layer=False)), {"pixel_values": images}


def trained_vision() -> tuple[torch.nn.Module, Inputs]:
    """DINOv2-small, whose positions are interpolated to 196 pixels, and one photograph."""
    loaded = load_model("embedded:dinov2-small")
    picture = embedded_photographs()[0].load_image()
    size = {"height": 196, "width": 196}
    inputs = loaded.image_processor(picture, size=size, do_center_crop=False, return_tensors="pt")
    return loaded.model, dict(inputs)


def decoder(tokens: int) -> tuple[torch.nn.Module, Inputs]:
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=RUN_LAYERS, num_attention_heads=HEADS,
        vocab_size=1000, max_position_embeddings=4096,
    )  # fmt: skip
    ids = torch.randint(5, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    return wide(transformers.LlamaModel(config)), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encoder(tokens: int) -> tuple[torch.nn.Module, Inputs]:
    config = transformers.BertConfig(num_hidden_layers=RUN_LAYERS, vocab_size=1000, max_position_embeddings=tokens)
    ids = torch.randint(5, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))
    model = wide(transformers.BertModel(config, add_pooling_layer=False))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, Inputs]]] = {
    "ViT-B/16, 197 tokens": lambda: vision(224),
    "DINOv2-small, trained, 197 tokens": trained_vision,
    "ViT-B/16, 577 tokens": lambda: vision(384),
    "BERT-base, 1024 tokens": lambda: encoder(1024),
    "BERT-base, 2048 tokens": lambda: encoder(2048),
    "causal decoder, 2048 tokens": lambda: decoder(2048),
}
STORED = {
    "float16": ExtractSpec(form="dense", summaries=True),
    "exact": ExtractSpec(form="dense", encoding="exact", summaries=False),
    "compact": ExtractSpec(form="dense", encoding="compact", summaries=False),
    "factored": ExtractSpec(form="factored", summaries=False),
}


# -- bytes -----------------------------------------------------------------------------------------------------------


def measure_bytes() -> None:
    """Bytes a sample of every form and encoding, and how many times smaller than torch.save in float32."""
    rows = []
    for name, make in MODELS.items():
        model, inputs = make()
        scale = LAYERS / model.config.num_hidden_layers
        rows.append(_row(name, _saved(model, inputs) * scale, _runs(model, [inputs]), 1 / scale))
    model, texts = "embedded:minilm", _paragraphs()
    longest = max(len(t.split()) for t in texts)
    attention = extract(model, [Sample(str(i), text=t) for i, t in enumerate(texts)], spec=STORED["exact"])
    tokens = attention.plan.streams["text"]
    dense = 4 * 6 * 12 * tokens**2
    samples = [Sample(str(i), text=t) for i, t in enumerate(texts)]
    rows.append(
        _row(f"MiniLM on English, {tokens} tokens ({longest} words)", dense, _runs(model, samples), len(samples))
    )
    print("\nBytes a sample, and how many times smaller than torch.save of the float32 tuple\n")
    _print(["", "float32 .pt", "float16 .pt", *STORED, "factored, bfloat16 model", "summaries (float16)"], rows)


def _row(name: str, saved: float, runs: dict[str, tuple[int, int]], samples: float) -> list[str]:
    found = [name, _megabytes(saved), f"{_megabytes(saved / 2)} (2.0x)"]
    for label in (*STORED, "bfloat16"):
        found.append(
            f"{_megabytes(runs[label][0] / samples)} ({saved / (runs[label][0] / samples):.1f}x)"
            if label in runs
            else "-"
        )
    return [*found, _megabytes(runs["float16"][1] / samples)]


def _saved(model: torch.nn.Module, inputs: Inputs) -> float:
    """Bytes of what torch saves of one sample's `output_attentions`, float32."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        one = {k: v[:1] for k, v in inputs.items()}
        torch.save(model(**one, output_attentions=True).attentions, Path(folder) / "a.pt")
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
        return (Path(folder) / "a.pt").stat().st_size


def _runs(model: torch.nn.Module | str, samples: Sequence[Inputs] | Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """Bytes of attention and of its summaries in a run of each kind."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, spec in STORED.items():
            found[label] = _sizes(extract(model, samples, spec=spec, out=Path(folder) / label))  # type: ignore[arg-type]
        if isinstance(model, torch.nn.Module):
            model = model.to(torch.bfloat16)
            found["bfloat16"] = _sizes(extract(model, samples, spec=STORED["factored"], out=Path(folder) / "half"))  # type: ignore[arg-type]
    return found


def _sizes(run: Run) -> tuple[int, int]:
    sizes = [0, 0]
    for array in Path(run.location).glob("*.*/*"):
        if array.is_dir():
            sizes[array.name in SUMMARIES] += sum(f.stat().st_size for f in array.rglob("*") if f.is_file())
    return sizes[0], sizes[1]


def _paragraphs() -> list[str]:
    """English of up to 200 words: sentences in several orders."""
    sentences = [str(s.text) for s in embedded_sentences()]
    orders = [np.random.default_rng(i).permutation(len(sentences)) for i in range(8)]
    return [" ".join(" ".join(sentences[k] for k in order).split()[:120]) for order in orders]


# -- queries ---------------------------------------------------------------------------------------------------------


def measure_queries(samples: int, rounds: int, warm: bool) -> None:
    """Seconds and bytes of each query: from the run, from saved files, and from the arrays without summaries."""
    with tempfile.TemporaryDirectory() as folder:
        location, saved = Path(folder) / "run.zarr", [Path(folder) / f"{i}.pt" for i in range(samples)]
        _make(location, saved)
        os.sync()
        before = None if warm else partial(_forget, Path(folder))
        rows = [_asked(name, location, saved, rounds, before) for name in QUERIES]
    print(
        f"\nQueries over {samples} samples, {LAYERS} layers, {HEADS} heads, {TOKENS} tokens: milliseconds (megabytes)\n"
    )
    _print(["", "run", "of these, chunks", "saved files", "times faster", "scan of the run", "times faster"], rows)


def _make(location: Path, saved: Sequence[Path]) -> None:
    """The run and the saved files, of the same softmaxes of normal scores."""
    generator = torch.Generator().manual_seed(0)
    site = SitePlan("joint", "joint", tuple(range(LAYERS)), ("",) * LAYERS, HEADS, HEADS, TOKENS, TOKENS)
    plan = RunPlan({"joint": TOKENS}, {SITE: site}, unit=4)
    samples = [Sample(str(i)) for i in range(len(saved))]
    run = Run.create(location, plan, ExtractSpec(summaries=True), samples, {"model": "made"})
    for block in run.blocks():
        kind = np.broadcast_to(KINDS, (len(block), TOKENS))
        kinds = TokenKinds(torch.tensor(kind), torch.tensor(kind))
        valid = torch.ones(len(block), TOKENS, dtype=torch.bool)
        whole, beside = [], []
        for layer in range(LAYERS):
            scores = torch.randn(len(block), HEADS, TOKENS, TOKENS, generator=generator) * 2.5
            attention = torch.softmax(scores, dim=-1)
            summaries = Summaries(kinds, valid, SUMMARIES, "float16")
            summaries.add(attention)
            beside.append(summaries.arrays())
            whole.append(attention.half().float())
            run.write_layer(SITE, "attention", block, layer, whole[-1].half().numpy())
            run.write_layer(SITE, "query_valid", block, layer, valid.numpy())
        for name in SUMMARIES:
            run.write_layers(SITE, name, block, np.stack([found[name] for found in beside], axis=1))
        run.write_tokens("joint", block, plain_layout(kind))
        run.commit(block, np.full(len(block), EXTRACTED))
        for row, sample in enumerate(block):
            torch.save(tuple(layer[row : row + 1].clone() for layer in whole), saved[sample])


def _load(path: Path) -> np.ndarray:
    """One saved sample, (layer, head, query, key)."""
    return torch.cat(torch.load(path, weights_only=True)).numpy()


def _all(saved: Sequence[Path], part: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([part(_load(path)) for path in saved])


TEXT, IMAGE = (np.equal(KINDS, KIND_CODES[kind]) for kind in ("text", "image"))


def _block(whole: np.ndarray) -> np.ndarray:
    return whole[5][:, TEXT][:, :, IMAGE]


def _scan(run: Run) -> Callable[[Callable[[np.ndarray], np.ndarray]], list[np.ndarray]]:
    attention = run.attention(SITE)
    return lambda part: [part(attention[i].values) for i in range(attention.shape[0])]


def _largest(parts: list[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate(parts))[::-1][:20]


def _top(whole: np.ndarray) -> np.ndarray:
    return np.partition(whole.ravel(), -20)[-20:]


def _above(whole: np.ndarray) -> np.ndarray:
    """What is above 0.3: (edge, 5), layer, head, query, key and weight."""
    at = np.nonzero(whole > 0.3)
    return np.stack([*at, whole[at]], axis=1)


def _above_on_image(whole: np.ndarray) -> np.ndarray:
    edges = _above(whole)
    query, key = edges[:, 2].astype(int), edges[:, 3].astype(int)
    return edges[TEXT[query] & IMAGE[key]]


def _as_rows(edges: xr.DataArray) -> np.ndarray:
    names = ("layer", "head", "query_token", "key_token")
    return np.stack([*(edges[name].values for name in names), edges.values], axis=1)


def _heads(whole: np.ndarray) -> np.ndarray:
    return whole[:, :, TEXT][..., IMAGE].sum(-1).max(-1).ravel() > 0.9


Query = Callable[[Run], np.ndarray]
QUERIES: dict[str, tuple[Query, Callable[[Sequence[Path]], np.ndarray], Query | None]] = {
    "one layer and head, all samples": (
        lambda r: r.attention(SITE).sel(layer=5, head=3).values, lambda s: _all(s, lambda w: w[5, 3]), None,
    ),
    "one sample, all layers": (lambda r: r.attention(SITE)[7].values, lambda s: _load(s[7]), None),
    "CLS rows of everything": (
        lambda r: r.attention(SITE)[:, :, :, 0].values, lambda s: _all(s, lambda w: w[:, :, 0]), None,
    ),
    "text-to-image block of a layer": (
        lambda r: r.select(SITE, layer=5, query="text", key="image").values, lambda s: _all(s, _block), None,
    ),
    "one row": (lambda r: r.attention(SITE)[7, 5, 3, 60].values, lambda s: _load(s[7])[5, 3, 60], None),
    "the 20 strongest": (
        lambda r: strongest_edges(r, SITE, 20, {}).values,
        lambda s: _largest([_top(_load(path)) for path in s]),
        lambda r: _largest(_scan(r)(_top)),
    ),
    "weights above 0.3, text on image": (
        lambda r: _as_rows(r.strong_edges(SITE, above=0.3, query="text", key="image")),
        lambda s: np.concatenate([_above_on_image(_load(path)) for path in s]),
        lambda r: np.concatenate(_scan(r)(_above_on_image)),
    ),
    "weights above 0.3": (
        lambda r: _as_rows(r.strong_edges(SITE, above=0.3)),
        lambda s: np.concatenate([_above(_load(path)) for path in s]),
        lambda r: np.concatenate(_scan(r)(_above)),
    ),
    "heads, above 0.9 from text on image": (
        lambda r: np.array(len(r.strong_heads(SITE, above=0.9, query="text", key="image"))),
        lambda s: np.array(sum(int(_heads(_load(path)).sum()) for path in s)),
        lambda r: np.array(sum(int(found.sum()) for found in _scan(r)(_heads))),
    ),
}  # fmt: skip


def _forget(folder: Path) -> None:
    """Have the system drop the files of a folder from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _asked(
    name: str, location: Path, saved: Sequence[Path], rounds: int, before: Callable[[], None] | None
) -> list[str]:
    ask, load, scan = QUERIES[name]
    contenders: list[Callable[[], np.ndarray]] = [lambda: ask(open_run(location)), lambda: load(saved)]
    if scan is not None:
        contenders.append(lambda: scan(open_run(location)))
    answers = [contender() for contender in contenders]
    for answer in answers[1:]:
        assert_array_equal(answers[0], answer)
    total, chunks = _bytes_read(contenders[0])
    times: list[list[float]] = [[] for _ in contenders]
    for _, (place, contender) in itertools.product(range(rounds), enumerate(contenders)):
        if before is not None:
            before()
        started = time.perf_counter()
        contender()
        times[place].append(1000 * (time.perf_counter() - started))
    medians = [statistics.median(t) for t in times]
    files = [saved[7]] if name in ("one sample, all layers", "one row") else saved
    loaded = sum(path.stat().st_size for path in files) / 1e6
    row = [name, f"{medians[0]:,.1f} ({total / 1e6:.2f})", f"{100 * chunks / total:.0f} %"]
    row += [f"{medians[1]:,.0f} ({loaded:.0f})", f"{medians[1] / medians[0]:.1f}"]
    return row + ([f"{medians[2]:,.0f}", f"{medians[2] / medians[0]:.1f}"] if scan is not None else ["-", "-"])


def _bytes_read(contender: Callable[[], object]) -> tuple[int, int]:
    """Bytes that were read of the run, and those of them that are of chunks."""
    read = [0, 0]
    of_store, of_file = zarr.storage.LocalStore.get, chunks._of_file

    def count(key: str, size: int) -> None:
        read[0] += size
        read[1] += size if "/c/" in key else 0

    async def counted(store: zarr.storage.LocalStore, key: str, *args: object, **options: object) -> object:
        found = await of_store(store, key, *args, **options)  # type: ignore[arg-type]
        count(key, len(found) if found is not None else 0)
        return found

    def counted_file(path: Path, part: object) -> object:
        found = of_file(path, part)  # type: ignore[arg-type]
        count(str(path), len(found) if found is not None else 0)
        return found

    zarr.storage.LocalStore.get, chunks._of_file = counted, counted_file  # type: ignore[assignment, method-assign]
    try:
        contender()
    finally:
        zarr.storage.LocalStore.get, chunks._of_file = of_store, of_file  # type: ignore[method-assign]
    return read[0], read[1]


# -- what summaries cost while extracting ------------------------------------------------------------------------------


def measure_summaries(rounds: int) -> None:
    """Seconds a sample of extraction with and without summaries."""
    rows = []
    for name, make, form in (
        ("ViT-B/16, 197 tokens, dense", lambda: vision(224), "dense"),
        ("BERT-base, 1024 tokens, factored", lambda: encoder(1024), "factored"),
    ):
        model, inputs = make()
        times: dict[bool, list[float]] = {True: [], False: []}
        for _, summaries in itertools.product(range(rounds + 1), times):
            with tempfile.TemporaryDirectory() as folder:
                times[summaries].append(_blocks_seconds(model, inputs, form, summaries, Path(folder) / "run.zarr"))
        without, beside = (statistics.median(times[s][1:]) / len(next(iter(inputs.values()))) for s in (False, True))
        rows.append([name, f"{1000 * without:.0f}", f"{1000 * beside:.0f}", f"{beside / without:.2f}"])
    print(f"\nMilliseconds a sample to extract {RUN_LAYERS} layers, forward and writing included\n")
    _print(["", "without summaries", "with summaries", "ratio"], rows)


def _blocks_seconds(model: torch.nn.Module, inputs: Inputs, form: str, summaries: bool, out: Path) -> float:
    """Seconds from the plan to the last block."""
    seen: list[float] = []
    extract(model, [inputs], form=form, summaries=summaries, out=out, progress=lambda p: seen.append(p.seconds))
    planned, *_, done = seen[-3:]
    return done - planned


def _print(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--warm", action="store_true", help="leave files in the page cache")
    parser.add_argument("--only", choices=["bytes", "queries", "summaries"])
    chosen = parser.parse_args()
    parts = {
        "bytes": measure_bytes,
        "queries": lambda: measure_queries(chosen.samples, chosen.rounds, chosen.warm),
        "summaries": lambda: measure_summaries(chosen.rounds),
    }
    for name, measure in parts.items():
        if chosen.only in (None, name):
            measure()


if __name__ == "__main__":
    main()
