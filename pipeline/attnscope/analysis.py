"""Analysers: what they must offer, and how they are run on a run."""

import dataclasses
import datetime
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import pydantic
import xarray as xr

from attnscope.conditions import RANDOM, Ranking, distinct_rankings
from attnscope.plugins import load_plugins
from attnscope.quantities import ExtractSpec, union
from attnscope.run import EXTRACTED, LEFT_OUT, MISSING, Run

if TYPE_CHECKING:
    from attnscope.report import Element


class AnalyserError(ValueError):
    """An unknown analyser, or options that it refuses; the message is one sentence and names what is known."""


@runtime_checkable
class Analyser(Protocol):
    """A pure function from a run to a labelled dataset; its dataclass fields are its options."""

    name: ClassVar[str]

    def requires(self) -> ExtractSpec:
        """What extraction must record; pure and cheap."""
        ...

    def analyse(self, run: Run) -> xr.Dataset:
        """The result; every variable has `long_name` and `units`. Memory doesn't grow with the number of samples."""
        ...

    def report(self, result: xr.Dataset) -> "Iterable[Element]":
        """What a reader should see of the result."""
        ...


def make_analyser(name: str, options: Mapping[str, object] | None = None) -> Analyser:
    """The registered analyser of this name with these options, checked and converted by their types.

    Raises
    ------
    AnalyserError
        When there is no such analyser or option, or a value doesn't fit; the known ones are named.
    """
    known = load_plugins().analysers
    name = name.replace("-", "_")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise AnalyserError(f"unknown analyser {name!r}{hint}; known are {', '.join(sorted(known))}")
    cls = known[name]
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for option in options or {}:
        if option not in fields:
            listed = ", ".join(fields) or "none"
            raise AnalyserError(f"analyser {name!r} has no option {option!r}; its options are {listed}")
    try:
        return pydantic.TypeAdapter(cls).validate_python(dict(options or {}))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AnalyserError(f"analyser {name!r}, option {place!r}: {first['msg']}, got {first['input']!r}") from None


def options_of(analyser: Analyser) -> dict[str, object]:
    """The options of an analyser as plain values."""
    return dataclasses.asdict(analyser)  # type: ignore[call-overload]


def requirements(analysers: Iterable[Analyser], beside: Sequence[ExtractSpec] = ()) -> ExtractSpec:
    """What one extraction must record for all of these analysers (and for the specs beside them).

    Where a condition takes the tokens that an analyser ranks first, that analyser's needs are among them.
    """
    specs = [*(a.requires() for a in analysers), *beside]
    rankings = distinct_rankings(c for spec in specs for c in spec.conditions)
    made = [ranking_analyser(r) for r in rankings if r.analyser != RANDOM]
    before = [dataclasses.replace(analyser.requires(), conditions=()) for analyser in made]
    return union([*specs, *before])


def ranking_analyser(ranking: Ranking) -> Analyser:
    """The analyser that a ranking goes by, with its options."""
    return make_analyser(ranking.analyser, json.loads(ranking.options))


def analyse(
    run: Run,
    analyser: Analyser,
    *,
    save: bool = True,
    compute: Callable[[Run, Analyser], xr.Dataset] | None = None,
) -> xr.Dataset:
    """Run an analyser on a run, stamp the result with how it came about, and save it in the run.

    `compute` stands in for the analyser's own `analyse`, such as one that works on parts of the run elsewhere.

    Raises
    ------
    MissingQuantity
        When the run doesn't hold what the analyser requires; the message says how to get it.
    """
    run.require(analyser.requires(), f"analyser {analyser.name!r}")
    result = analyser.analyse(run) if compute is None else compute(run, analyser)
    for name, variable in result.data_vars.items():
        absent = {"long_name", "units"} - set(variable.attrs)
        if absent:
            raise TypeError(f"analyser {analyser.name!r} gave {name!r} without {' and '.join(sorted(absent))}")
    result = result.assign_attrs(result.attrs | _stamp(run, analyser))
    if save:
        run.save_analysis(analyser.name, result)
    return result


def is_fresh(run: Run, analyser: Analyser) -> bool:
    """Whether the run holds what this analyser would give: of the same options, version and samples."""
    if analyser.name not in run.analyses:
        return False
    saved = run.analysis(analyser.name).attrs
    return all(saved.get(name) == value for name, value in _stamp(run, analyser).items() if name != "created")


def _stamp(run: Run, analyser: Analyser) -> dict[str, object]:
    status = run.status
    plugins = load_plugins()
    registered = plugins.analysers.get(analyser.name) is type(analyser)
    source = plugins.source("analyser", analyser.name) if registered else None
    return {
        "analyser": analyser.name,
        "options": json.dumps(options_of(analyser), sort_keys=True, default=str),
        "distribution": source.distribution if source else type(analyser).__module__,
        "version": source.version if source else "",
        "model": str(run.attrs.get("model", "")),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "samples_used": int((status == EXTRACTED).sum()),
        "samples_left_out": int((status == LEFT_OUT).sum()),
        "samples_missing": int((status == MISSING).sum()),
    }
