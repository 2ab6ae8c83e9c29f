"""What is set before Prefect is imported, and what is left alone; none of this starts Prefect."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attnscope_flows

NAMES = (*attnscope_flows._PLACES, *attnscope_flows._QUIET, "PREFECT_SERVER_EPHEMERAL_ENABLED")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and an environment in which Prefect has not been heard of."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("ATTNSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_user_without_prefect_gets_a_home_in_the_cache(home: Path) -> None:
    attnscope_flows._set_environment()
    assert Path(os.environ["PREFECT_HOME"]).parent == home / "cache"
    assert os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] == "180"


@pytest.mark.parametrize("name", attnscope_flows._PLACES)
def test_a_place_that_the_user_names_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/theirs")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    attnscope_flows._set_environment()
    assert os.environ[name] == "/theirs"
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert name == "PREFECT_HOME" or "PREFECT_HOME" not in os.environ


@pytest.mark.parametrize(
    ("profiles", "kept"),
    [
        ('active = "work"\n[profiles.work]\nPREFECT_API_URL = "http://server/api"\n', True),
        ('active = "local"\n[profiles.local]\nPREFECT_LOGGING_LEVEL = "INFO"\n', False),
        ("active = ", False),
    ],
)
def test_a_profile_that_names_a_server_is_kept(home: Path, profiles: str, kept: bool) -> None:
    (home / ".prefect").mkdir()
    (home / ".prefect/profiles.toml").write_text(profiles)
    attnscope_flows._set_environment()
    assert ("PREFECT_HOME" not in os.environ) is kept


def test_importing_the_package_does_not_import_prefect() -> None:
    program = "import sys, attnscope_flows; print('prefect' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "False"
