"""The command line: parse, call, print.

Nothing heavy is imported before a command needs it: `attnscope query` loads neither torch, transformers, prefect nor
matplotlib.
"""

import os
import sys
import warnings
from typing import TYPE_CHECKING, TextIO

import click

from attnscope import __version__
from attnscope.cli import errors, query, reference, runs, scheduling, sql, studies

if TYPE_CHECKING:
    from collections.abc import Sequence


# What matters of these is raised, and told in our own words.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}


class CommandLine(click.Group):
    """The group of all commands; whatever goes wrong becomes one sentence on stderr and an exit code."""

    def main(  # type: ignore[override]
        self, args: "Sequence[str] | None" = None, prog_name: str | None = None, **extra: object
    ) -> None:
        """Run a command and exit; click's own modes of failing are not used."""
        extra["standalone_mode"] = False
        warnings.showwarning = _show_warning
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            code = super().main(args, prog_name, **extra)  # type: ignore[call-overload]
        except (Exception, KeyboardInterrupt) as error:
            if errors.wants_traceback():
                raise
            code, sentence = errors.explain(error)
            click.echo(f"attnscope: {sentence}", err=True)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> object:
        """Call the command; that nobody reads its output to the end is no error."""
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"attnscope: note: {' '.join(str(message).split())}", err=True)


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="attnscope", message="%(prog)s %(version)s")
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=errors.ask_for_traceback,
    help="Show where an error arose; so does ATTNSCOPE_TRACEBACK=1 in the environment.",
)
def main() -> None:
    """Store what transformers attend to, and ask it questions.

    Exit codes: 0 done; 1 the data is at fault; 2 the command is; 130 interrupted.
    """


COMMANDS = (
    *studies.COMMANDS,
    query.query,
    sql.sql,
    *runs.COMMANDS,
    *scheduling.COMMANDS,
    *reference.COMMANDS,
)
for command in COMMANDS:
    main.add_command(command)
