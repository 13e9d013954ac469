"""A server on runs that tests may change."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from photon.telemetry.events import Event
from photon.telemetry.log import EventLog
from photon.ui.server import listen
from tests.report.conftest import CONFIG, finished_run, other_run, write_run
from tests.telemetry.synthetic import synthetic_events

__all__ = ["finished_run", "other_run"]

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return what serves folders of runs, and says where."""
    servers = []

    def begin(*where: Path) -> str:
        server = listen(list(where), 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder of two runs."""
    write_run(tmp_path / "runs" / "first", list(synthetic_events()))
    config = CONFIG.format(seed=0, rounds=12, outer_lr=0.7, strategy="Diloco")
    events = list(synthetic_events(rounds=12, seed=3, strategy="diloco"))
    write_run(tmp_path / "runs" / "sweep" / "second", events, config=config)
    return tmp_path / "runs"


def begin_run(folder: Path, events: list[Event], count: int) -> None:
    """Lay out a run that has told of ``count`` events."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("rounds: 10\n")
    tell(folder, events[:count])


def tell(folder: Path, events: list[Event]) -> None:
    """Append events to a run's."""
    with EventLog(folder / "events.jsonl") as log:
        for event in events:
            log(event)
