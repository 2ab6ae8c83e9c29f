"""What a finished study shows in Prefect's UI: its key figures as a table, one picture, and a link to the report."""

import logging
from base64 import b64encode
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_link_artifact, create_table_artifact

from attnscope.rendering import first_chart, key_figures
from attnscope.run import open_run
from attnscope_flows.progress import artifact_key

_log = logging.getLogger(__name__)


def report_artifacts(run: str, page: str) -> None:
    """Show the key figures of a run's analyses, their first chart, and where the report lies."""
    opened = open_run(run)
    try:
        create_table_artifact(key_figures(opened), artifact_key("results", run), f"Means over {run}")
        chart = first_chart(opened)
        if chart is not None:
            caption, picture = chart
            address = f"data:image/png;base64,{b64encode(picture).decode()}"
            create_image_artifact(address, artifact_key("figure", run), caption)
    except Exception as error:
        # They are beside the point of the task, whose report is written.
        _log.warning("the results of %s can't be shown: %s", run, error)
    link_artifact(page, "report")


def link_artifact(page: str, kind: str) -> None:
    """Show where a page lies."""
    try:
        create_link_artifact(Path(page).resolve().as_uri(), f"{kind} {page}", artifact_key(kind, page))
    except Exception as error:
        _log.warning("the link to %s can't be shown: %s", page, error)
