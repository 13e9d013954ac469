"""The end of a run that could not write it itself."""

from pathlib import Path

from photon.telemetry.events import Checkpointed, RunFinished, RunInterrupted
from photon.telemetry.log import EventLog, read_events


def note_interruption(run_dir: Path, reason: str) -> None:
    """Append the end that a stopped ServerApp could not write itself."""
    path = run_dir / "events.jsonl"
    events = read_events(path) if path.exists() else []
    if not events or isinstance(events[-1], RunInterrupted | RunFinished):
        return
    last_round = max((event.round for event in events if isinstance(event, Checkpointed)), default=0)
    with EventLog(path) as log:
        log(RunInterrupted(round=last_round, reason=reason))
