"""Relevance of tiny models of every wiring against equations 5 to 11 written out with loops over an eager backward."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import attnscope
from attnscope.checking import check_run
from attnscope.compatibility import joint_models
from attnscope.compatibility.examples import TEXT, VISION, image, numbers, text, widened
from attnscope.families.scores import written_logits
from attnscope.loading import ModelError, load_model
from attnscope.quantities import ExtractSpec
from attnscope.reference.learners import mapper_config
from attnscope.reference.mapper import MapperForConditionalGeneration, MapperForQuestionAnswering
from attnscope.run import Run, open_run
from attnscope.samples import Sample
from attnscope_relevance import Relevance, reading, walking

Writer = Callable[[str], Path]
Maps = list[tuple[str, np.ndarray, np.ndarray]]
ALL = ("relevance", "rollout", "attention", "gradcam", "gradient")


class Spy(TorchFunctionMode):
    """Keeps every softmax of a forward in the graph, with the name of the module that ran it."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.seen: list[tuple[str, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.softmax, torch.Tensor.softmax, functional.softmax):
            result.retain_grad()
            self.seen.append((self.running[-1], result))
        return result


def spied(model: torch.nn.Module, inputs: dict[str, torch.Tensor], score: Callable[[Any], torch.Tensor]) -> Maps:
    """(module, attention, gradient) of every call in order, (sample, head, query, key) float64 each."""
    spy, handles = Spy(), []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: spy.running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: (spy.running.pop(), None)[1]))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with spy:
        outputs = model(**inputs)
    for handle in handles:
        handle.remove()
    score(outputs).sum().backward()
    found = []
    for name, attention in spy.seen:
        gradient = torch.zeros_like(attention) if attention.grad is None else attention.grad
        found.append((name, attention.detach().double().numpy(), gradient.double().numpy()))
    return found


