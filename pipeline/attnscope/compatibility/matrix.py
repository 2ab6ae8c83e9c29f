"""The compatibility matrix: one row an example and attention implementation, measured where it is called."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers

from attnscope.compatibility import EXAMPLES
from attnscope.compatibility.examples import Example
from attnscope.compatibility.extracted import dense_only, extracted, stored_error
from attnscope.compatibility.witness import exposed, first_tensor, forward, matched_errors, own_softmaxes
from attnscope.recording import Recording, recording

_INTRODUCTION = """\
# Compatibility

Each row is a tiny model of a family with wide random weights, in float32 on a CPU, with padding in the batch where the
family knows padding, run under one attention implementation. `make compatibility` measures all of them and writes this
page; the tests measure them again and compare. `python -m attnscope.compatibility` prints the page for the versions
that you have installed.

{versions}: {examples} models, {rows} rows. Largest error: {error:.0e} recorded, {stored:.0e} stored.

- **recorded**: attention kernels in a recorded call, of those that the audit counted below autograd. `0 of 0` is
  attention without a product of probabilities and values, which the audit doesn't count; its calls are recorded by
  the name of their module.
- **by**: the tier that recorded them (see [recording](recording.md)).
- **error**: largest difference between `call.attention()` and the softmax that the model's eager code runs, seen by an
  independent spy. Where that softmax isn't what is multiplied with the values, `(output)`: between attention times
  value and the output of the kernel.
- **outputs**: whether the model's outputs are bit-identical with and without recording.
- **`output_attentions`**: how many tensors transformers itself would give of those calls, and how many of these are no
  call's attention (scores before the softmax, or another layout).
- **roles**: known to a family file, or guessed from module names and shapes; and the sites with their layers.
- **stored error**: largest difference between what `extract` stores of the batch (exact encoding) and the recorded
  calls. Every site is stored dense; all but those under **dense only** can be stored factored as well. What keeps a
  site from it: a `bias` that is added to the scores, `parts` (windows and tiles, whose calls are put together), or code
  that leaves `probabilities` only.

Flash attention (`flash_attention_2`, `flash_attention_3` and hub kernels) needs a CUDA device and isn't in the table.

"""

TITLES = (
    *("example", "model", "kernel", "recorded", "by", "error", "outputs", "`output_attentions`", "roles", "sites"),
    *("stored error", "dense only"),
)


@dataclass(frozen=True)
class Row:
    """What recording and extraction gave of an example under one attention implementation.

    Kernels that `ran` by the audit, of which `recorded` are in a recorded call; `error` the largest difference from
    the model's own softmax, or from the attention's output where `by_output`; `output_error` that between attention
    times value and the output; `probabilities` the calls of which nothing else is known; `identical` whether the
    model's outputs were; `exposed` the tensors that `output_attentions` gives, and how many are a call's attention;
    `stored_error` the largest difference between stored and recorded attention; `dense_only` the sites that can't be
    stored factored, and why.
    """

    example: str
    model: str
    kernel: str
    calls: int
    ran: int
    recorded: int
    tiers: tuple[str, ...]
    error: float
    by_output: bool
    output_error: float
    probabilities: int
    identical: bool
    exposed: tuple[int, int]
    family: str
    guessed: bool
    sites: Mapping[str, int]
    stored_error: float
    dense_only: Mapping[str, str]

    def cells(self) -> tuple[str, ...]:
        """The row as the page shows it."""
        given, right = self.exposed
        return (
            self.example,
            f"`{self.model}`",
            self.kernel,
            f"{self.recorded} of {self.ran} in {self.calls} calls",
            ", ".join(self.tiers),
            _shown(self.error) + (" (output)" if self.by_output else ""),
            "identical" if self.identical else "changed",
            str(given) if given == right else f"{given} ({given - right} differ)",
            "guessed" if self.guessed else f"known ({self.family})",
            ", ".join(f"`{site}` x{layers}" for site, layers in self.sites.items()),
            _shown(self.stored_error),
            ", ".join(f"`{site}`: {reason}" for site, reason in self.dense_only.items()),
        )


def _shown(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def measure(name: str, kernel: str) -> Row:
    """Record an example and extract it, and compare both with the model itself."""
    example = EXAMPLES[name]
    model, inputs = example.build(kernel), example.inputs()
    plain = first_tensor(forward(model, inputs))
    with recording(model) as rec:
        identical = torch.equal(first_tensor(forward(model, inputs)), plain)
    run = extracted(model, inputs)
    return Row(
        name,
        example.model,
        kernel,
        calls=len(rec),
        ran=rec.audit.ran or 0,
        recorded=rec.audit.recorded,
        tiers=tuple(sorted({call.tier for call in rec})),
        error=_error(example, kernel, rec),
        by_output=kernel in example.output_only,
        output_error=_output_error(rec),
        probabilities=sum(call.probabilities is not None for call in rec),
        identical=identical,
        exposed=exposed(model, inputs, rec.calls),
        family=str(run.attrs["family"]),
        guessed=any(site.guessed for site in run.plan.sites.values()),
        sites={name: len(site.layers) for name, site in run.plan.sites.items()},
        stored_error=stored_error(run, model, inputs),
        dense_only=dense_only(run, rec),
    )


def _error(example: Example, kernel: str, rec: Recording) -> float:
    if kernel in example.output_only:
        return _output_error(rec)
    own = own_softmaxes(example.build("eager"), example.inputs())
    if len(rec) != len(own) - example.other_softmaxes:
        return float("inf")
    return max(matched_errors(rec.calls, own))


def _output_error(rec: Recording) -> float:
    return max((call.output_error() for call in rec if call.output is not None), default=0.0)


def versions() -> str:
    """The versions that a measurement belongs to."""
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


def measured() -> Iterator[Row]:
    """The whole matrix, row by row; says on stderr how far it is."""
    for name, example in EXAMPLES.items():
        print(name, file=sys.stderr)
        yield from (measure(name, kernel) for kernel in example.kernels)


def page(rows: Sequence[Row]) -> str:
    """The rows as docs/compatibility.md."""
    introduction = _INTRODUCTION.format(
        versions=versions(),
        examples=len({row.example for row in rows}),
        rows=len(rows),
        error=max(row.error for row in rows),
        stored=max(row.stored_error for row in rows),
    )
    return introduction + table(rows) + "\n"


def table(rows: Iterable[Row]) -> str:
    """The rows in markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (TITLES, ["---"] * len(TITLES), *(row.cells() for row in rows))]
    return "\n".join(lines)
