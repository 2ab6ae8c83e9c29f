"""Singular modes of all heads of a ViT: the thin form against torch.linalg.svd of the full matrix per head.

Both run in this process, interleaved, on the same random weights. The full matrix is decomposed for a sample of the
heads, and the time extrapolated to all of them, since all of ViT-L would take minutes per round.

    python benchmarks/qk_svd.py [--rounds 5] [--heads 4]
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch

from attnscope_qk_svd.modes import singular_modes, singular_values

MODELS = {"ViT-B/16": (12, 12, 64, 768), "ViT-L/16": (24, 16, 64, 1024)}


def weights(layers: int, heads: int, channels: int, features: int) -> np.ndarray:
    """Query and key projections, (2, layer, head, channel, feature) float32."""
    generator = np.random.default_rng(0)
    return generator.normal(0, 0.02, (2, layers, heads, channels, features)).astype(np.float32)


def thin(query: np.ndarray, key: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Singular values and cosines of every head, layer by layer, as the analyser does it."""
    return np.stack([singular_values(q.astype(dtype), k.astype(dtype))[0] for q, k in zip(query, key, strict=True)])


def thin_with_vectors(query: np.ndarray, key: np.ndarray) -> None:
    for q, k in zip(query, key, strict=True):
        singular_modes(q.astype(np.float64), k.astype(np.float64))


def full(query: np.ndarray, key: np.ndarray, heads: list[tuple[int, int]]) -> np.ndarray:
    """Singular values of W_q^T W_k of the chosen (layer, head), as the paper's code has them: from the whole matrix."""
    found = []
    for layer, head in heads:
        matrix = torch.from_numpy(query[layer, head]).T @ torch.from_numpy(key[layer, head])
        found.append(torch.linalg.svd(matrix)[1][: query.shape[2]].numpy())
    return np.stack(found)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], object]) -> int:
    """What numpy allocated at most while working, beside the weights."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(name: str, sizes: tuple[int, int, int, int], rounds: int, sampled: int) -> None:
    layers, heads, _, _ = sizes
    query, key = weights(*sizes)
    generator = np.random.default_rng(1)
    chosen = [(int(i) // heads, int(i) % heads) for i in generator.choice(layers * heads, sampled, replace=False)]
    works: dict[str, Callable[[], object]] = {
        "thin float64": lambda: thin(query, key),
        "thin float32": lambda: thin(query, key, np.float32),
        "thin float64 with vectors": lambda: thin_with_vectors(query, key),
        "full": lambda: full(query, key, chosen),
    }
    times: dict[str, list[float]] = {label: [] for label in works}
    for _ in range(rounds):
        for label, work in works.items():
            times[label].append(seconds(work))
    medians = {label: statistics.median(t) for label, t in times.items()}
    medians["full"] *= layers * heads / sampled
    at = tuple(np.array(chosen).T)
    # The reference of the error is the full matrix in double precision.
    exact = full(query.astype(np.float64), key.astype(np.float64), chosen)
    print(
        f"\n{name}: {layers} layers, {heads} heads; full matrices of {sampled} heads, extrapolated to {layers * heads}"
    )
    for label, median in medians.items():
        print(f"  {label:26} {median:8.3f} s   {medians['full'] / median:6.1f} x faster than full")
    for label, values in (
        ("thin float64", thin(query, key)[at]),
        ("thin float32", thin(query, key, np.float32)[at]),
        ("full float32", full(query, key, chosen)),
    ):
        print(f"  {label:26} largest relative error of a singular value {np.abs(values / exact - 1).max():.1e}")
    stored = query.nbytes + key.nbytes
    for label in ("thin float64", "thin float64 with vectors"):
        print(f"  {label:26} peak memory {peak_bytes(works[label]) / stored:.2f} x the weights ({stored / 1e6:.0f} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4, help="heads whose full matrix is decomposed in each round")
    arguments = parser.parse_args()
    print(f"numpy {np.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads of torch")
    for name, sizes in MODELS.items():
        measure(name, sizes, arguments.rounds, arguments.heads)


if __name__ == "__main__":
    main()
