"""The small settings compute what their equations say, and what their attention shows is measured as it says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from attnscope.cli import main
from attnscope.reference import score_tables
from attnscope.reference.alignments import swap_scores
from attnscope.reference.answering import Answering
from attnscope.reference.corpus import CLASSES, PAD, SIDE, VOCABULARY, Corpus, build_corpus
from attnscope.reference.inspecting import FRACTIONS, Inspected, examine_attention, measure
from attnscope.reference.judging import examine_painting, judge, judged_things, thing_classes
from attnscope.reference.kinds import build_learner
from attnscope.reference.lessons import trimmed
from attnscope.reference.painter import MENTIONS, Layout, Painter, draw_all, every_pixel, mentioned
from attnscope.reference.scan import MARGIN, SHARPNESS, SLOPE, Scan, examine_scan, hinge
from attnscope.reference.scenes import SHAPES, draw_scene
from attnscope.reference.score_tables import measure_model, summary
from attnscope.reference.tabulating import read_table

SCENES = np.arange(24)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus("test", range(len(SCENES)))


def wide(name: str, alignment: str = "") -> nn.Module:
    torch.manual_seed(0)
    learner = build_learner(name, alignment).eval()
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
    return learner


# -- scan --------------------------------------------------------------------------------------------------------------


def stacked_cross_attention(scores: Tensor, words: Tensor, regions: Tensor) -> Tensor:
    """Likeness of one text (word, channel) without padding and one image, step by step as Lee et al. say it."""
    scores = torch.where(scores > 0, scores, SLOPE * scores)
    scores = scores / scores.norm(dim=0, keepdim=True)
    attention = torch.exp(SHARPNESS * scores)
    attention = attention / attention.sum(1, keepdim=True)
    mixtures = torch.stack(
        [sum((a * v for a, v in zip(row, regions, strict=True)), torch.zeros(())) for row in attention]
    )
    return nn.functional.cosine_similarity(words, mixtures, dim=-1).mean()


@pytest.mark.parametrize("alignment", ["scaled_dot", "biased_general_kwq", "tanh_qwk"])
@torch.no_grad()
def test_a_meeting_of_texts_and_images_is_stacked_cross_attention(alignment: str, corpus: Corpus) -> None:
    learner = wide("scan", alignment)
    assert isinstance(learner, Scan)
    words = trimmed(corpus.words[SCENES[:5]])
    texts, (images, _) = learner.embed_texts(words), learner.embed_images(corpus, SCENES[:4])
    likeness = learner.meet(words, texts, images).likeness
    for number, (text, ids) in enumerate(zip(texts, words, strict=True)):
        real = text[ids != PAD]
        expected = [stacked_cross_attention(learner.score(real, image), real, image) for image in images]
        torch.testing.assert_close(likeness[number], torch.stack(expected), atol=1e-5, rtol=0)
    own = learner.meet_own(words[:4], texts[:4], images)
    torch.testing.assert_close(own.likeness[:, 0], likeness[:4].diagonal(), atol=1e-6, rtol=0)


@torch.no_grad()
def test_in_scan_dot_scaled_dot_and_cosine_are_the_same(corpus: Corpus) -> None:
    dot = met("dot", corpus)
    for alignment in ("scaled_dot", "cosine"):
        torch.testing.assert_close(met(alignment, corpus), dot, atol=5e-7, rtol=0)
    general = met("general_qwk", corpus)
    assert (general - dot).abs().max() > 1e-3
    # Between score and softmax stand LeakyReLU and the length over words, so that the key's bias isn't lost here.
    assert (met("biased_general_qwk", corpus) - general).abs().max() > 1e-3


def met(alignment: str, corpus: Corpus) -> Tensor:
    """How like texts and images are to one learner, but for its score."""
    learner = wide("scan")
    assert isinstance(learner, Scan)
    swap_scores(learner, alignment)
    generator = torch.Generator().manual_seed(3)
    for parameter in learner.score.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    words = trimmed(corpus.words[SCENES])
    return learner.meet(words, learner.embed_texts(words), learner.embed_images(corpus, SCENES)[0]).likeness


def test_a_text_is_read_alike_whatever_it_is_padded_with(corpus: Corpus) -> None:
    learner = wide("scan")
    assert isinstance(learner, Scan)
    short = trimmed(corpus.words[SCENES[:1]])
    alone, padded = learner.embed_texts(short), learner.embed_texts(nn.functional.pad(short, (0, 6)))
    torch.testing.assert_close(padded[:, : short.shape[1]], alone, atol=1e-6, rtol=0)


def test_the_hinge_takes_the_likest_wrong_one_both_ways() -> None:
    likeness = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.5, 0.4], [0.0, 0.45, 0.6]])
    texts = [max(0, MARGIN + 0.8 - 0.9), max(0, MARGIN + 0.4 - 0.5), max(0, MARGIN + 0.45 - 0.6)]
    images = [max(0, MARGIN + 0.2 - 0.9), max(0, MARGIN + 0.45 - 0.5), max(0, MARGIN + 0.8 - 0.6)]
    assert hinge(likeness).item() == pytest.approx((sum(texts) + sum(images)) / 3)
    assert hinge(torch.eye(3)).item() == 0


def test_retrieval_is_by_rank_among_the_gallery(corpus: Corpus) -> None:
    learner = wide("scan")
    assert isinstance(learner, Scan)
    found = examine_scan(learner, corpus)
    with torch.no_grad():
        words = trimmed(corpus.words)
        likeness = learner.meet(
            words, learner.embed_texts(words), learner.embed_images(corpus, SCENES)[0]
        ).likeness.numpy()
    for way, table in (("text_to_image", likeness), ("image_to_text", likeness.T)):
        for most in (1, 5, 10):
            hits = [number in np.argsort(-row)[:most] for number, row in enumerate(table)]
            assert found[f"{way}_at_{most}"].values.tolist() == hits


# -- answering ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_answer_does_not_see_regions_that_are_gone(corpus: Corpus) -> None:
    learner = wide("answering", "general_kwq")
    assert isinstance(learner, Answering)
    words, seen = trimmed(corpus.questions[SCENES, 0]), learner.see(corpus, SCENES)
    gone = torch.zeros(len(SCENES), seen.pixels.shape[1], dtype=torch.bool)
    gone[:, 3:] = True
    hidden = learner.encode(words, learner.hide(seen, gone))
    fewer = replace(seen, pixels=seen.pixels[:, :3], boxes=seen.boxes[:, :3])  # type: ignore[index]
    torch.testing.assert_close(
        learner.answer(hidden), learner.answer(learner.encode(words, fewer)), atol=1e-3, rtol=1e-3
    )
    attention = learner.attend(words, learner.hide(seen, gone))[0]
    assert (attention[..., 3:] == 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))


# -- painter -----------------------------------------------------------------------------------------------------------


def test_pixels_know_the_box_that_they_lie_in(corpus: Corpus) -> None:
    layout = Layout.of(corpus, SCENES)
    places, owner = layout.place(every_pixel().expand(len(SCENES), -1, -1))
    for scene in SCENES:
        things = mentioned(corpus, scene)
        of_pixel = owner[scene].view(SIDE, SIDE)
        for mention, thing in enumerate(things):
            shown = draw_scene("test", int(scene)).things[thing]
            row, column = int(shown.y * SIDE), int(shown.x * SIDE)
            assert of_pixel[row, column] == mention
            # The middle of its box, which is that of the thing unless something lies over it.
            assert places[scene].view(SIDE, SIDE, -1)[row, column, MENTIONS + 5 : MENTIONS + 7].abs().max() < 0.35
        assert set(of_pixel.unique().tolist()) == {*range(len(things)), MENTIONS}


@torch.no_grad()
def test_what_is_drawn_depends_on_the_words_alone_that_are_not_gone(corpus: Corpus) -> None:
    learner = wide("painter")
    assert isinstance(learner, Painter)
    words, layout = trimmed(corpus.words[SCENES]), Layout.of(corpus, SCENES)
    gone = torch.zeros(words.shape, dtype=torch.bool)
    whole = draw_all(learner, corpus).astype(int)
    for drawn in (learner.draw(words, layout), learner.draw(words, layout, gone)):
        # In batches of another size, a colour may be rounded to the next level.
        assert np.abs(drawn - whole).max() <= 1 and (drawn == whole).mean() > 0.999
    gone[:, 1:] = True
    places, _ = layout.place(every_pixel().expand(len(SCENES), -1, -1))
    attention, _ = learner.attend(words, places, gone)
    assert (attention[..., 0] == 1).all() and (attention[..., 1:] == 0).all()


def test_the_judge_tells_true_pictures_and_is_fooled_by_exchanged_ones(corpus: Corpus) -> None:
    scenes, things = judged_things(corpus)
    classes = thing_classes(corpus, scenes, things)
    names = [" ".join(draw_scene("test", int(s)).things[t].pair) for s, t in zip(scenes, things, strict=True)]
    assert [CLASSES[c] for c in classes] == names
    found = judge(corpus.pixels[scenes], corpus, scenes, things)
    np.testing.assert_allclose(found.sum((1, 2)), 1, atol=1e-5)
    assert (found.reshape(len(found), -1).argmax(1) == classes).mean() > 0.95
    # Grey pictures show nothing.
    grey = judge(np.full_like(corpus.pixels[scenes], 90), corpus, scenes, things)
    assert (grey.reshape(len(grey), -1).argmax(1) == classes).mean() < 0.2
    blind = examine_painting(build_learner("painter"), corpus)  # type: ignore[arg-type]
    assert blind["judge_both"].values.mean() > 0.95
    assert blind["drawn_both"].values.mean() < 0.2
    assert len(SHAPES) * 8 + 1 == len(CLASSES)


# -- what attention shows ----------------------------------------------------------------------------------------------


def inspected(attention: list[list[float]], truth: list[list[int]], weights: list[float]) -> Inspected:
    """Items of one scene each, whose score is the sum of the weights of the units that are left."""
    values, right = np.array(attention), np.array(truth, bool)

    def score(gone: np.ndarray) -> np.ndarray:
        return (~gone * np.array(weights)).sum(1)

    return Inspected(values, right, np.ones_like(right), np.arange(len(values)), score)


def test_figures_of_attention_by_hand() -> None:
    found = measure(inspected([[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]], [[1, 0, 1, 0], [1, 0, 0, 0]], [4, 2, 1, 1]))
    values = {name: items.values.tolist() for name, items in found.items()}
    assert values["pointing"] == [1, 0]
    assert values["mass"] == pytest.approx([0.6, 0.1])
    # Of two strongest one lies in two true ones; of one strongest none.
    assert values["overlap"] == pytest.approx([1 / 3, 0])
    assert values["chance"] == [0.5, 0.25]
    taken = [min(max(round(4 * fraction), 1), 3) for fraction in FRACTIONS]
    assert taken == [1, 1, 2, 3, 3]
    for item, order in enumerate(([4, 2, 1, 1], [1, 1, 2, 4])):
        lost = [sum(order[:n]) for n in taken]
        assert values["deletion"][item] == pytest.approx(np.mean(lost))
        assert values["insertion"][item] == pytest.approx(np.mean([8 - one for one in lost]))


def test_attention_alike_to_all_units_points_by_chance() -> None:
    truth = np.zeros((900, 9), int)
    truth[:, 0] = 1
    found = measure(inspected(np.full((900, 9), 1 / 9).tolist(), truth.tolist(), [1.0] * 9))
    assert found["pointing"].values.mean() == pytest.approx(1 / 9, abs=0.04)
    np.testing.assert_allclose(found["deletion_over_random"].values, 0, atol=1e-12)


def test_a_random_attention_is_no_better_than_random() -> None:
    rng = np.random.default_rng(1)
    random = rng.random((400, 9))
    truth = np.eye(9, dtype=int)[rng.integers(0, 9, 400)]
    found = measure(inspected(random.tolist(), truth.tolist(), rng.random(9).tolist()))
    for name in ("deletion_over_random", "insertion_over_random"):
        items = found[name].figure()
        assert items.low < 0 < items.high
    assert found["pointing"].values.mean() == pytest.approx(1 / 9, abs=0.05)


@pytest.mark.parametrize("name", ["vilt", "lxmert"])
def test_attention_of_carried_models_points_at_what_is_asked_for(name: str, corpus: Corpus) -> None:
    from attnscope.reference.weights import read_learner

    found = {key: items.values.mean() for key, items in examine_attention(read_learner(name), corpus).items()}
    assert found["attention_pointing"] > 0.8 > 3 * found["attention_chance"]
    assert found["attention_deletion_over_random"] > 0.2
    assert found["attention_insertion_over_random"] < -0.2


@pytest.mark.parametrize("name", ["scan", "answering", "painter"])
def test_attention_of_an_untrained_setting_is_near_chance(name: str, corpus: Corpus) -> None:
    torch.manual_seed(0)
    found = {key: items.values for key, items in examine_attention(build_learner(name).eval(), corpus).items()}
    assert abs(found["attention_mass"].mean() - found["attention_chance"].mean()) < 0.05
    assert all(np.isfinite(values).all() for values in found.values())


# -- tables ------------------------------------------------------------------------------------------------------------

SHORT = {"steps": 2, "decay": 1, "scenes": 60, "validation_scenes": 8}


@pytest.fixture
def few_unseen(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are measured on few scenes."""
    monkeypatch.setattr(score_tables, "_unseen", lambda: corpus)


