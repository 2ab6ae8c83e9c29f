"""What a model writes behind its prompt is recorded as it was when it wrote it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from attnscope.compatibility import EXAMPLES
from attnscope.compatibility.examples import widened
from attnscope.extraction import Extraction, extract, join_extraction
from attnscope.families.losses import word_logits
from attnscope.loading import ModelError, load_model
from attnscope.quantities import ExtractSpec
from attnscope.recording import recording
from attnscope.run import Run, RunError
from attnscope.samples import Sample, SampleError
from attnscope.tokens import KIND_CODES

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "cat", "and", "the", "dog", "on", "box", "two", "red", "big"]
SAMPLES = [Sample("short", text="a cat"), Sample("long", text="the big dog and a red cat")]
MOST = 5
EXACT = ExtractSpec(encoding="exact", generate=MOST)


def saved(model: torch.nn.Module, folder: Path) -> Path:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def decoder() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return widened(transformers.LlamaForCausalLM(config), 0.3)


def encoder_decoder() -> torch.nn.Module:
    config = transformers.BartConfig(
        vocab_size=len(WORDS), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return widened(transformers.BartForConditionalGeneration(config), 0.3)


def written(run: Run, stream: str, sample: int) -> np.ndarray:
    return np.flatnonzero(run.tokens(stream).kind.values[sample] == KIND_CODES["generated"])


def steps_of(folder: Path, sample: Sample, pattern: str) -> tuple[list[int], dict[str, list[np.ndarray]]]:
    """The tokens that `generate` writes for a sample, and the last row of each module's attention at each step."""
    loaded = load_model(folder)
    inputs = loaded.family.encode([sample], loaded)
    inputs.pop("decoder_input_ids", None)
    with recording(loaded.model) as recorded:
        ids = loaded.model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
    rows: dict[str, list[np.ndarray]] = {}
    for call in recorded:
        if pattern in call.module:
            rows.setdefault(call.module, []).append(call.attention()[0, :, -1].numpy())
    start = 1 if loaded.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return ids[0, start:].tolist(), rows


@pytest.mark.parametrize(
    ("build", "stream", "site", "pattern"),
    [
        (decoder, "text", "text.self", "self_attn"),
        (encoder_decoder, "decoder", "decoder.self", "decoder.layers"),
        (encoder_decoder, "decoder", "decoder.text", "encoder_attn"),
    ],
)
def test_rows_of_written_tokens_are_those_of_the_steps_that_wrote_the_next(
    build: object, stream: str, site: str, pattern: str, tmp_path: Path
) -> None:
    folder = saved(build(), tmp_path)  # type: ignore[operator]
    run = extract(folder, SAMPLES, spec=EXACT)
    for at, sample in enumerate(SAMPLES):
        ids, rows = steps_of(folder, sample, pattern)
        if site == "decoder.self":
            rows = {module: found for module, found in rows.items() if module.endswith("self_attn")}
        places = written(run, stream, at)
        assert len(places) >= 2
        assert [WORDS.index(str(t)) for t in run.tokens(stream).token_text.values[at][places]] == ids
        attention = run.attention(site).values[at]
        for layer, found in enumerate(rows.values()):
            # The step that writes a token reads the one before it.
            for place, row in zip(places, found, strict=False):
                stored = attention[layer, :, place - 1, : row.shape[-1]]
                np.testing.assert_allclose(stored, row, atol=5e-6)


@pytest.mark.parametrize(("name", "start"), [("GitForCausalLM", 3), ("ViltForMaskedLM", 0)])
def test_logits_of_words_stand_behind_the_image_where_it_is_read_first(name: str, start: int) -> None:
    """Seven tokens, four of them the text's: GIT reads its image before the text, ViLT behind it."""
    loaded = SimpleNamespace(model=type(name, (), {})(), name=name)
    logits = torch.arange(42.0).reshape(2, 7, 3)
    found = word_logits(SimpleNamespace(logits=logits), 4, loaded)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, logits[:, start : start + 4])


def test_ready_inputs_are_taken_as_they_are() -> None:
    example = EXAMPLES["llava"]
    model = example.build("eager")
    with pytest.raises(SampleError, match="ready inputs are taken as they are"):
        extract(model, [example.inputs()], spec=EXACT)


def test_a_model_without_a_head_that_writes_is_refused(tiny_clip: Path) -> None:
    with pytest.raises(ModelError, match="can't generate: it has no language modelling head"):
        extract(tiny_clip, SAMPLES, spec=EXACT)


def test_a_worker_that_joins_lets_the_model_write_as_well(tmp_path: Path) -> None:
    folder = saved(decoder(), tmp_path / "model")
    whole = extract(folder, SAMPLES, spec=EXACT)
    begun: list[Extraction] = []
    run = extract(folder, SAMPLES, spec=EXACT, drive=begun.append)
    assert run.missing()
    for block in run.missing():
        join_extraction(load_model(folder), run, None).part(block, SAMPLES[block.start : block.stop])
    np.testing.assert_array_equal(run.tokens("text").kind.values, whole.tokens("text").kind.values)
    np.testing.assert_array_equal(run.attention("text.self").values, whole.attention("text.self").values)


def test_a_run_is_resumed_with_as_many_tokens(tmp_path: Path) -> None:
    folder = saved(decoder(), tmp_path / "model")
    out = tmp_path / "run.zarr"
    first = extract(folder, SAMPLES, out=out, spec=EXACT).attention("text.self").values
    np.testing.assert_array_equal(extract(folder, SAMPLES, out=out, spec=EXACT).attention("text.self").values, first)
    with pytest.raises(RunError, match="was extracted with generate=5"):
        extract(folder, SAMPLES, out=out)
