"""Reports: every text escaped, one file, a broken section in its place."""

import html.parser
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr

import attnscope
from attnscope import analyse, report
from attnscope.analysis import make_analyser
from attnscope.report import (
    Citation,
    Code,
    Element,
    Facts,
    Heading,
    HeatMap,
    ImageGrid,
    ImageRow,
    LineChart,
    Note,
    Paragraph,
    Section,
    Series,
    ShadedText,
    Table,
    overlay,
    render_page,
)
from attnscope.run import LEFT_OUT, Run
from attnscope.statistics import bootstrap_interval
from attnscope.testing import make_run

EVIL = "<script>alert('1')</script> & \"$x^2$\""
PICTURE = np.zeros((4, 6, 3), np.uint8)
CURVE = LineChart(
    [0, 1], [Series(EVIL, [1.0, 2.0]), Series("b", [2, 3], [1, 2], [3, 4], np.ones((2, 3)))], EVIL, EVIL, EVIL
)
ELEMENTS = (
    Heading(EVIL),
    Paragraph(EVIL),
    Citation(EVIL, f"https://{EVIL}"),
    Note(EVIL),
    Code(EVIL),
    Facts([(EVIL, EVIL)]),
    Table([EVIL, "n"], [(EVIL, 1.5)], EVIL),
    CURVE,
    HeatMap(np.array([[1.0, np.nan]]), [EVIL], [EVIL, 2], EVIL, EVIL, EVIL, EVIL, centre=0.0),
    ImageGrid([EVIL], [ImageRow(EVIL, [PICTURE])], EVIL),
    ShadedText([EVIL, "b"], [1.0, np.nan], EVIL),
)


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and holds that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: type(e).__name__)
def test_every_element_escapes_what_comes_from_outside(element: Element) -> None:
    shown = element.html()
    reader = Reader(shown)
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    assert not [name for _, attrs in reader.tags for name in attrs if name.startswith("on")]
    told = "".join(reader.words) + "".join(v or "" for _, attrs in reader.tags for v in attrs.values())
    assert "<script>alert(" in told


def test_a_link_is_made_of_web_addresses_only() -> None:
    assert "<a " not in Citation("a paper", "javascript:alert(1)").html()
    assert 'href="https://arxiv.org/abs/1"' in Citation("a paper", "https://arxiv.org/abs/1").html()


def test_charts_are_drawn_in_the_text_colour_with_ids_of_their_own_and_their_numbers_beside() -> None:
    first, second = CURVE.html(), LineChart([0, 1], [Series("a", [1, 2])], "x", "y").html()
    assert "currentColor" in first
    assert report._INK not in first
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert not ids[0] & ids[1]
    for text, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text)) <= own
    ET.fromstring(second[second.index("<svg") : second.index("</svg>") + 6])
    reader = Reader(first)
    [svg] = [attrs for tag, attrs in reader.tags if tag == "svg"]
    assert svg["role"] == "img"
    assert "Line chart" in (svg["aria-label"] or "")
    assert "<details>" in first
    assert first == CURVE.html()


def test_numbers_stand_to_the_right_and_undefined_ones_in_words() -> None:
    shown = Table(["name", "value"], [("a", 0.123456), ("b", float("nan"))]).html()
    assert '<td class="number">0.1235</td>' in shown
    assert '<td class="number">not defined</td>' in shown
    assert "<td>a</td>" in shown


def test_words_are_shaded_by_their_share_of_the_greatest_weight() -> None:
    shown = ShadedText(["a", "b", "c", "d"], [2.0, 1.0, -1.0, np.nan]).html()
    assert re.findall(r"--weight:([\d.]+)", shown) == ["0.850", "0.425", "0.000", "0.000"]


def test_overlay_gives_each_patch_one_colour_and_leaves_undefined_patches_grey() -> None:
    picture = np.full((4, 6, 3), 100, np.uint8)
    blended = overlay(picture, np.array([[0.0, 1.0, np.nan], [0.5, 0.5, 0.5]]))
    assert blended.shape == picture.shape
    assert blended.dtype == np.uint8
    np.testing.assert_array_equal(blended[:2, 4:], 100)
    for block in (blended[:2, :2], blended[:2, 2:4], blended[2:, :]):
        assert len(np.unique(block.reshape(-1, 3), axis=0)) == 1
    assert blended[0, 2].sum() > blended[2, 0].sum() > blended[0, 0].sum()
    np.testing.assert_array_equal(overlay(picture, np.full((2, 3), np.nan)), picture)


