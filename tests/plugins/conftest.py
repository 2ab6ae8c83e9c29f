"""Runs that plugins are tried on: every kind of site with a content that is known, and outputs under conditions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
import xarray as xr
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from attnscope import ExtractSpec, Region, Run, Sample
from attnscope.compatibility.examples import VISION, widened
from attnscope.conditions import Condition
from attnscope.plan import Recipe, RunPlan, SitePlan
from attnscope.run import EXTRACTED, LEFT_OUT
from attnscope.testing import make_run
from attnscope.tokens import KIND_CODES, grid_layout, joined_layout, text_layout

OutputsOf = Callable[[Condition], dict[str, Any]]

GRID = (3, 4)
TEXT = 7
LAYERS = (0, 1)
CHANNELS = 4
SCALE = 0.5
# Patches of the two objects, and of the ground that is too large for one; words of the first two.
OBJECTS = (((0, 0), (0, 1), (1, 0), (1, 1)), ((2, 2), (2, 3)))
WORDS = (2, 4)
FEATURES = {"vision": 12, "text": 10, "joint": 12}
# Site: streams of queries and keys, heads, key heads, whether causal.
SITES = {
    "vision.self": ("vision", "vision", 4, 2, False),
    "text.self": ("text", "text", 2, 2, True),
    "text.vision": ("text", "vision", 2, 2, False),
    "joint.self": ("joint", "joint", 2, 2, False),
}


@dataclass
class Known:
    """A run and what it was made from, by (site, layer) or stream."""

    run: Run
    weights: dict[tuple[str, int], dict[str, np.ndarray]] = field(default_factory=dict)
    hidden: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    attention: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()


def _layouts(lengths: "tuple[int, ...]"):  # type: ignore[no-untyped-def]
    vision = grid_layout(len(lengths), *GRID, ("cls", "register"))
    kind = np.full((len(lengths), TEXT), KIND_CODES["padding"])
    strings = [[f"w{t}" if t < length else "" for t in range(TEXT)] for length in lengths]
    for row, length in enumerate(lengths):
        kind[row, :length] = KIND_CODES["text"]
        kind[row, 0], kind[row, length - 1] = KIND_CODES["cls"], KIND_CODES["special"]
    text = text_layout(strings, kind)
    patches = grid_layout(len(lengths), *GRID, ())
    return {"vision": vision, "text": text, "joint": joined_layout(text, patches)}


def _shares(stream: str, tokens: int) -> np.ndarray:
    """(region, token): two objects, and a ground that covers all but the first column."""
    shares = np.zeros((3, tokens), np.float32)
    first = {"vision": 2, "joint": TEXT}.get(stream)
    if first is not None:
        for region, patches in enumerate(OBJECTS):
            for row, column in patches:
                shares[region, first + row * GRID[1] + column] = 1
        shares[2, first:] = np.tile(np.arange(GRID[1]) > 0, GRID[0])
    if stream in ("text", "joint"):
        shares[2, :TEXT] = np.nan
        for region, word in enumerate(WORDS):
            shares[region, word] = 1
    return shares


@pytest.fixture(scope="session")
def known_run() -> Callable[..., Known]:
    """A function that makes a run of four samples: class token, register, ragged padded text, two words and patches of
    objects, a joint stream, a cross-attention site of unlike features, grouped heads, causal text, dead query rows; the
    last sample but one is left out.
    """

    def make(
        samples: int = 4,
        *,
        unit: int = 2,
        bias: float = 1.0,
        plain: bool = True,
        regions: bool = True,
        sites: tuple[str, ...] = tuple(SITES),
        location: str | None = None,
        encoding: str = "exact",
        seed: int = 0,
    ) -> Known:
        generator = np.random.default_rng(seed)
        lengths = tuple(TEXT - n % 2 for n in range(samples))
        sizes = {"vision": 2 + GRID[0] * GRID[1], "text": TEXT, "joint": TEXT + GRID[0] * GRID[1]}
        plans = {name: _site_plan(name, sizes) for name in sites}
        streams = {s: sizes[s] for name in sites for s in SITES[name][:2]}
        plan = RunPlan(streams, plans, unit=unit, thumbnails=True, regions=3 if regions else 0)
        quantities = frozenset({"attention", "query", "key", "value", "weights"})
        spec = ExtractSpec(quantities, encoding=encoding, form="dense")
        listed = [Sample(f"s{n}", text="a text", regions=(Region(),) * 3 if regions else ()) for n in range(samples)]
        run = Run.create(location, plan, spec, listed, {"model": "made", "family": "made"})
        known = Known(run, lengths=lengths)
        layouts = _layouts(lengths)
        for stream, tokens in streams.items():
            for layer in LAYERS:
                known.hidden[stream, layer] = generator.normal(size=(samples, tokens, FEATURES[stream]))
        for block in run.blocks():
            at = slice(block.start, block.stop)
            for stream, tokens in streams.items():
                part = layouts[stream]
                run.write_tokens(
                    stream, block, type(part)(*(getattr(part, n)[at] for n in ("kind", "text", "row", "column")))
                )
                if regions:
                    shares = np.stack([_shares(stream, tokens)] * len(block))
                    run.write_block(f"{stream}/region_share", block, shares)
        for name in sites:
            _write_site(known, name, generator, layouts, bias)
            run.describe_weights(name, plain=plain, rotary=not plain)
        for block in run.blocks():
            pictures = generator.integers(0, 255, (len(block), 224, 224, 3), dtype=np.uint8)
            run.write_block("samples/thumbnail", block, pictures)
            for part_name in ("image_digest", "reason"):
                run.write_block(f"samples/{part_name}", block, np.full(len(block), "", object))
            status = [LEFT_OUT if n == samples - 2 and samples > 3 else EXTRACTED for n in block]
            run.commit(block, np.array(status))
        return known

    return make


def _site_plan(name: str, sizes: dict[str, int]) -> SitePlan:
    queries, keys, heads, kv_heads, _ = SITES[name]
    return SitePlan(
        queries=queries,
        keys=keys,
        layers=LAYERS,
        modules=tuple(f"{name}.{n}" for n in LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        query_tokens=sizes[queries],
        key_tokens=sizes[keys],
        channels=CHANNELS,
        value_channels=CHANNELS,
        recipes=(Recipe(SCALE),) * len(LAYERS),
    )


def _write_site(known: Known, name: str, generator, layouts, bias: float) -> None:  # type: ignore[no-untyped-def]
    queries, keys, heads, kv_heads, causal = SITES[name]
    run = known.run
    for layer in LAYERS:
        weights = {
            "query": generator.normal(size=(heads, CHANNELS, FEATURES[queries])),
            "key": generator.normal(size=(kv_heads, CHANNELS, FEATURES[keys])),
            "query_bias": bias * generator.normal(size=(heads, CHANNELS)),
            "key_bias": bias * generator.normal(size=(kv_heads, CHANNELS)),
        }
        weights = {n: w.astype(np.float32) for n, w in weights.items()}
        known.weights[name, layer] = weights
        run.write_weights(name, layer, weights)
        sides = {}
        for side, stream in (("query", queries), ("key", keys)):
            projected = np.einsum("stf,hcf->shtc", known.hidden[stream, layer], weights[side].astype(float))
            sides[side] = projected + weights[f"{side}_bias"][None, :, None]
        repeated = np.repeat(sides["key"], heads // kv_heads, axis=1)
        scores = SCALE * sides["query"] @ np.swapaxes(repeated, -1, -2)
        allowed = np.broadcast_to((layouts[keys].kind != KIND_CODES["padding"])[:, None, None, :], scores.shape).copy()
        if causal:
            allowed &= np.tri(scores.shape[-2], dtype=bool)
        valid = np.ones(scores.shape[:1] + scores.shape[2:3], bool)
        if name == "text.self":
            allowed[:, :, 1] = False
            valid[:, 1] = False
        scores = np.where(allowed, scores, -np.inf)
        shifted = np.exp(scores - np.where(np.isfinite(scores.max(-1)), scores.max(-1), 0)[..., None])
        total = shifted.sum(-1, keepdims=True)
        attention = np.divide(shifted, total, out=np.zeros_like(shifted), where=total > 0)
        known.attention[name, layer] = attention
        value = generator.normal(size=sides["key"].shape)
        for block in run.blocks():
            at = slice(block.start, block.stop)
            for quantity, array in (("query", sides["query"]), ("key", sides["key"]), ("value", value)):
                run.write_layer(name, quantity, block, layer, array[at].astype(np.float32))
            compact = run.spec.encoding == "compact"
            stored = np.sqrt(attention[at]) * 255 if compact else attention[at]
            run.write_layer(name, "attention", block, layer, stored.round().astype(np.uint8) if compact else stored)
            run.write_layer(name, "query_valid", block, layer, valid[at])


@pytest.fixture
def run_with_outputs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A function that makes a run whose outputs under each condition are those that a function gives.

    The function gives `changed`, and what else it likes of `score`, `loss`, `correct`, `asked`, `content`, each
    (sample,), or (sample, phrase) for a condition by phrase.
    """

    def make(samples: int, outputs_of: OutputsOf, phrases: int = 1) -> Run:
        run = make_run(samples=samples, quantities=frozenset({"attention", "attention_relevance", "score"}))

        def outputs_under(self: Run, conditions: list[Condition]) -> xr.Dataset:
            by_phrase = any(c.by_phrase for c in conditions)
            shape = (samples, phrases) if by_phrase else (samples,)
            fills = {"score": np.nan, "loss": np.nan, "correct": np.nan, "asked": 1, "content": 8}
            found = {}
            for name, fill in {**fills, "changed": 0}.items():
                rows = [np.asarray(outputs_of(c).get(name, fill), float) for c in conditions]
                rows = [r[:, None] if by_phrase and r.ndim == 1 else r for r in rows]
                found[name] = np.stack([np.broadcast_to(r, shape) for r in rows])
            dims = ("condition", "sample", "phrase")[: 1 + len(shape)]
            return xr.Dataset({name: (dims, values) for name, values in found.items()})

        monkeypatch.setattr(Run, "outputs_under", outputs_under)
        monkeypatch.setattr(Run, "_require_conditions", lambda self, spec, asker: None)
        return run

    return make


