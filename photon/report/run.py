"""A run as its folder tells of it: what a report is made of."""

import itertools
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from photon.config.reader import UNREADABLE
from photon.errors import PhotonError
from photon.report.charts import Style
from photon.telemetry.events import (
    Diagnostics,
    Evaluated,
    Event,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SiloFinished,
)
from photon.telemetry.log import current_history, elapsed_seconds, read_events, read_summary
from photon.telemetry.summary import build_summary, counted, last_start

#: Silos up to which each is drawn; of more one could not tell one from another.
MOST_DRAWN = 64


@dataclass(frozen=True)
class Run:
    """A run folder as it was read.

    Attributes
    ----------
    folder, config_text, config
        Where it lies, and its configuration, as text and read.
    started
        The last start.
    history, elapsed
        The events that stand, and the seconds at work until each.
    summary
        As `build_summary` returns it.
    updates
        How many updates of each silo counted.
    """

    folder: Path
    started: RunStarted
    history: list[Event]
    elapsed: list[float]
    summary: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    updates: Counter[str]

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Read a run's folder.

        Raises
        ------
        PhotonError
            The folder is not a run's, or what it holds cannot be read.
        """
        for name in ("events.jsonl", "config.yaml"):
            if not (folder / name).is_file():
                raise PhotonError(
                    f"{folder}: not a run, it has no {name}; name a folder that `photon train` made"
                )
        return cls.of(folder, read_events(folder / "events.jsonl"))

    @classmethod
    def of(cls, folder: Path, events: list[Event], updates: Counter[str] | None = None) -> "Run":
        """Return the run in a folder as its events tell of it.

        Parameters
        ----------
        folder
            The folder; its configuration is read.
        events
            All events; where ``updates`` is given, without those of silos' replies.
        updates
            How many updates of each silo counted; None: as the events tell.

        Raises
        ------
        PhotonError
            What the folder holds cannot be read, or no event tells of a start.
        """
        history = current_history(events)
        try:
            text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
            started = last_start(history)
        except OSError as error:
            raise PhotonError(f"{folder / 'config.yaml'}: cannot be read ({error.strerror})") from None
        except PhotonError as error:
            raise PhotonError(f"{folder}: {error}") from None
        if updates is None:
            updates = Counter(event.silo for event in history if isinstance(event, SiloFinished))
        return cls(
            folder=folder,
            started=started,
            history=history,
            elapsed=elapsed_seconds(history),
            summary=build_summary(events, weights_sha256=_weights_sha256(folder, events)),
            config_text=text,
            config=_read_config(folder / "config.yaml", text),
            updates=updates,
        )

    @property
    def silos(self) -> dict[str, Style]:
        """The silos, and how each is drawn."""
        return {silo["name"]: Style.of(index) for index, silo in enumerate(self.started.silos)}

    @property
    def draws_silos(self) -> bool:
        """Whether figures have a line for each silo."""
        return len(self.started.silos) <= MOST_DRAWN

    @property
    def participants(self) -> dict[str, Style]:
        """The silos, and who else took part: the centralized strategy's only silo is no silo."""
        names = [silo["name"] for silo in self.started.silos]
        cohorts = [event.cohort for event in self.history if isinstance(event, RoundStarted)]
        seen = dict.fromkeys(name for cohort in cohorts for name in cohort)
        names = list(dict.fromkeys([*names, *seen]))
        return {name: Style.of(index) for index, name in enumerate(names) if name in seen}

    @property
    def rounds(self) -> list[RoundFinished]:
        """The rounds that were finished."""
        return [event for event in self.history if isinstance(event, RoundFinished)]

    @property
    def replies(self) -> list[SiloFinished]:
        """The updates that counted."""
        return [event for event in self.history if isinstance(event, SiloFinished)]

    @property
    def diagnosed(self) -> list[str]:
        """What figures the `Diagnostics` tell of, such as ``parameter_norm``."""
        events = [event for event in self.history if isinstance(event, Diagnostics)]
        return list(dict.fromkeys(name.partition("/")[0] for event in events for name in event.values))

    @property
    def evaluations(self) -> list[tuple[Evaluated, float]]:
        """The last evaluation of each round with the seconds at work until then."""
        found: dict[int, tuple[Evaluated, float]] = {}
        for event, seconds in zip(self.history, self.elapsed, strict=True):
            if isinstance(event, Evaluated):
                found[event.round] = (event, seconds)
        return [found[number] for number in sorted(found)]

    @property
    def status(self) -> tuple[str, str]:
        """In words, and as the kind that the page colours."""
        done, planned = self.summary["rounds"], self.started.rounds
        if any(isinstance(event, RunFinished) for event in self.history):
            return f"finished, {counted(planned, 'round')}", "good"
        stopped = [event for event in self.history if isinstance(event, RunInterrupted | RunStarted)][-1]
        word = "interrupted" if isinstance(stopped, RunInterrupted) else "not finished"
        return f"{word}, {done} of {counted(planned, 'round')}", "warn"


def bytes_by_round(run: Run) -> tuple[list[int], list[float], list[float]]:
    """Return rounds, and what had crossed the link up and down by the end of each."""
    up: dict[int, float] = {}
    down: dict[int, float] = {}
    moved: list[RoundFinished | Evaluated] = [*run.rounds, *(event for event, _ in run.evaluations)]
    for event in moved:
        up[event.round] = up.get(event.round, 0) + event.bytes_up
        down[event.round] = down.get(event.round, 0) + event.bytes_down
    rounds = sorted(up)
    return (
        rounds,
        list(itertools.accumulate(up[number] for number in rounds)),
        list(itertools.accumulate(down[number] for number in rounds)),
    )


def report_command(runs: Sequence[Run]) -> str:
    """Return the command that writes a report on ``runs``."""
    return f"photon report {shlex.join(str(run.folder) for run in runs)} --output report.html"


def _weights_sha256(folder: Path, events: Sequence[Event]) -> str | None:
    if events and isinstance(events[-1], RunFinished):
        return events[-1].summary.get("weights_sha256")
    return read_summary(folder).get("weights_sha256") if (folder / "summary.json").exists() else None


def _read_config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except UNREADABLE as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise PhotonError(f"{path}{line}: not YAML; mend it or start the run again") from None
    if not isinstance(config, dict):
        raise PhotonError(f"{path}: not a mapping of settings; mend it or start the run again")
    return config
