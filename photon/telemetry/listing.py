"""The runs below a folder, each in a line: what is trained, how far it is, and how it ended."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from photon.files.owner import is_going_on

#: Folders below that a run's own folder may lie in, as in a sweep.
LEVELS = 2
_EVENTS = "events.jsonl"
#: Events that say how a run stands; of the others a line is not read.
_TOLD = ("run_started", "run_finished", "run_interrupted", "round_finished", "evaluated")
#: Bytes in which an event's name stands at the beginning of a line, and of the longest line that is read.
_NAME, _LINE = 64, 64 << 20

State = Literal["running", "finished", "interrupted", "failed", "broken"]


@dataclass(frozen=True)
class Listed:
    """What a list says of a run.

    Attributes
    ----------
    name
        Its folder, below the one that is listed.
    state
        "interrupted": it was stopped, and can go on; "failed": it ended by an error, or was killed; "broken":
        its folder cannot be read, as ``reason`` says.
    strategy, model, rounds
        As of the newest start; None where the run has not got so far.
    done
        Rounds that are done.
    loss, perplexity
        Of the newest validation: nats a token.
    time
        Unix seconds at which the last of it happened.
    reason
        Why it is not finished.
    """

    name: str
    state: State
    strategy: str | None = None
    model: str | None = None
    rounds: int | None = None
    done: int = 0
    loss: float | None = None
    perplexity: float | None = None
    time: float = 0.0
    reason: str | None = None


def list_runs(root: Path) -> list[Listed]:
    """Return the runs in a folder and in the folders below it, newest first; one that is broken, too."""
    found = [_listed(folder, _name(folder, root)) for folder in run_folders(root)]
    return sorted(found, key=lambda run: (-run.time, run.name))


def _name(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder != root else folder.resolve().name


def run_folders(folder: Path, levels: int = LEVELS) -> Iterator[Path]:
    """Yield the folders of runs in and below a folder; not what is inside of a run."""
    if (folder / _EVENTS).exists() or (folder / "config.yaml").exists():
        yield folder
        return
    try:
        inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        below = [entry for entry in inside if levels and not entry.is_symlink() and entry.is_dir()]
    except OSError:
        return
    for entry in below:
        yield from run_folders(entry, levels - 1)


def _listed(folder: Path, name: str) -> Listed:
    facts: dict[str, Any] = {}
    try:
        facts["time"] = folder.stat().st_mtime
        last: dict[str, Any] = {}
        for event in _events(folder / _EVENTS):
            kind = event["event"]
            if kind == "run_started":
                facts |= {key: event.get(key) for key in ("strategy", "model", "rounds")}
                facts["done"] = event.get("resumed_from") or 0
            elif kind == "round_finished":
                facts["done"] = event["round"]
            elif kind == "evaluated":
                facts |= {"loss": event.get("loss"), "perplexity": event.get("perplexity")}
            if kind != "evaluated":
                last = event
            facts["time"] = event["time"]
        ended = last if last.get("event") in ("run_finished", "run_interrupted") else None
        state, reason = state_of(
            None if ended is None else ended["event"],
            str((ended or {}).get("reason") or ""),
            bad_input=bool((ended or {}).get("bad_input")),
            going_on=is_going_on(folder),
        )
        return Listed(name, state, **_checked(facts), reason=reason)
    except OSError as error:
        reason = "no events" if isinstance(error, FileNotFoundError) else error.strerror or "cannot be read"
    except (ValueError, KeyError, TypeError, RecursionError):
        reason = f"{_EVENTS} is damaged"
    time = facts.get("time", 0.0)
    return Listed(name, "broken", time=time if isinstance(time, float) else 0.0, reason=reason)


def state_of(
    end: str | None, reason: str = "", *, bad_input: bool = False, going_on: bool
) -> tuple[State, str | None]:
    """Return how a run stands, and why it is not finished.

    Parameters
    ----------
    end
        The event with which it has ended, "run_finished" or "run_interrupted"; None: with none so far.
    reason, bad_input
        What that event says.
    going_on
        Whether a process has the run.
    """
    if end == "run_finished":
        return "finished", None
    if going_on:
        return "running", None
    if end is None:
        return "failed", "it was killed"
    said = reason.split("\n", maxsplit=1)[0]
    by_user = not bad_input and said in ("", "stopped", "stopped by the user", "KeyboardInterrupt")
    return ("interrupted" if by_user else "failed"), said or None


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts of the kinds that they should be; what a file says may be anything."""
    kinds: dict[str, type | tuple[type, ...]] = {
        **{"strategy": str, "model": str, "rounds": int, "done": int},
        **{"loss": (int, float), "perplexity": (int, float), "time": (int, float)},
    }
    for key, value in facts.items():
        if value is not None and (not isinstance(value, kinds[key]) or isinstance(value, bool)):
            raise TypeError(key)
    return facts


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events that say how a run stands; the last line may be half written."""
    names = [f'"event": "{name}"'.encode() for name in _TOLD]
    if path.exists() and not path.is_file():
        # To open a pipe would wait for ever.
        raise ValueError(path)
    with path.open("rb") as stream:
        while line := stream.readline(_LINE):
            if not line.endswith(b"\n"):
                return
            if any(name in line[:_NAME] for name in names):
                event = json.loads(line)
                if not isinstance(event, dict):
                    raise TypeError(line[:_NAME])
                yield event
