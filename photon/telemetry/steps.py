"""How far a silo is within a round: a small file of its, for whoever watches on the same machine."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from photon.files.atomic import write_text

#: The file, in the silo's folder of a run.
STEPS = "steps.json"
#: Where silos that train on the machine of the server have their folders, in the run's.
SILOS = "silos"
#: Seconds between two writes.
EVERY = 0.5


@dataclass(frozen=True)
class Steps:
    """Local steps of a round.

    Attributes
    ----------
    round
        The round.
    done
        Steps that were taken.
    asked
        Steps that were asked for.
    """

    round: int
    done: int
    asked: int


class TellSteps:
    """Write down how many of a round's local steps are done; to be called after each.

    A disk that takes no more costs nothing but the news.

    Parameters
    ----------
    folder
        Folder of the silo.
    server_round, first_step, steps
        The round, the global step that it begins at, and the steps that were asked for.
    clock
        Monotonic seconds.
    """

    def __init__(
        self,
        folder: Path,
        server_round: int,
        first_step: int,
        steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = folder / STEPS
        self._round, self._first_step, self._steps = server_round, first_step, steps
        self._clock = clock
        self._next = -1.0
        self._tell(0)

    def __call__(self, step: int, loss: float) -> None:
        """Tell that a global step was taken, if the last word is old enough."""
        if self._clock() >= self._next:
            self._tell(step + 1 - self._first_step)

    def _tell(self, done: int) -> None:
        self._next = self._clock() + EVERY
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps([self._round, done, self._steps]), flush=False)


def read_steps(folder: Path) -> Steps | None:
    """Return how far a silo was when it last said so; None: it has not, or that cannot be read."""
    try:
        numbers = json.loads((folder / STEPS).read_text())
        server_round, done, asked = map(int, numbers)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return Steps(server_round, done, asked)
