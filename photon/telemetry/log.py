"""``events.jsonl``: writing it, reading it, following it while another process writes it.

A line counts once its line end is there; what a crash left behind it is no event yet. In the place of a line
that is damaged readers get a warning, and a run that goes on writes that warning there.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from photon.errors import PhotonError
from photon.files.atomic import write_bytes
from photon.files.json_object import read_object
from photon.telemetry.events import (
    Checkpointed,
    Diagnostics,
    Evaluated,
    Event,
    Notice,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SiloFailed,
    SiloFinished,
    TasksEvaluated,
    Unlearned,
    from_json,
)
from photon.telemetry.listener import ListenerRun

#: The file of events in a run's folder.
EVENTS = "events.jsonl"
#: Damaged lines that were cut out of it.
DAMAGED = "events-damaged.txt"

_ROUND_EVENTS = (
    RoundStarted,
    SiloFinished,
    SiloFailed,
    RoundFinished,
    Diagnostics,
    Evaluated,
    TasksEvaluated,
    Unlearned,
    Checkpointed,
    RunInterrupted,
)


class EventLog:
    """Listener that appends each event to a file and flushes it, so that a reader sees it at once.

    On opening, a half-written last line (left by a crash) is cut off.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(_complete_length(path))

    def __call__(self, event: Event) -> None:
        """Append ``event``."""
        self._file.write(event.to_json().encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; no event can be appended after that."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def event_log(run: ListenerRun) -> EventLog:
    """Return what writes a run's ``events.jsonl``."""
    return EventLog(run.run_dir / EVENTS)


def read_events(path: Path) -> list[Event]:
    """Read all events of a file; a half-written last line is left out, and a damaged one is a warning.

    Raises
    ------
    PhotonError
        The file cannot be read, or has lines and none is an event; the message names file and line.
    """
    lines = _lines(path)
    events, damaged = _read(path, lines)
    if damaged and len(damaged) == len(lines):
        _parse(path, 1, lines[0])
    return events


def mend(path: Path) -> list[int]:
    """Put warnings in the place of damaged lines; return the numbers of those, counted from 1.

    The lines themselves are appended to a file beside it, so that nothing is lost.

    Raises
    ------
    PhotonError
        The file cannot be read.
    """
    lines = _lines(path) if path.exists() else []
    events, damaged = _read(path, lines)
    if damaged:
        with path.with_name(DAMAGED).open("ab") as aside:
            aside.writelines(lines[number - 1] + b"\n" for number in damaged)
        for number in damaged:
            lines[number - 1] = events[number - 1].to_json().encode()
        write_bytes(path, b"".join(line + b"\n" for line in lines))
    return damaged


def follow(path: Path, stop: Callable[[], bool], *, interval: float = 0.1) -> Iterator[Event]:
    """Yield the events of a file from its start on, as they appear; a damaged line is a warning.

    Parameters
    ----------
    path
        The file; it need not exist yet.
    stop
        Asked whenever the end of the file is reached. After it said True, what has been written meanwhile
        is still yielded.
    interval
        Seconds to wait before looking again.
    """
    position, number, stopping = 0, 0, False
    file, last = 0, None
    while True:
        lines = _complete_lines(path, position)
        if (now := _identity(path)) != file:
            # It was mended: its lines are as many, and perhaps of other lengths.
            file, position = now, sum(map(len, _complete_lines(path, 0)[:number]))
            lines = _complete_lines(path, position)
        for line in lines:
            position += len(line)
            number += 1
            last = _event(path, number, line, last)[0]
            yield last
        if lines:
            continue
        if stopping:
            return
        stopping = stop()
        if not stopping:
            time.sleep(interval)


def current_history(events: Iterable[Event]) -> list[Event]:
    """Return the events that led to the present state of a run.

    A run that goes on from round r does later rounds again, so what was told of rounds after r before that
    is no longer true; unless the run then goes on from one of those, whose checkpoint was put back. A run
    started afresh makes everything before it void.
    """
    history: list[Event] = []
    undone: list[list[Event]] = []
    for event in events:
        if isinstance(event, RunStarted):
            if event.resumed_from is None:
                history, undone = [], []
            else:
                undone.append(history)
                reaching = (each for each in reversed(undone) if _last_round(each) >= event.resumed_from)
                history = _up_to(next(reaching, history), event.resumed_from)
                undone = [each for each in undone if _last_round(each) > event.resumed_from]
        history.append(event)
    return history


def elapsed_seconds(history: Iterable[Event]) -> list[float]:
    """Return for each event of a `current_history` the seconds the run has been at work.

    Neither the pause before a run is resumed nor the work that was lost with an interruption counts.
    """
    elapsed: list[float] = []
    worked = before = 0.0
    begun: Event | None = None
    for event in history:
        if isinstance(event, RunStarted) or begun is None:
            begun, before = event, worked
        worked = max(worked, before + seconds_between(begun, event))
        elapsed.append(worked)
    return elapsed


def seconds_between(earlier: Event, later: Event) -> float:
    """Return the seconds between two events of an attempt, by the clock that nobody sets if it was read."""
    if earlier.clock is not None and later.clock is not None:
        return later.clock - earlier.clock
    return later.time - earlier.time


def _last_round(history: list[Event]) -> int:
    return next((event.round for event in reversed(history) if isinstance(event, RoundFinished)), 0)


def _up_to(history: list[Event], last_round: int) -> list[Event]:
    def holds(event: Event) -> bool:
        if isinstance(event, RunFinished):
            return False
        return not (isinstance(event, _ROUND_EVENTS) and event.round > last_round)

    return [event for event in history if holds(event)]


def _complete_length(path: Path) -> int:
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _complete_lines(path: Path, position: int) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(position)
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [line + b"\n" for line in lines]


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise PhotonError(f"{path}: cannot read the events ({error.strerror})") from None


def _identity(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _read(path: Path, lines: Iterable[bytes]) -> tuple[list[Event], list[int]]:
    """Return an event for each line, and the numbers of those that are damaged."""
    events: list[Event] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, start=1):
        event, is_whole = _event(path, number, line, events[-1] if events else None)
        events.append(event)
        if not is_whole:
            damaged.append(number)
    return events, damaged


def _event(path: Path, number: int, line: bytes, before: Event | None) -> tuple[Event, bool]:
    """Return the event of a line, and whether it is one: else there is a warning in its place."""
    try:
        return _parse(path, number, line), True
    except PhotonError:
        message = f"line {number} of {path.name} was damaged, and is left out"
    notice = Notice(level="warning", message=message)
    return notice if before is None else replace(notice, time=before.time, clock=before.clock), False


def _parse(path: Path, number: int, line: bytes) -> Event:
    try:
        return from_json(line.decode())
    except UnicodeDecodeError:
        raise PhotonError(f"{path}, line {number}: not UTF-8; remove the line or the file") from None
    except PhotonError as error:
        raise PhotonError(f"{path}, line {number}: {error}") from None


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the summary of a finished run.

    Raises
    ------
    PhotonError
        If it cannot be read.
    """
    try:
        return read_object(run_dir / "summary.json")
    except PhotonError as error:
        raise PhotonError(f"{error}; remove it, and `photon resume` writes it anew") from error
