"""Families of image models: what is stored is the model's own softmax, in its place, and every token has its name."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from attnscope import loading
from attnscope.extraction import extract
from attnscope.families import GENERIC, Fold, SiteRule, find_family
from attnscope.families.builtin import FAMILIES, markdown_table
from attnscope.families.layouts import text_tokens
from attnscope.families.windows import window_fold
from attnscope.loading import load_model
from attnscope.quantities import ExtractSpec
from attnscope.run import Run
from attnscope.samples import Sample
from attnscope.testing import check_family
from attnscope.tokens import KINDS, grid_layout

EXACT = ExtractSpec(encoding="exact")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "patch_size": 4}
WIDE = TINY | {"image_size": (16, 24)}
SQUARE = TINY | {"image_size": 16}
Attention = dict[str, list[np.ndarray]]
MakeModel = Callable[..., torch.nn.Module]
Spy = Callable[..., Attention]
Windows = tuple[str, tuple[int, int], int, int]


def pixels(rows: int, columns: int, count: int = 2) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, rows, columns, generator=torch.Generator().manual_seed(2))}


def largest_error(stored: np.ndarray, own: np.ndarray) -> float:
    """Largest difference from the model's own, over what is stored."""
    assert stored.shape == own.shape
    real = ~np.isnan(stored)
    assert real.any()
    return float(np.abs(stored[real] - own[real]).max())


def kinds(run: Run, stream: str, sample: int = 0) -> list[str]:
    return [KINDS[k] for k in run.tokens(stream).kind.values[sample]]


def places(run: Run, stream: str, sample: int = 0) -> list[tuple[int, int]]:
    """Row and column of the tokens that have one."""
    tokens = run.tokens(stream).isel(sample=sample)
    return [(r, c) for r, c in zip(tokens.row.values.tolist(), tokens.column.values.tolist(), strict=True) if r >= 0]


def grid(rows: int, columns: int) -> list[tuple[int, int]]:
    return [(r, c) for r in range(rows) for c in range(columns)]


@dataclass(frozen=True)
class Case:
    """A model whose attention is that of one grid: where its modules are, and what its tokens are."""

    model: str
    config: Callable[[], object]
    size: tuple[int, int]
    module: str
    before: tuple[str, ...] = ("cls",)
    behind: tuple[str, ...] = ()
    kernel: str = "sdpa"