def test_a_page_is_one_file_without_scripts_that_follows_light_and_dark() -> None:
    page = render_page(
        EVIL, [Paragraph("about")], [Section(EVIL, ELEMENTS), Section("Two", []), Section("Two", [])], EVIL
    )
    reader = Reader(page.removeprefix("<!DOCTYPE html>"))
    assert not [tag for tag, _ in reader.tags if tag in ("script", "link", "iframe")]
    sources = [attrs["src"] for _, attrs in reader.tags if "src" in attrs]
    assert sources
    assert all((s or "").startswith("data:image/png;base64,") for s in sources)
    assert all(attrs.get("alt") for tag, attrs in reader.tags if tag == "img")
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    anchors = {attrs["id"] for tag, attrs in reader.tags if tag == "section"}
    assert len(anchors) == 3
    assert {(attrs["href"] or "")[1:] for tag, attrs in reader.tags if tag == "a"} >= anchors


def test_a_broken_section_is_named_in_its_place_and_costs_the_others_nothing() -> None:
    def broken() -> Iterator[Element]:
        yield Paragraph("before it broke")
        raise ZeroDivisionError("no <samples>")

    sections = [Section("First", broken()), Section("Second", [Paragraph("stands")])]
    with pytest.warns(RuntimeWarning, match="section 'First' could not be shown further: ZeroDivisionError"):
        page = render_page("title", [], sections)
    assert "before it broke" in page
    assert "ZeroDivisionError: no &lt;samples&gt;" in page
    assert "<p>stands</p>" in page


@pytest.fixture
def run() -> Run:
    made = make_run(samples=5, grid=(2, 2))
    made.set_attrs(model=EVIL, weights_digest="abc123", versions={"torch": "2.13"}, seed=3)
    made.commit(range(2, 3), np.array([LEFT_OUT]))
    made.write_block("samples/reason", range(2, 3), np.array(["image can't be <read>"], object))
    return made


def test_render_tells_what_was_run_and_how_to_repeat_it(run: Run) -> None:
    results = [analyse(run, make_analyser(*a)) for a in (("qk_svd",), ("relevance", {"start_layer": 1}))]
    page = attnscope.render(run, results)
    words = "".join(Reader(page.removeprefix("<!DOCTYPE html>")).words)
    for fact in (EVIL, "abc123", "torch 2.13", "4 used, 1 left out", "image can't be <read>", "sample-2"):
        assert fact in words
    assert "attnscope extract" in words
    assert "--for qk_svd --for relevance" in words
    assert "attnscope analyse memory relevance --option start_layer=1\n" in words
    assert "attnscope analyse memory qk_svd\n" in words
    assert "Query-key singular modes" in words
    assert "Pan, Philip, Xie and Schwartz" in words


def test_render_shows_the_results_that_it_can(run: Run) -> None:
    known = analyse(run, make_analyser("qk_svd"))
    unknown = xr.Dataset(attrs={"analyser": "gone<b>", "options": json.dumps({"x": 1})})
    strange = known.drop_vars("cosine_average")
    with pytest.warns(RuntimeWarning) as caught:
        page = attnscope.render(run, [unknown, strange, known])
    assert len(caught) == 2
    assert "unknown analyser &#x27;gone&lt;b&gt;&#x27;" in page
    assert page.count("arxiv.org/abs/2405.14880</a>") == 2
    assert page.count("</section>") == 3


def test_render_takes_results_that_were_saved(run: Run) -> None:
    analyse(run, make_analyser("relevance"))
    page = attnscope.render(run, [run.analysis(name) for name in run.analyses])
    assert "Relevance of tokens" in page
    assert page.count("<img ") == 16


def test_interval_of_the_mean_covers_it_and_leaves_missing_values_out() -> None:
    values = np.random.default_rng(0).normal(3, 1, (400, 2))
    low, high = bootstrap_interval(values)
    # 95 % of a normal: 1.96 standard errors to each side.
    np.testing.assert_allclose(high - low, 2 * 1.96 * values.std(0) / 20, rtol=0.15)
    assert ((low < values.mean(0)) & (values.mean(0) < high)).all()
    padded = np.concatenate([values, np.full((100, 2), np.nan)])
    np.testing.assert_allclose(np.subtract(*bootstrap_interval(padded)), low - high, rtol=0.2)
    for few in (values[:1], np.full((3, 2), np.nan), values[:0]):
        assert np.isnan(bootstrap_interval(few)).all()
    assert bootstrap_interval(values[:, 0])[0].shape == ()
