"""Compare ways to do the same work on a machine that others use too.

The cases run in turn, forwards and then backwards, so a change of the machine's load meets all of them.
Every turn gives one ratio, and the median of the ratios counts. CPU time of the process is the measure where
the work is bound to the CPU; wall time is shown beside it.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Seconds of one run."""

    cpu: float
    wall: float


def machine() -> str:
    """Return, in words, what is measured on."""
    import psutil

    cores = os.cpu_count()
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    named = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if re.search(rf"\b{unit}\b", info)]
    chip = f"{named[1].strip() if named else platform.machine()}{' with ' if units else ''}{', '.join(units)}"
    memory = psutil.virtual_memory().total / 2**30
    torch, flwr = (metadata.version(name).partition("+")[0] for name in ("torch", "flwr"))
    return (
        f"{cores} cores of an {chip}, {memory:.0f} GiB, Python {platform.python_version()}, torch {torch}, "
        f"Flower {flwr}"
    )


def timed(work: Callable[[], object]) -> Timing:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Timing(time.process_time() - cpu, time.perf_counter() - wall)


def interleave(cases: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Timing]]:
    """Time every case ``repeats`` times, in turn, after one run of each that does not count."""
    for work in cases.values():
        work()
    timings: dict[str, list[Timing]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name in list(cases)[:: -1 if repeat % 2 else 1]:
            timings[name].append(timed(cases[name]))
    return timings


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Return ``median (min – max)``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f}{unit} ({low:,.{digits}f} – {high:,.{digits}f})"


def ratio(of: Sequence[Timing], to: Sequence[Timing], clock: str) -> float:
    """Return the median over the turns of rate / reference rate; above 1 means faster than the reference."""
    return statistics.median(getattr(b, clock) / getattr(a, clock) for a, b in zip(of, to, strict=True))


class Report:
    """The tables of one script: printed as they come, and written as JSON if a file was named.

    Parameters
    ----------
    arguments
        Of the script; ``arguments.json`` is the file, or None.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._console = Console(width=None if os.isatty(1) else 140)
        self._json: Path | None = arguments.json
        self._content: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
            "load_before": os.getloadavg(),
            "tables": [],
        }
        self.say(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def rates(
        self,
        title: str,
        work: Mapping[str, float],
        unit: str,
        timings: Mapping[str, list[Timing]],
        digits: int,
    ) -> None:
        """Show rates of the cases; the first one is the reference of the ratios.

        Parameters
        ----------
        work
            What one run of each case gets done, in ``unit``.
        """
        reference = next(iter(timings))
        self.table(
            title,
            ["case", f"{unit} / CPU second", f"{unit} / second", f"CPU ratio to {reference}", "wall ratio"],
            [
                [
                    name,
                    spread([work[name] / timing.cpu for timing in measured], digits),
                    spread([work[name] / timing.wall for timing in measured], digits),
                    *(
                        f"{ratio(measured, timings[reference], clock) * work[name] / work[reference]:.3f}"
                        for clock in ("cpu", "wall")
                    ),
                ]
                for name, measured in timings.items()
            ],
            raw={name: [asdict(timing) for timing in measured] for name, measured in timings.items()},
        )

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], raw: Any = None
    ) -> None:
        """Show a table; ``raw`` (JSON values) goes to the file with it."""
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
        self._content["tables"].append({"title": title, "columns": columns, "rows": rows, "raw": raw})

    def close(self) -> None:
        """Say the load once more and write the file."""
        self._content["load_after"] = os.getloadavg()
        self.say(f"load average after: {os.getloadavg()[0]:.1f}")
        if self._json:
            self._json.write_text(json.dumps(self._content, indent=1) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's docstring, with the arguments that all scripts have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write tables and raw timings to FILE")
    return made


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a count of the command line, and takes none with which no figure would be left."""

    def count(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{number} is too few, it takes {least} at least")
        return number

    return count
