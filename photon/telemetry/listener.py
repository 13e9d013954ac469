"""What a listener of a run is told when it begins.

An entry of ``telemetry.listeners`` names a class or function whose first argument is a `ListenerRun`; the
entry's other keys are its further arguments. What it returns is called with each event. If that has
``close``, it is called at the end, however the run ends. A function may return None: it does not listen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from photon.config.schema import RunConfig
from photon.telemetry.events import Event


@dataclass(frozen=True)
class ListenerRun:
    """A run as a listener sees it.

    Attributes
    ----------
    run_dir
        The run's folder.
    config
        The run's configuration.
    live
        Whether the listener may take over the terminal.
    history
        Events of earlier attempts, if the run goes on; `photon.telemetry.log.current_history` leaves out
        what is no longer true.
    """

    run_dir: Path
    config: RunConfig
    live: bool
    history: Sequence[Event]