def equation_5(attention: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """One sample (head, query, key): the positive part before the mean over heads, with loops."""
    heads, queries, keys = attention.shape
    total = np.zeros((queries, keys))
    for h in range(heads):
        for i in range(queries):
            for j in range(keys):
                total[i, j] += max(0.0, attention[h, i, j] * gradient[h, i, j])
    return total / heads


def normal(relevance: np.ndarray) -> np.ndarray:
    """Equations 8 and 9; a row that gained nothing stays the identity's."""
    result = np.eye(len(relevance))
    gained = relevance - np.eye(len(relevance))
    for i, row in enumerate(gained):
        if row.sum() > 0:
            result[i] = result[i] + row / row.sum()
    return result


def chain(maps: list[np.ndarray]) -> np.ndarray:
    """Equation 6 over layers."""
    total = np.eye(len(maps[0]))
    for one in maps:
        total = total + one @ total
    return total


def rolled(maps: list[np.ndarray]) -> np.ndarray:
    """Rollout over layers."""
    total = np.eye(len(maps[0]))
    for one in maps:
        mixed = one + np.eye(len(one))
        total = mixed / mixed.sum(-1, keepdims=True) @ total
    return total


def extracted(model: torch.nn.Module, inputs: dict[str, torch.Tensor], target: str | int | None, **options: Any) -> Any:
    analyser = Relevance(target=target, methods=ALL, **options)
    run = attnscope.extract(model, [inputs], [analyser], spec=ExtractSpec(frozenset({"score"})))
    return attnscope.analyse(run, analyser, save=False)


def assert_close(found: Any, stream: str, sample: int, expected: dict[str, np.ndarray]) -> None:
    for name, row in expected.items():
        mine = found[name].sel(stream=stream).isel(sample=sample).values[: len(row)]
        np.testing.assert_allclose(mine, row, rtol=1e-5, atol=1e-5 * np.abs(row).max(), err_msg=f"{stream} {name}")


def last_of(attention: np.ndarray, gradient: np.ndarray) -> dict[str, np.ndarray]:
    """What the methods of the last layer make of one sample's map (head, query, key); what is masked has no part."""
    weight = (gradient * (attention > 0)).mean(axis=(1, 2), keepdims=True)
    return {
        "attention": attention.mean(0),
        "gradcam": np.clip((attention * weight).mean(0), 0, None),
        "gradient": np.clip((attention * gradient).mean(0), 0, None),
    }


def single_stream(maps: Maps, sample: int, row: int, keep: slice | np.ndarray) -> dict[str, np.ndarray]:
    """All methods for one row of a model of one stream."""
    ones = [(a[sample][:, keep][..., keep], g[sample][:, keep][..., keep]) for _, a, g in maps]
    found = {
        "relevance": chain([equation_5(a, g) for a, g in ones])[row],
        "rollout": rolled([a.mean(0) for a, _ in ones])[row],
    }
    return found | {name: values[row] for name, values in last_of(*ones[-1]).items()}


def test_vit() -> None:
    model = widened(hf.ViTForImageClassification._from_config(hf.ViTConfig(**VISION), attn_implementation="eager"))
    inputs = image()
    found = extracted(model, inputs, 1)
    maps = spied(model, inputs, lambda outputs: outputs.logits[:, 1])
    for sample in range(2):
        assert_close(found, "vision", sample, single_stream(maps, sample, 0, slice(None)))
    assert found.attrs["readout"] == "vision: the cls token that the target depends on"
    # Only CLS has a gradient in the last layer.
    assert (maps[-1][2][:, :, 1:] == 0).all()


def test_clip_reads_the_end_token_of_texts_of_several_lengths() -> None:
    model = joint_models.EXAMPLES["clip"].build("eager")
    inputs = joint_models.EXAMPLES["clip"].inputs()
    model.config.text_config.eos_token_id = 2
    model.text_model.eos_token_id = 2
    found = extracted(model, inputs, "similarity")
    maps = spied(model, inputs, lambda outputs: outputs.logits_per_image.diagonal())
    texts = [m for m in maps if "text" in m[0]]
    images = [m for m in maps if "vision" in m[0]]
    ends = inputs["input_ids"].argmax(1).tolist()
    for sample, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        assert_close(found, "vision", sample, single_stream(images, sample, 0, slice(None)))
        row = next(i for i in range(9) if texts[-1][2][sample][:, i].any())
        assert row in (ends[sample], 0)
        if row < length:
            assert_close(found, "text", sample, single_stream(texts, sample, row, slice(length)))


@pytest.mark.parametrize("name", ["vilt", "visual_bert"])
def test_models_of_one_stream_of_text_and_image(name: str) -> None:
    inputs = joint_models.EXAMPLES[name].inputs()
    if name == "vilt":
        config = hf.ViltConfig(**(TEXT | VISION), num_labels=3)
        model = widened(hf.ViltForQuestionAnswering._from_config(config, attn_implementation="eager"))
        # One patch each, so that the order that ViLT draws is no matter.
        inputs |= {"pixel_values": inputs["pixel_values"][..., :4, :4]}
    else:
        config = hf.VisualBertConfig(**TEXT, visual_embedding_dim=10, num_labels=3)
        model = widened(hf.VisualBertForVisualReasoning._from_config(config, attn_implementation="eager"))
    found = extracted(model, inputs, 2)
    maps = spied(model, inputs, lambda outputs: outputs.logits[:, 2])
    for sample, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        tokens = np.arange(maps[0][1].shape[-1])
        real = (tokens < length) | (tokens >= 9)
        mine = single_stream(maps, sample, 0, real)
        kept = found.isel(sample=[sample], token=np.flatnonzero(real))
        assert_close(kept, "joint", 0, mine)
        assert found["relevance"].sel(stream="joint").isel(sample=sample).values[~real].size == (~real).sum()
        assert np.isnan(found["relevance"].sel(stream="joint").isel(sample=sample).values[~real]).all()


def two_streams(maps: Maps, sample: int, length: int) -> dict[str, np.ndarray]:
    """The authors' walk over LXMERT with four matrices: text t, image i."""

    def cam(name: str, number: int = 0) -> np.ndarray:
        a, g = [(a, g) for n, a, g in maps if n == name][number]
        return equation_5(clipped(a, name, number)[sample], clipped(g, name, number)[sample])

    def clipped(values: np.ndarray, name: str, number: int) -> np.ndarray:
        rows = length if values.shape[2] == 9 else None
        columns = length if values.shape[3] == 9 else None
        return values[:, :, :rows, :columns]

    names = list(dict.fromkeys(n for n, _, _ in maps))
    tt, ii, ti, it = np.eye(length), np.eye(6), np.zeros((length, 6)), np.zeros((6, length))
    for name in names:
        if ".layer." in name:
            tt = tt + cam(name) @ tt
        if "r_layers" in name:
            ii = ii + cam(name) @ ii
    blocks = sorted({n.split("x_layers.")[1].split(".")[0] for n in names if "x_layers" in n})
    for block in blocks:
        cross, lang, visn = (
            next(n for n in names if f"x_layers.{block}.{part}" in n)
            for part in ("visual_attention", "lang_self_att", "visn_self_att")
        )
        text_over, image_over = cam(cross, 0), cam(cross, 1)
        t_bar, i_bar = normal(tt), normal(ii)
        add_ti = t_bar.T @ text_over @ i_bar
        add_tt = text_over @ it
        add_it = i_bar.T @ image_over @ t_bar
        add_ii = image_over @ ti
        tt, ti, it, ii = tt + add_tt, ti + add_ti, it + add_it, ii + add_ii
        one = cam(lang)
        tt, ti = tt + one @ tt, ti + one @ ti
        one = cam(visn)
        ii, it = ii + one @ ii, it + one @ it
    return {"text": tt[0], "vision": ti[0]}


def test_lxmert_whose_streams_look_at_each_other() -> None:
    config = joint_models.EXAMPLES["lxmert"].config()
    config.num_qa_labels = 4
    model = widened(hf.LxmertForQuestionAnswering._from_config(config, attn_implementation="eager"))
    inputs = joint_models.EXAMPLES["lxmert"].inputs()
    found = extracted(model, inputs, 3)
    maps = spied(model, inputs, lambda outputs: outputs.question_answering_score[:, 3])
    assert found.attrs["readout"].startswith("text: the")
    for sample, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for stream, row in two_streams(maps, sample, length).items():
            assert_close(found, stream, sample, {"relevance": row})
        cross = [a for n, a, _ in maps if "visual_attention" in n][-2][sample].mean(0)[:length]
        own = {
            "t": [a[sample].mean(0)[:length, :length] for n, a, _ in maps if ".layer." in n or "lang_self" in n],
            "i": [a[sample].mean(0) for n, a, _ in maps if "r_layers" in n or "visn_self" in n],
        }
        assert_close(found, "vision", sample, {
            "attention": cross[0],
            "rollout": (rolled(own["t"]).T @ cross @ rolled(own["i"]))[0],
        })  # fmt: skip
        assert_close(found, "text", sample, {"rollout": rolled(own["t"])[0], "attention": own["t"][-1][0]})


def encoder_decoder(
    encoder: list[np.ndarray], decoder: list[tuple[np.ndarray, np.ndarray]], row: int
) -> tuple[np.ndarray, np.ndarray]:
    """The authors' walk over an encoder and a decoder that looks at it: rows of R_qq and R_qi."""
    ii = chain(encoder)
    qq, qi = np.eye(len(decoder[0][0])), np.zeros((len(decoder[0][0]), len(ii)))
    for own, across in decoder:
        qq, qi = qq + own @ qq, qi + own @ qi
        qi = qi + normal(qq).T @ across @ normal(ii)
    return qq[row], qi[row]


def test_detr_whose_queries_look_at_the_image() -> None:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = hf.DetrConfig(
        backbone_config=backbone, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, num_queries=5, num_labels=3,
        use_timm_backbone=False, use_pretrained_backbone=False,
    )  # fmt: skip
    model = widened(hf.DetrForObjectDetection._from_config(config, attn_implementation="eager"))
    inputs = {"pixel_values": numbers(2, 3, 96, 64), "pixel_mask": torch.ones(2, 96, 64, dtype=torch.long)}
    found = extracted(model, inputs, "token:2")
    maps = spied(model, inputs, lambda outputs: outputs.logits[:, 2].amax(-1))
    for sample in range(2):
        cams = {name: equation_5(a[sample], g[sample]) for name, a, g in maps}
        encoder = [cams[n] for n in cams if "encoder.layers" in n and "decoder" not in n]
        decoder = [
            (cams[n], next(cams[m] for m in cams if f"decoder.layers.{layer}.encoder_attn" in m))
            for layer in range(2)
            for n in cams
            if f"decoder.layers.{layer}.self_attn" in n
        ]
        queries, places = encoder_decoder(encoder, decoder, row=2)
        assert_close(found, "queries", sample, {"relevance": queries})
        assert_close(found, "vision", sample, {"relevance": places})


def test_blip_whose_text_encoder_looks_at_the_image() -> None:
    config = joint_models._two_towers(hf.BlipConfig, text={"encoder_hidden_size": 32})
    model = widened(hf.BlipForImageTextRetrieval._from_config(config, attn_implementation="eager"))
    inputs = {n: t[:1] for n, t in (text() | image()).items()}
    found = extracted(model, inputs, "matching")
    maps = spied(model, inputs, lambda outputs: outputs.itm_score[:, 1] - outputs.itm_score[:, 0])
    cams = {name: equation_5(a[0], g[0]) for name, a, g in maps}
    encoder = [cams[n] for n in cams if "vision_model" in n]
    selves = [cams[n] for n in cams if "text_encoder" in n and "crossattention" not in n]
    across = [cams[n] for n in cams if "crossattention" in n]
    words, patches = encoder_decoder(encoder, list(zip(selves, across, strict=True)), row=0)
    assert_close(found, "text", 0, {"relevance": words})
    assert_close(found, "vision", 0, {"relevance": patches})


def test_causal_decoder_reads_the_last_token() -> None:
    config = hf.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = widened(hf.GPT2LMHeadModel._from_config(config, attn_implementation="eager"))
    inputs = text()
    for target, row in (("last_token", -1), ("word:3", 2)):
        found = extracted(model, inputs, target)
        lengths = inputs["attention_mask"].sum(1).tolist()

        def score(outputs: Any, target: str = target, lengths: list[int] = lengths) -> torch.Tensor:
            if target == "word:3":
                return outputs.logits[torch.arange(2), 2, inputs["input_ids"][:, 3]]
            return torch.stack([outputs.logits[i, n - 1].amax() for i, n in enumerate(lengths)])

        maps = spied(model, inputs, score)
        for sample, length in enumerate(lengths):
            at = length - 1 if row == -1 else row
            assert_close(found, "text", sample, single_stream(maps, sample, at, slice(length)))
            # What comes later has no part in it.
            assert (found["relevance"].sel(stream="text").isel(sample=sample).values[at + 1 : length] == 0).all()


def test_start_layer_begins_later() -> None:
    model = widened(hf.ViTForImageClassification._from_config(hf.ViTConfig(**VISION), attn_implementation="eager"))
    inputs = image()
    found = extracted(model, inputs, 1, start_layer=-1)
    maps = spied(model, inputs, lambda outputs: outputs.logits[:, 1])
    assert_close(found, "vision", 0, single_stream(maps[-1:], 0, 0, slice(None)))


@pytest.mark.parametrize("weighting", ["norm", "gradient"])
def test_weights_of_a_vit_are_those_of_its_residual_sums(weighting: str) -> None:
    model = widened(hf.ViTForImageClassification._from_config(hf.ViTConfig(**VISION), attn_implementation="eager"))
    inputs = image()
    analyser = Relevance(target=1, methods=("relevance",), weighting=weighting)  # type: ignore[arg-type]
    run = attnscope.extract(model, [inputs], [analyser], spec=ExtractSpec(frozenset({"score"})))
    found = attnscope.analyse(run, analyser, save=False)
    maps = spied(model, inputs, lambda outputs: outputs.logits[:, 1])
    # Everything again with the two terms of each sum kept: a block's input and what its attention's projection gives.
    terms: list[torch.Tensor] = []
    handles = []
    for block in model.vit.layers:
        handles.append(block.register_forward_pre_hook(lambda m, a: terms.append(a[0]) or a[0].retain_grad()))
        handles.append(
            block.attention.register_forward_hook(lambda m, a, out: terms.append(out[0]) or out[0].retain_grad())
        )
    model.vit.embeddings.register_forward_hook(lambda m, a, out: out.requires_grad_())
    model(**inputs).logits[:, 1].sum().backward()
    for handle in handles:
        handle.remove()
    # A block's input feeds the norm as well; the slope of the sum is that of what the attention adds to it.
    for sample in range(2):
        total = np.eye(17)
        for layer, (_, a, g) in enumerate(maps):
            x, o = (terms[2 * layer + n].detach().double().numpy()[sample] for n in (0, 1))
            slope = terms[2 * layer + 1].grad.double().numpy()[sample]
            if weighting == "norm":
                one, other = np.linalg.norm(x, axis=-1), np.linalg.norm(o, axis=-1)
            else:
                one, other = (np.clip(slope * t, 0, None).mean(-1) for t in (x, o))
            kept = np.where(one + other > 0, 2 * one / np.where(one + other > 0, one + other, 1), 1)
            stored = run.array("vision.self", f"residual_{weighting}").isel(sample=sample, layer=layer).values
            np.testing.assert_allclose(stored, kept, rtol=1e-4)
            total = kept[:, None] * total + (2 - kept)[:, None] * (equation_5(a[sample], g[sample]) @ total)
        assert_close(found, "vision", sample, {"relevance": total[0]})


@pytest.mark.parametrize("name", ["lxmert", "bert", "blip", "gpt2", "t5", "clip"])
def test_residual_sums_are_found_in_every_layer(name: str) -> None:
    if name == "blip":
        config = joint_models._two_towers(hf.BlipConfig, text={"encoder_hidden_size": 32})
        model = widened(hf.BlipForImageTextRetrieval._from_config(config, attn_implementation="eager"))
        inputs = {n: t[:1] for n, t in (text() | image()).items()}
    elif name in ("lxmert", "clip"):
        example = joint_models.EXAMPLES[name]
        model, inputs = example.build("eager"), example.inputs()
    elif name == "t5":
        config = hf.T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = widened(hf.T5ForConditionalGeneration._from_config(config, attn_implementation="eager"))
        inputs = text() | {"decoder_input_ids": text()["input_ids"][:, :4]}
    else:
        configs = {"bert": hf.BertConfig(**TEXT), "gpt2": hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)}
        classes = {"bert": hf.BertModel, "gpt2": hf.GPT2LMHeadModel}
        model = widened(classes[name]._from_config(configs[name], attn_implementation="eager"))
        inputs = text()
    analyser = Relevance(methods=("relevance",), weighting="norm")
    run = attnscope.extract(model, [inputs], [analyser], spec=ExtractSpec(frozenset({"score"})))
    for site in run.sites:
        shares = run.array(site, "residual_norm").values
        assert np.isfinite(shares).any(axis=(0, 2)).all(), site
        assert ((shares >= 0) & (shares <= 2) | np.isnan(shares)).all()
        assert np.nanstd(shares) > 1e-3
    result = attnscope.analyse(run, analyser, save=False)
    assert np.isfinite(result["relevance"]).any()