@pytest.mark.usefixtures("few_unseen")
def test_a_table_is_made_once_and_gives_differences_from_the_scaled_dot_product(tmp_path: Path) -> None:
    short = [f"--recipe={name}={value}" for name, value in SHORT.items()]
    command = ["reference", "scores", "--setting", "scan", "--seeds", "2", "--engine", "inline"]
    command += ["--alignment", "cosine", "--alignment", "sigmoid_qwk", "--out", str(tmp_path), *short]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    rows = read_table(str(tmp_path / "scan"))
    assert list(dict.fromkeys(row.variant for row in rows)) == ["scaled_dot", "cosine", "sigmoid_qwk"]
    by = {(row.variant, row.figure): row for row in rows}
    both = [measure_model(tmp_path / "scan" / f"cosine-{seed}")["attention_mass"] for seed in (0, 1)]
    assert by["cosine", "attention_mass"].value.mean == pytest.approx(np.mean(both))
    # In scan the two are one function, but for rounding.
    assert by["cosine", "attention_mass"].difference.mean == pytest.approx(0, abs=1e-3)  # type: ignore[union-attr]
    page = (tmp_path / "scan" / "page.md").read_text()
    assert summary(json.loads((tmp_path / "scan" / "scores.json").read_text())) in page
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("figures.json")}
    assert CliRunner().invoke(main, command).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("figures.json")} == before


