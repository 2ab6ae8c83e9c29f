"""`attnscope check`, `inspect` and `plugins`: what is there, and whether it is sound."""

import dataclasses
from typing import TYPE_CHECKING

import click

from attnscope.cli.errors import DATA_AT_FAULT

if TYPE_CHECKING:
    from attnscope.checking import CheckReport
    from attnscope.run import Run


@click.command()
@click.argument("run")
@click.option("--repair", is_flag=True, help="Make what is broken missing, so that the next extraction does it again.")
def check(run: str, repair: bool) -> int:
    """Verify every chunk and mark of a run.

    Names what is broken by site, quantity and sample, and exits with 1 if anything is and was not repaired.
    """
    from attnscope.checking import check_run
    from attnscope.run import open_run

    opened = open_run(run, read_only=not repair)
    found = check_run(opened)
    for sentence in found.sentences(_sample_ids(opened)):
        click.echo(sentence)
    if repair and found.faults:
        from attnscope.repairing import repair_run

        for sentence in repair_run(opened, found):
            click.echo(f"repaired: {sentence}")
        return 0
    click.echo(_verdict(run, found), err=bool(found.faults))
    return DATA_AT_FAULT if found.faults else 0


def _sample_ids(run: "Run") -> list[str]:
    try:
        return run.sample_ids
    except Exception:
        # Their own chunk is broken, which is among the faults.
        return []


def _verdict(run: str, found: "CheckReport") -> str:
    if found.faults:
        count = len(found.faults)
        places = "1 place" if count == 1 else f"{count} places"
        return f"attnscope: {run} is broken in {places}, named above; see check --repair"
    words = [
        f"{run} is sound: {found.chunks:,} chunks of {found.arrays} arrays read, {found.extracted:,} samples extracted"
    ]
    if found.left_out:
        words.append(f"{found.left_out:,} left out")
    if found.missing:
        words.append(f"{found.missing:,} still missing: the command that extracted it goes on with them")
    if found.half_written:
        words.append(f"{found.half_written:,} half-written files, which the next extraction deletes")
    return ", ".join(words)


@click.command()
@click.argument("model")
@click.option("--attn-implementation", help="Attention kernel of transformers: sdpa, eager, ...")
@click.option("--revision", help="Branch, tag or commit of the model on its hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def inspect(model: str, attn_implementation: str | None, revision: str | None, trust_remote_code: bool) -> None:
    """Show what would be recorded of a model.

    Sites, layers, heads, the kernel that really runs, and bytes per sample.
    """
    from attnscope.cli.tables import aligned
    from attnscope.inspection import inspect_model

    found = inspect_model(
        model, attn_implementation=attn_implementation, revision=revision, trust_remote_code=trust_remote_code
    )
    click.echo(aligned(found.rows()))
    for note in found.notes:
        click.echo(note)


@click.command()
def plugins() -> None:
    """List analysers and model families, with the distribution and version that each comes from."""
    from attnscope.cli.tables import aligned
    from attnscope.plugins import load_plugins

    found = load_plugins()
    for kind, names in (("analyser", found.analysers), ("family", found.families)):
        rows: list[dict[str, object]] = []
        for name in sorted(names):
            source = found.source(kind, name)
            row: dict[str, object] = {kind: name, "distribution": source.distribution, "version": source.version}
            if kind == "analyser":
                options = dataclasses.fields(names[name])  # type: ignore[arg-type]
                row["options"] = ", ".join(field.name for field in options) or "none"
            rows.append(row)
        click.echo(aligned(rows) + "\n" if rows else f"no {kind} is installed\n")
    for problem in found.problems:
        click.echo(f"attnscope: {problem}", err=True)


COMMANDS = (check, inspect, plugins)
