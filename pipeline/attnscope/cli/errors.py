"""From an error to one sentence and an exit code: 1 when the data is at fault, 2 when the command is."""

import errno
import logging
import os
from collections.abc import Callable
from types import TracebackType

import click

TRACEBACK_VARIABLE = "ATTNSCOPE_TRACEBACK"

DATA_AT_FAULT, COMMAND_AT_FAULT, INTERRUPTED = 1, 2, 130

# Errors of ours that blame the data; all others blame the command.
_BLAME_DATA = frozenset({"BrokenChunk", "BrokenRun", "DataFault", "SampleError"})
_EXTRA_OF = {
    "duckdb": "sql",
    "matplotlib": "report",
    "obstore": "cloud",
    "PIL": "extract",
    "dask": "cluster",
    "distributed": "cluster",
    "prefect": "flows",
    "pyarrow": "parquet",
    "safetensors": "extract",
    "torch": "extract",
    "transformers": "extract",
}
_STORAGE = ("zarr", "numcodecs", "crc32c", "google_crc32c")
_OUT_OF_MEMORY = "out of memory; a smaller --batch-size needs less, and what was finished is kept"


class DataFault(ValueError):
    """What a run or a source holds can't be used; the message is one sentence."""


def ask_for_traceback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Remember that the user wants tracebacks."""
    if value:
        os.environ[TRACEBACK_VARIABLE] = "1"


def wants_traceback() -> bool:
    """Whether errors are to be shown in full."""
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for an error."""
    if isinstance(error, click.Abort | KeyboardInterrupt):
        # Stores have requests under way in a thread of theirs; that these are dropped now is no news.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        return INTERRUPTED, "interrupted; what was finished is kept, and the same command goes on where it stopped"
    if type(error).__module__.partition(".")[0] in ("attnscope", "attnscope_flows"):
        blames_data = any(cls.__name__ in _BLAME_DATA for cls in type(error).__mro__)
        return DATA_AT_FAULT if blames_data else COMMAND_AT_FAULT, _one_line(error)
    if _arose_in(error.__traceback__) in _STORAGE:
        return DATA_AT_FAULT, f"the run can't be read ({_one_line(error)}); attnscope check names what is broken"
    for kind, sentence in _SENTENCES.items():
        if isinstance(error, kind):
            return COMMAND_AT_FAULT, sentence(error)
    if type(error).__name__ == "OutOfMemoryError":
        return COMMAND_AT_FAULT, _OUT_OF_MEMORY
    return DATA_AT_FAULT, (
        f"unexpected {type(error).__name__}: {_one_line(error)}; {TRACEBACK_VARIABLE}=1 in the environment shows where"
    )


def _usage(error: click.ClickException) -> str:
    message = _one_line_of(error.format_message())
    context = getattr(error, "ctx", None)
    return f"{message.rstrip('.')}; see {context.command_path} --help" if context is not None else message


def _missing_module(error: ModuleNotFoundError) -> str:
    name = (error.name or "").partition(".")[0]
    if name not in _EXTRA_OF:
        return _one_line(error)
    return f"this needs {name}, which is not installed; run: pip install 'attnscope[{_EXTRA_OF[name]}]'"


def _of_the_system(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the device; free some and repeat the command, what was finished is kept"
    place = f"{str(error.filename)!r}: " if error.filename else ""
    return f"{place}{error.strerror or _one_line(error)}"


def _arose_in(traceback: TracebackType | None) -> str:
    """The top package of the code that raised."""
    name = ""
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    return name.partition(".")[0]


def _one_line(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return _one_line_of(str(text)) or type(error).__name__


def _one_line_of(text: str) -> str:
    return " ".join(text.split())


_SENTENCES: dict[type[BaseException], Callable[..., str]] = {
    click.ClickException: _usage,
    MemoryError: lambda error: _OUT_OF_MEMORY,
    ModuleNotFoundError: _missing_module,
    OSError: _of_the_system,
}
