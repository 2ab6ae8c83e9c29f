"""Vision-language families: every site against the model's own softmax, every token in its place."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.overrides import TorchFunctionMode

from attnscope.extraction import extract
from attnscope.loading import LoadedModel, load_model
from attnscope.quantities import ExtractSpec
from attnscope.recording import recording
from attnscope.run import Run
from attnscope.samples import Sample
from attnscope.testing import check_family
from attnscope.tokens import KINDS

EXACT = ExtractSpec(encoding="exact")
WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "circle",
    "square",
    "on",
    "left",
    "of",
    "the",
    "big",
    "small",
    "box",
    "with",
    "two",
]
TEXTS = ("a cat", "the big dog on a red box", "two blue circle")
SIZES = ((30, 44), (64, 28), (40, 40))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PATCHES = {**SMALL, "image_size": 32, "patch_size": 8}
WORDED = {
    **SMALL,
    "vocab_size": 40,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
LLAMA = {
    **{**WORDED, "max_position_embeddings": 512}, "model_type": "llama", "num_key_value_heads": 2,
}  # fmt: skip
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")


# -- tiny models with their processors ---------------------------------------------------------------------------------


def tokenizer(*extra: str, **options: object) -> transformers.PreTrainedTokenizerFast:
    """Whole words, and special ones; BOS in front, padding at the end."""
    names = {word: i for i, word in enumerate((*SPECIAL, *extra, *WORDS))}
    inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([*SPECIAL, *extra])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    options = {"extra_special_tokens": list(extra), **options}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **roles, **options)


def save(model: torch.nn.Module, folder: Path, *processors: object) -> Path:
    """Every parameter drawn anew, wide enough that attention is far from uniform, and saved as users save models."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + is_gain)
    model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 255, (*size, 3), dtype=np.uint8) for size in SIZES]
    return [
        Sample(f"s{i}", image=Image.fromarray(p), text=t) for i, (p, t) in enumerate(zip(pixels, TEXTS, strict=True))
    ]


def square(size: int = 32) -> transformers.CLIPImageProcessorPil:
    side = {"height": size, "width": size}
    return transformers.CLIPImageProcessorPil(size=side, do_center_crop=False)


# -- the models' own attention -----------------------------------------------------------------------------------------


