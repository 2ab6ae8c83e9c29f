"""Plugins: two hooks, one loader.

A distribution offers a module under the entry-point group `attnscope`; the module implements one or both hooks. What
attnscope brings itself arrives in just that way.
"""

import functools
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from attnscope.analysis import Analyser
    from attnscope.families import ModelFamily

GROUP = "attnscope"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def attnscope_register_analysers(register: "Callable[[type[Analyser]], None]") -> None:
    """Call `register` with each analyser class: a frozen dataclass whose fields are its options."""


@hookspec
def attnscope_register_families(register: "Callable[[ModelFamily], None]") -> None:
    """Call `register` with each model family."""


class PluginConflict(RuntimeError):
    """Two distributions offer the same name; the message names both."""


@dataclass(frozen=True)
class Source:
    """Where a registered thing comes from."""

    distribution: str
    version: str
    module: str


@dataclass(frozen=True)
class Plugins:
    """All that was found: analysers and families by name, where they come from, and what failed to load."""

    analysers: "Mapping[str, type[Analyser]]"
    families: "Mapping[str, ModelFamily]"
    sources: Mapping[tuple[str, str], Source]
    problems: tuple[str, ...]

    def source(self, kind: str, name: str) -> Source:
        """Where the analyser or family ('analyser' | 'family') of this name comes from."""
        return self.sources[kind, name]


@functools.lru_cache(maxsize=1)
def load_plugins() -> Plugins:
    """Load every entry point of the group, each on its own: a broken one costs the others nothing and is warned of."""
    analysers: dict[str, type[Analyser]] = {}
    families: dict[str, ModelFamily] = {}
    sources: dict[tuple[str, str], Source] = {}
    problems: list[str] = []

    def add(kind: str, found: dict, thing: object, source: Source) -> None:
        name = thing.name  # type: ignore[attr-defined]
        if name in found:
            first = sources[kind, name]
            raise PluginConflict(
                f"{kind} {name!r} is offered by {first.distribution} {first.version}"
                f" and by {source.distribution} {source.version}; uninstall one of them"
            )
        found[name] = thing
        sources[kind, name] = source

    for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda p: (_first(p), p.name)):
        source = Source(_distribution(point), point.dist.version if point.dist else "", point.value)
        try:
            offered = _offered_by(point.load())
        except Exception as error:
            problems.append(f"plugin {point.name!r} of {source.distribution} {source.version} failed to load: {error}")
            continue
        for kind, thing in offered:
            add(kind, analysers if kind == "analyser" else families, thing, source)
    for problem in problems:
        warnings.warn(problem, RuntimeWarning, stacklevel=2)
    return Plugins(analysers, families, sources, tuple(problems))


def _offered_by(module: ModuleType) -> list[tuple[str, object]]:
    """What a module registers, as ('analyser' | 'family', thing); all of it or, when anything fails, nothing."""
    offered: list[tuple[str, object]] = []

    def collector(kind: str) -> Callable[[object], None]:
        def register(thing: object) -> None:
            name = getattr(thing, "name", None)
            if not isinstance(name, str) or not name:
                raise TypeError(f"{kind} {thing!r} has no name")
            offered.append((kind, thing))

        return register

    hooks = _hooks_of(module)
    hooks.attnscope_register_analysers(register=collector("analyser"))
    hooks.attnscope_register_families(register=collector("family"))
    return offered


def _hooks_of(module: ModuleType) -> pluggy.HookRelay:
    """The hooks that one module implements; a misspelt hook is an error rather than a plugin that does nothing."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(sys.modules[__name__])
    manager.register(module)
    manager.check_pending()
    if not manager.get_hookcallers(module):
        raise TypeError("it implements no attnscope hook")
    return manager.hook


def _first(point: importlib.metadata.EntryPoint) -> str:
    # Ours first, so that a conflict is told as "attnscope and the other".
    name = _distribution(point)
    return "" if name == GROUP else name


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown"