# -- each written token as a target ------------------------------------------------------------------------------------

MOST = 4
EACH = Relevance(target="generated", methods=ALL)


def each_written(folder: Path, samples: list[Sample], out: str | None = None, **options: Any) -> Run:
    spec = ExtractSpec(frozenset({"score"}))
    return attnscope.extract(folder, samples, [EACH], out, spec=spec, generate=MOST, **options)


def prefixes(folder: Path, sample: Sample) -> list[tuple[int, Maps]]:
    """For each token that an eager model writes, its place, and the maps of a run over what is before it."""
    loaded = load_model(folder, attn_implementation="eager")
    name = "decoder_input_ids" if loaded.config.is_encoder_decoder else "input_ids"
    inputs = loaded.family.encode([sample], loaded)
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    ids = loaded.model.generate(**given, max_new_tokens=MOST, do_sample=False)
    start = 1 if loaded.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    found = []
    for place in range(start, ids.shape[1]):
        one = {**inputs, name: ids[:, :place]}
        if "decoder_attention_mask" in one or name == "input_ids":
            one[name.replace("input_ids", "attention_mask")] = torch.ones_like(one[name])
        maps = spied(loaded.model, one, lambda outputs, place=place: outputs.logits[:, -1, ids[0, place]])
        found.append((place, maps))
    return found


