"""One Prefect server for all tests of flows, started as users start it, and models that take no time."""

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Served:
    """A running `attnscope serve`: the address of its server, and the process."""

    url: str
    process: "subprocess.Popen[str]"
    environment: dict[str, str]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds attnscope as its wheel installs it, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder / "wheel")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(folder / "packages"), str(wheel)], check=True, capture_output=True)
    return folder / "packages"


@pytest.fixture(scope="session")
def served(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`attnscope serve` from the wheel, with a server and a database of its own, and one worker."""
    folder = tmp_path_factory.mktemp("served")
    url = f"http://127.0.0.1:{free_port()}/api"
    environment = {**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(folder), "PYTHONPATH": str(installed)}
    for name in ("PREFECT_LOGGING_TO_API_ENABLED", "PREFECT_LOGGING_LEVEL"):
        environment.pop(name, None)
    log = (folder / "serve.log").open("w")
    # As a shell runs what stands before an '&'.
    command = [
        "sh",
        "-c",
        'trap "" INT; exec "$@"',
        "sh",
        sys.executable,
        "-m",
        "attnscope.cli",
        "serve",
        "--limit",
        "2",
    ]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)
    try:
        until = time.monotonic() + 240
        while "serving the work pool" not in (folder / "serve.log").read_text():
            assert process.poll() is None, (folder / "serve.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.5)
        yield Served(url, process, environment)
    finally:
        process.send_signal(signal.SIGTERM)
        # Sooner than it would kill what doesn't end by itself.
        process.wait(timeout=30)
        log.close()


@pytest.fixture(scope="session")
def prefect(served: Served) -> Iterator[None]:
    """Flows of this process run against the served server, without waiting for heartbeats."""
    with warnings.catch_warnings():
        # Prefect's own imports warn; what our code does under it is still held to account.
        warnings.simplefilter("ignore")
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        with temporary_settings({PREFECT_API_URL: served.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with random weights: 2 layers, 2 heads, 4 x 4 patches, 3 classes."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def make_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Images of noise."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{seed}-{number:04}.png"
        )
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of noise."""
    return make_images(tmp_path_factory.mktemp("images"), 5)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
