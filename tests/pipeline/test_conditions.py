"""Conditions: what they mean, how they are applied, and what extraction stores under them."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertModel, CLIPModel, ViltForMaskedLM, ViTForImageClassification

import attnscope
from attnscope import perturbing
from attnscope.ablation import intersections_over_union, overlaps
from attnscope.checking import check_run
from attnscope.conditions import INTACT, Condition, Phrase, Ranking, phrases_of
from attnscope.loading import LoadedModel, ModelError, load_model
from attnscope.quantities import ExtractSpec, union
from attnscope.repairing import repair_run
from attnscope.run import MissingQuantity, Run, open_run
from attnscope.samples import Region, Sample
from attnscope_relevance import Relevance

BOX = (0.0, 0.0, 16.0, 16.0)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Five noise images of 32 pixels; but for the fifth, the phrase "red cat" has a box over the upper left quarter."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]
    texts = ["a red cat on the box", "the red cat", "two red cat with a big dog", "a red cat", "a dog"]
    regions = (Region("red cat", BOX),)
    targets = {"negative": "a blue dog"}
    return [
        Sample(f"s{i}", picture, text, regions if i < 4 else (), targets if i < 3 else {})
        for i, (picture, text) in enumerate(zip(pictures, texts, strict=True))
    ]


def outputs(model: Path, samples: list[Sample], *conditions: Condition, batch_size: int = 2) -> dict[str, np.ndarray]:
    spec = ExtractSpec(frozenset({"attention_mean", "score"}), conditions=conditions)
    found = attnscope.extract(model, samples, spec=spec, batch_size=batch_size).outputs_under(conditions)
    return {str(name): values.values for name, values in found.data_vars.items()}


def encoded(model: Path, samples: list[Sample]) -> tuple[LoadedModel, dict[str, torch.Tensor]]:
    loaded = load_model(model)
    return loaded, loaded.family.encode(samples, loaded)


def test_equal_meanings_are_equal_conditions_with_names_of_their_own() -> None:
    assert Condition(operator="noise", threshold=0.9, fraction=0.3, seed=4) == INTACT
    ranking = Ranking.by("relevance", "rollout", {"row": "mean"}, layer=3)
    listed = [
        INTACT,
        *(Condition(image="all", operator=o) for o in ("mean", "zero", "noise", "other", "drop")),  # type: ignore[arg-type]
        Condition(image="all", operator="noise", seed=1),
        *(Condition(image="object", threshold=t) for t in (0.0, 0.5)),
        *(Condition(text="all", text_operator=o) for o in ("mask", "drop")),  # type: ignore[arg-type]
        *(Condition(text="ranked", ranking=r, fraction=0.5) for r in (ranking, Ranking.random(), Ranking.random(1))),
        *(Condition(text="ranked", ranking=ranking, fraction=0.5, first=f) for f in ("least",)),  # type: ignore[arg-type]
        *(Condition(ask=a) for a in ("phrase", "object")),  # type: ignore[arg-type]
        Condition(text="negative"),
        *(Condition(text="given", given=t) for t in ("a cat", "a dog")),
    ]
    assert len({c.name for c in listed}) == len(listed)
    assert [Condition.from_json(c.to_json()) for c in listed] == listed
    spec = ExtractSpec(conditions=tuple(listed))
    assert ExtractSpec.from_json(spec.to_json()) == spec
    assert union([spec, ExtractSpec(conditions=(INTACT,))]).conditions == tuple(listed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "some"}, "image is one of intact, all, object, ranked, got 'some'"),
        ({"image": "ranked"}, "needs a ranking"),
        ({"text": "given"}, "'given' text needs that text"),
        ({"text": "all", "given": "a cat"}, "no other takes one"),
        ({"image": "all", "ranking": Ranking.random()}, "no other takes one"),
        ({"image": "ranked", "ranking": Ranking.random(), "fraction": 1.5}, r"fraction lies in \[0, 1\]"),
        ({"image": "object", "threshold": 1.0}, r"threshold in \[0, 1\)"),
    ],
)
def test_what_means_nothing_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Condition(**fields)  # type: ignore[arg-type]


def test_regions_of_one_phrase_are_one_phrase() -> None:
    regions = [Region("cat", BOX, (2, 5)), Region("dog", BOX), Region("cat", (1, 1, 2, 2), (2, 5)), Region(None, BOX)]
    assert phrases_of(regions) == [Phrase("cat", (2, 5), (BOX, (1, 1, 2, 2))), Phrase("dog", None, (BOX,))]


def test_overlap_by_hand_and_never_below_intersection_over_union() -> None:
    cells = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], float)
    box = [(0.0, 0.0, 20.0, 5.0)]
    np.testing.assert_allclose(overlaps(cells, box, on_grid=True), [0.5, 0.5, 0])
    np.testing.assert_allclose(overlaps(cells, box, on_grid=False), [0.5, 0.5, 0])
    np.testing.assert_allclose(intersections_over_union(cells, box), [1 / 3, 1 / 3, 0])
    drawn = np.sort(np.random.default_rng(0).random((40, 2, 2)), axis=1).reshape(40, 4)
    target = [tuple(drawn[0]), tuple(drawn[1])]
    for on_grid in (True, False):
        found = overlaps(drawn[2:], target, on_grid)
        assert (found >= intersections_over_union(drawn[2:], target) - 1e-12).all()
        assert ((found >= 0) & (found <= 1 + 1e-12)).all()
    # The whole image covers any target whole.
    np.testing.assert_allclose(overlaps(np.array([[0, 0, 1, 1.0]]), target, on_grid=False), 1)


def test_the_intact_condition_is_the_plain_forward_bit_for_bit(tiny_vit: Path, samples: list[Sample]) -> None:
    found = outputs(tiny_vit, samples, INTACT, batch_size=5)
    _, inputs = encoded(tiny_vit, samples)
    with torch.no_grad():
        logits = ViTForImageClassification.from_pretrained(tiny_vit).eval()(**inputs).logits
    np.testing.assert_array_equal(found["score"][0], logits.amax(1).numpy())
    np.testing.assert_allclose(found["loss"][0], -logits.log_softmax(1).amax(1).numpy(), rtol=1e-5)
    assert (found["correct"] == 1).all()
    assert (found["changed"] == 0).all()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_dropped_patches_are_as_if_they_had_never_been_there(
    tiny_vit: Path, samples: list[Sample], kernel: str
) -> None:
    conditions = (INTACT, Condition(image="object", operator="drop"))
    spec = ExtractSpec(conditions=conditions)
    run = attnscope.extract(tiny_vit, samples[:2], spec=spec, attn_implementation=kernel)
    found = run.outputs_under(conditions)
    model = ViTForImageClassification.from_pretrained(tiny_vit).eval()
    _, inputs = encoded(tiny_vit, samples[:2])
    # The upper left quarter of 8 x 8 patches, behind CLS.
    gone = {1 + 8 * row + column for row in range(4) for column in range(4)}
    kept = [t for t in range(65) if t not in gone]
    handle = model.vit.embeddings.register_forward_hook(lambda module, args, output: output[:, kept])
    with torch.no_grad():
        logits = model(**inputs).logits
    handle.remove()
    with torch.no_grad():
        intact = model(**inputs).logits.argmax(1)
    expected = logits[torch.arange(2), intact].numpy()
    np.testing.assert_allclose(found["score"][1, :, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(found["changed"][1, :, 0], 16)
    np.testing.assert_array_equal(found["content"][1, :, 0], 64)


def test_dropped_patches_of_one_stream_are_as_if_masked(tiny_vilt: Path, samples: list[Sample]) -> None:
    loss = outputs(tiny_vilt, samples, Condition(ask="phrase", image="object", operator="drop"))["loss"][0, :, 0]
    model = ViltForMaskedLM.from_pretrained(tiny_vilt).eval()
    loaded, _ = encoded(tiny_vilt, samples[:1])
    for at in range(4):
        _, inputs = encoded(tiny_vilt, samples[at : at + 1])
        ids = inputs["input_ids"]
        place = [t for t, w in enumerate(loaded.tokenizer.convert_ids_to_tokens(ids[0])) if w in ("red", "cat")]
        labels = ids[0, place]
        ids[0, place] = loaded.tokenizer.mask_token_id
        torch.manual_seed(5)
        _, _, (order, _) = model.vilt.embeddings.visual_embed(inputs["pixel_values"], inputs["pixel_mask"], -1)
        text = ids.shape[1]
        torch.manual_seed(5)
        handle = model.vilt.embeddings.register_forward_hook(
            lambda m, a, out, order=order, text=text: (out[0], without(out[1], order, text))
        )
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids}).logits[0]
        handle.remove()
        expected = torch.nn.functional.cross_entropy(logits[place], labels)
        assert loss[at] == pytest.approx(float(expected), abs=2e-5)
    assert np.isnan(loss[4])


def without(mask: torch.Tensor, order: torch.Tensor, text: int) -> torch.Tensor:
    """ViLT's mask (1, token) with the patches of the upper left quarter hidden."""
    mask = mask.clone()
    hidden = (order[0] < 2).all(1)
    mask[0, text + 1 :][hidden] = 0
    return mask


