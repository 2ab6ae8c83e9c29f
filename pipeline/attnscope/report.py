"""Reports: elements that show themselves as HTML, and the one self-contained page that holds them.

Nothing here knows of runs or analysers. Every text that comes in is escaped; charts are SVG drawn in the page's own
text colour, so that they follow light and dark, and pictures are PNG. The page needs no script and no other file.
"""

import base64
import hashlib
import html
import importlib.resources
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn in this colour, replaced by the page's text colour.
_INK = "#0a0b0c"
# Readable on light and on dark, told apart by the colour-blind with the dashes beside them.
_COLOURS = ("#3182bd", "#d97706", "#2a9d6f", "#a06cc8", "#d1495b", "#8a8f98")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_DRAWING = {
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.14,
    "grid.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "attnscope",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_VECTOR_CELLS = 4000


class Element(Protocol):
    """Anything that a report may hold."""

    def html(self) -> str:
        """Itself as HTML, with every text escaped."""
        ...


@dataclass(frozen=True)
class Heading:
    """A heading inside a section; level 3 or 4."""

    text: str
    level: Literal[3, 4] = 3

    def html(self) -> str:
        return f"<h{self.level}>{_escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str

    def html(self) -> str:
        return f"<p>{_escape(self.text)}</p>"


@dataclass(frozen=True)
class Citation:
    """Where a method comes from; `url` is shown as a link when it is http or https."""

    text: str
    url: str = ""

    def html(self) -> str:
        link = ""
        if self.url.startswith(("https://", "http://")):
            link = f' <a href="{_escape(self.url)}">{_escape(self.url.split("://", 1)[1])}</a>'
        return f'<p class="citation">Method: {_escape(self.text)}{link}</p>'


@dataclass(frozen=True)
class Note:
    """A caveat, or (`kind='problem'`) something that went wrong."""

    text: str
    kind: Literal["note", "problem"] = "note"

    def html(self) -> str:
        return f'<p class="{self.kind}" role="note">{_escape(self.text)}</p>'


@dataclass(frozen=True)
class Code:
    """Commands, as typed."""

    text: str

    def html(self) -> str:
        return f"<pre><code>{_escape(self.text)}</code></pre>"


@dataclass(frozen=True)
class Facts:
    """Names and their values, such as what a run says of itself."""

    pairs: Sequence[tuple[str, object]]

    def html(self) -> str:
        return f"<dl>{''.join(f'<dt>{_escape(n)}</dt><dd>{_format(v)}</dd>' for n, v in self.pairs)}</dl>"


@dataclass(frozen=True)
class Table:
    """Rows under named columns; numbers are set to the right with four digits."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""

    def html(self) -> str:
        caption = f"<caption>{_escape(self.caption)}</caption>" if self.caption else ""
        numeric = [bool(self.rows) and all(_is_number(r[i]) for r in self.rows) for i in range(len(self.columns))]
        head = "".join(_cell("th", c, n, ' scope="col"') for c, n in zip(self.columns, numeric, strict=True))
        body = "".join(
            f"<tr>{''.join(_cell('td', v, n) for v, n in zip(row, numeric, strict=True))}</tr>" for row in self.rows
        )
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        label = _escape(self.caption or "table")
        return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'


@dataclass(frozen=True, eq=False)
class Series:
    """One line of a chart: values, a band from `low` to `high`, and `points` (x, point) around it."""

    label: str
    values: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray | None = None
    high: Sequence[float] | np.ndarray | None = None
    points: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class LineChart:
    """Series over a common x axis; the numbers stand in a table that folds out below it."""

    x: Sequence[float] | np.ndarray
    series: Sequence[Series]
    x_label: str
    y_label: str
    caption: str = ""
    zero_line: bool = False
    logarithmic: bool = False

    def html(self) -> str:
        labels = ", ".join(s.label for s in self.series)
        alt = f"Line chart of {self.y_label} over {self.x_label}: {labels}."
        return _figure(_svg(self._draw, alt), self.caption, "chart scroll") + _fold("Numbers", self._table())

    def png(self) -> bytes:
        """The chart alone, on white."""
        return _drawn_png(self._draw)

    def _draw(self) -> "Figure":
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter

        figure, axes = _axes(7.4, 3.4)
        x = np.asarray(self.x, float)
        if self.zero_line:
            axes.axhline(0, color=_INK, linewidth=0.8, alpha=0.5)
        for number, series in enumerate(self.series):
            colour = _COLOURS[number % len(_COLOURS)]
            if series.points is not None:
                points = np.asarray(series.points, float)
                across = np.repeat(x, points.shape[1])
                axes.plot(across, points.ravel(), "o", color=colour, markersize=2.6, alpha=0.4, markeredgewidth=0)
            if series.low is not None and series.high is not None:
                low, high = np.asarray(series.low, float), np.asarray(series.high, float)
                axes.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
            dash = _DASHES[number % len(_DASHES)]
            marker = "o" if len(x) <= 48 else None
            axes.plot(x, np.asarray(series.values, float), color=colour, linestyle=dash, linewidth=1.8, marker=marker,
                      markersize=3.6, label=series.label)  # fmt: skip
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        if self.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter("")
        if np.array_equal(x, np.round(x)):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(self.series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return figure

    def _table(self) -> Table:
        columns, values = [self.x_label], [np.asarray(self.x, float)]
        for series in self.series:
            named = ((series.label, series.values), (f"{series.label}, low", series.low), ("high", series.high))
            for name, listed in named:
                if listed is not None:
                    columns.append(name)
                    values.append(np.asarray(listed, float))
        return Table(columns, list(zip(*values, strict=True)))


@dataclass(frozen=True, eq=False)
class Bars:
    """One bar for each name with its interval from `low` to `high`; the numbers stand in a table that folds out."""

    names: Sequence[str]
    values: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray
    high: Sequence[float] | np.ndarray
    value_label: str
    caption: str = ""

    def html(self) -> str:
        rows = list(zip(self.names, *(map(float, v) for v in (self.values, self.low, self.high)), strict=True))
        alt = f"Bars of {self.value_label}: {', '.join(self.names)}."
        table = Table(["", self.value_label, "low", "high"], rows)
        return _figure(_svg(self._draw, alt), self.caption, "chart scroll") + _fold("Numbers", table)

    def _draw(self) -> "Figure":
        figure, axes = _axes(7.4, 1.0 + 0.42 * len(self.names))
        values, low, high = (np.asarray(v, float) for v in (self.values, self.low, self.high))
        places = np.arange(len(self.names))
        axes.barh(places, values, height=0.62, color=_COLOURS[0], alpha=0.75, linewidth=0)
        errors = np.clip(np.stack([values - low, high - values]), 0, None)
        axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=_INK, elinewidth=1.2, capsize=3)
        axes.set_yticks(places, list(self.names))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.axvline(0, color=_INK, linewidth=0.8, alpha=0.5)
        axes.set_xlabel(self.value_label)
        return figure


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A matrix as colours; with `centre` the colours diverge from that value, symmetrically."""

    values: np.ndarray
    rows: Sequence[object] | np.ndarray
    columns: Sequence[object] | np.ndarray
    row_label: str
    column_label: str
    value_label: str
    caption: str = ""
    centre: float | None = None

    def html(self) -> str:
        alt = f"Heat map of {self.value_label} over {self.row_label} and {self.column_label}."
        listed = [[_text(r), *map(float, v)] for r, v in zip(self.rows, self.values, strict=True)]
        table = Table([f"{self.row_label} \\ {self.column_label}", *map(_text, self.columns)], listed)
        return _figure(_svg(self._draw, alt), self.caption, "chart scroll") + _fold("Numbers", table)

    def png(self) -> bytes:
        """The chart alone, on white."""
        return _drawn_png(self._draw)

    def _draw(self) -> "Figure":
        values = np.ma.masked_invalid(np.asarray(self.values, float))
        figure, axes = _axes(7.4, min(7.0, 1.4 + 0.26 * len(self.rows)))
        axes.grid(False)
        low, high = self._limits(values)
        mesh = axes.pcolormesh(values, cmap="viridis" if self.centre is None else "RdBu_r", vmin=low, vmax=high,
                               rasterized=values.size > _VECTOR_CELLS, edgecolors="face", linewidth=0.2)  # fmt: skip
        axes.invert_yaxis()
        _label_cells(axes.set_yticks, self.rows, 24)
        _label_cells(axes.set_xticks, self.columns, 24)
        axes.set_xlabel(self.column_label)
        axes.set_ylabel(self.row_label)
        bar = figure.colorbar(mesh, ax=axes, label=self.value_label, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        return figure

    def _limits(self, values: np.ma.MaskedArray) -> tuple[float, float]:
        if not values.count():
            return 0.0, 1.0
        if self.centre is None:
            return float(values.min()), float(values.max())
        reach = float(np.abs(values - self.centre).max()) or 1.0
        return self.centre - reach, self.centre + reach


@dataclass(frozen=True, eq=False)
class ImageRow:
    """Pictures of one thing, (height, width, 3) uint8 each, one per column of the grid; words may stand below each."""

    label: str
    pictures: Sequence[np.ndarray]
    words: "Sequence[ShadedText]" = ()


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Rows of pictures under named columns."""

    columns: Sequence[str]
    rows: Sequence[ImageRow]
    caption: str = ""

    def html(self) -> str:
        head = "".join(f'<th scope="col">{_escape(c)}</th>' for c in self.columns)
        body = "".join(map(self._row, self.rows))
        table = f'<table class="pictures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        return _figure(table, self.caption, "scroll")

    def _row(self, row: ImageRow) -> str:
        words = [text.html() if text.tokens else "" for text in row.words] or [""] * len(row.pictures)
        cells = "".join(
            f'<td><img src="{_png(p)}" alt="{_escape(f"{row.label}: {c}")}" loading="lazy">{w}</td>'
            for c, p, w in zip(self.columns, row.pictures, words, strict=True)
        )
        label = f'<tr><th scope="row" colspan="{len(self.columns)}">{_escape(row.label)}</th></tr>' if row.label else ""
        return f"{label}<tr>{cells}</tr>"


@dataclass(frozen=True, eq=False)
class ShadedText:
    """Words shaded by their weights: the heaviest is darkest, 0 and below and NaN are plain."""

    tokens: Sequence[str]
    weights: Sequence[float] | np.ndarray
    label: str = ""

    def html(self) -> str:
        weights = np.nan_to_num(np.clip(np.asarray(self.weights, float), 0, None), posinf=0)
        shades = weights / (weights.max(initial=0) or 1) * 0.85
        label = f'<span class="label">{_escape(self.label)}</span>' if self.label else ""
        words = " ".join(
            f'<mark style="--weight:{s:.3f}" title="{w:.4g}">{_escape(t)}</mark>'
            for t, w, s in zip(self.tokens, weights, shades, strict=True)
        )
        return f'<p class="words">{label}<span>{words}</span></p>'


@dataclass(frozen=True)
class Section:
    """A part of the page; its elements are made while it is written, and a failure among them stays inside it."""

    title: str
    elements: Iterable[Element] = field(compare=False)

    def html(self) -> str:
        parts = "\n".join(self._parts())
        return f"<h2>{_escape(self.title)}</h2>\n{parts}"

    def _parts(self) -> Iterator[str]:
        try:
            for element in self.elements:
                yield element.html()
        except Exception as error:
            problem = f"The section {self.title!r} could not be shown further: {type(error).__name__}: {error}"
            warnings.warn(problem, RuntimeWarning, stacklevel=2)
            yield Note(problem, "problem").html()


def render_page(title: str, summary: Iterable[Element], sections: Iterable[Section], footer: str = "") -> str:
    """One HTML page: what it is about, then the sections; a broken section is named in its place and in a warning."""
    anchored = [(f"{_slug(s.title)}-{number}", s) for number, s in enumerate(sections, start=1)]
    style = importlib.resources.files(__package__).joinpath("report.css").read_text("utf-8")
    links = "".join(f'<li><a href="#{anchor}">{_escape(s.title)}</a></li>' for anchor, s in anchored)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escape(title)}</title>",
            f"<style>\n{style}</style></head>",
            f"<body>\n<header><h1>{_escape(title)}</h1>",
            *(element.html() for element in summary),
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>',
            *(f'<section id="{anchor}">\n{section.html()}\n</section>' for anchor, section in anchored),
            f"</main>\n<footer>{_escape(footer)}</footer>\n</body></html>\n",
        ]
    )


def overlay(picture: np.ndarray, values: np.ndarray, strength: float = 0.62) -> np.ndarray:
    """A picture in grey under a heat map, (height, width, 3) uint8.

    `values` (row, column) is the map on the patch grid, scaled from its least to its greatest value; every patch is
    one block of one colour, since there is nothing finer to show. NaN lets the grey picture through.
    """
    colours = _matplotlib().colormaps["inferno"]
    height, width = picture.shape[:2]
    rows = np.arange(height) * values.shape[0] // height
    columns = np.arange(width) * values.shape[1] // width
    scaled = _to_unit_range(np.asarray(values, float))[rows[:, None], columns]
    grey = np.repeat(picture.astype(float).mean(-1, keepdims=True), 3, -1)
    blend = strength * np.isfinite(scaled)[..., None]
    coloured = colours(np.nan_to_num(scaled))[..., :3] * 255
    return np.round((1 - blend) * grey + blend * coloured).astype(np.uint8)


def _to_unit_range(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    if not finite.size or finite.max() == finite.min():
        return np.where(np.isfinite(values), 0.0, np.nan)
    return (values - finite.min()) / (finite.max() - finite.min())


def _matplotlib() -> ModuleType:
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawing a report needs matplotlib; run: pip install 'attnscope[report]'") from None
    return mpl


def _axes(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _label_cells(set_ticks, names: Sequence[object] | np.ndarray, most: int) -> None:  # type: ignore[no-untyped-def]
    step = max(1, math.ceil(len(names) / most))
    shown = range(0, len(names), step)
    set_ticks([i + 0.5 for i in shown], [_text(names[i]) for i in shown])


def _svg(draw: Callable[[], "Figure"], alt: str) -> str:
    """A figure as inline SVG: ink in the page's text colour, ids that no other figure of the page has."""
    drawn = io.StringIO()
    with _matplotlib().rc_context(_DRAWING):
        draw().savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    own = hashlib.sha256(svg.encode()).hexdigest()[:10]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_escape(alt)}"', 1)


def _drawn_png(draw: Callable[[], "Figure"]) -> bytes:
    drawn = io.BytesIO()
    with _matplotlib().rc_context(_DRAWING):
        draw().savefig(drawn, format="png", dpi=110, facecolor="white")
    return drawn.getvalue()


def _png(picture: np.ndarray) -> str:
    """A picture as a data address."""
    _matplotlib()
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(picture), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _figure(content: str, caption: str, css: str) -> str:
    words = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="{css}" tabindex="0">{content}</div>{words}</figure>'


def _fold(title: str, element: Element) -> str:
    return f"<details><summary>{_escape(title)}</summary>{element.html()}</details>"


def _cell(tag: str, value: object, numeric: bool, more: str = "") -> str:
    css = ' class="number"' if numeric else ""
    return f"<{tag}{css}{more}>{_format(value)}</{tag}>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _format(value: object) -> str:
    return _escape(_text(value))


def _text(value: object) -> str:
    if not isinstance(value, float | np.floating):
        return str(value)
    number = float(value)
    return f"{number:.4g}" if math.isfinite(number) else "not defined"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)
