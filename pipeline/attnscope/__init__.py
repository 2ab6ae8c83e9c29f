"""attnscope: store what transformers attend to, and ask it questions."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnscope.analysis import Analyser, analyse
    from attnscope.extraction import extract
    from attnscope.plugins import hookimpl
    from attnscope.quantities import ExtractSpec
    from attnscope.recording import recording
    from attnscope.rendering import render
    from attnscope.run import Run, open_run
    from attnscope.samples import Region, Sample, read_samples
    from attnscope.statistics import bootstrap_interval

try:
    __version__ = version("attnscope")
except PackageNotFoundError:
    __version__ = "0"

# Public names and where they live. They are imported on first use, so that `import attnscope` loads neither torch
# nor transformers, prefect or matplotlib.
_HOMES = {
    "Analyser": "analysis",
    "ExtractSpec": "quantities",
    "Region": "samples",
    "Run": "run",
    "Sample": "samples",
    "analyse": "analysis",
    "bootstrap_interval": "statistics",
    "extract": "extraction",
    "hookimpl": "plugins",
    "open_run": "run",
    "read_samples": "samples",
    "recording": "recording",
    "render": "rendering",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - the table above is the one list


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'attnscope' has no attribute {name!r}")
    home = import_module(f"attnscope.{_HOMES[name]}")
    # Submodules may share a name with what they define (`attnscope.recording`): bind the public one.
    globals()[name] = getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
