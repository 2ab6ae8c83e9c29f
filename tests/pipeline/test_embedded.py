"""The embedded weights are those of the graph that carries them, and load as any other model does."""

import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, BertModel, Dinov2Model

from attnscope import embedded
from attnscope.embedded import EMBEDDED_MODELS, embedded_model, embedded_photographs, embedded_samples
from attnscope.samples import SampleError

LAYERS = 12


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNSCOPE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def dinov2_folder(cache: Path) -> Path:
    return embedded_model("dinov2-small")


@pytest.fixture(scope="module")
def onnx_file() -> Path:
    model = EMBEDDED_MODELS["dinov2-small"]
    return embedded._inside_package(model.package, model.inside, wanted_by="the test")[0]


@pytest.fixture(scope="module")
def pixels(dinov2_folder: Path) -> np.ndarray:
    processor = AutoImageProcessor.from_pretrained(dinov2_folder)
    images = [sample.load_image() for sample in embedded_photographs()[:2]]
    return processor(images, return_tensors="np")["pixel_values"]


def test_dinov2_equals_the_graph_run_by_onnxruntime(dinov2_folder: Path, onnx_file: Path, pixels: np.ndarray) -> None:
    hidden_node = "/backbone/layernorm/Add_1_output_0"
    attention_node = "/backbone/encoder/layer.{}/attention/attention/Softmax_output_0"
    attention_nodes = [attention_node.format(layer) for layer in range(LAYERS)]
    hidden, *attentions = run_graph(onnx_file, [hidden_node, *attention_nodes], pixels)

    model, loading = Dinov2Model.from_pretrained(
        dinov2_folder, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(pixels), output_attentions=True)

    assert not any(loading.values()), loading
    # Rounding: over the ten photographs 3.8e-5 at most, of values with a root mean square of 2.3; a float64 model is as
    # far from the graph.
    np.testing.assert_allclose(outputs.last_hidden_state.numpy(), hidden, atol=1e-4, rtol=0)
    assert len(outputs.attentions) == LAYERS
    for ours, graphs in zip(outputs.attentions, attentions, strict=True):
        np.testing.assert_allclose(ours.numpy(), graphs, atol=1e-4, rtol=0)


def test_dinov2_image_processor_squeezes_the_whole_photograph(dinov2_folder: Path, pixels: np.ndarray) -> None:
    image = embedded_photographs()[0].load_image()
    assert image is not None
    squeezed = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32) / 255
    expected = (squeezed - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels[0], expected.transpose(2, 0, 1), atol=1e-6)


def test_minilm_is_a_bert_that_loads_with_no_missing_key() -> None:
    folder = embedded_model("minilm")
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert isinstance(model, BertModel)
    assert not any(loading.values()), loading

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    sentences = ["a cat sleeps", "a kitten is dozing", "the rocket engine ignites"]
    tokens = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    embedding = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = embedding @ embedding.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2


def test_a_folder_is_written_once(cache: Path, dinov2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_write_dinov2", lambda *_: pytest.fail("written a second time"))
    assert embedded_model("dinov2-small") == dinov2_folder
    assert [path.name for path in cache.iterdir()] == [dinov2_folder.name]


def test_another_version_of_the_package_gets_a_folder_of_its_own(
    tmp_path: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_write_dinov2", lambda folder, _: (folder / "config.json").touch())
    for version in ("0.1.1", "0.1.2"):
        monkeypatch.setattr(embedded, "_inside_package", lambda *_, version=version, **__: (onnx_file, version))
        embedded_model("dinov2-small")
    assert len(list(tmp_path.iterdir())) == 2


def test_two_that_write_at_once_leave_one_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSCOPE_CACHE", str(tmp_path))
    both_write = threading.Barrier(2)

    def write(folder: Path, _: Path) -> None:
        (folder / "config.json").touch()
        both_write.wait(timeout=30)

    monkeypatch.setattr(embedded, "_write_dinov2", write)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded_model("dinov2-small"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert list(tmp_path.iterdir()) == [found[0]] == [found[1]]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSCOPE_CACHE", str(tmp_path))

    def fail(folder: Path, _: Path) -> None:
        (folder / "model.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_write_dinov2", fail)
    with pytest.raises(KeyboardInterrupt):
        embedded_model("dinov2-small")
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set ATTNSCOPE_CACHE to a folder that can be written"):
        embedded_model("dinov2-small")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown embedded model 'dino'; known: dinov2-small, minilm"):
        embedded_model("dino")


@pytest.mark.parametrize("use", [lambda: embedded_model("minilm"), embedded_photographs])
def test_an_absent_package_says_what_to_install(use: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(embedded, "distribution", absent)
    assert callable(use)
    with pytest.raises(ModuleNotFoundError, match=r"not installed; run: pip install 'attnscope\[demo\]'"):
        use()


def test_photographs_open_and_their_boxes_lie_inside() -> None:
    samples = embedded_photographs()
    assert len({sample.id for sample in samples}) == len(samples) == 10
    for sample in samples:
        image = sample.load_image()
        assert image is not None
        assert sample.regions, sample.id
        for region in sample.regions:
            assert region.box is not None
            left, top, right, bottom = region.box
            assert 0 <= left < right <= image.width, (sample.id, region)
            assert 0 <= top < bottom <= image.height, (sample.id, region)


def test_phrases_stand_in_their_captions() -> None:
    for sample in embedded_photographs():
        assert sample.text
        for region in sample.regions:
            assert region.span is not None
            assert sample.text[slice(*region.span)] == region.phrase


def test_samples_go_by_name() -> None:
    assert [sample.id for sample in embedded_samples("photographs")] == [sample.id for sample in embedded_photographs()]
    sentences = embedded_samples("sentences")
    assert len({sample.id for sample in sentences}) == len({sample.text for sample in sentences}) == 10
    with pytest.raises(SampleError, match="unknown embedded samples 'pictures'; known: photographs, sentences"):
        embedded_samples("pictures")


def run_graph(onnx_file: Path, nodes: list[str], pixels: np.ndarray) -> list[np.ndarray]:
    """Values of inner nodes of an ONNX graph.

    Protobuf merges messages that follow each other, so that a graph of nothing but these outputs is appended.
    """
    outputs = b"".join(protobuf_field(12, protobuf_field(1, node.encode())) for node in nodes)
    graph = onnx_file.read_bytes() + protobuf_field(7, outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(nodes, {"input_image": pixels})


def protobuf_field(number: int, content: bytes) -> bytes:
    length, size = b"", len(content)
    while size > 0x7F:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content