def test_pixel_operators_put_in_what_they_say(tiny_vit: Path, samples: list[Sample]) -> None:
    conditions = [Condition(image="object", operator=o) for o in ("mean", "zero", "noise", "other")]  # type: ignore[arg-type]
    found = outputs(tiny_vit, samples, INTACT, *conditions)
    model = ViTForImageClassification.from_pretrained(tiny_vit).eval()
    _, inputs = encoded(tiny_vit, samples)
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        intact = model(pixels).logits.argmax(1)

        def score(change: Callable[[torch.Tensor], torch.Tensor | float]) -> np.ndarray:
            changed = pixels[:1].clone()
            changed[..., :16, :16] = change(changed)
            return model(changed).logits[0, intact[0]].numpy()

        mean = pixels.mean(dim=(0, 2, 3))[None, :, None, None]
        np.testing.assert_allclose(found["score"][1, 0, 0], score(lambda _: mean), atol=1e-5)
        np.testing.assert_allclose(found["score"][2, 0, 0], score(lambda _: 0.0), atol=1e-5)
        others = [score(lambda _, i=i: pixels[i : i + 1, :, :16, :16]) for i in range(1, 5)]
    assert np.abs(np.array(others) - found["score"][4, 0, 0]).min() < 1e-5
    assert abs(found["score"][3, 0, 0] - found["score"][1, 0, 0]) > 1e-3


