"""A tracker in a thread of its own: one that fails or hangs costs a run nothing but its figures."""

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from photon.errors import PhotonError
from photon.telemetry.events import Event

#: Events that may wait for a tracker; one that takes none of so many hangs.
MOST_WAITING = 10_000


class Tracker(Protocol):
    """What hears events, and is closed at the end."""

    def __call__(self, event: Event) -> None:
        """Hear an event."""

    def close(self) -> None:
        """Write out what is left."""


class Aside:
    """Listener that hands events to a tracker in another thread, and waits for nothing of it.

    Parameters
    ----------
    begin
        Makes the tracker, in that thread.
    name
        Of the tracker, for messages.
    begins_within, ends_within
        Seconds that it has to begin, and at the end of the run to write out what is left.

    Raises
    ------
    PhotonError
        If the tracker cannot begin: before the run starts, it is better mended than missed.
    """

    def __init__(
        self,
        begin: Callable[[], Tracker],
        name: str,
        *,
        begins_within: float = 120.0,
        ends_within: float = 30.0,
    ) -> None:
        # A notice names a listener by this.
        self.__qualname__ = name
        self._ends_within = ends_within
        self._events: queue.Queue[Event | None] = queue.Queue(MOST_WAITING)
        self._error: Exception | None = None
        self._begun = threading.Event()
        self._hangs = False
        # The end of the process waits for no such thread.
        self._thread = threading.Thread(target=self._work, args=(begin,), name=name, daemon=True)
        self._thread.start()
        if not self._begun.wait(begins_within):
            raise PhotonError(
                f"telemetry: {name} has not begun within {begins_within:g} seconds; is its service "
                "reachable? Leave it out of telemetry.listeners to train without"
            )
        self._raise_error()

    def _work(self, begin: Callable[[], Tracker]) -> None:
        try:
            tracker = begin()
            self._begun.set()
            try:
                while (event := self._events.get()) is not None:
                    tracker(event)
            finally:
                tracker.close()
        except Exception as error:
            self._error = error
        finally:
            self._begun.set()

    def __call__(self, event: Event) -> None:
        """Hand over ``event``.

        Raises
        ------
        Exception
            What the tracker has raised at an earlier event; or it has taken none for long.
        """
        self._raise_error()
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._hangs = True
            raise TimeoutError(f"it hangs: {MOST_WAITING:,} events wait for it") from None

    def close(self) -> None:
        """Let the tracker write out what is left, within its time.

        Raises
        ------
        Exception
            What the tracker has raised; or it has not ended in time.
        """
        if self._hangs:
            return
        self._events.put_nowait(None)
        self._thread.join(self._ends_within)
        if self._thread.is_alive():
            raise TimeoutError(f"it has not ended within {self._ends_within:g} seconds, and is left alone")
        self._raise_error()

    def _raise_error(self) -> None:
        # Once: the run is told of it, and then it is over.
        error, self._error = self._error, None
        if error is not None:
            raise error
