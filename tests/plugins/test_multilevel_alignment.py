"""Alignment on three levels: its measures by hand, planted alignments, and tiny models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import attnscope
import attnscope_multilevel_alignment as align
from attnscope import Region, Run, Sample, analyse
from attnscope.compatibility.examples import TEXT, VISION, image, text, widened
from attnscope.conditions import Condition
from attnscope.plan import RunPlan, SitePlan
from attnscope.quantities import ExtractSpec
from attnscope.run import EXTRACTED
from attnscope.tokens import KIND_CODES, grid_layout, text_layout
from attnscope_multilevel_alignment import MultilevelAlignment


def test_a_uniform_map_gives_the_largest_box_the_square_root_of_its_area() -> None:
    shares = np.zeros((3, 16))
    for box, size in enumerate((1, 9, 4)):
        shares[box, :size] = 1
    areas = np.array([1.0, 9, 4])
    np.testing.assert_allclose(shares @ np.ones(16) / np.sqrt(areas), np.sqrt(areas))
    assert align.best_box(np.ones(16), shares, areas) == 1
    assert align.best_box(np.eye(16)[0], shares, areas) == 0


def test_pointing_and_mass_by_hand() -> None:
    values, shares = np.array([1.0, 3, 0, 0]), np.array([0, 0.5, 1, 1])
    assert align.point(values, shares >= 0.5) == 1
    assert align.point(values, shares > 0.5) == 0
    assert align.mass_inside(values, shares) == pytest.approx(3 * 0.5 / 4)
    assert np.isnan(align.mass_inside(0 * values, shares))
    assert align.mass_inside(np.ones(4), shares) == shares.mean()


def test_intersection_over_union_by_hand() -> None:
    box = (0, 0, 10, 10)
    assert align.intersection_over_union(box, box) == 1
    assert align.intersection_over_union(box, (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert align.intersection_over_union(box, (20, 0, 30, 10)) == 0


def test_keywords_of_paper_and_code_differ_where_heads_disagree() -> None:
    # One head puts everything on token 5; three heads agree on tokens 0 to 3.
    weights = np.array([[0, 0, 0, 0, 0, 1.0], *[[0.2, 0.2, 0.2, 0.2, 0.1, 0.1]] * 3])
    allowed = np.ones(6, bool)
    assert set(align.keywords_of_the_paper(weights, allowed, 2)) == {5, 0}
    assert set(align.keywords_of_the_code(weights, allowed, 1, 2)) == {0, 5}
    assert align.keywords_of_the_code(weights, allowed, 1, 2)[0] == 0
    allowed[5] = False
    assert 5 not in align.keywords_of_the_paper(weights, allowed)
    assert len(align.keywords_of_the_paper(weights, np.eye(6, dtype=bool)[0])) == 1
    # Far more votes than the paper's four are kept: five.
    random = np.random.default_rng(0).random((12, 20))
    assert len(align.keywords_of_the_code(random, np.ones(20, bool))) == 5
    assert len(align.keywords_of_the_paper(random, np.ones(20, bool))) == 4


def test_recall_by_hand_and_equal_texts_cost_nothing() -> None:
    similarity = np.array([[3.0, 2, 1], [3, 2, 2], [0, 1, 0.5]])
    np.testing.assert_array_equal(align.recall_at(similarity, np.arange(3))[:, 0], [1, 0, 0])
    np.testing.assert_array_equal(align.recall_at(similarity, np.arange(3))[:, 1:], 1)
    many = np.tile(np.arange(20.0), (20, 1))
    expected = [[float(19 - own < k) for k in (1, 5, 10)] for own in range(20)]
    np.testing.assert_array_equal(align.recall_at(many, np.arange(20)), expected)


def test_concepts_are_named_by_their_words_in_a_row() -> None:
    assert align.names("a red cat on a box", "red cat")
    assert align.names("A Red cat", "red CAT")
    assert not align.names("a red big cat", "red cat")
    assert not align.names("a scared cat", "red cat")
    assert not align.names("a red", "red cat")


def test_precision_and_recall_of_chosen_concepts_by_hand() -> None:
    scores = np.array([9.0, 5, 4, 3, 2, 1])
    candidates = np.array([False, True, True, True, True, True])
    wanted = np.array([False, True, False, True, False, False])
    assert align.found_among(scores, wanted, candidates, 1) == (1, 1 / 2)
    assert align.found_among(scores, wanted, candidates, 2) == (1 / 2, 1 / 2)
    assert align.found_among(scores, wanted, candidates, 3) == (2 / 3, 1)
    # No more are chosen than there are.
    assert align.found_among(scores, wanted, candidates, 9) == (2 / 5, 1)


def planted(maps: Callable[[int], np.ndarray], heads: int = 2) -> Run:
    """Three samples of CLS, four words and a 4 x 4 grid; 'cat' is words 1 and 2 and the upper left quarter.

    `maps(layer)` is the attention (head, word, patch); among words CLS attends to the words of the phrase.
    """
    regions = (
        Region("red cat", (0, 0, 8, 8), (2, 9)),
        Region("dog", (8, 8, 16, 16), (13, 16)),
        Region("sky", (0, 0, 16, 16), (0, 1)),
    )
    samples = [Sample(f"s{i}", text="a red cat on dog", regions=regions) for i in range(3)]
    sites = {
        "text.self": SitePlan("text", "text", (0, 1), ("", ""), heads, heads, 6, 6),
        "text.vision": SitePlan("text", "vision", (0, 1), ("", ""), heads, heads, 6, 16),
    }
    plan = RunPlan(streams={"text": 6, "vision": 16}, sites=sites, unit=3, regions=3)
    spec = ExtractSpec(frozenset({"attention", "attention_relevance", "score"}), encoding="exact")
    run = Run.create(None, plan, spec, samples, {"model": "made"})
    block = range(3)
    kind = np.tile([KIND_CODES["cls"], *[KIND_CODES["text"]] * 5], (3, 1))
    run.write_tokens("text", block, text_layout([["[CLS]", "a", "red", "cat", "on", "dog"]] * 3, kind))
    run.write_tokens("vision", block, grid_layout(3, 4, 4, ()))
    shares = np.zeros((3, 3, 16), np.float32)
    grid = np.zeros((4, 4), np.float32)
    grid[:2, :2] = 1
    shares[:, 0], shares[:, 1], shares[:, 2] = grid.ravel(), grid[::-1, ::-1].ravel(), 1
    words = np.zeros((3, 3, 6), np.float32)
    words[:, 0, [2, 3]] = words[:, 1, 5] = words[:, 2, 1] = 1
    run.write_block("vision/region_share", block, shares)
    run.write_block("text/region_share", block, words)
    among = np.full((heads, 6, 6), 0.01)
    among[:, :, [2, 3, 5, 1]] = [0.3, 0.3, 0.2, 0.16]
    for layer in range(2):
        across = np.broadcast_to(maps(layer), (3, heads, 6, 16))
        for site, values in (("text.self", np.broadcast_to(among, (3, heads, 6, 6))), ("text.vision", across)):
            run.write_layer(site, "attention", block, layer, values.astype(np.float32))
            run.write_layer(site, "attention_relevance", block, layer, values.mean(1))
            run.write_layer(site, "query_valid", block, layer, np.ones((3, 6), bool))
    run.commit(block, np.full(3, EXTRACTED))
    return run


def test_planted_alignment_is_found_at_its_layer_and_uniform_maps_are_chance() -> None:
    inside = np.zeros((4, 4))
    inside[:2, :2] = 0.25
    outside = inside[::-1, ::-1]

    def maps(layer: int) -> np.ndarray:
        found = np.full((2, 6, 16), 1 / 16)
        if layer == 1:
            found[:, [2, 3]], found[:, 5] = inside.ravel(), outside.ravel()
        return found

    result = analyse(planted(maps), MultilevelAlignment(negatives=False, maps="attention"), save=False)
    assert result.attrs["site"] == "text.vision"
    # The sky covers all of the image: left out, in each of three samples.
    assert int(result["phrases_skipped"]) == 3
    for name in ("pointing", "mass", "box"):
        assert float(result[name].sel(layer=1)) == 1, name
    assert float(result["mass"].sel(layer=0)) == pytest.approx(0.25)
    assert float(result["mass_chance"]) == pytest.approx(0.25)
    assert float(result["pointing_chance"]) == pytest.approx(0.25)
    assert float(result["box_chance"]) == pytest.approx(0.5)
    # The four keywords of CLS are the four annotated words; 'on' is the only other.
    np.testing.assert_allclose(result["precision"], 1)
    np.testing.assert_allclose(result["recall_of_words"], 1)
    assert float(result["precision_chance"]) == pytest.approx(0.8)
    html = "".join(e.html() for e in MultilevelAlignment().report(result))
    assert html.count("<svg") == 2
    assert "3 phrases have no box" in html


def test_swapped_maps_point_at_the_other_object() -> None:
    def maps(layer: int) -> np.ndarray:
        found = np.zeros((2, 6, 16))
        found[:, [2, 3], 15] = found[:, 5, 0] = 1
        return found

    result = analyse(planted(maps), MultilevelAlignment(negatives=False), save=False)
    for name in ("pointing", "mass", "box"):
        np.testing.assert_array_equal(result[name], 0)


def test_maps_that_are_zero_everywhere_are_left_out_and_counted() -> None:
    """As in the last layer of a joint stream, where only the row that the answer is read from has a gradient."""

    def maps(layer: int) -> np.ndarray:
        found = np.zeros((2, 6, 16))
        if layer == 0:
            found[:, [2, 3], 0] = found[:, 5, 15] = 1
        return found

    result = analyse(planted(maps), MultilevelAlignment(negatives=False), save=False)
    np.testing.assert_array_equal(result["maps_empty"], [0, 6])
    for name in ("pointing", "mass", "box"):
        np.testing.assert_array_equal(result[name], [1, np.nan])
    html = "".join(e.html() for e in MultilevelAlignment().report(result))
    assert "zero everywhere for some phrases, which are left out there: layer 1 (6)" in html


def test_retrieval_and_negatives_of_a_dual_encoder() -> None:
    config = hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    model = widened(hf.CLIPModel._from_config(config, attn_implementation="eager"))
    inputs = text() | image()
    analyser = MultilevelAlignment(retrieval=True, negatives=False, maps="attention")
    run = attnscope.extract(model, [inputs], [analyser], spec=ExtractSpec(frozenset({"score"})))
    result = analyse(run, analyser, save=False)
    with torch.no_grad():
        similarity = model(**inputs).logits_per_image
    expected = [(similarity.argmax(d) == torch.arange(2)).float().mean() for d in (1, 0)]
    np.testing.assert_allclose(result["recall"].sel(at=1), expected)
    np.testing.assert_allclose(result["recall"].sel(at=5), 1)
    vectors = run.embeddings
    np.testing.assert_allclose(np.linalg.norm(vectors["image_embedding"], axis=1), 1, rtol=1e-6)
    mine = vectors["image_embedding"].values @ vectors["text_embedding"].values.T
    np.testing.assert_allclose(mine * model.logit_scale.detach().exp().item(), similarity, rtol=1e-4, atol=1e-4)
    assert result.attrs["site"] == ""
    assert "no map of a word" in "".join(e.html() for e in analyser.report(result))


def test_negatives_and_reconstruction_are_what_the_outputs_say(run_with_outputs: Callable[..., Run]) -> None:
    def outputs_of(condition: Condition) -> dict[str, Any]:
        negative = np.array([1, 3, 1, np.nan])
        if condition.ask == "object":
            return {"loss": np.log(2) * np.full((4, 1), 4 if condition.text == "all" else 3)}
        if condition.by_phrase:
            return {"loss": np.log(2) * np.full((4, 1), 5 if condition.image == "all" else 1)}
        return {"score": negative if condition.text == "negative" else np.full(4, 2.0)}

    run = run_with_outputs(4, outputs_of)
    analyser = MultilevelAlignment(reconstruction=True, object_reconstruction=True)
    result = analyser.analyse(run)
    assert float(result["matching"]) == pytest.approx(2 / 3)
    assert float(result["margin"]) == pytest.approx(1 / 3)
    assert int(result["without_negative"]) == 1
    np.testing.assert_allclose(result["reconstruction"], [1, 5])
    np.testing.assert_allclose(result["object_reconstruction"], [3, 4])
    assert "telling masked objects" in "".join(e.html() for e in analyser.report(result))


def test_words_of_one_stream_look_at_its_patches(tmp_path: Path) -> None:
    words = ("a", "red", "cat", "on", "the", "box")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    hf.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    hf.ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(tmp_path)
    config = hf.ViltConfig(**(TEXT | VISION | {"vocab_size": 11}), max_position_embeddings=16)
    widened(hf.ViltForMaskedLM._from_config(config, attn_implementation="eager")).save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    regions = (Region("red cat", (0, 0, 8, 8), (2, 9)), Region("the box", (8, 0, 16, 16), (13, 20)))
    pictures = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(3)]
    samples = [Sample(f"s{i}", picture, "a red cat on the box", regions) for i, picture in enumerate(pictures)]
    analyser = MultilevelAlignment(maps="attention", negatives=False)
    run = attnscope.extract(tmp_path, samples, [analyser], spec=ExtractSpec(encoding="exact"))
    result = analyse(run, analyser, save=False)
    assert result.attrs["site"] == "joint.self"
    mass = np.zeros((3, 2, 2))
    for sample in range(3):
        tokens = run.tokens("joint").isel(sample=sample)
        attention = run.attention("joint.self").isel(sample=sample).mean("head").values
        row, column, kind = (tokens[n].values for n in ("row", "column", "kind"))
        patches = np.flatnonzero(kind == KIND_CODES["image"])
        for number, (names, box) in enumerate(((("red", "cat"), row < 2), (("the", "box"), column >= 2))):
            rows = [t for t, w in enumerate(tokens["token_text"].values) if w in names]
            inside = (box & ((column < 2) | (number == 1)))[patches]
            for layer in range(2):
                values = np.mean([attention[layer, r][patches] for r in rows], axis=0)
                mass[sample, number, layer] = values[inside].sum() / values.sum()
    np.testing.assert_allclose(result["mass"], mass.mean((0, 1)), rtol=1e-5)


def test_concepts_that_a_text_leaves_out_are_those_that_a_model_run_by_hand_finds(tmp_path: Path) -> None:
    words = ("a", "red", "cat", "on", "the", "box", "dog", "blue")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    hf.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    hf.ViltImageProcessorPil(size={"shortest_edge": 16}, size_divisor=4).save_pretrained(tmp_path)
    config = hf.ViltConfig(**(TEXT | VISION | {"vocab_size": 13}), max_position_embeddings=16)
    model = widened(hf.ViltForImageAndTextRetrieval._from_config(config, attn_implementation="eager"), 0.3)
    model.save_pretrained(tmp_path)
    concepts = ("red cat", "box", "dog", "blue dog", "blue box", "blue cat")
    generator = np.random.default_rng(0)
    samples, expected = [], {"precision": [], "recall": []}
    for number in range(6):
        picture = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        regions = (
            # The phrase has a word between the concept's, and its label none.
            Region("red the cat", (0, 0, 8, 8), (2, 13), label="red cat"),
            Region(None, (8, 8, 16, 16), label="blue dog"),
            *([Region(None, (8, 0, 16, 8), label="box")] if number % 2 else []),
        )
        samples.append(Sample(f"s{number}", picture, "a red the cat on the box" if number == 4 else "a red the cat",
                              regions if number != 5 else regions[:1]))  # fmt: skip
    analyser = MultilevelAlignment(concepts=concepts, negatives=False, maps="attention", target="matching")
    spec = ExtractSpec(frozenset({"score"}))
    run = attnscope.extract(tmp_path, samples, [analyser], spec=spec, target="matching", batch_size=2)
    result = analyse(run, analyser, save=False)
    loaded = attnscope.loading.load_model(tmp_path)  # type: ignore[attr-defined]
    for number, sample in enumerate(samples[:5]):
        shown = {"dog", "blue dog"} | ({"box"} if number % 2 else set())
        asked = [c for c in concepts if c not in ({"red cat", "box"} if number == 4 else {"red cat"})]
        torch.manual_seed(0)
        scores = {}
        for concept in asked:
            inputs = loaded.family.encode([Sample("x", sample.image, f"a {concept}")], loaded)
            with torch.no_grad():
                scores[concept] = float(model(**inputs).logits[0, 0])
        first = sorted(asked, key=lambda c: -scores[c])
        hits = [len(shown & set(first[:k])) for k in (1, 2, 4)]
        expected["precision"].append([h / min(k, len(first)) for h, k in zip(hits, (1, 2, 4), strict=True)])
        expected["recall"].append([h / len(shown) for h in hits])
    for name, values in expected.items():
        np.testing.assert_allclose(result[f"missing_{name}"], np.mean(values, axis=0), rtol=1e-6)
    chance = np.mean([2 / 5, 3 / 5, 2 / 5, 3 / 5, 2 / 4])
    np.testing.assert_allclose(result["missing_precision_chance"], chance)
    np.testing.assert_allclose(result["missing_recall_chance"][0], np.mean([1 / 5] * 4 + [1 / 4]))
    assert int(result["missing_skipped"]) == 1
    html = "".join(e.html() for e in analyser.report(result))
    assert "1 texts leave out nothing that is labelled" in html


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The area that two boxes (left, top, right, bottom) share, counted in half pixels."""
    grid = np.arange(0.25, 40, 0.5)
    inside = [((grid > box[0]) & (grid < box[2]), (grid > box[1]) & (grid < box[3])) for box in (a, b)]
    return float((inside[0][0] & inside[1][0]).sum() * (inside[0][1] & inside[1][1]).sum()) / 4


