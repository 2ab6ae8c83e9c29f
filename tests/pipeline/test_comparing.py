"""A comparison: means, paired differences and curves are what the runs' own results say."""

import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

from attnscope.analysis import AnalyserError
from attnscope.cli import main
from attnscope.comparing import _differences, _means, render_comparison
from attnscope.run import Run
from attnscope.study import _labels, compare
from attnscope.testing import make_run


def result(values: np.ndarray, ids: list[str]) -> xr.Dataset:
    variable = xr.DataArray(
        values, dims=("sample", "layer"), coords={"sample": ids}, attrs={"long_name": "entropy", "units": "nats"}
    )
    return xr.Dataset({"entropy": variable, "name": ("sample", np.array(ids, object), {})})


def saved(values: np.ndarray, ids: list[str]) -> Run:
    run = make_run()
    run.save_analysis("trial", result(values, ids))
    return run


def test_differences_are_paired_by_sample_whatever_their_order() -> None:
    first = result(np.array([[1.0, 3.0], [5.0, np.nan], [0.0, 2.0]]), ["a", "b", "c"])
    other = result(np.array([[4.0, 4.0], [7.0, 9.0], [100.0, 100.0]]), ["b", "a", "z"])
    results = {"first": first, "other": other}
    assert list(_means(results)) == [("entropy", "nats", 11 / 5, 224 / 6)]
    ((name, label, used, difference, low, high),) = _differences(results)
    # Means over layers: a 2 and 8, b 5 and 4; c and z are in one run alone.
    assert (name, label, used, difference) == ("entropy", "other", 2, (6 - 1) / 2)
    assert low <= difference <= high


def test_the_page_shows_each_run_and_curve() -> None:
    runs = {
        "small": saved(np.array([[1.0, 2.0]]), ["a"]),
        "deep <b>": saved(np.array([[1.0, 2.0, 3.0]]), ["a"]),
    }
    page = render_comparison(runs)
    assert "deep &lt;b&gt;" in page and "deep <b>" not in page
    assert "relative depth" in page
    assert len(re.findall(r"<svg", page)) == 1


def test_labels_are_names_of_folders_and_distinct() -> None:
    assert list(_labels(["/ckpt/step-100", "/ckpt/step-200"])) == ["step-100", "step-200"]
    labels = _labels(["/a/model", "/b/model", "embedded:minilm", "../.."])
    assert len(labels) == 4
    assert all(re.fullmatch(r"[\w-][\w.-]*", label) for label in labels)


def test_one_model_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(AnalyserError, match="needs two different models or more, not x"):
        compare(["x"], "samples", str(tmp_path))


def test_the_command_compares_two_models(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    import torch
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    model = ViTForImageClassification.from_pretrained(tiny_vit)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "later")
    ViTImageProcessorPil.from_pretrained(tiny_vit).save_pretrained(tmp_path / "later")
    command = ["compare", str(tiny_vit), str(tmp_path / "later"), "--samples", str(captioned_images), "--limit", "3"]
    chosen = ["--analyser", "qk_svd", "--option", "null_draws=3", "--engine", "inline", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*command, *chosen])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out/comparison.html").read_text()
    assert tiny_vit.name in page and "later" in page and "qk_svd" in page
    assert (tmp_path / "out/later/run.zarr").is_dir()