def test_all_of_the_image_gone_leaves_nothing_of_it(tiny_vit: Path, samples: list[Sample]) -> None:
    whole = [Condition(image="all", operator=o) for o in ("mean", "zero", "drop")]  # type: ignore[arg-type]
    model = ViTForImageClassification.from_pretrained(tiny_vit).eval()
    _, inputs = encoded(tiny_vit, samples)
    with torch.no_grad():
        intact = model(**inputs).logits.argmax(1)
    scores = outputs(tiny_vit, samples, INTACT, *whole)["score"][1:]
    for row in scores:
        for label in intact.unique():
            assert np.ptp(row[(intact == label).numpy()]) < 1e-5


def test_objects_are_nested_in_the_threshold(tiny_vit: Path, samples: list[Sample]) -> None:
    shifted = [dataclasses.replace(s, regions=(Region("cat", (3, 3, 21, 18)),)) for s in samples]
    conditions = [Condition(image="object", threshold=t) for t in (0.0, 0.3, 0.5, 0.9)]
    counts = outputs(tiny_vit, shifted, *conditions)["changed"][:, 0, 0]
    assert list(counts) == sorted(counts, reverse=True)
    # Patches of 4 pixels: columns 0-5 and rows 0-4 are touched, columns 1-4 and rows 1-3 lie inside.
    assert counts[0] == 30
    assert counts[3] == 12


def test_masked_words_are_asked_for_one_by_one(tiny_vilt: Path, samples: list[Sample]) -> None:
    found = outputs(tiny_vilt, samples, Condition(ask="phrase"), Condition(ask="phrase", text="all"), batch_size=3)
    loaded, inputs = encoded(tiny_vilt, samples)
    tokens = [loaded.tokenizer.convert_ids_to_tokens(row) for row in inputs["input_ids"].tolist()]
    torch.manual_seed(1)
    model = ViltForMaskedLM.from_pretrained(tiny_vilt).eval()
    ids = inputs["input_ids"].clone()
    place = [[t for t, w in enumerate(row) if w in ("red", "cat")] for row in tokens]
    for row in range(4):
        ids[row, place[row]] = loaded.tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": ids}).logits
    for row in range(4):
        expected = torch.nn.functional.cross_entropy(logits[row, place[row]], inputs["input_ids"][row, place[row]])
        assert found["loss"][0, row, 0] == pytest.approx(float(expected), abs=1e-5)
    np.testing.assert_array_equal(found["asked"][0, :, 0], [2, 2, 2, 2, 0])
    assert np.isnan(found["loss"][0, 4, 0])
    assert (found["changed"][:, 4, 0] == -1).all()
    # Every word but CLS and SEP is masked, the phrase's among them.
    assert found["changed"][1, 0, 0] == 6


