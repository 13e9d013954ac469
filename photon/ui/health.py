"""How the silos of a run are, and what in the run needs somebody's attention."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass

from photon.report.page import Table
from photon.report.run import Run
from photon.telemetry.events import (
    Notice,
    RoundFinished,
    RoundStarted,
    RunInterrupted,
    SiloFailed,
    SiloFinished,
)
from photon.telemetry.log import seconds_between
from photon.telemetry.steps import SILOS, read_steps
from photon.telemetry.summary import format_count, format_seconds

#: Rounds that an estimate of the time left looks back, and rows that the table of silos has.
_ROUNDS, _MOST_ROWS = 10, 200
#: A silo this many times slower than the median holds the round up.
_SLOW = 3.0


@dataclass(frozen=True)
class Progress:
    """Where a run stands: in words, the kind that the page colours, and seconds left (None: unknown)."""

    words: str
    kind: str
    left: float | None


def progress(run: Run, going_on: bool) -> Progress:
    """Return where a run stands.

    Parameters
    ----------
    run
        The run.
    going_on
        Whether a process is at work on it on this machine.
    """
    words, kind = run.status
    if kind == "good" or not going_on:
        stopped = any(isinstance(event, RunInterrupted) for event in run.history[-3:])
        if words.startswith("not finished") and not stopped:
            words = words.replace("not finished", "no process at work here")
        return Progress(words, kind, None)
    done, planned = run.summary["rounds"], run.started.rounds
    return Progress(f"training, {done} of {planned} rounds", "good", _left(run))


def _left(run: Run) -> float | None:
    places = [(event, at) for event, at in zip(run.history, run.elapsed, strict=True)]
    ends = [at for event, at in places if isinstance(event, RoundFinished)][-_ROUNDS - 1 :]
    starts = [at for event, at in places if isinstance(event, RoundStarted)]
    if not ends:
        return None
    # One round alone is measured from where it began; several from end to end, pauses between left out.
    each = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0] - min(starts, default=ends[0])
    return each * (run.started.rounds - run.summary["rounds"])


def silo_table(run: Run, replies: dict[str, SiloFinished], going_on: bool) -> Table:
    """Return a row for each silo, those that need attention first."""
    failed = [event for event in run.history if isinstance(event, SiloFailed)]
    failures = Counter(event.silo for event in failed)
    last_failure = {event.silo: event for event in failed}
    begun = next((e for e in reversed(run.history) if isinstance(e, RoundStarted)), None)
    finished = next((e for e in reversed(run.history) if isinstance(e, RoundFinished)), None)
    number = begun.round if begun is not None else 0
    is_open = going_on and begun is not None and (finished is None or finished.round < number)
    asked = set(begun.cohort) if is_open and begun is not None else set()
    names = list(dict.fromkeys([*(silo["name"] for silo in run.started.silos), *replies, *last_failure]))
    rows: list[tuple[int, list[str]]] = []
    for name in names:
        reply, failure = replies.get(name), last_failure.get(name)
        is_worse = failure is not None and (reply is None or failure.round >= reply.round)
        if is_worse and failure is not None:
            rank, state = 0, f"failed in round {failure.round}: {failure.kind}"
        elif name in asked and (reply is None or reply.round < number):
            rank, state = 1, _at_work(run, name, number)
        elif reply is not None:
            rank, state = 2, f"round {reply.round} done"
        else:
            rank, state = 3, "not yet asked"
        rows.append(
            (
                rank,
                [
                    name,
                    state,
                    str(run.updates[name]),
                    str(failures[name]),
                    f"{reply.loss:.4f}" if reply and math.isfinite(reply.loss) else "–",
                    format_count(reply.tokens_per_second) if reply else "–",
                    format_seconds(reply.seconds["total"]) if reply else "–",
                ],
            )
        )
    rows.sort(key=lambda row: row[0])
    shown = [row for _, row in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        shown.append([f"and {len(rows) - _MOST_ROWS:,} more", *[""] * 6])
    columns = ["silo", "state", "updates", "failures", "loss", "tokens/s", "time"]
    return Table(columns, shown, [run.silos.get(row[0]) if run.draws_silos else None for row in shown])


def _at_work(run: Run, name: str, number: int) -> str:
    steps = read_steps(run.folder / SILOS / name) if name not in ("", ".", "..") and "/" not in name else None
    if steps is None or steps.round != number:
        return f"round {number}"
    return f"round {number}, step {steps.done} of {steps.asked}"


def attention(run: Run, replies: dict[str, SiloFinished], going_on: bool) -> list[tuple[str, str]]:
    """Return what needs attention: the kind that the page colours, and the words."""
    found: list[tuple[str, str]] = []
    words, kind = run.status
    if kind != "good" and not going_on:
        found.append(("bad", f"{words}: go on with photon resume {run.folder}"))
    failed = Counter(event.silo for event in run.history if isinstance(event, SiloFailed))
    for name, number in failed.most_common(5):
        tries = number + run.updates[name]
        if number > 1 or tries == number:
            found.append(("bad", f"{name} failed in {number} of {tries} rounds that it was asked in"))
    speeds = {name: reply.tokens_per_second for name, reply in replies.items()}
    known = {name: speed for name, speed in speeds.items() if math.isfinite(speed) and speed > 0}
    if len(known) > 2:
        usual = statistics.median(known.values())
        slow = sorted((speed, name) for name, speed in known.items() if speed * _SLOW < usual)
        for speed, name in slow[:3]:
            found.append(("warn", f"{name} trains {usual / speed:.1f} times slower than the median silo"))
    rounds = run.rounds
    if rounds and not math.isfinite(rounds[-1].train_loss) and run.started.local_steps:
        found.append(("bad", f"the training loss of round {rounds[-1].round} is no number"))
    values = [event.perplexity for event, _ in run.evaluations]
    if len(values) > 2 and values[-1] > 2 * min(values):
        found.append(("warn", f"perplexity is {values[-1] / min(values):.1f} times its best"))
    if going_on and (late := _late(run)) is not None:
        found.append(("warn", late))
    warned = [event for event in run.history if isinstance(event, Notice) and event.level == "warning"]
    found += [("warn", event.message) for event in warned[-3:]]
    return found


def _late(run: Run) -> str | None:
    import time

    if len(run.rounds) < 3:
        return None
    usual = statistics.median(event.seconds["round"] for event in run.rounds[-_ROUNDS:])
    last = run.history[-1]
    now = time.time()
    silent = now - last.time
    if seconds_between(run.history[0], last) <= 0 or silent < max(60.0, 5 * usual):
        return None
    return f"nothing was heard for {format_seconds(silent)}; a round takes {format_seconds(usual)}"
