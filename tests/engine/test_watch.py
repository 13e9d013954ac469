"""Following a run of another process: what is shown, and how it ends."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from photon.engine import watch as module
from photon.engine.watch import watch
from photon.errors import PhotonError, RunError
from photon.files.owner import LOCK
from photon.telemetry.events import Event, RunFinished, RunInterrupted
from photon.telemetry.log import EventLog, read_events


@pytest.fixture
def run_dir(run_small: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    run_small("rounds=2")
    return tmp_path / "run"


def keep(run_dir: Path, wanted: Callable[[Event], bool]) -> list[Event]:
    """Leave in the run's log only the events that are wanted; return the others."""
    events = read_events(run_dir / "events.jsonl")
    (run_dir / "events.jsonl").unlink()
    with EventLog(run_dir / "events.jsonl") as log:
        for event in filter(wanted, events):
            log(event)
    return [event for event in events if not wanted(event)]


def test_a_finished_run_is_shown_whole(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch(run_dir, wait=0)
    said = capsys.readouterr().out
    assert "round 1/2" in said
    assert "round 2/2" in said


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wait, said in ((0, ""), (0.1, f"waiting for a run in {tmp_path}, 0 s at most\n")):
        with pytest.raises(PhotonError, match="no run has started here"):
            watch(tmp_path, wait=wait)
        assert capsys.readouterr().err == said


def test_a_run_that_was_killed_or_interrupted_is_a_failure(run_dir: Path) -> None:
    keep(run_dir, lambda event: not isinstance(event, RunFinished))
    with pytest.raises(RunError, match=r"killed; go on with `photon resume"):
        watch(run_dir, wait=0)
    with EventLog(run_dir / "events.jsonl") as log:
        log(RunInterrupted(round=1, reason="no quorum"))
    with pytest.raises(RunError, match="no quorum; go on"):
        watch(run_dir, wait=0)


def test_a_run_going_on_is_followed_to_its_end(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was interrupted before and has been resumed."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    later = keep(run_dir, lambda event: not isinstance(event, RunFinished))
    with EventLog(run_dir / "events.jsonl") as log:
        log(RunInterrupted(round=1, reason="no quorum"))

    def go_on() -> None:
        with FileLock(run_dir / LOCK):
            time.sleep(0.5)
            with EventLog(run_dir / "events.jsonl") as log:
                for event in later:
                    log(event)

    thread = threading.Thread(target=go_on)
    thread.start()
    watch(run_dir, wait=5)
    thread.join()
    assert "finished after" in capsys.readouterr().out