def area(box: np.ndarray) -> float:
    return overlap(box, box)


def test_words_of_a_model_of_regions_look_at_their_boxes(tmp_path: Path) -> None:
    """Against loops over the boxes that LXMERT was given: two that phrases name, one that none does, and fillings."""
    words = ("a", "red", "cat", "on", "the", "box")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    hf.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = hf.LxmertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=37, vocab_size=11, l_layers=1, x_layers=2, r_layers=1,
        visual_feat_dim=48, num_qa_labels=4, region_pixels={"count": 7, "side": 4},
    )  # fmt: skip
    widened(hf.LxmertForQuestionAnswering._from_config(config, attn_implementation="eager")).save_pretrained(tmp_path)
    generator = np.random.default_rng(0)
    named = {"red cat": (0, 0, 10, 8), "the box": (20, 2, 36, 12)}
    boxes = [(0, 0, 10, 8), (20, 2, 36, 12), (22, 3, 36, 12)]
    regions = (Region("red cat", boxes[0], (2, 9)), Region("the box", boxes[1], (13, 20)), Region(None, boxes[2], None))
    pictures = [Image.fromarray(generator.integers(0, 255, (16, 40, 3), dtype=np.uint8)) for _ in range(3)]
    samples = [Sample(f"s{i}", picture, "a red cat on the box", regions) for i, picture in enumerate(pictures)]
    analyser = MultilevelAlignment(maps="attention", negatives=False)
    run = attnscope.extract(tmp_path, samples, [analyser], spec=ExtractSpec(encoding="exact"))
    result = analyse(run, analyser, save=False)
    assert result.attrs["site"] == "text.vision"
    own = run.tokens("vision")["box"].values[0].astype(float)
    np.testing.assert_allclose(own[:3], boxes, atol=1e-4)
    own = np.round(own * 2) / 2
    expected: dict[str, list[list[float]]] = {name: [] for name in ("pointing", "mass", "box", "region")}
    chance: dict[str, list[float]] = {name: [] for name in expected}
    for sample in range(3):
        text_of = run.tokens("text").isel(sample=sample)["token_text"].values
        attention = run.attention("text.vision").isel(sample=sample).mean("head").values
        for phrase, box in named.items():
            rows = [t for t, w in enumerate(text_of) if w in phrase.split()]
            shares = np.array([overlap(one, np.array(box)) / area(one) for one in own])
            fits = [overlap(one, np.array(box)) / (area(one) + area(np.array(box)) - overlap(one, np.array(box)))
                    for one in own]  # fmt: skip
            chance["pointing"].append(float((shares >= 0.5 * shares.max()).mean()))
            chance["mass"].append(shares.mean())
            chance["region"].append(np.mean([fit >= 0.5 for fit in fits]))
            told: dict[str, list[float]] = {name: [] for name in expected}
            for layer in attention:
                values = layer[rows].mean(0)
                best = int(values.argmax())
                told["pointing"].append(float(shares[best] >= 0.5 * shares.max()))
                told["mass"].append(float((values * shares).sum() / values.sum()))
                told["region"].append(float(fits[best] >= 0.5))
                masses = [
                    sum(v * overlap(one, np.array(b)) / area(one) for v, one in zip(values, own, strict=True))
                    / np.sqrt(area(np.array(b)))
                    for b in boxes
                ]
                chosen = np.array(boxes[int(np.argmax(masses))])
                both = overlap(chosen, np.array(box))
                told["box"].append(float(both / (area(chosen) + area(np.array(box)) - both) >= 0.5))
            for name, values in told.items():
                expected[name].append(values)
    for name, found in expected.items():
        np.testing.assert_allclose(result[name], np.mean(found, axis=0), rtol=1e-4, err_msg=name)
    for name in ("pointing", "mass", "region"):
        np.testing.assert_allclose(result[f"{name}_chance"], np.mean(chance[name]), rtol=1e-4, err_msg=name)
    # The box of the unnamed thing overlaps that of the named one by more than half.
    assert float(result["box_chance"]) == pytest.approx(np.mean([1 / 3, 2 / 3]))
    assert "strongest region of a detector" in "".join(e.html() for e in analyser.report(result))


def test_a_site_that_is_none_is_refused() -> None:
    run = planted(lambda layer: np.full((2, 6, 16), 1 / 16))
    with pytest.raises(ValueError, match=r"'text\.self' is not attention from words to an image"):
        MultilevelAlignment(site="text.self", negatives=False).analyse(run)
