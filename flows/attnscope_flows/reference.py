"""Training of the reference models as flows: one model with its card, and a table of variants by seeds."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextvars import ContextVar
from multiprocessing import get_context
from typing import TYPE_CHECKING, Literal

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from pydantic import JsonValue

from attnscope.study import Receipt
from attnscope_flows.extract import RETRY_AFTER, may_pass
from attnscope_flows.progress import artifact_key

if TYPE_CHECKING:
    from attnscope.reference.tabulating import Variant
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
    samples: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    processes: int = 1,
) -> Receipt:
    """Train a reference model, on generated scenes or on samples, and examine it.

    Args:
        model: One of vilt, clip, lxmert, text, simla, mapper, scan, answering, painter.
        out: Folder for the model; what was begun there with the same recipe and seed is finished.
        seed: Seed of the weights and of the lessons.
        changes: Fields of the recipe with other values.
        scenes: How many unseen scenes of each split it is examined on.
        samples: What it learns from in the place of generated scenes, by those models that can.
        device: What it is computed on.
        dtype: What most of a step is computed in; weights stay float32.
        processes: How many processes share each batch; on cuda each has a device.
    """
    running: dict[str, JsonValue] = {"samples": samples, "device": device, "dtype": dtype, "processes": processes}
    defaults = {"samples": None, "device": "cpu", "dtype": "float32", "processes": 1}
    changes = {**changes, **{field: value for field, value in running.items() if value != defaults[field]}}
    trained = train_task(model, out, seed, changes)
    return {**trained, **examine_task(model, out, seed, changes, scenes)}


@task(
    name="train and measure",
    task_run_name="{variant[name]} with seed {seed}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_AFTER),
    retry_delay_seconds=RETRY_AFTER,
    retry_condition_fn=may_pass,
)
def measure_task(variant: dict[str, JsonValue], seed: int, out: str, measure: str | None, apart: bool) -> Receipt:
    """Train and measure one variant with one seed, in a process of its own where several run at a time."""
    from attnscope.reference import tabulating

    (chosen,) = _variants([variant])
    call = (chosen, seed, out, tabulating.measure_of(measure))
    if not apart:
        return tabulating.make(*call, listener.get())
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(tabulating.make, *call).result()


@task(name="tabulate", task_run_name="tabulate {out}", cache_policy=NO_CACHE)
def table_task(variants: list[dict[str, JsonValue]], seeds: list[int], out: str, measure: str | None) -> Receipt:
    """Write the table, which is shown as an artifact as well."""
    from pathlib import Path

    from attnscope.reference import tabulating

    rows = tabulating.write_table(_variants(variants), seeds, out, tabulating.measure_of(measure))
    page = Path(out) / "table.md"
    create_markdown_artifact(page.read_text(encoding="utf-8"), artifact_key("table", out), f"Table of {out}")
    return {"table": str(page), "rows": len(rows)}


@flow(name="tabulate-reference", flow_run_name="tabulate {out}", validate_parameters=True)
def table_flow(
    variants: list[dict[str, JsonValue]],
    out: str,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - Prefect copies it, and its form shows the default
    measure: str | None = None,
    processes: int = 1,
) -> Receipt:
    """Train variants of models with several seeds, measure them, and tabulate means, intervals and differences.

    Args:
        variants: Mappings of name, model and changes (fields of the recipe with other values); the first is what the
            others are compared with.
        out: Folder for models and table; what was finished there with the same recipe and seed is not made again.
        seeds: Seeds of the weights and of the lessons, the same for all variants.
        measure: package.module:function from the folder of a model to its figures; the card's figures if not given.
        processes: How many trainings run at a time, each in one thread.
    """
    from attnscope.reference import tabulating

    chosen = _variants(variants)
    tabulating.check(chosen, seeds)
    tabulating.measure_of(measure)
    running: list[PrefectFuture[Receipt]] = []
    for variant in variants:
        for seed in seeds:
            if processes == 1:
                measure_task(variant, seed, out, measure, apart=False)
                continue
            if len(running) == processes:
                running.remove(_next_done(running))
            running.append(measure_task.submit(variant, seed, out, measure, apart=True))
    for future in running:
        future.result()
    return table_task(variants, seeds, out, measure)


def _next_done(running: "list[PrefectFuture[Receipt]]") -> "PrefectFuture[Receipt]":
    done = next(as_completed(running))
    done.result()
    return done


def _variants(given: Sequence[dict[str, JsonValue]]) -> "list[Variant]":
    from attnscope.reference import tabulating

    return [tabulating.variant_of(one) for one in given]
