"""The events of a living run, read as they are written: each byte once."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from photon.errors import PhotonError
from photon.report.run import MOST_DRAWN
from photon.telemetry.events import Evaluated, Event, Notice, RunStarted, SiloFinished, from_json

_CHUNK = 2**23
_START = re.compile(rb'(?m)^(?=\{"event": "run_started")')
#: A reply as it is written today; others are read as any event is.
_REPLY = re.compile(
    rb'(?m)^(\{"event": "silo_finished", "time": [^,]+, "clock": [^,]+, "round": (\d+), "silo": "([^"\\]*)",'
    rb"[^\n]*\})\n"
)
_PER_SILO = re.compile(rb'"per_(silo|node)": \{(?:"[^"\\]*": \{[^{}]*\}(?:, )?)*\}')


class Tail:
    """What a file of events holds so far.

    Of a run with more silos than a chart draws, replies are counted and not kept: of each silo the last one
    is, and of evaluations the figures of single silos are in the first and the last alone.

    Attributes
    ----------
    events
        All events; of a run with many silos, without the replies.
    is_thin
        Whether it has many silos.
    last_replies
        The last reply of each silo.
    begun
        How often the file was read from its start, since it was another one or had become shorter.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = 0
        self.begun = 0
        self._begin()

    def _begin(self) -> None:
        self._position = 0
        self._lines = 0
        self.begun += 1
        self.events: list[Event] = []
        self.is_thin = False
        self._raw_replies: dict[str, bytes] = {}
        self._typed_replies: dict[str, SiloFinished] = {}
        self._by_round: dict[int, list[str]] = {}
        self._whole: tuple[int, bytes] | None = None

    @property
    def position(self) -> int:
        """Bytes that were read; a line that is not complete is none of them."""
        return self._position

    @property
    def updates(self) -> Counter[str] | None:
        """How many updates of each silo counted, where replies are not among the events."""
        if not self.is_thin:
            return None
        counts: Counter[str] = Counter()
        for silos in self._by_round.values():
            counts.update(silos)
        return counts

    def last_replies(self) -> dict[str, SiloFinished]:
        """Return the last reply of each silo."""
        for line in self._raw_replies.values():
            event = _event(line, 0)
            if isinstance(event, SiloFinished):
                self._typed_replies[event.silo] = event
        self._raw_replies.clear()
        return self._typed_replies

    def read(self) -> bool:
        """Read what is new; return whether anything was.

        Raises
        ------
        FileNotFoundError
            The file is gone.
        """
        with self._path.open("rb") as file:
            about = self._path.stat()
            if self._position and (about.st_ino != self._file or about.st_size < self._position):
                self._begin()
            self._file = about.st_ino
            before, held = self._position, b""
            file.seek(self._position)
            while read := file.read(_CHUNK):
                whole, line_end, rest = (held + read).rpartition(b"\n")
                held = rest
                if line_end:
                    self._position += len(whole) + 1
                    self._take(whole + b"\n")
        if self._position == before:
            return False
        self._keep_last_evaluation()
        return True

    def _take(self, text: bytes) -> None:
        for attempt in _START.split(text):
            part = attempt
            if attempt.startswith(b'{"event": "run_started"'):
                first, _, part = attempt.partition(b"\n")
                self._add(first)
            if self.is_thin:
                found = _REPLY.findall(part)
                for line, number, silo in found:
                    name = silo.decode("utf-8", "replace")
                    self._raw_replies[name] = line
                    self._by_round.setdefault(int(number), []).append(name)
                self._lines += len(found)
            for line in (_REPLY.sub(b"", part) if self.is_thin else part).split(b"\n")[:-1]:
                self._add(line)

    def _add(self, line: bytes) -> None:
        self._lines += 1
        if self.is_thin and line.startswith(b'{"event": "evaluated"') and b'"round": 0,' not in line[:200]:
            event = _event(_PER_SILO.sub(rb'"per_\1": {}', line), self._lines)
            self._whole = (len(self.events), line)
        else:
            event = _event(line, self._lines)
        if isinstance(event, RunStarted):
            self.is_thin = self.is_thin or len(event.silos) > MOST_DRAWN
            # What a run that goes on does again no longer counts.
            goes_on = event.resumed_from or 0
            self._by_round = {n: silos for n, silos in self._by_round.items() if n <= goes_on}
        if self.is_thin and isinstance(event, SiloFinished):
            self._typed_replies[event.silo] = event
            self._by_round.setdefault(event.round, []).append(event.silo)
            return
        if isinstance(event, SiloFinished):
            self._typed_replies[event.silo] = event
        if isinstance(event, Notice) and event.time == 0.0 and self.events:
            event = replace(event, time=self.events[-1].time, clock=self.events[-1].clock)
        self.events.append(event)

    def _keep_last_evaluation(self) -> None:
        """Give the last evaluation the figures of single silos, and take them from the one before."""
        if self._whole is None:
            return
        place, line = self._whole
        self._whole = None
        for number, event in enumerate(self.events):
            if isinstance(event, Evaluated) and event.round and event.per_silo:
                self.events[number] = replace(event, per_silo={}, per_node={})
        self.events[place] = _event(line, 0)


def _event(line: bytes, number: int) -> Event:
    try:
        return from_json(line.decode())
    except (UnicodeDecodeError, PhotonError):
        message = f"line {number} of events.jsonl was damaged, and is left out"
        return Notice(time=0.0, level="warning", message=message)