def assert_each_close(found: Any, stream: str, at: tuple[int, int], expected: dict[str, np.ndarray]) -> None:
    for name, row in expected.items():
        mine = found[f"each_{name}"].sel(stream=stream).isel(sample=at[0], answer=at[1]).values
        limits = {"rtol": 1e-5, "atol": 1e-5 * np.abs(row).max()}
        np.testing.assert_allclose(mine[: len(row)], row, err_msg=f"{stream} {name}", **limits)
        # What was written later has no part in it.
        assert not np.nan_to_num(mine[len(row) :]).any()


@pytest.mark.parametrize(
    ("model", "stream", "pattern"), [("llama", "text", "self_attn"), ("llava", "joint", "language")]
)
def test_each_token_that_a_decoder_writes_is_what_a_run_over_its_prefix_says(
    model: str, stream: str, pattern: str, writer: Writer, asked: list[Sample]
) -> None:
    folder = writer(model)
    run = each_written(folder, asked)
    found = attnscope.analyse(run, EACH, save=False)
    for sample, one in enumerate(asked):
        steps = prefixes(folder, one)
        assert len(steps) >= 2
        for answer, (place, maps) in enumerate(steps):
            mine = [m for m in maps if pattern in m[0]]
            assert_each_close(found, stream, (sample, answer), single_stream(mine, 0, place - 1, slice(None)))
            if model == "llava":
                # The image encoder has a gradient as well; its last layer isn't read: CLS stands for it.
                tower = [equation_5(a[0], g[0]) for n, a, g in maps if "vision" in n]
                assert tower[0].any()
                assert_each_close(found, "vision", (sample, answer), {"relevance": chain(tower)[0]})
        length = steps[-1][0] + 1
        mean = found["each_relevance"].sel(stream=stream).isel(sample=sample).values[: len(steps)].mean(0)[:length]
        np.testing.assert_allclose(
            found["relevance"].sel(stream=stream).isel(sample=sample).values[:length], mean, rtol=1e-5
        )