class Softmaxes(TorchFunctionMode):
    """Softmaxes over four axes, by the module that took them and the number of the call."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], torch.Tensor] = {}
        self.names = {m: n for n, m in model.named_modules()}
        self.stack: list[str] = []

    def keep(self, module: str, value: torch.Tensor) -> None:
        number = sum(name == module for name, _ in self.found)
        self.found[module, number] = value.detach().clone()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax" and result.ndim == 4 and self.stack:
            self.keep(self.stack[-1], result)
        return result


@contextmanager
def spied(model: torch.nn.Module) -> Iterator[Softmaxes]:
    """Watch an eager model; torch's own attention modules are asked for their weights."""
    spy = Softmaxes(model)

    def enter(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        spy.stack.append(spy.names[module])
        if isinstance(module, torch.nn.MultiheadAttention):
            kwargs = {**kwargs, "need_weights": True, "average_attn_weights": False}
        return args, kwargs

    def leave(module: torch.nn.Module, args: object, output: object) -> None:
        spy.stack.pop()
        if isinstance(module, torch.nn.MultiheadAttention):
            spy.keep(spy.names[module], output[1])  # type: ignore[index]

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    with torch.no_grad(), spy:
        yield spy
    for handle in handles:
        handle.remove()


@dataclass
class Extracted:
    """A run over one batch, the inputs of that batch, and the model's own softmaxes for them."""

    run: Run
    inputs: dict[str, torch.Tensor]
    order: list[int]
    own: dict[tuple[str, int], torch.Tensor]
    loaded: LoadedModel
    bound: float
    worst: dict[str, float] = field(default_factory=dict)

    def compare(self, site: str, layer: int, expected: torch.Tensor | np.ndarray) -> None:
        """The stored attention of a layer is this one, for samples in the order of the batch, wherever it is real."""
        mine = self.run.attention(site).sel(layer=layer).values[self.order]
        theirs = np.zeros_like(mine)
        theirs[tuple(slice(0, n) for n in expected.shape)] = np.asarray(expected)
        real = ~np.isnan(mine)
        plan = self.run.plan.sites[site]
        queries, keys = (self.real(stream) for stream in (plan.queries, plan.keys))
        assert (real == (queries[:, None, :, None] & keys[:, None, None, :])).all()
        error = np.abs(mine - theirs)[real].max()
        self.worst[site] = max(float(error), self.worst.get(site, 0.0))
        assert error <= self.bound

    def real(self, stream: str) -> np.ndarray:
        """Which tokens are no padding, for samples in the order of the batch."""
        return self.run.tokens(stream).kind.values[self.order] != 0

    def kinds(self, stream: str, row: int) -> list[str]:
        """Names of the kinds of tokens of the batch's n-th sample."""
        return [KINDS[k] for k in self.run.tokens(stream).kind.values[self.order[row]]]

    def strings(self, stream: str, row: int) -> list[str]:
        return [str(t) for t in self.run.tokens(stream).token_text.values[self.order[row]]]

    def places(self, stream: str, row: int) -> list[tuple[int, int]]:
        """Row and column of the tokens that have a place."""
        tokens = self.run.tokens(stream).isel(sample=self.order[row])
        pairs = zip(tokens.row.values.tolist(), tokens.column.values.tolist(), strict=True)
        return [p for p in pairs if p != (-1, -1)]


def extracted(
    folder: Path,
    rules: Sequence[tuple[str, str, int]] = (),
    ready: Mapping[str, torch.Tensor] | None = None,
    target: str | None = None,
    before: Callable[[], None] = lambda: None,
    kernel: str = "sdpa",
    bound: float = 2e-6,
) -> Extracted:
    """Extract all samples (or ready inputs) in one batch, check the family, and run the model again in eager."""
    loaded = load_model(folder, attn_implementation=None if kernel == "sdpa" else kernel)
    seen: list[dict[str, torch.Tensor]] = []
    handle = loaded.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    given = samples() if ready is None else [ready]
    count = 3 if ready is None else len(next(iter(ready.values())))
    spec = ExtractSpec(frozenset({"attention", "score"}), encoding="exact", target=target)
    run = extract(loaded.model, given, spec=spec, batch_size=count)
    handle.remove()
    assert run.attrs["family"] == loaded.family.name != "generic"
    assert not any(site.guessed for site in run.plan.sites.values())
    assert np.isfinite(run.outputs.score.values).all()
    batches = seen[1:]
    assert len(batches) == (count if loaded.family.one_by_one else 1)
    order = batch_order(loaded, ready)
    checked = order[:1] if loaded.family.one_by_one else order
    encoded = dict(ready) if ready is not None else loaded.family.encode([samples()[i] for i in checked], loaded)
    check_family(loaded.family, loaded.model, encoded)
    eager = type(loaded.model).from_pretrained(folder, attn_implementation="eager").eval()
    before()
    found = []
    for batch in batches:
        with spied(eager) as spy:
            eager(**batch)
        found.append(spy.found)
    own = {call: joined([f[call] for f in found]) for call in found[0]}
    inputs = {name: joined([b[name] for b in batches]) for name in batches[0]}
    result = Extracted(run, inputs, order, own, loaded, bound)
    for site, pattern, first in rules:
        compare_all(result, site, pattern, first)
    return result


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One batch from several; the smaller ones are filled up with zeros at the end of every axis."""
    longest = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    pads = [
        [n for size, most in zip(p.shape[:0:-1], longest[::-1], strict=True) for n in (0, most - size)] for p in parts
    ]
    return torch.cat([torch.nn.functional.pad(p, pad) for p, pad in zip(parts, pads, strict=True)])


def batch_order(loaded: LoadedModel, ready: Mapping[str, torch.Tensor] | None) -> list[int]:
    """Samples from the shortest to the longest, as they are batched."""
    if ready is not None:
        return list(range(len(next(iter(ready.values())))))
    lengths = [sum(loaded.family.measure(s, loaded).values()) for s in samples()]
    return np.argsort(lengths, kind="stable").tolist()


def compare_all(result: Extracted, site: str, pattern: str, first: int = 0, number: int = 0) -> None:
    """Every layer of a site against the softmaxes of the modules whose names match, layer by layer."""
    layers = 0
    for (module, call), own in result.own.items():
        match = re.fullmatch(pattern, module)
        if match and call == number:
            result.compare(site, first + int(match.group(1)), own)
            layers += 1
    assert layers >= 1


# -- dual encoders -----------------------------------------------------------------------------------------------------

CLIP_RULES = [
    ("vision.self", r"(?:.*\.)?vision_model\.encoder\.layers\.(\d+)\.self_attn", 0),
    ("text.self", r"(?:.*\.)?text_model\.(?:roberta\.)?encoder\.layers?\.(\d+)\..*", 0),
]


@pytest.mark.parametrize("name", ["CLIP", "AltCLIP", "ChineseCLIP", "OwlViT"])
def test_dual_encoders(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")
    cls = getattr(transformers, f"{name}Model")
    extra = {"project_dim": 16} if name == "AltCLIP" else {}
    made = cls(config(text_config={**WORDED, **extra}, vision_config=PATCHES, projection_dim=16))
    result = extracted(save(made, tmp_path, tokenizer(), square()), CLIP_RULES)
    assert set(result.run.sites) == {"vision.self", "text.self"}
    assert result.kinds("vision", 0) == ["cls"] + ["image"] * 16
    assert result.places("vision", 1) == [(r, c) for r in range(4) for c in range(4)]
    words = result.strings("text", 0)
    assert words[:4] == ["<s>", "a", "cat", "<pad>"]
    assert result.kinds("text", 0)[:4] == ["special", "text", "text", "padding"]


def test_detector_of_named_things(tmp_path: Path) -> None:
    config = transformers.OwlViTConfig(text_config=WORDED, vision_config=PATCHES, projection_dim=32)
    made = transformers.OwlViTForObjectDetection(config)
    result = extracted(save(made, tmp_path, tokenizer(), square()), CLIP_RULES, target="detection")
    best = result.loaded.model(**result.inputs).logits.flatten(1).amax(1).detach().numpy()
    np.testing.assert_allclose(result.run.outputs.score.values[0][result.order], best, rtol=1e-5)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPTextModel"])
def test_halves_of_a_dual_encoder(name: str, tmp_path: Path) -> None:
    vision = "Vision" in name
    config = transformers.CLIPVisionConfig(**PATCHES) if vision else transformers.CLIPTextConfig(**WORDED)
    made = getattr(transformers, name)(config)
    folder = save(made, tmp_path, *([square()] if vision else [tokenizer()]))
    site = "vision.self" if vision else "text.self"
    result = extracted(folder, [(site, r"(?:.*\.)?encoder\.layers\.(\d+)\.self_attn", 0)])
    assert result.run.sites == (site,)


# -- one stream --------------------------------------------------------------------------------------------------------


def test_vilt_patches_keep_their_place_in_a_random_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = transformers.models.vilt.modeling_vilt.ViltEmbeddings
    drawn: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    proper = embeddings.visual_embed

    def noted(self: object, *args: object, **kwargs: object) -> object:
        state = torch.get_rng_state()
        result = proper(self, *args, **kwargs)
        drawn.append((state, result[1], result[2][0]))
        return result

    monkeypatch.setattr(embeddings, "visual_embed", noted)
    sizes = {**WORDED, "image_size": 64, "patch_size": 8, "max_position_embeddings": 12}
    made = transformers.ViltForQuestionAnswering(transformers.ViltConfig(**sizes, num_labels=5))
    processor = transformers.ViltImageProcessorPil(size={"shortest_edge": 32}, size_divisor=8)
    rules = [("joint.self", r"vilt\.encoder\.layer\.(\d+)\.attention\.attention", 0)]
    folder = save(made, tmp_path, tokenizer(model_max_length=12), processor)
    result = extracted(folder, rules, before=lambda: torch.set_rng_state(drawn[1][0]))
    _, mask, order = drawn[1]
    text = result.inputs["input_ids"].shape[1]
    grids = set()
    for row in range(3):
        real = mask[row, 1:].bool()
        assert result.places("joint", row) == [tuple(p) for p in order[row][real].tolist()]
        assert result.kinds("joint", row)[text] == "cls"
        grids.add(max(result.places("joint", row)))
        assert len(set(result.places("joint", row))) == int(real.sum())
    assert len(grids) > 1
    assert any(result.places("joint", row) != sorted(result.places("joint", row)) for row in range(3))
    assert result.strings("joint", result.order.index(0))[:4] == ["<s>", "a", "cat", "<pad>"]


def regions(mask_name: str, features_name: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ready inputs with padding at the end of texts and of regions."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 5, 3, 0, 0], [2, 9, 8, 3, 0]])
    found = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    features = torch.randn(3, 4, 12, generator=generator)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), features_name: features, mask_name: found, **more}


def test_visual_bert(tmp_path: Path) -> None:
    config = transformers.VisualBertConfig(**WORDED, visual_embedding_dim=12, num_labels=5)
    folder = save(transformers.VisualBertForQuestionAnswering(config), tmp_path, tokenizer())
    ready = regions("visual_attention_mask", "visual_embeds")
    rules = [("joint.self", r"visual_bert\.encoder\.layer\.(\d+)\.attention\.self", 0)]
    result = extracted(folder, rules, ready)
    assert result.run.sites == ("joint.self",)
    assert result.kinds("joint", 1) == [
        *("special", "text", "special", "padding", "padding"), *("image", "image", "padding", "padding"),
    ]  # fmt: skip
    assert result.places("joint", 0) == []


def test_lxmert_continues_the_layers_of_both_streams(tmp_path: Path) -> None:
    sizes = {k: v for k, v in WORDED.items() if k != "num_hidden_layers"}
    config = transformers.LxmertConfig(**sizes, l_layers=2, r_layers=1, x_layers=2, visual_feat_dim=12, num_qa_labels=5)
    folder = save(transformers.LxmertForQuestionAnswering(config), tmp_path, tokenizer())
    ready = regions("visual_attention_mask", "visual_feats", visual_pos=torch.rand(3, 4, 4))
    rules = [
        ("text.self", r"lxmert\.encoder\.layer\.(\d+)\.attention\.self", 0),
        ("vision.self", r"lxmert\.encoder\.r_layers\.(\d+)\.attention\.self", 0),
        ("text.self", r"lxmert\.encoder\.x_layers\.(\d+)\.lang_self_att\.self", 2),
        ("vision.self", r"lxmert\.encoder\.x_layers\.(\d+)\.visn_self_att\.self", 1),
    ]
    result = extracted(folder, rules, ready)
    cross = r"lxmert\.encoder\.x_layers\.(\d+)\.visual_attention\.att"
    compare_all(result, "text.vision", cross)
    compare_all(result, "vision.text", cross, number=1)
    layers = {name: site.layers for name, site in result.run.plan.sites.items()}
    assert layers == {
        "text.self": (0, 1, 2, 3), "vision.self": (0, 1, 2), "text.vision": (0, 1), "vision.text": (0, 1),
    }  # fmt: skip
    assert result.kinds("vision", 1) == ["image", "image", "padding", "padding"]


def test_flava(tmp_path: Path) -> None:
    config = transformers.FlavaConfig(
        text_config=WORDED, image_config=PATCHES, multimodal_config=SMALL, projection_dim=16
    )
    folder = save(transformers.FlavaModel(config), tmp_path, tokenizer(), square())
    layer = r"_model\.encoder\.layer\.(\d+)\.attention\.attention"
    rules = [
        ("vision.self", f"image{layer}", 0),
        ("text.self", f"text{layer}", 0),
        ("joint.self", f"multimodal{layer}", 0),
    ]
    result = extracted(folder, rules)
    assert set(result.run.sites) == {"vision.self", "text.self", "joint.self"}
    assert result.kinds("joint", 0)[:23] == [
        "cls", "cls", *["image"] * 16, "special", "text", "text", "padding", "padding",
    ]  # fmt: skip
    assert result.places("joint", 0) == [(r, c) for r in range(4) for c in range(4)]


# -- encoders that look at each other ----------------------------------------------------------------------------------

BLIP_RULES = [
    ("vision.self", r"vision_model\.encoder\.layers\.(\d+)\.self_attn", 0),
    ("text.self", r"text_(?:encoder|decoder\.bert)\.encoder\.layer\.(\d+)\.attention\.self", 0),
    ("text.vision", r"text_(?:encoder|decoder\.bert)\.encoder\.layer\.(\d+)\.crossattention\.self", 0),
]


def blip_config() -> transformers.BlipConfig:
    text = {**WORDED, "sep_token_id": 3, "encoder_hidden_size": 32}
    return transformers.BlipConfig(
        text_config=text, vision_config=PATCHES, projection_dim=16, image_text_hidden_size=16
    )


@pytest.mark.parametrize("name", ["ImageTextRetrieval", "ConditionalGeneration"])
def test_blip_looks_at_the_image(name: str, tmp_path: Path) -> None:
    made = getattr(transformers, f"BlipFor{name}")(blip_config())
    result = extracted(save(made, tmp_path, tokenizer(), square()), BLIP_RULES)
    assert set(result.run.sites) == {"vision.self", "text.self", "text.vision"}
    assert result.run.plan.sites["text.vision"].queries == "text"
    assert result.run.plan.sites["text.vision"].keys == "vision"
    outputs = result.loaded.model(**result.inputs)
    scores = result.run.outputs.score.values[0][result.order]
    if name == "ImageTextRetrieval":
        odds = torch.log_softmax(outputs.itm_score, 1)
        np.testing.assert_allclose(scores, (odds[:, 1] - odds[:, 0]).detach(), rtol=1e-4)
    else:
        last = result.inputs["attention_mask"].sum(1) - 1
        np.testing.assert_allclose(scores, outputs.logits[torch.arange(3), last].amax(1).detach(), rtol=1e-5)


def test_blip_answers_from_the_question(tmp_path: Path) -> None:
    folder = save(transformers.BlipForQuestionAnswering(blip_config()), tmp_path, tokenizer(), square())
    answers = r"text_decoder\.bert\.encoder\.layer\.(\d+)\."
    rules = [
        *[
            (site, pattern.replace("(?:encoder|decoder\\.bert)", "encoder"), first)
            for site, pattern, first in BLIP_RULES
        ],
        ("decoder.self", answers + r"attention\.self", 0),
        ("decoder.text", answers + r"crossattention\.self", 0),
    ]
    result = extracted(folder, rules)
    assert set(result.run.sites) == {"vision.self", "text.self", "text.vision", "decoder.self", "decoder.text"}
    assert result.strings("decoder", 0) == ["<s>"]


def test_bridgetower_continues_the_layers_of_both_streams(tmp_path: Path) -> None:
    config = transformers.BridgeTowerConfig(
        **{**SMALL, "hidden_size": 64, "num_attention_heads": 1}, contrastive_hidden_size=16,
        text_config={**WORDED, "hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3},
        vision_config={"hidden_size": 64, "num_hidden_layers": 3, "patch_size": 8, "image_size": 32},
    )  # fmt: skip
    processor = transformers.BridgeTowerImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"shortest_edge": 32}, size_divisor=8
    )
    folder = save(transformers.BridgeTowerForImageAndTextRetrieval(config), tmp_path, tokenizer(), processor)
    layer = r"bridgetower\.cross_modal_{}_layers\.(\d+)\.{}\.self"
    rules = [
        ("text.self", r"bridgetower\.text_model\.encoder\.layer\.(\d+)\.attention\.self", 0),
        ("vision.self", r"bridgetower\.vision_model\.visual\.transformer\.resblocks\.(\d+)\.attn", 0),
        ("text.self", layer.format("text", "attention"), 3),
        ("vision.self", layer.format("image", "attention"), 3),
        ("text.vision", layer.format("text", "crossattention"), 0),
        ("vision.text", layer.format("image", "crossattention"), 0),
    ]
    result = extracted(folder, rules, target="matching")
    assert set(result.run.sites) == {"text.self", "vision.self", "text.vision", "vision.text"}


# -- language models that read images ----------------------------------------------------------------------------------

CLIP_TOWER = {**PATCHES, "model_type": "clip_vision_model"}
SIGLIP_TOWER = {**PATCHES, "model_type": "siglip_vision_model"}
LANGUAGE = ("joint.self", r"model\.language_model\.layers\.(\d+)\.self_attn", 0)
# The hidden states of a model under sdpa and under eager differ already, and wide weights let that grow.
BOUNDS = {"eager": 2e-6, "sdpa": 5e-5}
GRID = [(r, c) for r in range(4) for c in range(4)]


def image_places(result: Extracted, row: int) -> list[tuple[int, int, str]]:
    """Row, column and tile of the image tokens that the language model reads."""
    tokens = result.run.tokens("joint").isel(sample=result.order[row])
    image = tokens.kind.values == KINDS.index("image")
    parts = (tokens.row.values[image], tokens.column.values[image], tokens.token_text.values[image])
    return [(int(r), int(c), str(t)) for r, c, t in zip(*parts, strict=True)]


def compare_tiles(result: Extracted, pattern: str, tiles: Sequence[int]) -> None:
    """Each layer of the image encoder: a sample's tiles attend each to itself, one behind the other."""
    starts = np.cumsum([0, *tiles])
    for (module, _), own in result.own.items():
        match = re.fullmatch(pattern, module)
        if match is None:
            continue
        assert len(own) == starts[-1]
        blocks = [_along_diagonal(own[a:b]) for a, b in pairwise(starts)]
        result.compare("vision.self", int(match.group(1)), joined([b[None] for b in blocks]))


def _along_diagonal(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.block_diag(*heads) for heads in zip(*parts, strict=True)])


