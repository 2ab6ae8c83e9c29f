"""Training of the reference models as a flow."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import JsonValue

from attnscope.study import Receipt
from attnscope_flows.extract import RETRY_AFTER, may_pass

if TYPE_CHECKING:
    from attnscope.reference.training import TrainingProgress

listener: "ContextVar[Callable[[TrainingProgress], None] | None]" = ContextVar("training_listener", default=None)
"""Who hears of the progress of a training that runs in this process."""


@task(
    name="train",
    task_run_name="train {model} with seed {seed}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
def train_task(model: str, out: str, seed: int, changes: dict[str, JsonValue]) -> Receipt:
    """Train into a folder; a retry goes on from the last checkpoint."""
    from attnscope.reference import making

    return making.train(making.recipe_of(model, changes), seed, out, listener.get())


@task(name="examine", task_run_name="examine {out}", cache_policy=NO_CACHE)
def examine_task(model: str, out: str, seed: int, changes: dict[str, JsonValue], scenes: int) -> Receipt:
    """Examine the trained model on unseen scenes and write its card, which is shown as an artifact as well."""
    from pathlib import Path

    from attnscope.reference import making

    receipt = making.examine(making.recipe_of(model, changes), seed, out, scenes)
    page = Path(str(receipt["card"])).read_text(encoding="utf-8")
    create_markdown_artifact(page, key=f"reference-{model}", description=f"Card of reference:{model}")
    return receipt


@flow(name="train-reference", flow_run_name="train {model} into {out}", validate_parameters=True)
def train_flow(
    model: str,
    out: str,
    seed: int = 0,
    changes: dict[str, JsonValue] = {},  # noqa: B006 - Prefect copies it, and its form shows the default
    scenes: int = 512,
) -> Receipt:
    """Train a reference model and examine it.

    Args:
        model: One of vilt, clip, lxmert, text, scan, answering, painter.
        out: Folder for the model; what was begun there with the same recipe and seed is finished.
        seed: Seed of the weights and of the lessons.
        changes: Fields of the recipe with other values.
        scenes: How many unseen scenes of each split it is examined on.
    """
    trained = train_task(model, out, seed, changes)
    return {**trained, **examine_task(model, out, seed, changes, scenes)}