# -- tiny models that write --------------------------------------------------------------------------------------------

SPOKEN = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "a", "cat", "and", "the", "dog", "on", "box", "two", "red", "big"]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = {
    "vocab_size": len(SPOKEN), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, **SPECIAL,
}  # fmt: skip


def _speech() -> hf.PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPOKEN)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, extra_special_tokens=["<image>"], **roles)


def _llama(folder: Path) -> None:
    widened(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), 0.3).save_pretrained(folder)
    _speech().save_pretrained(folder)


def _bart(folder: Path) -> None:
    config = hf.BartConfig(
        vocab_size=len(SPOKEN), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, **SPECIAL,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    widened(hf.BartForConditionalGeneration(config), 0.3).save_pretrained(folder)
    _speech().save_pretrained(folder)


def _llava(folder: Path) -> None:
    tower = {**VISION, "image_size": 32, "patch_size": 8, "model_type": "clip_vision_model"}
    config = hf.LlavaConfig(text_config={**LLAMA, "model_type": "llama"}, vision_config=tower, image_token_index=4)
    model = widened(hf.LlavaForConditionalGeneration(config), 0.3)
    model.generation_config.suppress_tokens = [4]
    model.save_pretrained(folder)
    pixels = hf.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    hf.LlavaProcessor(
        pixels, _speech(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)


_WRITERS = {"llama": _llama, "bart": _bart, "llava": _llava}


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the folder of a tiny model that writes: 'llama', 'bart' or 'llava', with wide weights."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            _WRITERS[name](made[name])
        return made[name]

    return folder


@pytest.fixture
def asked() -> list[Sample]:
    """Two samples of noise, with a short and a longer text of the words that writers know."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    texts = ("a cat", "the big dog and a red cat")
    return [
        Sample(f"s{i}", image=Image.fromarray(p), text=t) for i, (p, t) in enumerate(zip(pixels, texts, strict=True))
    ]
