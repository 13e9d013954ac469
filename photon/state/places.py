"""Where in its text a silo was asked to train: what it remembers of that, and what it sees in a request.

The place that a request begins at is the aggregator's word. Servers of Photon say 0 in a run's first round,
and from then on where the last accepted round ended; a round whose reply was lost begins again where it
began, and a resumed run where one of its rounds did. So a silo can tell whether a place was chosen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: Places that are remembered of a run, the newest: a resumed run goes back by a few rounds at most.
MAX_PLACES = 64


@dataclass(frozen=True)
class Place:
    """What a request trains on.

    Attributes
    ----------
    reader
        Whose text it is a place of: the silo's own, or text that is pooled under a name.
    start, end
        First window, and the one after the last, in the order in which the text is read.
    updates
        Updates of the silo, in all runs, when it had been counted.
    """

    reader: str
    start: int
    end: int
    updates: int = 0

    def overlaps(self, other: "Place") -> bool:
        """Return whether both have a window in common; orders of different seeds count as one."""
        return self.start < other.end and other.start < self.end

    def is_again(self, other: "Place") -> bool:
        """Return whether it is the very same text."""
        return (self.reader, self.start, self.end) == (other.reader, other.start, other.end)


def chosen(place: Place, of_run: Iterable[Place] | None, *, remembers: bool) -> str | None:
    """Return why the place of a request is the aggregator's choice; None: it is where the run was.

    Parameters
    ----------
    of_run
        What is remembered of the run; None: it is new.
    remembers
        Whether the silo has counted any run. One that has lost its state believes what it is told once.
    """
    if place.start == 0 or (of_run is None and not remembers):
        return None
    if of_run is None:
        return f"window {place.start:,} in the first round that the silo knows of this run"
    # One that an earlier Photon has counted has no places.
    own = list(of_run)
    if not own or any(place.start in (one.start, one.end) for one in own if one.reader == place.reader):
        return None
    return f"window {place.start:,}, where no round of this run began or ended"


def updates_since(place: Place, run_id: str, places: Mapping[str, Iterable[Place]]) -> int | None:
    """Return how many updates ago some of this text was trained on; None: never, or for the same round.

    Parameters
    ----------
    place
        With the number of updates so far.
    places
        Run to what is remembered of it.
    """
    found: list[int] = []
    for run, of_run in places.items():
        for one in of_run:
            if one.is_again(place) and run == run_id:
                return None
            if one.overlaps(place):
                found.append(place.updates - one.updates)
    return min(found, default=None)