def test_each_token_that_a_decoder_beside_an_encoder_writes(writer: Writer, asked: list[Sample]) -> None:
    folder = writer("bart")
    run = each_written(folder, asked)
    found = attnscope.analyse(run, EACH, save=False)
    assert found.attrs["readout"] == "decoder: the token before each written one"
    for sample, one in enumerate(asked):
        steps = prefixes(folder, one)
        assert len(steps) >= 2
        for answer, (place, maps) in enumerate(steps):
            cams = {name: equation_5(a[0], g[0]) for name, a, g in maps}
            encoder = [cams[n] for n in cams if ".encoder.layers" in n]
            own = [cams[n] for n in cams if ".decoder.layers" in n and n.endswith("self_attn")]
            across = [cams[n] for n in cams if "encoder_attn" in n]
            mine, theirs = encoder_decoder(encoder, list(zip(own, across, strict=True)), row=place - 1)
            assert_each_close(found, "decoder", (sample, answer), {"relevance": mine})
            assert_each_close(found, "text", (sample, answer), {"relevance": theirs})
            last = next(
                (a[0], g[0]) for n, a, g in reversed(maps) if ".decoder.layers" in n and n.endswith("self_attn")
            )
            kept = {name: values[place - 1] for name, values in last_of(*last).items()}
            assert_each_close(found, "decoder", (sample, answer), kept)