def test_dropped_words_move_the_rest_together(tiny_bert: Path, samples: list[Sample]) -> None:
    condition = Condition(text="phrase", text_operator="drop")
    found = outputs(tiny_bert, samples, INTACT, condition)
    model = BertModel.from_pretrained(tiny_bert).eval()
    shorter = ["a on the box", "the", "two with a big dog", "a"]
    for at, text in enumerate(shorter):
        _, inputs = encoded(tiny_bert, [Sample("x", text=text)])
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[0, 0].norm()
        assert found["score"][1, at, 0] == pytest.approx(float(expected), abs=1e-4)
    assert np.isnan(found["score"][1, 4, 0])


def test_a_negative_text_stands_in_the_place_of_the_text(tiny_clip: Path, samples: list[Sample]) -> None:
    found = outputs(tiny_clip, samples, INTACT, Condition(text="negative"))
    swapped = [dataclasses.replace(s, text="a blue dog") for s in samples[:3]]
    _, inputs = encoded(tiny_clip, swapped)
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(tiny_clip).eval()(**inputs).logits_per_image.diagonal()
    np.testing.assert_allclose(found["score"][1, :3], expected.numpy(), atol=1e-5)
    assert np.isnan(found["score"][1, 3:]).all()


def test_a_given_text_stands_in_the_place_of_every_text(tiny_clip: Path, samples: list[Sample]) -> None:
    given = Condition(text="given", given="a red cat")
    run = attnscope.extract(tiny_clip, samples, spec=ExtractSpec(conditions=(INTACT, given)))
    other = attnscope.extract(
        tiny_clip, [dataclasses.replace(s, text="a red cat") for s in samples], spec=ExtractSpec(frozenset({"score"}))
    )
    found = run.outputs_under([given])["score"].values[0]
    np.testing.assert_allclose(found, other.outputs["score"].values[0], rtol=1e-5)
    assert Condition.from_json(given.to_json()) == given
    # Digests of conditions without a given text are as they were before there were such.
    assert "given" not in INTACT.to_json()


def test_ranked_tokens_go_in_the_order_of_the_ranking(tiny_vit: Path, samples: list[Sample]) -> None:
    ranking = Ranking.by("relevance", "rollout", {"methods": ["rollout"]})
    fractions = (0.0, 0.3, 1.0)
    conditions = [
        Condition(image="ranked", ranking=ranking, fraction=f, first=first, operator="drop")  # type: ignore[arg-type]
        for first in ("most", "least")
        for f in fractions
    ]
    spec = ExtractSpec(frozenset({"score"}), conditions=tuple(conditions))
    run = attnscope.extract(tiny_vit, samples, spec=spec, batch_size=2)
    found = run.outputs_under(conditions)
    np.testing.assert_array_equal(found["changed"][:, 0], [0, 19, 64, 0, 19, 64])
    np.testing.assert_allclose(found["score"][0], found["score"][3], rtol=1e-6)
    np.testing.assert_allclose(found["score"][2], found["score"][5], rtol=1e-6)
    assert (np.abs(found["score"][1] - found["score"][4]) > 1e-4).all()
    # The 19 patches with the most rollout, taken out by hand.
    values = Relevance(methods=("rollout",)).analyse(run)["rollout"].squeeze().values[0]
    kept = sorted([0, *(1 + np.argsort(-values[1:])[19:])])
    model = ViTForImageClassification.from_pretrained(tiny_vit).eval()
    _, inputs = encoded(tiny_vit, samples[:1])
    with torch.no_grad():
        intact = model(**inputs).logits.argmax()
        model.vit.embeddings.register_forward_hook(lambda module, args, output: output[:, kept])
        expected = model(**inputs).logits[0, intact]
    assert float(found["score"][1, 0]) == pytest.approx(float(expected), abs=1e-5)


