"""Summaries of attention: what they say is what the stored attention says, whatever the model and the form."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import attnscope
from attnscope.cli import main
from attnscope.computed import COMPUTABLE, computed_summary
from attnscope.extraction import extract
from attnscope.quantities import RANKS, SUMMARIES, ExtractSpec
from attnscope.run import Run
from attnscope.tokens import KIND_CODES, KINDS

Made = Callable[..., torch.nn.Module]
PADDING = KIND_CODES["padding"]


def by_hand(run: Run, site: str) -> dict[str, np.ndarray]:
    """The summaries of a site, row by row from its attention."""
    attention = run.attention(site)
    kinds = {side: attention[f"{side}_kind"].values for side in ("query", "key")}
    samples, layers, heads, queries, _ = attention.shape
    values = attention.values
    found = {name: np.full(run.array(site, name).shape, np.nan) for name in SUMMARIES}
    mass = np.full((samples, layers, heads, queries, len(KINDS)), np.nan)
    largest = mass.copy()
    for sample, layer, head, query in np.ndindex(samples, layers, heads, queries):
        row = values[sample, layer, head, query]
        if np.isnan(row).all():
            continue
        positive = row[row > 0].astype(np.float64)
        found["entropy"][sample, layer, head, query] = -(positive * np.log(positive)).sum()
        best = np.sort(positive)[::-1][:RANKS]
        found["top_value"][sample, layer, head, query, : len(best)] = best
        for kind in set(kinds["key"][sample].tolist()) - {PADDING}:
            mass[sample, layer, head, query, kind] = row[kinds["key"][sample] == kind].sum()
            largest[sample, layer, head, query, kind] = row[kinds["key"][sample] == kind].max()
    for sample in range(samples):
        for kind in set(kinds["query"][sample].tolist()) - {PADDING}:
            rows = kinds["query"][sample] == kind
            there = ~np.isnan(mass[sample][:, :, rows]).all(axis=(0, 1, 3))
            if there.any():
                of_kind = mass[sample][:, :, rows][:, :, there]
                found["kind_mass"][sample, :, :, kind] = of_kind.mean(axis=2)
                found["kind_mass_max"][sample, :, :, kind] = of_kind.max(axis=2)
                found["kind_max"][sample, :, :, kind] = largest[sample][:, :, rows][:, :, there].max(axis=2)
    return found


def assert_summaries(run: Run, tolerance: float = 1e-5) -> None:
    for site in run.sites:
        attention = run.attention(site).values
        for name, expected in by_hand(run, site).items():
            stored = run.array(site, name)
            if name == "top_key":
                there = stored.values >= 0
                np.testing.assert_array_equal(there, ~np.isnan(run.array(site, "top_value").values))
                read = np.take_along_axis(attention, np.where(there, stored.values, 0), axis=-1)
                np.testing.assert_allclose(read[there], run.array(site, "top_value").values[there], atol=2e-6)
                assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in stored.values.reshape(-1, RANKS))
            else:
                np.testing.assert_allclose(stored.values, expected, atol=tolerance, err_msg=f"{site} {name}")


@pytest.mark.parametrize("encoding", ["exact", "float16", "compact"])
def test_summaries_are_those_of_the_stored_attention(tiny_clip: Path, captioned_images: Path, encoding: str) -> None:
    assert_summaries(extract(tiny_clip, captioned_images, encoding=encoding, batch_size=4, summaries=True))


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_summaries_under_grouped_heads_and_padding(made_model: Made, form: str) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(5, 50, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 7, 4, 1)):
        mask[row, : 12 - length] = 0
    model = made_model("LlamaForCausalLM", config, "sdpa")
    run = extract(model, [{"input_ids": ids, "attention_mask": mask}], encoding="exact", form=form, summaries=True)
    assert run.plan.sites["text.self"].form == form
    assert_summaries(run)


def test_summaries_of_windows_put_together(made_model: Made) -> None:
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=3
    )
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    run = extract(
        made_model("SwinForImageClassification", config), [{"pixel_values": pixels}], batch_size=2, summaries=True
    )
    assert all(-1 in site.call_numbers for site in run.plan.sites.values())
    assert_summaries(run)


def test_summaries_come_without_the_attention(tiny_bert: Path, captioned_images: Path) -> None:
    whole = extract(tiny_bert, captioned_images, encoding="exact", summaries=True)
    spec = ExtractSpec(frozenset({"entropy", "kind_mass"}), encoding="exact")
    alone = extract(tiny_bert, captioned_images, spec=spec)
    assert set(alone.quantities("text.self")) == {"entropy", "kind_mass", "query_valid"}
    for name in ("entropy", "kind_mass"):
        np.testing.assert_array_equal(alone.array("text.self", name), whole.array("text.self", name))
    assert whole.missing(spec) == []


def test_summaries_may_be_left_out(tiny_bert: Path, captioned_images: Path) -> None:
    run = extract(tiny_bert, captioned_images, summaries=False)
    assert set(run.quantities("text.self")) == {"attention", "attention_mean", "query_valid"}


def test_compact_attention_keeps_its_stated_bounds(tiny_clip: Path, captioned_images: Path) -> None:
    exact, compact = (extract(tiny_clip, captioned_images, encoding=e, summaries=True) for e in ("exact", "compact"))
    for site in exact.sites:
        ours, theirs = compact.attention(site), exact.attention(site)
        stored = {"dense": "attention", "ragged": "attention_values"}[compact.plan.sites[site].form]
        assert compact._array(f"{site}/{stored}").dtype == np.uint8
        error = np.abs(ours - theirs)
        assert 0 < float(error.max()) <= float(ours.attrs["bound"]) <= 4e-3
        rows = ours / ours.sum("key_token") - theirs
        variation = np.abs(rows).sum("key_token", min_count=1) / 2
        assert float(variation.max()) < 0.015


@pytest.mark.parametrize("name", COMPUTABLE)
def test_what_is_not_stored_is_computed_from_the_attention(name: str, tiny_clip: Path, captioned_images: Path) -> None:
    run = extract(tiny_clip, captioned_images, summaries=True, form="dense")
    for site in run.sites:
        stored, computed = run.array(site, name), computed_summary(run, site, name)
        assert stored.dims == computed.dims
        np.testing.assert_allclose(computed.values, stored.values, rtol=1e-5, atol=1e-5)
        part = {"sample": [7, 1], "layer": 1, "head": slice(1, 3), stored.dims[3]: [2, 0]}
        np.testing.assert_array_equal(computed.isel(part).values, computed.values[[7, 1], 1, 1:3][:, :, [2, 0]])


def test_every_code_is_the_nearest_to_its_own_weight() -> None:
    from attnscope.writing import decoded, encoded

    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encoded(decoded(codes), "compact"), codes)
    weights = torch.linspace(0, 1, 100_001)
    assert float((decoded(encoded(weights, "compact")) - weights).abs().max()) <= 3.92e-3


def test_reading_summaries_touches_no_attention(tmp_path: Path, tiny_vit: Path, captioned_images: Path) -> None:
    run = extract(tiny_vit, captioned_images, out=tmp_path / "run.zarr", summaries=True)
    for path in (tmp_path / "run.zarr").glob("*/attention/c"):
        path.rename(path.with_name("away"))
    assert not np.isnan(attnscope.open_run(run.location).array("vision.self", "entropy").values).any()


@pytest.mark.parametrize("stat", [["entropy"], ["mass", "--query", "cls"], ["max", "--key", "image"]])
def test_the_command_computes_statistics_where_none_are_stored(
    stat: list[str], tiny_vit: Path, captioned_images: Path, tmp_path: Path
) -> None:
    told = []
    for name, summaries in (("with", True), ("without", False)):
        extract(tiny_vit, captioned_images, out=tmp_path / name, summaries=summaries, form="dense")
        command = ["query", str(tmp_path / name), "vision.self", "--format", "csv", "--stat", *stat]
        told.append(CliRunner().invoke(main, command, prog_name="attnscope"))
    assert [one.exit_code for one in told] == [0, 0]
    assert "reads the attention itself" in told[1].stderr
    assert not told[0].stderr
    stored, computed = (list(csv.DictReader(one.stdout.splitlines())) for one in told)
    assert len(stored) == len(computed) > 0
    for mine, theirs in zip(computed, stored, strict=True):
        (label,) = (n for n in mine if n in ("entropy", "kind_mass", "kind_max"))
        assert float(mine.pop(label)) == pytest.approx(float(theirs.pop(label)), abs=1e-5)
        assert mine == theirs