def test_the_score_of_what_was_written_is_its_mean_logit_and_its_words_are_told(
    writer: Writer, asked: list[Sample]
) -> None:
    folder = writer("llama")
    run = each_written(folder, asked)
    found = attnscope.analyse(run, EACH, save=False)
    loaded = load_model(folder)
    for sample, one in enumerate(asked):
        inputs = loaded.family.encode([one], loaded)
        given = inputs["input_ids"].shape[1]
        ids = loaded.model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
        logits = loaded.model(ids).logits[0, given - 1 : -1].gather(-1, ids[0, given:, None]).mean()
        np.testing.assert_allclose(run.outputs["score"].values[0, sample], logits.detach(), rtol=1e-5)
        said = [w for w in found["answer_text"].values[sample].tolist() if w]
        assert said == loaded.tokenizer.convert_ids_to_tokens(ids[0, given:].tolist())
        # Samples that wrote fewer tokens have nothing for the others.
        assert np.isnan(found["each_relevance"].values[0, sample, len(said) :]).all()
    assert "each written token" in attnscope.render(run, [found])


def test_written_tokens_are_weighted_each_by_its_own_gradient(writer: Writer, asked: list[Sample]) -> None:
    analyser = Relevance(target="generated", methods=("relevance",), weighting="gradient")
    spec = ExtractSpec(frozenset({"score"}))
    run = attnscope.extract(writer("llama"), asked[:1], [analyser], spec=spec, generate=MOST)
    found = attnscope.analyse(run, analyser, save=False)
    shares = run.array("text.self", "answer_residual").values[0]
    # The logit of a written token doesn't depend on what stands behind it.
    maps = run.array("text.self", "answer_relevance").values[0]
    given = 2
    for answer in range(int((found["answer_text"].values[0] != "").sum())):
        row = np.eye(maps.shape[-1])[given + answer - 1]
        for layer in reversed(range(len(maps))):
            kept = shares[layer, answer].astype(float)
            row = row * kept + (row * (2 - kept)) @ np.nan_to_num(maps[layer, answer].astype(float))
        np.testing.assert_allclose(
            np.nan_to_num(found["each_relevance"].values[0, 0, answer]), row, rtol=1e-5, atol=1e-6
        )
        assert not (shares[:, answer, given + answer :] != 1).any()


