"""Vision-language families: every site against the model's own softmax, every token in its place."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.overrides import TorchFunctionMode

from attnscope.extraction import extract
from attnscope.loading import LoadedModel, load_model
from attnscope.quantities import ExtractSpec
from attnscope.run import Run
from attnscope.samples import Sample
from attnscope.testing import check_family
from attnscope.tokens import KINDS

EXACT = ExtractSpec(encoding="exact")
WORDS = "a red green blue cat dog circle square on left of the big small box with two".split()
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
    """Whole words; BOS in front, padding at the end."""
    from tokenizers.processors import TemplateProcessing

    names = {word: i for i, word in enumerate((*SPECIAL, *extra, *WORDS))}
    inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([*SPECIAL, *extra])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
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
        assert error <= 2e-6

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
) -> Extracted:
    """Extract all samples (or ready inputs) in one batch, check the family, and run the model again in eager."""
    loaded = load_model(folder)
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
    result = Extracted(run, inputs, order, own, loaded)
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
