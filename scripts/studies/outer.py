"""DiLoCo, Streaming DiLoCo and MuLoCo, each tuned in outer momentum, outer rate and local rate alike.

    python scripts/studies/outer.py run --minutes 45       # go on with what is missing
    python scripts/studies/outer.py run --only MuLoCo      # of one method
    python scripts/studies/outer.py table                  # docs/results/outer.md

Every run is a whole federation in this process. A method's search begins at one point of a grid and tries the
neighbours of the best known point: one step along an axis, and one step up in momentum with one down in the
outer rate, or the other way round. It ends when all of them are worse. Nothing else chooses points, and the
grid is the same for all. What is tuned with seed 0 is run with seeds 1 and 2, with 8 silos and on unlike text.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from convergence import Cell, reached
from results import Result, Results, Runs, load
from study import Study
from tables import perplexity, table
from text import BATCH, QUICK, SEQUENCE_LENGTH, SETTINGS, VOCABULARY, add_data, dealt_evenly, federate
from text import prepared, temporary_folder

MOMENTA = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
OUTER = (0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
RATES = (0.001, 0.0014, 0.002, 0.0028, 0.004, 0.0056, 0.008, 0.0112, 0.016, 0.0224, 0.032, 0.045, 0.064)
AXES = (RATES, MOMENTA, OUTER)
NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (0, -1, 1), (0, 1, -1))
EVALUATION = 64


@dataclass(frozen=True)
class Point:
    """Where a method is run: the peak local rate, and momentum and rate of an outer step if it has one."""

    rate: float
    momentum: float | None = None
    outer: float | None = None

    def overrides(self) -> list[str]:
        local = [f"optimizer.lr={self.rate:g}"]
        if self.momentum is None:
            return local
        nesterov = [] if self.momentum else ["outer.nesterov=false"]
        return [*local, f"outer.momentum={self.momentum:g}", f"outer.lr={self.outer:g}", *nesterov]


def train(data: Path, method: str, overrides: Sequence[str], cell: Cell, point: Point, text: str) -> Result:
    from photon.telemetry.events import Evaluated, RunStarted, SiloFinished
    from photon.telemetry.log import read_events

    settings = [
        *SETTINGS,
        f"data.path={text_of(data, cell, text)}",
        f"cohort={cell.clients}",
        f"local_steps={cell.local_steps}",
        f"rounds={cell.steps // cell.local_steps}",
        f"evaluation.every={max(1, EVALUATION // cell.local_steps)}",
        f"seed={cell.seed}",
        *overrides,
        *point.overrides(),
    ]
    with temporary_folder() as run_dir:
        summary = federate(settings, run_dir)
        events = list(read_events(run_dir / "events.jsonl"))
    parameters = next(event.parameters for event in events if isinstance(event, RunStarted))
    curve, up, tokens = [], 0, 0
    for event in events:
        if isinstance(event, SiloFinished):
            up += event.bytes_up
            tokens += event.tokens
        elif isinstance(event, Evaluated):
            curve.append({"tokens": tokens, "bytes_up": up / cell.clients, "perplexity": event.perplexity})
    if overrides[0] == "strategy=centralized":
        per_step = SEQUENCE_LENGTH * BATCH * cell.clients
        curve = [{**one, "bytes_up": 4 * parameters * one["tokens"] / per_step} for one in curve]
    return {
        "method": method,
        "overrides": list(overrides),
        **asdict(cell),
        "text": text,
        **asdict(point),
        "parameters": parameters,
        "perplexity": None if summary is None else curve[-1]["perplexity"],
        "curve": curve,
    }


def text_of(data: Path, cell: Cell, text: str) -> Path:
    """Return text dealt out evenly, or, ``by-source``, one domain to a silo."""
    if text == "iid":
        return dealt_evenly(data, cell.clients)
    return prepared(data / "by-source", VOCABULARY, SEQUENCE_LENGTH)


@dataclass(frozen=True)
class Method:
    """A method, and where its search begins; ``searched`` ones have all three axes."""

    overrides: Sequence[str]
    start: Point
    axes: Sequence[tuple[int, int, int]] = NEIGHBOURS


DILOCO = ["strategy=diloco", QUICK]
STREAMING = ["strategy=streaming-diloco", "strategy.fragments=2", QUICK]
MULOCO = ["strategy=diloco", "optimizer=muon", "optimizer.weight_decay=0.0"]
RATE_ALONE = NEIGHBOURS[:2]


def search(results: Results, title: str, method: Method, cell: Cell, text: str = "iid") -> tuple[Point, bool]:
    """Return the point to try next, and whether it has a line: then it is the best and the search has ended."""
    known = {
        point_of(one): one["perplexity"] or float("inf")
        for one in results
        if (one["method"], one["text"]) == (title, text)
        and all(one[key] == value for key, value in asdict(cell).items())
    }
    if not known:
        return method.start, False
    best = min(known, key=lambda point: known[point])
    for point in neighbours(best, method.axes):
        if point not in known:
            return point, False
    return best, True


def point_of(one: Result) -> Point:
    return Point(one["rate"], one["momentum"], one["outer"])


def neighbours(point: Point, moves: Sequence[tuple[int, int, int]]) -> Iterator[Point]:
    """Yield the points one step away along each move that lie on the grid."""
    values = (point.rate, point.momentum, point.outer)
    for move in moves:
        moved = []
        for axis, value, step in zip(AXES, values, move, strict=True):
            place = None if value is None else axis.index(value) + step
            moved.append(axis[place] if place is not None and 0 <= place < len(axis) else None)
        if all((new is None) == (old is None) for new, old in zip(moved, values, strict=True)):
            yield Point(*moved)
