"""A run as its page shows it, kept up to date by what its folder tells."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.errors import PhotonError, printable
from photon.files.owner import is_going_on
from photon.report.comparison import comparison_page
from photon.report.page import Page, Panel
from photon.report.run import Run
from photon.report.single import run_page
from photon.telemetry.log import EVENTS
from photon.telemetry.samples import SAMPLES
from photon.ui.delta import delta
from photon.ui.health import Progress, attention, progress, silo_table
from photon.ui.log import log_lines
from photon.ui.render import comparison_body, fragments
from photon.ui.tail import Tail

#: States that are kept, for those who have seen one of them.
_MOST_STATES = 4
#: Seconds after which a page is shown with what was read; the rest comes with the next news.
_READ_SECONDS = 0.5
#: A page is made anew at most in one of this many seconds of its making.
_SPARING = 4.0


@dataclass(frozen=True)
class State:
    """What a page shows: HTML by the name of its place, and charts by that of their panel."""

    version: str
    html: dict[str, str]
    charts: dict[str, Any]


class LiveRun:
    """A run whose page follows it.

    Parameters
    ----------
    name
        As the page calls it.
    folder
        The run's folder.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self._tail = Tail(folder / "events.jsonl")
        self._lock = threading.Lock()
        self._states: OrderedDict[str, State] = OrderedDict()
        self._page: Page | None = None
        self._seen: tuple[Any, ...] = ()
        # A server that was started anew must not take states of the one before for its own.
        self._mark = secrets.token_hex(4)
        self._count = 0
        self._not_before = 0.0

    def state(self) -> State:
        """Return the present state, made anew if there is news."""
        with self._lock:
            return self._state()

    @property
    def has_more(self) -> bool:
        """Whether the events were not read to their end."""
        return self._tail.share < 1

    def since(self, version: str) -> dict[str, Any]:
        """Return what has changed since a state; everything, if nobody remembers that one."""
        with self._lock:
            now = self._state()
            before = self._states.get(version)
            more = self.has_more
        if before is None:
            return {"version": now.version, "html": now.html, "charts": ["=", now.charts], "more": more}
        html = {place: text for place, text in now.html.items() if before.html.get(place) != text}
        changed = delta(before.charts, now.charts)
        return {"version": now.version, "html": html, "charts": changed, "more": more}

    def panel(self, name: str) -> Panel | None:
        """Return a panel of the page; None: there is none of that name."""
        self.state()
        page = self._page
        panels = (pair for _, panels in page.panels for pair in panels) if page else ()
        return dict(panels).get(name)

    def _state(self) -> State:
        now = time.monotonic()
        if self._states and now < self._not_before:
            return next(reversed(self._states.values()))
        try:
            self._tail.read(_READ_SECONDS)
            going_on = is_going_on(self.folder)
            # Where nothing was told, what a silo has done of its steps may still be news.
            beat = int(now / 10) if going_on else 0
            seen = (self._tail.begun, self._tail.position, going_on, _written(self.folder / SAMPLES), beat)
            if seen == self._seen and self._states:
                return next(reversed(self._states.values()))
            html, charts = self._make(going_on)
            self._seen = seen
        except (OSError, PhotonError) as error:
            what = (
                f"{printable(self.folder)}: the folder is gone" if isinstance(error, OSError) else str(error)
            )
            html, charts = fragments(self.name, None, fault=what), {}
            self._seen = ()
        if self._states:
            last = next(reversed(self._states.values()))
            if (last.html, last.charts) == (html, charts):
                return last
        self._count += 1
        state = State(f"{self._mark}-{self._count}", html, charts)
        self._states[state.version] = state
        while len(self._states) > _MOST_STATES:
            self._states.popitem(last=False)
        self._not_before = (
            0.0 if self.has_more else time.monotonic() + min(_SPARING * (time.monotonic() - now), 10.0)
        )
        return state

    def _reading(self) -> Progress | None:
        share = self._tail.share
        return Progress(f"reading the events, {share:.0%}", "info", None) if share < 1 else None

    def _make(self, going_on: bool) -> tuple[dict[str, str], dict[str, Any]]:
        run = Run.of(self.folder, self._tail.events, self._tail.updates)
        if self._tail.is_thin:
            # Both rest on every single reply.
            run.summary["privacy"] = run.summary["mfu"] = None
        replies = self._tail.last_replies()
        page = run_page(run)
        self._page = page
        html = fragments(
            self.name,
            page,
            progress=self._reading() or progress(run, going_on),
            attention=[] if self.has_more else attention(run, replies, going_on),
            silos=silo_table(run, replies, going_on),
            log=log_lines(run),
        )
        return html, page.charts


class LiveComparison:
    """A page on several runs, made anew when one of them has news.

    Parameters
    ----------
    folders
        The runs' folders.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._state: State | None = None
        self._title = ""
        self._not_before = 0.0

    def state(self) -> tuple[str, State]:
        """Return the title of the page, and its present state.

        Raises
        ------
        PhotonError
            If the events of one of the runs cannot be read.
        """
        with self._lock:
            now = time.monotonic()
            version = "-".join(str(_written(folder / EVENTS)) for folder in self._folders)
            old = self._state
            if old is not None and (old.version == version or now < self._not_before):
                return self._title, old
            page = comparison_page([Run.load(folder) for folder in self._folders])
            self._title = page.title
            self._state = State(version, {"comparison": comparison_body(page)}, page.charts)
            # All events are read again.
            self._not_before = time.monotonic() + _SPARING * (time.monotonic() - now)
            return self._title, self._state

    def since(self, version: str) -> dict[str, Any]:
        """Return the page if it is another one than that state."""
        _, now = self.state()
        if now.version == version:
            return {"version": version, "html": {}, "charts": None, "more": False}
        return {"version": now.version, "html": now.html, "charts": ["=", now.charts], "more": False}


def _written(file: Path) -> int:
    """Return when a file was written last; 0: there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
