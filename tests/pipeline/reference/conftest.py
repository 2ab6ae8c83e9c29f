"""A small folder of real files, as a user of training has it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 60, 200)}


def write_photographs(folder: Path, count: int = 24) -> Path:
    """Files of one colour each with some noise, in several sizes and formats, and a text that names the colour."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 3]
        pixels = np.clip(np.array(colour) + rng.integers(-20, 20, (20 + number, 30, 3)), 0, 255)
        file = f"p{number}.{'jpg' if number % 4 == 1 else 'png'}"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / file)
        lines.append(json.dumps({"file_name": file, "text": f"A {name} photograph, number {number}."}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """24 photographs."""
    return write_photographs(tmp_path / "photographs")
