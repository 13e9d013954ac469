"""Which SuperLink a deployed run is given to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.config.schema import RunConfig
from photon.engine import deployment
from photon.engine.deployment import COMPLETED, Connection, deployed_connection
from photon.errors import PhotonError
from photon.telemetry.events import RunFinished
from photon.telemetry.log import EventLog, read_events

SETTINGS = """
[superlink]
default = "prod"
local = { address = ":local:" }
prod = { address = "aggregator.example.org:8000", root-certificates = "/ca.crt" }
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return tmp_path


def test_the_named_or_the_default_connection_is_taken(home: Path) -> None:
    (home / "config.toml").write_text(SETTINGS)
    assert deployed_connection(None).name == "prod"
    assert deployed_connection("prod").name == "prod"


@pytest.mark.parametrize(
    ("settings", "name", "said"),
    [
        (None, None, "does not exist"),
        ("nonsense", None, "names no SuperLinks"),
        (SETTINGS, "local", "no SuperLink of that name"),
        (SETTINGS, "prd", "there are: local, prod"),
    ],
)
def test_anything_else_is_refused(home: Path, settings: str | None, name: str | None, said: str) -> None:
    if settings is not None:
        (home / "config.toml").write_text(settings)
    with pytest.raises(PhotonError, match=said):
        deployed_connection(name)


@pytest.mark.parametrize(
    ("noted", "told", "result"),
    [
        ("running", True, COMPLETED),
        ("finished:completed", True, COMPLETED),
        ("finished:failed", True, "Flower reports finished:failed"),
        ("running", False, "Flower reports running"),
    ],
)
def test_a_run_that_says_it_has_finished_is_believed_before_flower_notes_it(
    run_small: Callable[..., dict[str, Any]],
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noted: str,
    told: bool,
    result: str,
) -> None:
    run_small("rounds=1")
    log = tmp_path / "run" / "events.jsonl"
    events = [event for event in read_events(log) if told or not isinstance(event, RunFinished)]
    log.unlink()
    with EventLog(log) as again:
        for event in events:
            again(event)
    monkeypatch.setattr(deployment, "NOTE_SECONDS", 0.0)
    monkeypatch.setattr(Connection, "status", lambda self, run_id: noted)
    config = small_config(f"run_dir={tmp_path / 'run'}")
    assert Connection("local", {}).follow(config, "1", lambda: False, 0) == result