def test_a_summary_marks_what_is_more_than_noise() -> None:
    def of(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.25, "high": mean + 0.25, "seeds": 3}

    rows = [
        {"variant": variant, "figure": figure, "value": of(0.5), "difference": of(by), "verdict": verdict}
        for variant, figure, by, verdict in (
            ("dot", "attention_mass", 0.1, "noise"),
            ("dot", "drawn_shape", 0.4, "apart"),
            ("cosine", "drawn_shape", -0.4, "apart"),
        )
    ]
    assert summary({"figures": ["drawn_shape", "attention_mass"], "rows": rows}).splitlines() == [
        "| score | drawn shape | mass |",
        "|---|---|---|",
        "| `dot` | 0.500 ± 0.250 ▲ | 0.500 ± 0.250 |",
        "| `cosine` | 0.500 ± 0.250 ▼ | - |",
    ]


@pytest.mark.usefixtures("few_unseen")
def test_the_command_makes_a_table_per_setting_as_a_flow(tmp_path: Path) -> None:
    pytest.importorskip("prefect")
    short = [f"--recipe={name}={value}" for name, value in SHORT.items()]
    command = ["reference", "scores", "--setting", "answering", "--alignment", "dot", "--seeds", "1"]
    done = CliRunner().invoke(main, [*command, "--engine", "prefect", "--out", str(tmp_path), *short])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "answering" / "page.md").is_file()
    table = json.loads((tmp_path / "answering" / "table.json").read_text())
    assert {row["variant"] for row in table["rows"]} == {"scaled_dot", "dot"}
    assert {row["verdict"] for row in table["rows"]} == {"", "one seed"}
    refused = CliRunner().invoke(main, ["reference", "scores", "--setting", "clip", "--out", str(tmp_path)])
    assert refused.exit_code == 2
    assert "no scores are compared in 'clip'; the settings are vilt, lxmert, scan, answering, painter" in refused.stderr
    own = ["reference", "scores", "--setting", "vilt", "--recipe", "samples=data", "--out", str(tmp_path)]
    refused = CliRunner().invoke(main, own)
    assert refused.exit_code == 2
    assert "for scores on samples use `attnscope reference table`" in refused.stderr


def test_words_of_questions_name_classes_of_regions() -> None:
    from attnscope.reference.inspecting import _CLASS_SAYS

    red, circle = VOCABULARY.index("red"), VOCABULARY.index("circle")
    assert [CLASSES[n] for n in np.flatnonzero(_CLASS_SAYS[red] & _CLASS_SAYS[circle])] == ["red circle"]
