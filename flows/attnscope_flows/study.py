"""A whole study as a flow: extract, analyse, report."""

from prefect import flow

from attnscope.study import DEFAULT_CHOICES, AnalyserChoice, ExtractOptions, Receipt, study
from attnscope_flows.analyse import analyse_task, report_task
from attnscope_flows.extract import extract_task


@flow(name="study", flow_run_name="study {model} into {out}", validate_parameters=True)
def study_flow(
    model: str,
    samples: str,
    out: str,
    analysers: list[AnalyserChoice] = list(DEFAULT_CHOICES),  # noqa: B006 - Prefect copies it, and its form shows it
    options: ExtractOptions = ExtractOptions(),  # noqa: B008 - frozen
) -> Receipt:
    """Extract, run analysers, and write a report into a folder.

    Args:
        model: Name on a hub, a folder with safetensors, or embedded:NAME.
        samples: Folder of images, JSONL, CSV or Parquet file, or embedded:NAME.
        out: Folder for run.zarr and report.html.
        analysers: Analysers with their options.
        options: How to extract.
    """
    return study(
        model, samples, out, analysers, options, extract=extract_task, analyse=analyse_task, report=report_task
    )