CASES = {
    "vit": Case("ViTModel", lambda: hf.ViTConfig(**WIDE), (16, 24), "layers.{}.attention"),
    "vit classifier": Case(
        "ViTForImageClassification", lambda: hf.ViTConfig(**SQUARE), (16, 16), "vit.layers.{}.attention"
    ),
    "deit": Case("DeiTModel", lambda: hf.DeiTConfig(**WIDE), (16, 24), "layers.{}.attention", ("cls", "special")),
    "vit_msn": Case("ViTMSNModel", lambda: hf.ViTMSNConfig(**WIDE), (16, 24), "layers.{}.attention"),
    "ijepa": Case("IJepaModel", lambda: hf.IJepaConfig(**WIDE), (16, 24), "layers.{}.attention", (), kernel="eager"),
    "dinov2": Case("Dinov2Model", lambda: hf.Dinov2Config(**SQUARE), (16, 24), "encoder.layer.{}.attention"),
    "dinov2_with_registers": Case(
        "Dinov2WithRegistersModel",
        lambda: hf.Dinov2WithRegistersConfig(**SQUARE, num_register_tokens=3),
        (24, 16),
        "encoder.layer.{}.attention",
        ("cls", "register", "register", "register"),
    ),
    "dinov3": Case(
        "DINOv3ViTModel",
        lambda: hf.DINOv3ViTConfig(**SQUARE, num_register_tokens=2),
        (16, 24),
        "model.layer.{}.attention",
        ("cls", "register", "register"),
    ),
    "beit": Case("BeitModel", lambda: hf.BeitConfig(**SQUARE), (16, 16), "layers.{}.attention"),
    "beit with position bias": Case(
        "BeitModel", lambda: hf.BeitConfig(**SQUARE, use_relative_position_bias=True), (16, 16), "layers.{}.attention"
    ),
    "data2vec-vision": Case(
        "Data2VecVisionModel",
        lambda: hf.Data2VecVisionConfig(**SQUARE, use_shared_relative_position_bias=True),
        (16, 16),
        "encoder.layer.{}.attention.attention",
    ),
    "yolos": Case(
        "YolosModel",
        lambda: hf.YolosConfig(**(TINY | {"image_size": [16, 24]}), num_detection_tokens=3),
        (16, 24),
        "encoder.layer.{}.attention.attention",
        ("cls",),
        ("query",) * 3,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_grid_of_patches(case: Case, made_model: MakeModel, own_attention: Spy) -> None:
    inputs = pixels(*case.size, count=3)
    own = own_attention(made_model(case.model, case.config()), inputs)
    model = made_model(case.model, case.config(), case.kernel)
    run = extract(model, [inputs], spec=EXACT, batch_size=2)
    assert run.sites == ("vision.self",)
    assert not run.plan.sites["vision.self"].guessed
    assert run.attention("vision.self").layer.values.tolist() == [0, 1]
    for layer in range(2):
        stored = run.attention("vision.self").sel(layer=layer).values
        assert stored.shape[1] == 4
        assert largest_error(stored, own[case.module.format(layer)][0]) <= 2e-6
    rows, columns = (n // 4 for n in case.size)
    assert kinds(run, "vision") == [*case.before, *["image"] * (rows * columns), *case.behind]
    assert places(run, "vision") == grid(rows, columns)
    check_family(model.config.model_type, model, inputs)


def attention_of_windows(
    own: np.ndarray, size: tuple[int, int], window: int, shift: int
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """For each pair of patches (i, j) what i gives to j: (sample, head), from windows, patch by patch."""
    padded = [-(-n // window) * window for n in size]

    def at(row: int, column: int) -> tuple[int, int]:
        """Window and position inside of it."""
        down, right = (row - shift) % padded[0], (column - shift) % padded[1]
        number = (down // window) * (padded[1] // window) + right // window
        return number, (down % window) * window + right % window

    windows = padded[0] * padded[1] // window**2
    by_sample = own.reshape(-1, windows, *own.shape[1:])  # (sample, window, head, query, key)
    for i, one in enumerate(grid(*size)):
        for j, other in enumerate(grid(*size)):
            (number, query), (same, key) = at(*one), at(*other)
            value = by_sample[:, number, :, query, key]
            yield (i, j), value if number == same else np.zeros_like(value)


def folded(own: np.ndarray, size: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """The attention between all patches of a grid, (sample, head, query, key), from that inside of windows."""
    tokens = size[0] * size[1]
    samples = len(own) * window**2 // int(np.prod([-(-n // window) * window for n in size]))
    whole = np.zeros((samples, own.shape[1], tokens, tokens), np.float32)
    for (i, j), value in attention_of_windows(own, size, window, shift):
        whole[:, :, i, j] = value
    return whole


@dataclass(frozen=True)
class WindowCase:
    """A model of windows: for each layer its module, the grid, the window and the shift; for each stage its layers."""

    model: str
    config: Callable[[], object]
    size: tuple[int, int]
    layers: Mapping[int, Windows]
    stages: Mapping[str, tuple[int, ...]]
    kernel: str = "eager"


def _swin(config: type, **extra: object) -> object:
    sizes = {"image_size": (16, 24), "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
    return config(**(sizes | extra), window_size=3)


_SWIN_MODULES = {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}
_TWO_STAGES = {"vision.self": (0, 1), "vision.self.2": (2, 3)}


def _two_stages(
    module: str, shifts: tuple[int, ...] = (0, 1, 0, 1)
) -> dict[int, tuple[str, tuple[int, int], int, int]]:
    grids = ((8, 12), (8, 12), (4, 6), (4, 6))
    return {i: (module.format(*_SWIN_MODULES[i]), grids[i], 3, shifts[i]) for i in range(4)}


WINDOW_CASES = {
    "swin": WindowCase(
        "SwinModel",
        lambda: _swin(hf.SwinConfig),
        (16, 24),
        _two_stages("encoder.layers.{}.blocks.{}.attention"),
        _TWO_STAGES,
        "sdpa",
    ),
    "swinv2": WindowCase(
        "Swinv2Model",
        lambda: _swin(hf.Swinv2Config),
        (16, 24),
        _two_stages("encoder.layers.{}.blocks.{}.attention.self"),
        _TWO_STAGES,
    ),
    "donut-swin": WindowCase(
        "DonutSwinModel",
        lambda: _swin(hf.DonutSwinConfig),
        (16, 24),
        _two_stages("encoder.layers.{}.blocks.{}.attention.self"),
        _TWO_STAGES,
    ),
    "maskformer-swin": WindowCase(
        "MaskFormerSwinModel",
        lambda: _swin(hf.MaskFormerSwinConfig),
        (16, 24),
        _two_stages("encoder.layers.{}.blocks.{}.attention.self"),
        _TWO_STAGES,
    ),
    "swin2sr": WindowCase(
        "Swin2SRModel",
        lambda: hf.Swin2SRConfig(
            image_size=8, patch_size=1, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
        ),
        (8, 12),
        {
            0: ("encoder.stages.0.layers.0.attention.self", (8, 12), 4, 0),
            1: ("encoder.stages.0.layers.1.attention.self", (8, 12), 4, 2),
            2: ("encoder.stages.1.layers.0.attention.self", (8, 12), 4, 0),
        },
        {"vision.self": (0, 1, 2)},
    ),
}


@pytest.mark.parametrize("case", WINDOW_CASES.values(), ids=WINDOW_CASES)
def test_windows_are_put_back_on_the_grid(case: WindowCase, made_model: MakeModel, own_attention: Spy) -> None:
    inputs = pixels(*case.size)
    own = own_attention(made_model(case.model, case.config()), inputs)
    model = made_model(case.model, case.config(), case.kernel)
    run = extract(model, [inputs], spec=EXACT, batch_size=2)
    assert {s: run.plan.sites[s].layers for s in run.sites if s.startswith("vision")} == case.stages
    for site, layers in case.stages.items():
        for layer in layers:
            module, size, window, shift = case.layers[layer]
            stored = run.attention(site).sel(layer=layer).values
            assert largest_error(stored, folded(own[module][0], size, window, shift)) <= 2e-6
        stream = run.plan.sites[site].queries
        assert places(run, stream) == grid(*case.layers[layers[0]][1])
        assert set(kinds(run, stream)) == {"image"}
    check_family(model.config.model_type, model, inputs)


FLORENCE_VISION = {
    **{"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "window_size": 4},
    **{"patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4]},
    **{"projection_dim": 32, "max_temporal_embeddings": 4, "max_position_embeddings": 12},
}
IMAGE_TOKEN = 4


def florence_parts() -> dict[str, object]:
    text = {
        **{"model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 30},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37},
        **{"max_position_embeddings": 64, "decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0},
    }
    return {"vision_config": FLORENCE_VISION, "text_config": text, "image_token_id": IMAGE_TOKEN}


def test_florence2_reads_windows_channels_and_a_joint_stream(made_model: MakeModel, own_attention: Spy) -> None:
    ids = torch.tensor([[IMAGE_TOKEN] * 16 + [0, 9, 8, 7, 2], [IMAGE_TOKEN] * 16 + [0, 9, 2, 1, 1]])
    inputs = pixels(24, 36) | {"input_ids": ids, "attention_mask": (ids != 1).long()}
    inputs["decoder_input_ids"] = torch.tensor([[2, 0, 9], [2, 0, 8]])
    name, config = "Florence2ForConditionalGeneration", lambda: hf.Florence2Config(**florence_parts())
    own = own_attention(made_model(name, config()), inputs)
    model = made_model(name, config())
    run = extract(model, [inputs], spec=EXACT, batch_size=2)
    image = {f"{stream}.self{stage}" for stream in ("vision", "channels") for stage in ("", ".2")}
    assert set(run.sites) == image | {"joint.self", "decoder.self", "decoder.joint"}
    block = "model.vision_tower.blocks.{}.0."
    for layer, (stage, size) in enumerate({"": (6, 9), ".2": (3, 5)}.items()):
        site = f"vision.self{stage}"
        windows = own[block.format(layer) + "spatial_block.window_attn"][0]
        assert largest_error(run.attention(site).sel(layer=layer).values, folded(windows, size, 4, 0)) <= 2e-6
        assert places(run, run.plan.sites[site].queries) == grid(*size)
        channels = own[block.format(layer) + "channel_block.channel_attn"][0]
        assert largest_error(run.attention(f"channels.self{stage}").sel(layer=layer).values, channels) <= 2e-6
        for site, module in (
            ("joint.self", "encoder.layers.{}.self_attn"),
            ("decoder.self", "decoder.layers.{}.self_attn"),
            ("decoder.joint", "decoder.layers.{}.encoder_attn"),
        ):
            theirs = own["model.language_model." + module.format(layer)][0]
            assert largest_error(run.attention(site).sel(layer=layer).values, theirs) <= 2e-6
    assert kinds(run, "channels") == ["channel"] * 8
    assert kinds(run, "joint", 1) == ["special"] + ["image"] * 15 + ["text"] * 3 + ["padding"] * 2
    assert places(run, "joint") == grid(3, 5)
    check_family("florence2", model, inputs)


def test_florence2_is_asked_in_words_and_given_what_it_answers(
    made_model: MakeModel, own_attention: Spy, tmp_path: Path
) -> None:
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "<image>", "what", "is", "a", "red", "cat"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(vocabulary[:5])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    pictures = hf.CLIPImageProcessorPil(
        size={"height": 24, "width": 36}, do_center_crop=False, image_seq_length=16, resample=3
    )
    pictures.image_seq_length = 16
    processor = hf.Florence2Processor(pictures, tokenizer)
    model = made_model("Florence2ForConditionalGeneration", hf.Florence2Config(**florence_parts()))
    folder = save(tmp_path, model, processor)
    asked = [replace(s, text=t) for s, t in zip(photographs((40, 40), (30, 50)), ("what", "what is red"), strict=True)]
    samples = [asked[0], replace(asked[1], targets={"output": "a red cat"})]
    run = extract(folder, samples, spec=EXACT, batch_size=2, attn_implementation="eager")
    loaded = load_model(folder, attn_implementation="eager")
    own = own_attention(loaded.model, loaded.family.encode(samples, loaded))
    for layer in range(2):
        theirs = own[f"model.language_model.decoder.layers.{layer}.encoder_attn"][0]
        assert largest_error(run.attention("decoder.joint").sel(layer=layer).values, theirs) <= 2e-6
    assert kinds(run, "joint")[:2] == ["special", "image"]
    assert run.tokens("joint").token_text.values[1, 16:].tolist() == ["<s>", "what", "is", "red", "</s>"]
    assert run.tokens("decoder").token_text.values[1].tolist() == ["</s>", "a", "red"]
    assert kinds(run, "decoder", 0) == ["special", "padding", "padding"]


def test_windows_of_one_image_cover_each_patch_once() -> None:
    fold = window_fold(2, (3, 5), 2, 1)
    assert fold.queries.shape == (2 * 2 * 3, 4)
    for sample in range(2):
        found = fold.queries[fold.samples == sample]
        assert sorted(found[found >= 0].tolist()) == list(range(15))
    # The first window of a grid rolled by one begins at row 1, column 1.
    assert fold.queries[0].tolist() == [6, 7, 11, 12]


def save(folder: Path, model: torch.nn.Module, *parts: object) -> Path:
    for part in (model, *parts):
        part.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def photographs(*sizes: tuple[int, int], text: str | None = None) -> list[Sample]:
    generator = np.random.default_rng(3)
    images = [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    return [Sample(f"s{i}", image=image, text=text) for i, image in enumerate(images)]


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def detector(make: MakeModel, kernel: str = "eager") -> torch.nn.Module:
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=hf.ResNetConfig(**RESNET, out_features=["stage4"]),
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=37, decoder_ffn_dim=37, num_queries=5, num_labels=3,
    )  # fmt: skip
    model = make("DetrForObjectDetection", config, kernel)
    # Wide convolutions make scores near 100, where float32 itself is no finer than 1e-5.
    model.model.input_projection.weight.data *= 0.3
    return model


def test_a_detector_reads_each_image_on_a_grid_of_its_own(
    made_model: MakeModel, own_attention: Spy, tmp_path: Path
) -> None:
    processor = hf.DetrImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160})
    model = detector(made_model)
    folder = save(tmp_path, model, processor)
    # In the order of their lengths, as batches are made: in another order, sums are rounded otherwise.
    samples = photographs((96, 96), (96, 160), (160, 96))
    run = extract(folder, samples, spec=EXACT, batch_size=3, attn_implementation="eager")
    assert set(run.sites) == {"vision.self", "queries.self", "queries.vision"}
    shapes = [(3, 3), (3, 5), (5, 3)]
    loaded = load_model(folder, attn_implementation="eager")
    inputs = loaded.family.encode(samples, loaded)
    assert inputs["pixel_values"].shape[-2:] == (160, 160)
    own = own_attention(loaded.model, inputs)
    for sample, (rows, columns) in enumerate(shapes):
        real = [r * 5 + c for r, c in grid(rows, columns)]
        assert places(run, "vision", sample) == grid(rows, columns)
        assert kinds(run, "vision", sample) == ["image"] * len(real) + ["padding"] * (24 - len(real))
        for layer in range(2):
            for site, module, queries in (
                ("vision.self", "encoder.layers.{}.self_attn", real),
                ("queries.self", "decoder.layers.{}.self_attn", range(5)),
                ("queries.vision", "decoder.layers.{}.encoder_attn", range(5)),
            ):
                keys = range(5) if site == "queries.self" else real
                theirs = own["model." + module.format(layer)][0][sample][:, queries][:, :, keys]
                mine = run.attention(site).isel(sample=sample).sel(layer=layer).values
                kept = mine[:, : len(queries), : len(keys)]
                assert largest_error(kept, theirs) <= 2e-6
                assert np.isnan(mine).sum() == mine.size - kept.size
    assert kinds(run, "queries") == ["query"] * 5
    check_family("detr", loaded.model, inputs)


def test_a_detector_without_a_mask_sees_each_image_alone(
    made_model: MakeModel, own_attention: Spy, tmp_path: Path
) -> None:
    config = hf.YolosConfig(**(TINY | {"image_size": [16, 24]}), num_detection_tokens=3)
    processor = hf.YolosImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 24})
    folder = save(tmp_path, made_model("YolosForObjectDetection", config), processor)
    samples = photographs((32, 48), (48, 32), (32, 32))
    run = extract(folder, samples, spec=EXACT, batch_size=3)
    loaded = load_model(folder, attn_implementation="eager")
    for i, sample in enumerate(samples):
        inputs = loaded.family.encode([sample], loaded)
        inputs.pop("pixel_mask", None)
        rows, columns = (n // 4 for n in inputs["pixel_values"].shape[-2:])
        tokens = 1 + rows * columns + 3
        own = own_attention(loaded.model, inputs)
        for layer in range(2):
            stored = run.attention("vision.self").isel(sample=i).sel(layer=layer).values
            theirs = own[f"vit.encoder.layer.{layer}.attention.attention"][0][0]
            assert largest_error(stored[:, :tokens, :tokens], theirs) <= 2e-6
            assert np.isnan(stored[:, tokens:]).all()
        assert places(run, "vision", i) == grid(rows, columns)


def siglip_parts() -> dict[str, object]:
    small = {k: v for k, v in TINY.items() if k != "patch_size"}
    text = {"vocab_size": 22, "max_position_embeddings": 16, "projection_size": 32}
    return {"text_config": small | text, "vision_config": small | {"patch_size": 4, "image_size": 16}}


def test_siglip_pools_with_a_query_of_its_own(made_model: MakeModel, own_attention: Spy) -> None:
    ids = torch.randint(5, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    inputs = pixels(16, 16) | {"input_ids": ids, "attention_mask": mask}
    own = own_attention(made_model("SiglipModel", hf.SiglipConfig(**siglip_parts())), inputs)
    model = made_model("SiglipModel", hf.SiglipConfig(**siglip_parts()), "sdpa")
    run = extract(model, [inputs], spec=EXACT, batch_size=2)
    assert set(run.sites) == {"vision.self", "text.self", "queries.vision"}
    for layer in range(2):
        for site, tower in (("vision.self", "vision"), ("text.self", "text")):
            theirs = own[f"{tower}_model.encoder.layers.{layer}.self_attn"][0]
            assert largest_error(run.attention(site).sel(layer=layer).values, theirs) <= 2e-6
    pooled = run.attention("queries.vision").sel(layer=0).values
    assert pooled.shape == (2, 4, 1, 16)
    assert largest_error(pooled, own["vision_model.head.attention"][0]) <= 2e-6
    assert kinds(run, "queries") == ["query"]
    assert kinds(run, "vision") == ["image"] * 16
    assert kinds(run, "text", 1) == ["text"] * 6 + ["padding"] * 3
    check_family("siglip", model, inputs)


def test_siglip2_keeps_each_images_own_shape(made_model: MakeModel, own_attention: Spy, tmp_path: Path) -> None:
    small = {k: v for k, v in TINY.items() if k != "patch_size"}
    config = hf.Siglip2VisionConfig(**small, patch_size=4, num_patches=16)
    processor = hf.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)
    folder = save(tmp_path, made_model("Siglip2VisionModel", config), processor)
    samples = photographs((32, 32), (20, 60), (60, 20))
    run = extract(folder, samples, spec=EXACT, batch_size=3)
    loaded = load_model(folder, attn_implementation="eager")
    inputs = loaded.family.encode(samples, loaded)
    own = own_attention(loaded.model, inputs)
    module = next(n for n in own if n.endswith("layers.0.self_attn")).replace(".0.", ".{}.")
    shapes = inputs["spatial_shapes"].tolist()
    assert len({tuple(s) for s in shapes}) == 3
    for layer in range(2):
        assert largest_error(run.attention("vision.self").sel(layer=layer).values, own[module.format(layer)][0]) <= 2e-6
    pooled = own[next(n for n in own if n.endswith("head.attention"))][0]
    assert largest_error(run.attention("queries.vision").sel(layer=0).values, pooled) <= 2e-6
    for i, (rows, columns) in enumerate(shapes):
        assert places(run, "vision", i) == grid(rows, columns)
        assert kinds(run, "vision", i) == ["image"] * (rows * columns) + ["padding"] * (16 - rows * columns)
        stored = run.attention("vision.self").isel(sample=i, layer=0, head=0).values
        assert (~np.isnan(stored)).sum() == (rows * columns) ** 2
    check_family(loaded.family, loaded.model, inputs)


def test_stages_of_an_unknown_model_are_streams_on_their_own_grids(made_model: MakeModel, own_attention: Spy) -> None:
    config = {"hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1, 2, 2, 2], "depths": [2, 1, 1, 1]}
    inputs = pixels(64, 96)
    own = own_attention(made_model("SegformerModel", hf.SegformerConfig(**config)), inputs)
    run = extract(made_model("SegformerModel", hf.SegformerConfig(**config)), [inputs], spec=EXACT, batch_size=2)
    modules = [f"stages.{stage}.blocks.{block}.attention" for stage, block in ((0, 0), (0, 1), (1, 0), (2, 0), (3, 0))]
    stored = {
        m: (s, n) for s in run.sites for m, n in zip(run.plan.sites[s].modules, run.plan.sites[s].layers, strict=True)
    }
    assert set(stored) == set(modules)
    assert [stored[m][1] for m in modules] == [0, 1, 2, 3, 4]
    for module, (site, layer) in stored.items():
        assert run.plan.sites[site].guessed
        assert largest_error(run.attention(site).sel(layer=layer).values, own[module][0]) <= 2e-6
    assert places(run, run.plan.sites["vision.self"].queries) == grid(16, 24)


def test_windows_of_an_unknown_model_get_no_places(made_model: MakeModel, own_attention: Spy) -> None:
    config = {**SQUARE, "window_size": 2, "window_block_indices": [0]}
    inputs = pixels(16, 16)
    own = own_attention(made_model("VitDetModel", hf.VitDetConfig(**config)), inputs)
    run = extract(made_model("VitDetModel", hf.VitDetConfig(**config)), [inputs], spec=EXACT)
    assert {s: (run.plan.sites[s].queries, run.plan.sites[s].layers) for s in run.sites} == {
        "vision.self": ("vision", (0,)),
        "vision.self.2": ("vision.2", (1,)),
    }
    assert set(kinds(run, "vision")) == {"unknown"}
    assert places(run, "vision.2") == grid(4, 4)
    whole = own["encoder.layer.1.attention"][0].reshape(2, 4, 16, 16)
    assert largest_error(run.attention("vision.self.2").sel(layer=1).values, whole) <= 2e-6
    windows = own["encoder.layer.0.attention"][0].reshape(2, 4, 4, 4, 4)  # (sample, window, head, query, key)
    stored = run.attention("vision.self").sel(layer=0).values
    for window in range(4):
        part = slice(4 * window, 4 * window + 4)
        assert largest_error(stored[:, :, part, part], windows[:, window]) <= 2e-6
    assert stored.sum() == pytest.approx(2 * 4 * 16, abs=1e-4)


def test_an_unknown_detector_has_queries(
    made_model: MakeModel, own_attention: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_family", lambda _: GENERIC)
    run = extract(detector(made_model), [pixels(96, 160)], spec=EXACT, batch_size=2)
    own = own_attention(detector(made_model), pixels(96, 160))
    assert set(run.sites) == {"vision.self", "queries.self", "queries.vision"}
    for site, module in (
        ("vision.self", "encoder.layers.{}.self_attn"),
        ("queries.vision", "decoder.layers.{}.encoder_attn"),
    ):
        for layer in range(2):
            theirs = own["model." + module.format(layer)][0]
            assert largest_error(run.attention(site).sel(layer=layer).values, theirs) <= 2e-6
    assert places(run, "vision") == grid(3, 5)


def test_a_broken_family_is_named(made_model: MakeModel) -> None:
    model = made_model("DeiTModel", hf.DeiTConfig(**SQUARE))
    good = find_family("deit")

    def too_few(inputs: dict, loaded: object, tokens: int) -> object:
        return grid_layout(2, 4, 4)

    def mislaid(call: object, inputs: dict, loaded: object) -> Fold:
        places = np.zeros((2, 18), int)
        return Fold(np.arange(2), places, places)

    broken = {
        "no rule of family 'vit' places module 'layers.0.attention'": replace(good, sites=()),
        "no layout of stream 'vision'": replace(good, streams={}),
        "the model attended to": replace(good, streams={"vision": too_few}),
        "are both layer 0 of 'vision.self'": replace(good, sites=(SiteRule(r"attention", "vision.self"),)),
        r"are \[3, 4\], not 0, 1, 2": replace(
            good, sites=(SiteRule(r"layers\.(?P<layer>\d+)\.", "vision.self", first_layer=3),)
        ),
        "is among the queries": replace(good, fold=mislaid, streams={"vision": lambda *_: grid_layout(2, 1, 1, ())}),
    }
    for message, family in broken.items():
        with pytest.raises(AssertionError, match=message):
            check_family(family, model, pixels(16, 16))


def test_an_unmarked_padding_is_named(made_model: MakeModel) -> None:
    config = hf.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37
    )
    ids = torch.full((2, 5), 7)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    careless = replace(find_family("bert"), streams={"text": text_tokens(mask_name="nothing")})
    with pytest.raises(AssertionError, match="token 3 of stream 'text', sample 1, is never attended to"):
        check_family(careless, made_model("BertModel", config), inputs)


DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_documented_family_from_outside_keeps_the_contract() -> None:
    module, proof = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert module.count("\n") < 40
    names: dict[str, object] = {}
    exec(module, names)
    torch.manual_seed(0)
    exec(proof, names)


def test_the_documented_table_is_what_is_registered() -> None:
    table = DOCUMENT.read_text().split("<!-- families -->\n")[1].split("<!-- /families -->")[0]
    assert table == markdown_table()
    types = [t for family in FAMILIES for t in family.model_types]
    assert len(types) == len(set(types))
    assert all(find_family(t).name != "generic" for t in types)
