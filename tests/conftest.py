"""What every test runs under: no hub, one thread of torch, a quiet Prefect, nothing written into the user's home."""

import atexit
import os
import shutil
import tempfile

import pytest

# Before any test module imports torch, transformers or prefect: they read these when they are imported.
_home = tempfile.mkdtemp(prefix="attnscope-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ.update(
    ATTNSCOPE_CACHE=f"{_home}/cache",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DO_NOT_TRACK="1",
    # One thread gives the same bits every time, and two pytest processes share two cores.
    OMP_NUM_THREADS="1",
    MPLBACKEND="agg",
    PREFECT_HOME=f"{_home}/prefect",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    # The first start makes the database: 20 to 50 seconds on a busy machine, beyond Prefect's own limit.
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="180",
    PREFECT_LOGGING_LEVEL="WARNING",
    PREFECT_LOGGING_TO_API_ENABLED="false",
    PREFECT_RESULTS_DEFAULT_SERIALIZER="json",
)


# First: xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and keep all that need a Prefect server in one process."""
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    for item in items:
        if item.get_closest_marker("server"):
            item.add_marker(pytest.mark.xdist_group("server"))
