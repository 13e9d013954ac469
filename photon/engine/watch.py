"""Follow a run that another process trains, by its events."""

import sys
import time
from pathlib import Path

from rich.console import Console

from photon.errors import PhotonError, RunError
from photon.files.owner import is_going_on
from photon.telemetry.display import Display
from photon.telemetry.events import Event, RunFinished, RunInterrupted
from photon.telemetry.log import follow
from photon.telemetry.steps import SILOS

#: Seconds between looks at whether the run is still going on.
_LOOK_SECONDS = 2.0


def watch(run_dir: Path, *, wait: float) -> None:
    """Show the run in ``run_dir`` until it ends.

    Parameters
    ----------
    run_dir
        Folder of the run, on this machine.
    wait
        Seconds to wait for a run that has not started, or been resumed, yet.

    Raises
    ------
    PhotonError
        If there is no run.
    RunError
        If the run stopped before its end.
    """
    end = time.monotonic() + wait
    events = run_dir / "events.jsonl"
    if wait and not events.is_file():
        # Not among what is shown of the run.
        sys.stderr.write(f"waiting for a run in {run_dir}, {wait:.0f} s at most\n")
        sys.stderr.flush()
    while not events.is_file():
        if time.monotonic() > end:
            raise PhotonError(f"{run_dir}: no run has started here; is the folder right?")
        time.sleep(0.2)
    last: Event | None = None
    next_look, was_going_on = 0.0, False

    def over() -> bool:
        nonlocal next_look, was_going_on
        if isinstance(last, RunFinished):
            return True
        if time.monotonic() < next_look:
            return False
        next_look = time.monotonic() + _LOOK_SECONDS
        if is_going_on(run_dir):
            was_going_on = True
            return False
        return was_going_on or time.monotonic() > end

    with Display(Console(), silos=run_dir / SILOS) as show:
        for event in follow(events, over):
            show(event)
            last = event
    if isinstance(last, RunInterrupted):
        raise RunError(f"{last.reason}; go on with `photon resume {run_dir}`")
    if not isinstance(last, RunFinished):
        raise RunError(f"{run_dir}: the run was killed; go on with `photon resume {run_dir}`")
