"""The log of a run, in lines to read."""

from photon.report.run import Run
from photon.report.single import log_line
from photon.telemetry.events import Checkpointed, Evaluated, Event, RoundFinished, RunFinished, SiloFinished
from photon.telemetry.summary import format_bytes, format_perplexity, format_seconds

#: Newest lines that a page shows.
_MOST = 400

Line = tuple[str, str, str, str]


def log_lines(run: Run) -> list[Line]:
    """Return kind, time, what and details, the newest first."""
    lines = []
    for event, seconds in zip(run.history, run.elapsed, strict=True):
        at = format_seconds(seconds)
        line = log_line(event, at) or _line(event, at)
        if line is not None:
            lines.append(line)
    return lines[: -_MOST - 1 : -1]


def _line(event: Event, at: str) -> Line | None:
    match event:
        case RoundFinished():
            took = format_seconds(event.seconds["round"])
            return "info", at, f"round {event.round} done", f"loss {event.train_loss:.4f}, in {took}"
        case Evaluated():
            told = f"perplexity {format_perplexity(event.perplexity)}"
            return "info", at, f"round {event.round} evaluated", told
        case SiloFinished():
            sent = f"loss {event.loss:.4f}, {format_bytes(event.bytes_up)} up"
            return "info", at, f"round {event.round}: {event.silo}", sent
        case Checkpointed():
            return "info", at, f"round {event.round} saved", f"{event.path}, {format_bytes(event.bytes)}"
        case RunFinished():
            return "info", at, "finished", ""
        case _:
            return None
