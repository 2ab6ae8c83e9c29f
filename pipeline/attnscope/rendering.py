"""The report of a run: what it is, then a section for each result, shown by the analyser that made it."""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from attnscope.analysis import AnalyserError, make_analyser, options_of
from attnscope.plugins import load_plugins
from attnscope.report import Code, Element, Facts, HeatMap, LineChart, Note, Paragraph, Section, Table, render_page
from attnscope.run import EXTRACTED, LEFT_OUT, MISSING, Run

_IDS_PER_REASON = 5


def render(run: Run, results: Iterable[xr.Dataset]) -> str:
    """One self-contained HTML page about a run and what analysers gave for it.

    Each result names its analyser and options in its attrs, as `analyse` stamps them. A result that can't be shown is
    named in its place, and in a RuntimeWarning; the others are shown all the same.
    """
    listed = list(results)
    sections = [Section(_title(result), _section(result)) for result in listed]
    title = f"Attention of {run.attrs.get('model') or run.location}"
    created = run.attrs.get("created", "")
    return render_page(title, _summary(run, listed), sections, f"Extracted {created} into {run.location}.")


def key_figures(run: Run) -> list[dict[str, str | float | int]]:
    """The mean of every variable of numbers in a run's analyses, over all that is finite, as rows of a table."""
    rows: list[dict[str, str | float | int]] = []
    for name in run.analyses:
        result = run.analysis(name)
        for variable, values in result.data_vars.items():
            if values.dtype.kind in "fiub":
                numbers = np.asarray(values.values, float)
                finite = numbers[np.isfinite(numbers)]
                rows.append(
                    {
                        "analyser": name,
                        "variable": str(variable),
                        "mean": float(f"{finite.mean():.6g}") if finite.size else "none",
                        "units": str(values.attrs.get("units", "")),
                        "samples": int(result.attrs.get("samples_used", 0)),
                    }
                )
    return rows


def first_chart(run: Run) -> tuple[str, bytes] | None:
    """The first chart of a run's report: its caption, and itself as a PNG."""
    for name in run.analyses:
        result = run.analysis(name)
        try:
            elements = make_analyser(name, _options(result)).report(result)
            chart = next((e for e in elements if isinstance(e, LineChart | HeatMap)), None)
        except AnalyserError:
            continue
        if chart is not None:
            return f"{name}: {chart.caption}", chart.png()
    return None


def _section(result: xr.Dataset) -> Iterator[Element]:
    """What the analyser shows, and under which options and from which distribution it came."""
    name = str(result.attrs.get("analyser", ""))
    analyser = make_analyser(name, _options(result))
    yield from analyser.report(result)
    yield Facts([("analyser", name), ("options", _listed(_options(result))), ("analysed by", _analysed_by(result))])


def _summary(run: Run, results: Sequence[xr.Dataset]) -> Iterator[Element]:
    attrs = run.attrs
    yield Facts([(name, value) for name, value in _facts(run, attrs) if value not in ("", None)])
    yield from _left_out(run)
    yield Paragraph("The commands that give this report again:")
    yield Code(_commands(run, results))


def _facts(run: Run, attrs: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    status = run.status
    yield "model", attrs.get("model")
    yield "class", attrs.get("model_class")
    yield "revision", attrs.get("revision")
    yield "weights digest", attrs.get("weights_digest")
    yield "family", attrs.get("family")
    kernels = sorted({k for site in run.plan.sites.values() for k in site.kernels})
    yield "attention kernel", ", ".join(kernels) or attrs.get("attention_kernel")
    yield "attention", "; ".join(_site_words(run, name) for name in run.sites)
    yield "precision and device", " on ".join(str(attrs[key]) for key in ("dtype", "device") if attrs.get(key))
    if "score" in run.spec.quantities:
        yield "target of the score", run.spec.target or attrs.get("target") or "the default of the family"
    counts = [(int((status == code).sum()), word) for code, word in _STATUS_WORDS]
    yield "samples", ", ".join(f"{n} {word}" for n, word in counts if n or word == "used")
    yield "seed", attrs.get("seed")
    versions = attrs.get("versions")
    yield "versions", _listed(versions) if isinstance(versions, Mapping) else versions


_STATUS_WORDS = ((EXTRACTED, "used"), (LEFT_OUT, "left out"), (MISSING, "not yet extracted"))


def _site_words(run: Run, name: str) -> str:
    site = run.plan.sites[name]
    tokens = f"{site.query_tokens} tokens"
    if site.queries != site.keys:
        tokens = f"{site.query_tokens} by {site.key_tokens} tokens"
    guessed = ", its role guessed from names and shapes" if site.guessed else ""
    return f"{name}: {len(site.layers)} layers, {site.heads} heads, {tokens}{guessed}"


def _left_out(run: Run) -> Iterator[Element]:
    status = run.status
    samples = run.samples
    reasons: dict[str, list[str]] = defaultdict(list)
    for position in np.flatnonzero(status == LEFT_OUT):
        reason = str(samples["reason"].values[position]) or "no reason given"
        reasons[reason].append(str(samples["id"].values[position]))
    if reasons:
        rows = [(reason, len(ids), _some(ids)) for reason, ids in sorted(reasons.items(), key=lambda r: -len(r[1]))]
        yield Table(["why a sample was left out", "samples", "which"], rows)
    if (status == MISSING).any():
        yield Note("The run isn't finished: what follows rests on the samples extracted so far.")


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _IDS_PER_REASON} more" if len(ids) > _IDS_PER_REASON else ""
    return ", ".join(ids[:_IDS_PER_REASON]) + more


def _commands(run: Run, results: Sequence[xr.Dataset]) -> str:
    attrs = run.attrs
    command = attrs.get("command")
    names = [str(r.attrs["analyser"]) for r in results if r.attrs.get("analyser")]
    model, samples = (str(attrs.get(key) or key.upper()) for key in ("model", "samples"))
    wanted = [part for name in names for part in ("--for", name)]
    lines = [str(command or shlex.join(["attnscope", "extract", model, samples, "--out", run.location, *wanted]))]
    for result in results:
        if result.attrs.get("analyser"):
            chosen = [part for option in _changed_options(result) for part in ("--option", option)]
            lines.append(shlex.join(["attnscope", "analyse", run.location, str(result.attrs["analyser"]), *chosen]))
    return "\n".join([*lines, shlex.join(["attnscope", "report", run.location])])


def _changed_options(result: xr.Dataset) -> list[str]:
    """The options that are not the analyser's own defaults, as `name=value`."""
    try:
        defaults = options_of(make_analyser(str(result.attrs["analyser"])))
    except AnalyserError:
        defaults = {}
    plain = json.loads(json.dumps(defaults, default=str))
    return [f"{name}={_plain(v)}" for name, v in sorted(_options(result).items()) if plain.get(name) != v]


def _options(result: xr.Dataset) -> dict[str, object]:
    return dict(json.loads(result.attrs.get("options") or "{}"))


def _title(result: xr.Dataset) -> str:
    """The `title` of the analyser's class where it has one, else its name."""
    name = str(result.attrs.get("analyser") or "result without an analyser")
    return str(getattr(load_plugins().analysers.get(name), "title", name))


def _analysed_by(result: xr.Dataset) -> str:
    attrs = result.attrs
    return f"{attrs.get('distribution', '')} {attrs.get('version', '')}, {attrs.get('created', '')}".strip(" ,")


def _listed(pairs: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {'none' if value is None else _plain(value)}" for name, value in pairs.items()) or "none"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