def test_written_tokens_are_explained_without_a_gradient_too(writer: Writer, asked: list[Sample]) -> None:
    """Rollout and attention of the row before each token, from one map for all of them."""
    plain = Relevance(target="generated", methods=("rollout", "attention"))
    spec = ExtractSpec(frozenset({"score"}))
    run = attnscope.extract(writer("llama"), asked, [plain], spec=spec, generate=MOST)
    assert "answer_relevance" not in run.quantities("text.self")
    found = attnscope.analyse(run, plain, save=False)
    whole = attnscope.analyse(each_written(writer("llama"), asked), EACH, save=False)
    for name in ("each_rollout", "each_attention", "rollout"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-6)
    silent = attnscope.extract(writer("llama"), asked, [Relevance(methods=("rollout",))], spec=spec)
    with pytest.raises(ValueError, match="holds nothing that the model wrote"):
        plain.analyse(silent)


def test_maps_of_written_tokens_are_checked_grown_and_read_back(
    writer: Writer, asked: list[Sample], tmp_path: Path
) -> None:
    long, short = reversed(asked)
    folder = writer("llama")
    out = str(tmp_path / "run.zarr")
    each_written(folder, [long], out, grow=True)
    each_written(folder, [long, short], out, grow=True)
    run = open_run(out)
    assert check_run(run).faults == ()
    whole = each_written(folder, [long, short])
    for name in ("answer_relevance", "answer_gradcam", "answer_gradient"):
        stored, size = run.array("text.self", name), whole.plan.streams["text"]
        assert stored.dims == ("sample", "layer", "answer", "query_token", "key_token")
        np.testing.assert_array_equal(stored.values[..., :size, :size], whole.array("text.self", name).values)


def test_written_tokens_are_no_target_of_a_model_that_does_not_write(writer: Writer, asked: list[Sample]) -> None:
    spec = ExtractSpec(frozenset({"score"}))
    with pytest.raises(ModelError, match="give generate=N"):
        attnscope.extract(writer("llama"), asked, [EACH], spec=spec)
    with pytest.raises(ValueError, match="extract with generate=N"):
        written_logits(object(), {}, None)  # type: ignore[arg-type]


WORDS = torch.tensor([[2, 9, 8, 30, 31, 12, 3], [2, 9, 20, 3, 0, 0, 0]])
MAPPERS: dict[str, tuple[Any, str | int, Callable[[Any], torch.Tensor]]] = {
    "answers": (MapperForQuestionAnswering, 3, lambda outputs: outputs.logits[:, 3]),
    # What is said behind the second token is the third.
    "captions": (
        MapperForConditionalGeneration,
        "word:2",
        lambda outputs: outputs.logits[torch.arange(2), 1, WORDS[:, 2]],
    ),
}


