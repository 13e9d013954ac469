"""The events of a living run, read as they are written: each byte once."""

import math
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from photon.errors import PhotonError
from photon.report.run import MOST_DRAWN
from photon.telemetry.events import Evaluated, Event, Notice, RunStarted, SiloFinished, from_json

#: Bytes that are read at once; no line is as long.
_CHUNK = 2**22
#: Bytes at the beginning of a file that tell it from another.
_HEAD = 512
#: How a reply begins as it is written today; others are read as any event is.
_REPLY = re.compile(
    rb'\{"event": "silo_finished", "time": [^,]+, "clock": [^,]+, "round": (\d+), "silo": "([^"\\]*)",'
)
_EVALUATED = b'{"event": "evaluated"'


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
        self.begun = 0
        self._begin()

    def _begin(self) -> None:
        self._position = 0
        self._head = b""
        self._size = 0
        self._lines = 0
        self.begun += 1
        self.events: list[Event] = []
        self.is_thin = False
        self._raw_replies: dict[bytes, bytes] = {}
        self._typed_replies: dict[str, SiloFinished] = {}
        self._by_round: dict[int, list[bytes]] = {}
        self._whole: tuple[int, bytes] | None = None

    @property
    def position(self) -> int:
        """Bytes that were read; a line that is not complete is none of them."""
        return self._position

    @property
    def share(self) -> float:
        """What share of the file was read; 1.0: all but a line that is not complete."""
        return 1.0 if self._size - self._position < _CHUNK else self._position / self._size

    @property
    def updates(self) -> Counter[str] | None:
        """How many updates of each silo counted, where replies are not among the events."""
        if not self.is_thin:
            return None
        counts: Counter[bytes] = Counter()
        for silos in self._by_round.values():
            counts.update(silos)
        return Counter({silo.decode("utf-8", "replace"): number for silo, number in counts.items()})

    def last_replies(self) -> dict[str, SiloFinished]:
        """Return the last reply of each silo."""
        for line in self._raw_replies.values():
            event = _event(line, 0)
            if isinstance(event, SiloFinished):
                self._typed_replies[event.silo] = event
        self._raw_replies.clear()
        return self._typed_replies

    def read(self, seconds: float = math.inf) -> bool:
        """Read what is new, for so long at most; return whether anything was.

        Raises
        ------
        FileNotFoundError
            The file is gone.
        """
        with self._path.open("rb") as file:
            about = self._path.stat()
            # A file in the place of another may have its number; its first event has a time of its own.
            if about.st_size < self._position or file.read(len(self._head)) != self._head:
                self._begin()
            before, held = self._position, b""
            self._size = about.st_size
            file.seek(self._position)
            end = time.monotonic() + seconds
            while time.monotonic() < end and (read := file.read(_CHUNK)):
                whole, line_end, rest = (held + read).rpartition(b"\n")
                held = rest
                if line_end:
                    self._head = self._head or whole[:_HEAD]
                    self._position += len(whole) + 1
                    self._take(whole + b"\n")
        if self._position == before:
            return False
        self._keep_last_evaluation()
        return True

    def _take(self, text: bytes) -> None:
        # Of hundreds of thousands of replies each costs one look at its first hundred bytes.
        for line in text.split(b"\n")[:-1]:
            found = _REPLY.match(line) if self.is_thin else None
            if found is None or not line.endswith(b"}"):
                self._add(line)
                continue
            number, silo = found.groups()
            self._lines += 1
            self._raw_replies[silo] = line
            self._by_round.setdefault(int(number), []).append(silo)

    def _add(self, line: bytes) -> None:
        self._lines += 1
        event = None
        if self.is_thin and line.startswith(_EVALUATED) and b'"round": 0,' not in line[:200]:
            event = _without_silos(line)
            self._whole = (len(self.events), line)
        event = event or _event(line, self._lines)
        if isinstance(event, RunStarted):
            self.is_thin = self.is_thin or len(event.silos) > MOST_DRAWN
            # What a run that goes on does again no longer counts.
            goes_on = event.resumed_from or 0
            self._by_round = {n: silos for n, silos in self._by_round.items() if n <= goes_on}
        if self.is_thin and isinstance(event, SiloFinished):
            self._typed_replies[event.silo] = event
            self._by_round.setdefault(event.round, []).append(event.silo.encode())
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


def _without_silos(line: bytes) -> Event | None:
    """Read an evaluation without the figures of single silos; None: that cannot be done."""
    for key in (b'"per_silo": {', b'"per_node": {'):
        begin = line.find(key)
        end = line.find(b"}}", begin)
        if 0 <= begin < end and line[begin + len(key) : begin + len(key) + 1] != b"}":
            line = line[: begin + len(key)] + line[end + 1 :]
    try:
        return from_json(line.decode())
    except (UnicodeDecodeError, PhotonError):
        return None


def _event(line: bytes, number: int) -> Event:
    try:
        return from_json(line.decode())
    except (UnicodeDecodeError, PhotonError):
        message = f"line {number} of events.jsonl was damaged, and is left out"
        return Notice(time=0.0, level="warning", message=message)
