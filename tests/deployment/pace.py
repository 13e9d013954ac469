"""A listener that holds a round until a test lets it go, so that a fault strikes however quick rounds are."""

import time
from pathlib import Path

from photon.telemetry.events import Event, RoundStarted
from photon.telemetry.listener import ListenerRun


class HoldRounds:
    """Wait, whenever one of the rounds from ``first`` to ``last`` has begun, until its file is there."""

    def __init__(self, run: ListenerRun, *, folder: str, first: int, last: int) -> None:
        self._folder = Path(folder)
        self._rounds = range(first, last + 1)

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundStarted) and event.round in self._rounds:
            while not (self._folder / f"go-{event.round}").exists():
                time.sleep(0.05)