def wide_mapper(head: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The reference world's mapper with wide random weights, and two texts of several lengths with images."""
    model = widened(MAPPERS[head][0]._from_config(mapper_config(), attn_implementation="eager"))
    mask = (WORDS > 0).long()
    return model, {"input_ids": WORDS, "attention_mask": mask, "pixel_values": numbers(2, 3, 48, 48)}


def mapped(cams: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The walk over two encoders, two layers of co-attention and a decoder, with a matrix for each pair of streams."""

    def those(start: str) -> list[np.ndarray]:
        return [cam for name, cam in cams.items() if name.startswith(start)]

    tt, ii = chain(those("model.text_model")), chain(those("model.vision_model"))
    ti, it = np.zeros((len(tt), len(ii))), np.zeros((len(ii), len(tt)))
    for layer in range(2):
        text, image, text_over, image_over = (
            cams[f"model.mapper.layers.{layer}.{part}_attention"]
            for part in ("text", "image", "text_image", "image_text")
        )
        tt, ti = tt + text @ tt, ti + text @ ti
        ii, it = ii + image @ ii, it + image @ it
        t_bar, i_bar = normal(tt), normal(ii)
        tt, ti, it, ii = (
            tt + text_over @ it,
            ti + t_bar.T @ text_over @ i_bar,
            it + i_bar.T @ image_over @ t_bar,
            ii + image_over @ ti,
        )
    if not those("decoder"):
        return {"text": tt, "vision": ti}
    selves, across = ([cams[f"decoder.layers.{n}.{part}_attention"] for n in range(2)] for part in ("self", "image"))
    words = len(selves[0])
    ww, wi, wp = np.eye(words), np.zeros((words, len(ii))), np.zeros((words, len(tt)))
    gained = ii.sum(1) - 1
    for own, over in zip(selves, across, strict=True):
        ww, wi, wp = ww + own @ ww, wi + own @ wi, wp + own @ wp
        looked = normal(ww).T @ over
        wi = wi + looked @ normal(ii)
        wp = wp + (looked / np.where(gained > 0, gained, np.inf)) @ it
    return {"text": ww, "vision": wi, "prompt": wp}


@pytest.mark.parametrize(("head", "row"), [("answers", None), ("captions", 1)])
def test_a_mapper_between_two_encoders_and_a_decoder(head: str, row: int | None) -> None:
    model, inputs = wide_mapper(head)
    _, target, score = MAPPERS[head]
    found = extracted(model, inputs, target)
    maps = spied(model, inputs, score)
    assert found.attrs["readout"].startswith("text: the")
    for sample, length in enumerate(inputs["attention_mask"].sum(1).tolist()):

        def real(values: np.ndarray, sample: int = sample, length: int = length) -> np.ndarray:
            rows, columns = (length if size == 7 else None for size in values.shape[2:])
            return values[sample, :, :rows, :columns]

        cams = {name: equation_5(real(a), real(g)) for name, a, g in maps}
        at = length - 1 if row is None else row
        for stream, relevance in mapped(cams).items():
            assert relevance[at].any(), stream
            assert_close(found, stream, sample, {"relevance": relevance[at]})


def heads_mean(run: Any, event: walking.Event) -> np.ndarray:
    """The attention of the first sample, which has no padding, where a stream looks at itself; nothing elsewhere."""
    one = run.array(event.site, "attention_mean").isel(sample=0, layer=event.position).values.astype(float)
    return one if event.is_self else np.zeros_like(one)


@pytest.mark.parametrize("head", MAPPERS)
def test_weights_of_a_mapper_have_chefer_and_rollout_as_limits(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wide_mapper(head)
    plain = Relevance(target=MAPPERS[head][1], methods=("relevance", "rollout"))
    for weighting in ("norm", "gradient"):
        weighted = dataclasses.replace(plain, weighting=weighting)  # type: ignore[arg-type]
        run = attnscope.extract(model, [inputs], [plain, weighted], spec=ExtractSpec(frozenset({"score"})))
        for site in run.sites:
            shares = run.array(site, f"residual_{weighting}").values
            assert np.isfinite(shares).any(axis=(0, 2)).all(), site
        expected, different = (attnscope.analyse(run, a, save=False)["relevance"] for a in (plain, weighted))
        assert np.abs(different - expected).max() > 0.01
        # Where both terms count alike, it is Chefer's.
        with monkeypatch.context() as patch:
            patch.setattr(reading.Reader, "_share", lambda self, event: np.ones(int(self._real(event.queries).sum())))
            same = attnscope.analyse(run, weighted, save=False)["relevance"]
        np.testing.assert_array_equal(same, expected)
    events = plain._events(run)
    sizes = {name: len(run.tokens(name)["token"]) for name in run.streams}
    layers = sum(e.queries == e.keys == "text" for e in events)
    maps = {event: heads_mean(run, event) for event in events}
    for row in np.eye(sizes["text"]):
        # Where both terms are halved, and the map is the attention itself, it is rollout.
        walk = walking.Walk(events, maps.__getitem__, sizes)
        even = walk.rows("text", row)["text"] / 2**layers
        np.testing.assert_allclose(even, walking.roll_out(walk, "text", row)["text"], rtol=1e-6)
        # Where the residual has all the weight, nothing is passed on.
        alone = walking.Walk(
            events, lambda event: maps[event] + 1, sizes, lambda event: np.full(sizes[event.queries], 2.0)
        ).rows("text", row)
        np.testing.assert_allclose(alone["text"], 2**layers * row)
        assert not any(np.any(values) for name, values in alone.items() if name != "text")
