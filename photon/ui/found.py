"""Which runs are served, and how each stands at a glance."""

import json
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.errors import PhotonError, printable
from photon.files.owner import is_going_on
from photon.telemetry.events import Event, RoundFinished, RunFinished, RunInterrupted, RunStarted, from_json
from photon.telemetry.listing import run_folders, state_of
from photon.telemetry.log import EVENTS
from photon.telemetry.summary import format_count, format_perplexity

#: Runs that a list shows.
_MOST = 500
#: Bytes at the end of a file of events that tell how the run stands.
_LAST = 2**18


def find_runs(where: list[Path]) -> dict[str, Path]:
    """Return folders of runs in and below ``where``, newest first, by names that tell them apart."""
    found: dict[Path, float] = {}
    for root in where:
        for folder in run_folders(root):
            file = folder / EVENTS
            try:
                about = file.stat()
                # A pipe would hold whoever reads it for ever.
                if stat.S_ISREG(about.st_mode):
                    found[folder.resolve()] = about.st_mtime
            except OSError:
                continue
    folders = sorted(found, key=lambda folder: -found[folder])[:_MOST]
    return _named(folders)


def _named(folders: list[Path]) -> dict[str, Path]:
    """Name folders by as much of their paths' ends as tells them apart."""
    names: dict[str, Path] = {}
    counts: dict[tuple[int, str], int] = {}
    for folder in folders:
        for depth in range(1, len(folder.parts) + 1):
            key = (depth, "/".join(folder.parts[-depth:]))
            counts[key] = counts.get(key, 0) + 1
    for folder in folders:
        depths = range(1, len(folder.parts) + 1)
        ends = ("/".join(folder.parts[-depth:]) for depth in depths)
        name = next(end for depth, end in zip(depths, ends, strict=True) if counts[depth, end] == 1)
        names[printable(name)] = folder
    return names


@dataclass(frozen=True)
class _Glance:
    seen: tuple[int, int]
    started: RunStarted | None
    last: dict[str, Event]


class Glances:
    """How runs stand, by the first line and the end of their events alone."""

    def __init__(self) -> None:
        self._known: dict[Path, _Glance] = {}

    def row(self, name: str, folder: Path) -> dict[str, Any]:
        """Return the row of a run in the list."""
        row: dict[str, Any] = {
            "name": name,
            "kind": "warn",
            "state": "cannot be read",
            "rounds": "–",
            "left": None,
            "perplexity": "–",
            "tokens": "–",
            "strategy": "–",
        }
        try:
            glance = self._look(folder)
        except OSError:
            return row | {"state": "the folder is gone"}
        started, last = glance.started, glance.last
        if started is None:
            return row
        done, evaluated = last.get("round_finished"), last.get("evaluated")
        number = getattr(done, "round", started.resumed_from or 0)
        state, kind = _state(last, going_on=is_going_on(folder))
        left = None
        if state == "running" and isinstance(done, RoundFinished):
            seconds = done.seconds["round"]
            left = max(0.0, seconds * (started.rounds - number) - max(0.0, time.time() - done.time))
        return row | {
            "kind": kind,
            "state": state,
            "rounds": f"{number} of {started.rounds}",
            "left": left,
            "perplexity": format_perplexity(getattr(evaluated, "perplexity", None)),
            "tokens": format_count(getattr(done, "tokens", 0)),
            "strategy": started.strategy,
        }

    def _look(self, folder: Path) -> _Glance:
        file = folder / EVENTS
        about = file.stat()
        seen = (about.st_ino, about.st_size)
        known = self._known.get(folder)
        if known is not None and known.seen == seen:
            return known
        with file.open("rb") as events:
            started = known.started if known and known.seen[0] == about.st_ino else _typed(events.readline())
            events.seek(max(0, about.st_size - _LAST))
            lines = events.read().split(b"\n")[:-1]
        last: dict[str, Event] = {}
        order: list[str] = []
        for line in reversed(lines):
            name = line[11 : line.find(b'"', 11)].decode("ascii", "replace")
            if name in ("silo_finished", "silo_failed", "diagnostics") or name in last:
                continue
            event = _typed(line)
            if event is not None:
                last[name] = event
                order.append(name)
        later = last.get("run_started")
        started = later if isinstance(later, RunStarted) else started
        glance = _Glance(seen, started if isinstance(started, RunStarted) else None, last)
        self._known[folder] = glance
        return glance


def _state(last: dict[str, Event], *, going_on: bool) -> tuple[str, str]:
    ends = [last[name] for name in ("run_started", "run_finished", "run_interrupted") if name in last]
    newest = max(ends, key=lambda event: event.time, default=None)
    state: str
    if isinstance(newest, RunInterrupted):
        state, _ = state_of("run_interrupted", newest.reason, bad_input=newest.bad_input, going_on=going_on)
    else:
        end = "run_finished" if isinstance(newest, RunFinished) else None
        state, _ = state_of(end, going_on=going_on)
    return state, "good" if state in ("running", "finished") else "warn"


def _typed(line: bytes) -> Event | None:
    try:
        return from_json(line.decode())
    except (UnicodeDecodeError, PhotonError, json.JSONDecodeError):
        return None