def test_a_run_gains_only_the_conditions_that_it_lacks(
    tiny_vit: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    forward = perturbing.run_model
    monkeypatch.setattr(perturbing, "run_model", lambda *args: forwards.append(1) or forward(*args))
    first, second = Condition(image="all", operator="zero"), Condition(image="all", operator="drop")
    spec = ExtractSpec(frozenset({"attention_mean", "score"}))

    def extract(*conditions: Condition) -> Run:
        forwards.clear()
        wanted = dataclasses.replace(spec, conditions=conditions)
        return attnscope.extract(tiny_vit, samples, spec=wanted, out=tmp_path / "run.zarr", batch_size=2)

    run = extract(first)
    with pytest.raises(MissingQuantity, match=r"outputs under 'image -all by drop', which .* does not hold"):
        run.require(ExtractSpec(frozenset({"score"}), conditions=(second,)), "analyser 'x'")
    with pytest.raises(MissingQuantity, match="holds no outputs under 'image -all by drop'"):
        run.outputs_under([second])
    stored = run.outputs_under([first])["score"].values
    batches = len(forwards) // 2
    run = extract(second, first)
    # The intact forward of every batch, and one of the new condition.
    assert len(forwards) == 2 * batches
    assert set(run.conditions) == {first, second}
    np.testing.assert_array_equal(run.outputs_under([first])["score"].values, stored)
    extract(first, second)
    assert not forwards
    assert not check_run(open_run(tmp_path / "run.zarr")).faults


def test_conditions_cut_short_go_on_where_they_were(
    tiny_vit: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    condition = Condition(image="all", operator="zero")
    spec = ExtractSpec(frozenset({"attention_mean", "score"}), conditions=(condition,))
    monkeypatch.setattr("attnscope.planning.unit_for", lambda *_: 2)
    write = perturbing.write_set
    written = []

    def fail_at_second(*args: object) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(args[2])
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(perturbing, "write_set", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        attnscope.extract(tiny_vit, samples, spec=spec, out=tmp_path / "run.zarr", batch_size=2)
    run = open_run(tmp_path / "run.zarr")
    assert run.conditions == ()
    assert not check_run(run).faults
    monkeypatch.setattr(perturbing, "write_set", lambda *args: written.append(args[2]) or write(*args))
    run = attnscope.extract(tiny_vit, samples, spec=spec, out=tmp_path / "run.zarr", batch_size=2)
    assert written == [range(0, 2), range(2, 4), range(4, 5)]
    whole = outputs(tiny_vit, samples, condition)
    np.testing.assert_allclose(run.outputs_under([condition])["score"].values, whole["score"], rtol=1e-6)


def test_broken_outputs_are_found_and_run_again(tiny_vit: Path, samples: list[Sample], tmp_path: Path) -> None:
    condition = Condition(image="all", operator="zero")
    spec = ExtractSpec(frozenset({"attention_mean", "score"}), conditions=(condition,))
    run = attnscope.extract(tiny_vit, samples, spec=spec, out=tmp_path / "run.zarr")
    stored = run.outputs_under([condition])["score"].values
    (chunk,) = (tmp_path / "run.zarr/outputs").glob("*/score/c/0/0")
    chunk.write_bytes(b"rubbish")
    run = open_run(tmp_path / "run.zarr", read_only=False)
    found = check_run(run)
    assert len(found.faults) == 1
    (done,) = repair_run(run, found)
    assert done.startswith("outputs under conditions")
    assert open_run(tmp_path / "run.zarr").conditions == ()
    run = attnscope.extract(tiny_vit, samples, spec=spec, out=tmp_path / "run.zarr")
    np.testing.assert_array_equal(run.outputs_under([condition])["score"].values, stored)
    assert not check_run(run).faults


def test_ready_inputs_take_conditions_too(tiny_vit: Path, samples: list[Sample]) -> None:
    _, inputs = encoded(tiny_vit, samples)
    model = ViTForImageClassification.from_pretrained(tiny_vit)
    condition = Condition(image="ranked", ranking=Ranking.random(), fraction=0.5, operator="zero")
    spec = ExtractSpec(frozenset({"attention_mean", "score"}), conditions=(condition,))
    found = attnscope.extract(model, [inputs], spec=spec).outputs_under([condition])
    np.testing.assert_allclose(found["score"].values, outputs(tiny_vit, samples, condition)["score"], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "condition", "error", "message"),
    [
        ("tiny_vit", Condition(text="all"), ModelError, "takes no text"),
        ("tiny_vit", Condition(ask="object"), ValueError, "tells no image tokens"),
        ("tiny_clip", Condition(ask="phrase"), ValueError, "tells no words"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    request: pytest.FixtureRequest,
    samples: list[Sample],
    model: str,
    condition: Condition,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        outputs(request.getfixturevalue(model), samples, condition)


def test_hiding_asks_for_a_run_of_every_layer(tiny_vit: Path, samples: list[Sample]) -> None:
    spec = ExtractSpec(layers=frozenset({1}), conditions=(Condition(image="all", operator="drop"),))
    with pytest.raises(MissingQuantity, match="some sites or layers only"):
        attnscope.extract(tiny_vit, samples, spec=spec)


def test_the_pages_examples_run(tiny_vilt: Path, samples: list[Sample], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/conditions.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict[str, object] = {"model": tiny_vilt, "samples": samples}
    exec(first, names)
    exec(second.replace('"run.zarr"', "out"), {**names, "out": tmp_path / "run.zarr"} | names)
