"""A listener that gives a test the time to act before a round's requests go out."""

import time

from photon.telemetry.events import Event, RoundStarted
from photon.telemetry.listener import ListenerRun


class WaitAtStart:
    """Wait whenever a round has begun."""

    def __init__(self, run: ListenerRun, *, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundStarted):
            time.sleep(self._seconds)