def llava_config(**more: object) -> transformers.LlavaConfig:
    return transformers.LlavaConfig(text_config=LLAMA, vision_config=CLIP_TOWER, image_token_index=4, **more)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llava(strategy: str, tmp_path: Path) -> None:
    made = transformers.LlavaForConditionalGeneration(llava_config(vision_feature_select_strategy=strategy))
    processor = transformers.LlavaProcessor(
        square(), tokenizer("<image>"), patch_size=8, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )  # fmt: skip
    tower = ("vision.self", r"model\.vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn", 0)
    result = extracted(save(made, tmp_path, processor), [tower, LANGUAGE])
    assert [p[:2] for p in image_places(result, 0)] == GRID
    before = ["special"] if strategy == "default" else ["special", "special"]
    assert result.kinds("joint", 0) == [*before, *["image"] * 16, "text", "text", *["padding"] * 5]
    last = result.inputs["attention_mask"].sum(1) - 1
    logits = result.loaded.model(**result.inputs).logits[torch.arange(3), last].amax(1)
    np.testing.assert_allclose(result.run.outputs.score.values[0][result.order], logits.detach(), rtol=1e-4)


def test_llava_writes_behind_image_and_text(tmp_path: Path) -> None:
    processor = transformers.LlavaProcessor(
        square(), tokenizer("<image>"), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    folder = save(transformers.LlavaForConditionalGeneration(llava_config()), tmp_path, processor)
    run = extract(folder, samples(), spec=ExtractSpec(encoding="exact", generate=4))
    loaded = load_model(folder)
    for at, sample in enumerate(samples()):
        inputs = loaded.family.encode([sample], loaded)
        with recording(loaded.model) as recorded:
            ids = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        kind = [KINDS[k] for k in run.tokens("joint").kind.values[at]]
        assert kind[1:17] == ["image"] * 16
        assert [i for i, k in enumerate(kind) if k == "generated"] == list(range(prompt, ids.shape[1]))
        steps = [c for c in recorded if "language_model.layers.1." in c.module]
        stored = run.attention("joint.self").values[at, 1]
        for number, call in enumerate(steps):
            row = prompt - 1 + number
            np.testing.assert_allclose(stored[:, row, : row + 1], call.attention()[0, :, -1].numpy(), atol=5e-6)


def test_a_prompt_is_made_by_the_chat_template_or_taken_as_it_is(tmp_path: Path) -> None:
    words = tokenizer("<image>", "User", "Assistant")
    words.chat_template = (
        "{{ bos_token }}{% for m in messages %}User {% for part in m.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}Assistant"
    )
    processor = transformers.LlavaProcessor(
        square(), words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    made = transformers.LlavaForConditionalGeneration(llava_config())
    loaded = load_model(save(made, tmp_path, processor))
    asked = samples()[:1]
    told = [Sample("t", image=asked[0].image, text="the dog <image> on a box")]
    for given, expected in (
        (asked, ["<s>", "User", *["<image>"] * 16, "a", "cat", "Assistant"]),
        (told, ["<s>", "the", "dog", *["<image>"] * 16, "on", "a", "box"]),
    ):
        ids = loaded.family.encode(given, loaded)["input_ids"][0]
        assert words.convert_ids_to_tokens(ids.tolist()) == expected


def test_llava_next_tiles_lie_on_one_grid(tmp_path: Path) -> None:
    canvases = [[32, 64], [64, 32], [64, 64]]
    config = transformers.LlavaNextConfig(
        text_config=LLAMA, vision_config=CLIP_TOWER, image_token_index=4, image_grid_pinpoints=canvases
    )
    pixels = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=canvases
    )
    processor = transformers.LlavaNextProcessor(
        pixels, tokenizer("<image>"), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    result = extracted(save(transformers.LlavaNextForConditionalGeneration(config), tmp_path, processor), [LANGUAGE])
    tiles = [len(pixels(images=[samples()[i].image], return_tensors="pt").pixel_values[0]) for i in result.order]
    assert sorted(tiles) == [3, 3, 5]
    compare_tiles(result, r"model\.vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn", tiles)
    row = result.order.index(0)  # 30 x 44 pixels on a canvas of 1 x 2 tiles: 4 rows, of whose 8 columns 6 are image
    fine = [(r, c, f"tile 0,{c // 4}") for r in range(4) for c in range(1, 7)]
    assert image_places(result, row) == [(r, 2 * c, "overview") for r, c in GRID] + fine
    kinds = result.kinds("joint", row)
    assert kinds.count("special") == 1 + 4
    vision = [(r, 2 * c) for r, c in GRID] + GRID + [(r, c + 4) for r, c in GRID]
    assert result.places("vision", row) == vision


# transformers' processor makes labels with a signature that NumPy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("pooled", "kernel"), [(True, "eager"), (False, "eager"), (True, "sdpa")])
def test_paligemma_reads_the_prompt_in_both_directions(pooled: bool, kernel: str, tmp_path: Path) -> None:
    config = transformers.PaliGemmaConfig(
        text_config={**LLAMA, "model_type": "gemma", "head_dim": 8},
        vision_config={**SIGLIP_TOWER, "vision_use_head": pooled}, image_token_index=4, projection_dim=32,
    )  # fmt: skip
    pixels = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    pixels.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(pixels, tokenizer("<image>"))
    made = transformers.PaliGemmaForConditionalGeneration(config)
    tower = r"model\.vision_tower\.(?:vision_model\.)?"
    rules = [("vision.self", tower + r"encoder\.layers\.(\d+)\.self_attn", 0), LANGUAGE]
    result = extracted(save(made, tmp_path, processor), rules, kernel=kernel, bound=BOUNDS[kernel])
    assert set(result.run.sites) == {"vision.self", "joint.self", *(["queries.vision"] if pooled else [])}
    if pooled:
        module = next(name for name, _ in result.own if name.endswith("head.attention"))
        result.compare("queries.vision", 0, result.own[module, 0])
        assert result.kinds("queries", 0) == ["query"]
    assert [p[:2] for p in image_places(result, 0)] == GRID
    attention = result.run.attention("joint.self").values[result.order[0], 0]
    assert (attention[:, 0, 1:17] > 0).any()


def test_gemma3_averages_patches_to_a_smaller_grid(tmp_path: Path) -> None:
    text = {**LLAMA, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**SIGLIP_TOWER, "vision_use_head": False}, mm_tokens_per_image=4,
        image_token_index=4, boi_token_index=5, eoi_token_index=6,
    )  # fmt: skip
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(*names.values(), extra_special_tokens=names, padding_side="left")
    pixels = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(pixels, words, image_seq_length=4)
    tower = ("vision.self", r"model\.vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn", 0)
    result = extracted(
        save(transformers.Gemma3ForConditionalGeneration(config), tmp_path, processor), [tower, LANGUAGE]
    )
    assert [p[:2] for p in image_places(result, 0)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert result.kinds("joint", 0) == [
        *["padding"] * 5, "special", "special", *["image"] * 4, "special", "text", "text",
    ]  # fmt: skip


QWEN = {
    "Qwen2VL": ("qwen2_vl_text", {"embed_dim": 32, "mlp_ratio": 2}),
    "Qwen2_5_VL": ("qwen2_5_vl_text", {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}),
    "Qwen3VL": (
        "qwen3_vl_text", {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", list(QWEN))
def test_qwen_reads_images_of_any_shape(name: str, kernel: str, tmp_path: Path) -> None:
    text, more = QWEN[name]
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "num_heads": 4, "hidden_size": 32, "intermediate_size": 64, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, **more}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        text_config={**LLAMA, "model_type": text, "rope_parameters": rope, "head_dim": 8}, vision_config=vision,
        image_token_id=4, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", padding_side="left")
    pixels = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=2048
    )
    made = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    result = extracted(save(made, tmp_path, words, pixels), [LANGUAGE], kernel=kernel, bound=BOUNDS[kernel])
    shapes = [tuple(s[1:]) for s in result.inputs["image_grid_thw"].tolist()]
    assert len(set(shapes)) > 1
    for row, (height, width) in enumerate(shapes):
        blocks = [(r, c) for r in range(0, height, 2) for c in range(0, width, 2)]
        assert result.places("vision", row) == [(r + i, c + j) for r, c in blocks for i in (0, 1) for j in (0, 1)]
        assert [p[:2] for p in image_places(result, row)] == [(r // 2, c // 2) for r, c in blocks]
        assert result.kinds("joint", row)[-len(TEXTS[result.order[row]].split()) - 1] == "special"
    for layer in range(2):
        calls = [v for (m, _), v in result.own.items() if m == f"model.visual.blocks.{layer}.attn"]
        segments = [
            s for n, shape in enumerate(shapes) for s in image_segments(n, shape, name == "Qwen2_5_VL", layer == 1)
        ]
        result.compare("vision.self", layer, unpacked(calls, segments, max(h * w for h, w in shapes)))


def image_segments(image: int, shape: tuple[int, int], is_sorted: bool, is_whole: bool) -> list[tuple[int, np.ndarray]]:
    """The patches that one call reads, in its order: windows of 2 x 2 merged patches, apart or one behind the other."""
    rows, columns = shape[0] // 2, shape[1] // 2
    size = 2 if is_sorted else max(rows, columns)
    windows = []
    for top in range(0, rows, size):
        for left in range(0, columns, size):
            inside = [(r, c) for r in range(top, min(top + size, rows)) for c in range(left, min(left + size, columns))]
            windows.append(np.array([4 * (r * columns + c) + k for r, c in inside for k in range(4)]))
    return [(image, np.concatenate(windows))] if is_whole else [(image, window) for window in windows]


def unpacked(calls: Sequence[torch.Tensor], segments: Sequence[tuple[int, np.ndarray]], most: int) -> np.ndarray:
    """Attention between all patches of each image from that of each call."""
    images = 1 + max(image for image, _ in segments)
    whole = np.zeros((images, calls[0].shape[1], most, most), np.float32)
    for call, (image, places) in zip(calls, segments, strict=True):
        whole[image][:, places[:, None], places[None, :]] = call[0]
    return whole


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_idefics3_shuffles_the_patches_of_each_tile(name: str, kernel: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(
        text_config=LLAMA, vision_config={**PATCHES, "model_type": f"{name.lower()}_vision"}, image_token_id=4,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    pixels = getattr(transformers, f"{name}ImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    marks = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", *marks, padding_side="left")
    made = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    language = ("joint.self", r"model\.text_model\.layers\.(\d+)\.self_attn", 0)
    result = extracted(save(made, tmp_path, words, pixels), [language], kernel=kernel, bound=BOUNDS[kernel])
    cut = [pixels(images=[[samples()[i].image]], return_row_col_info=True) for i in result.order]
    shapes = [(int(c["rows"][0][0]), int(c["cols"][0][0])) for c in cut]
    compare_tiles(result, r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn", [1 + r * c for r, c in shapes])
    assert len(set(shapes)) > 1 or shapes[0][0] * shapes[0][1] > 1
    for row, shape in enumerate(shapes):
        assert image_places(result, row) == tiled_places(shape, 2)
        assert result.places("vision", row) == [p[:2] for p in tiled_places(shape, 4)]


def tiled_places(shape: tuple[int, int], side: int) -> list[tuple[int, int, str]]:
    """Tiles row by row, each on its part of the grid, then the whole image over all of it."""
    inside = [(r, c) for r in range(side) for c in range(side)]
    cut = [(a, b) for a in range(shape[0]) for b in range(shape[1])]
    tiles = [(a * side + r, b * side + c, f"tile {a},{b}") for a, b in cut for r, c in inside]
    return tiles + [(r * shape[0], c * shape[1], "overview") for r, c in inside]


def test_internvl_tiles_lie_on_one_grid(tmp_path: Path) -> None:
    vision = {**PATCHES, "model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(
        text_config={**LLAMA, "model_type": "qwen2"}, vision_config=vision, image_token_id=4, downsample_ratio=0.5
    )
    pixels = transformers.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=4)
    words = tokenizer("<IMG_CONTEXT>", "<img>", "</img>")
    folder = save(transformers.InternVLForConditionalGeneration(config), tmp_path, words, pixels)
    # In eager: what sdpa rounds differently in the first layer is 2.6e-6 in the second on some processors.
    result = extracted(folder, [LANGUAGE], kernel="eager")
    cut = [pixels(images=[samples()[i].image], crop_to_patches=True)["num_patches"][0] for i in result.order]
    compare_tiles(result, r"model\.vision_tower\.encoder\.layer\.(\d+)\.attention", cut)
    assert len(set(cut)) > 1
    row = result.order.index(1)  # 64 x 28 pixels: two tiles, one above the other, and the whole image
    assert cut[row] == 3
    assert image_places(result, row) == tiled_places((2, 1), 2)
    assert result.places("vision", row) == [p[:2] for p in tiled_places((2, 1), 4)]
    assert result.places("vision", result.order.index(2)) == GRID


def q_former(name: str, language: Mapping[str, object], folder: Path) -> Path:
    """BLIP-2 or InstructBLIP with four queries, saved with its processor."""
    instructed = name.startswith("Instruct")
    reader = {**WORDED, "max_position_embeddings": 64, "encoder_hidden_size": 32, "cross_attention_frequency": 1,
              "use_qformer_text_input": True}  # fmt: skip
    sizes = {"num_query_tokens": 4, "image_token_index": 4}
    config = (transformers.InstructBlipConfig if instructed else transformers.Blip2Config)(
        vision_config=PATCHES, qformer_config=reader, text_config=language, **sizes
    )
    pixels = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32})
    words = [tokenizer("<image>"), *([tokenizer("<image>")] if instructed else [])]
    kind = transformers.InstructBlipProcessor if instructed else transformers.Blip2Processor
    return save(getattr(transformers, name)(config), folder, kind(pixels, *words, num_query_tokens=4))


OPT = {"model_type": "opt", "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
       "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0}  # fmt: skip
T5 = {"model_type": "t5", "vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip
Q_FORMER_RULES = [
    ("vision.self", r"vision_model\.encoder\.layers\.(\d+)\.self_attn", 0),
    ("queries.self", r"qformer\.encoder\.layer\.(\d+)\.attention\.attention", 0),
    ("queries.vision", r"qformer\.encoder\.layer\.(\d+)\.crossattention\.attention", 0),
]


@pytest.mark.parametrize("name", ["Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"])
def test_q_former_stands_between_image_and_language_model(name: str, tmp_path: Path) -> None:
    language = ("joint.self", r"language_model\.model\.decoder\.layers\.(\d+)\.self_attn", 0)
    result = extracted(q_former(name, OPT, tmp_path), [*Q_FORMER_RULES, language])
    assert set(result.run.sites) == {"vision.self", "queries.self", "queries.vision", "joint.self"}
    assert result.kinds("joint", 0)[:7] == [*["query"] * 4, "special", "text", "text"]
    read = ["special", "text", "text", *["padding"] * 4] if name.startswith("Instruct") else []
    assert result.kinds("queries", 0)[: 4 + len(read)] == ["query"] * 4 + read


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_blip_2_with_an_encoder_decoder(kernel: str, tmp_path: Path) -> None:
    t5 = r"language_model\.{}\.block\.(\d+)\.layer\.\d\.{}"
    rules = [
        ("joint.self", t5.format("encoder", "SelfAttention"), 0),
        ("decoder.self", t5.format("decoder", "SelfAttention"), 0),
        ("decoder.joint", t5.format("decoder", "EncDecAttention"), 0),
    ]
    folder = q_former("Blip2ForConditionalGeneration", T5, tmp_path)
    result = extracted(folder, [*Q_FORMER_RULES, *rules], kernel=kernel, bound=BOUNDS[kernel])
    assert result.strings("decoder", 0) == ["<pad>"]


def test_blip_2_retrieval_reads_image_and_text_apart(tmp_path: Path) -> None:
    result = extracted(q_former("Blip2ForImageTextRetrieval", OPT, tmp_path), Q_FORMER_RULES)
    compare_all(result, "text.self", Q_FORMER_RULES[1][1], number=1)
    assert result.strings("text", 0)[:3] == ["<s>", "a", "cat"]


def test_git_reads_the_image_in_front_of_the_text(tmp_path: Path) -> None:
    config = transformers.GitConfig(**{**WORDED, "max_position_embeddings": 64}, vision_config=PATCHES)
    folder = save(transformers.GitForCausalLM(config), tmp_path, tokenizer(), square())
    rules = [
        ("vision.self", r"git\.image_encoder\.vision_model\.encoder\.layers\.(\d+)\.self_attn", 0),
        ("joint.self", r"git\.encoder\.layer\.(\d+)\.attention\.self", 0),
    ]
    result = extracted(folder, rules)
    assert result.kinds("joint", 0)[:20] == ["cls", *["image"] * 16, "special", "text", "text"]
    last = 17 + result.inputs["attention_mask"].sum(1) - 1
    logits = result.loaded.model(**result.inputs).logits[torch.arange(3), last].amax(1)
    np.testing.assert_allclose(result.run.outputs.score.values[0][result.order], logits.detach(), rtol=1e-4)


@pytest.mark.parametrize("also", ["attention_relevance", "attention_grad"])
def test_batches_and_gradients_leave_the_attention_as_it_is(also: str, tmp_path: Path) -> None:
    config = transformers.GitConfig(**{**WORDED, "max_position_embeddings": 64}, vision_config=PATCHES)
    folder = save(transformers.GitForCausalLM(config), tmp_path, tokenizer(), square())
    plain = extract(folder, samples(), spec=EXACT, batch_size=3)
    spec = ExtractSpec(frozenset({"attention", "attention_relevance", also}), encoding="exact")
    slopes = []
    for size in (1, 3):
        run = extract(folder, samples(), spec=spec, batch_size=size)
        for site in plain.sites:
            mine, theirs = run.attention(site).values, plain.attention(site).values
            real = ~np.isnan(mine) & ~np.isnan(theirs)
            np.testing.assert_allclose(mine[real], theirs[real], atol=2e-6)
        slopes.append(run.array("vision.self", also).values)
    np.testing.assert_allclose(slopes[0], slopes[1], atol=1e-5 * np.nanmax(np.abs(slopes[0])))


def test_kosmos_2_queries_stand_for_the_image(tmp_path: Path) -> None:
    text = {"vocab_size": 60, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4,
            "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    config = transformers.Kosmos2Config(text_config=text, vision_config=PATCHES, latent_query_num=4)
    words = tokenizer("<image>", "</image>")
    processor = transformers.Kosmos2Processor(square(), words, num_patch_index_tokens=4)
    rules = [
        ("vision.self", r"vision_model\.model\.encoder\.layers\.(\d+)\.self_attn", 0),
        ("joint.self", r"text_model\.model\.layers\.(\d+)\.self_attn", 0),
    ]
    result = extracted(save(transformers.Kosmos2ForConditionalGeneration(config), tmp_path, processor), rules)
    result.compare("queries.vision", 0, result.own["image_to_text_projection.x_attn", 0])
    assert result.kinds("joint", 0)[:9] == ["special", "special", *["query"] * 4, "special", "text", "text"]
    keys = result.run.plan.sites["queries.vision"].keys
    assert result.kinds(keys, 0) == ["cls", *["image"] * 16, *["query"] * 4]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_mllama_looks_at_tiles(kernel: str, tmp_path: Path) -> None:
    text = {**LLAMA, "model_type": "mllama_text_model", "num_hidden_layers": 3, "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
              "intermediate_size": 64, "vision_output_dim": 64, "image_size": 32, "patch_size": 8, "max_num_tiles": 4,
              "intermediate_layers_indices": [1], "supported_aspect_ratios": ratios}  # fmt: skip
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=4)
    pixels = transformers.MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    processor = transformers.MllamaProcessor(pixels, tokenizer("<|image|>", "<|python_tag|>"))
    rules = [
        ("vision.self", r"model\.vision_model\.transformer\.layers\.(\d+)\.self_attn", 0),
        ("vision.self", r"model\.vision_model\.global_transformer\.layers\.(\d+)\.self_attn", 2),
        ("text.self", r"model\.language_model\.layers\.(\d+)\.self_attn", 0),
        ("text.vision", r"model\.language_model\.layers\.(\d+)\.cross_attn", 0),
    ]
    folder = save(transformers.MllamaForConditionalGeneration(config), tmp_path, processor)
    result = extracted(folder, rules, kernel=kernel, bound=BOUNDS[kernel])
    row = result.order.index(1)  # 64 x 28 pixels: two tiles, one above the other
    assert result.places("vision", row) == GRID + [(r + 4, c) for r, c in GRID]
    assert result.strings("text", row)[:3] == ["<|image|>", "<s>", "the"]
    assert result.run.plan.sites["text.self"].layers == (0, 2)
    assert result.run.plan.sites["text.vision"].layers == (1,)
