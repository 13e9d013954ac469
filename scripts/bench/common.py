"""Compare two ways to do the same work on a machine that others use too.

The two run in turn, A B B A …, so a change of the machine's load meets both. Every pair gives one ratio, and
the median of the ratios counts. CPU time of the process is the measure where the work is bound to the CPU;
wall time is shown beside it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one run."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Comparison:
    """Timings of A and B, pair by pair."""

    a: list[Timing]
    b: list[Timing]

    def cpu_ratio(self) -> float:
        """Median over the pairs of A's CPU seconds / B's: above 1 means that B is faster."""
        return statistics.median(a.cpu / b.cpu for a, b in zip(self.a, self.b, strict=True))

    def wall_ratio(self) -> float:
        """Median over the pairs of A's wall seconds / B's."""
        return statistics.median(a.wall / b.wall for a, b in zip(self.a, self.b, strict=True))

    def table(self, name_a: str, name_b: str, work: float, unit: str) -> str:
        """Return a Markdown table: median rates of ``work`` (per run, in ``unit``) and the ratios B / A."""
        rows = [f"| {unit} per second | CPU time | wall time |", "|---|---|---|"]
        for name, timings in ((name_a, self.a), (name_b, self.b)):
            cpu = work / statistics.median(timing.cpu for timing in timings)
            wall = work / statistics.median(timing.wall for timing in timings)
            rows.append(f"| {name} | {cpu:,.0f} | {wall:,.0f} |")
        rows.append(f"| {name_b} / {name_a} | {self.cpu_ratio():.3f} | {self.wall_ratio():.3f} |")
        return "\n".join(rows)


def timed(work: Callable[[], object]) -> Timing:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Timing(time.process_time() - cpu, time.perf_counter() - wall)


def compare(a: Callable[[], object], b: Callable[[], object], pairs: int) -> Comparison:
    """Time ``a`` and ``b`` in turn, ``pairs`` times each, after one run of each that does not count."""
    a()
    b()
    timings_a, timings_b = [], []
    for pair in range(pairs):
        for this in "ab" if pair % 2 == 0 else "ba":
            (timings_a if this == "a" else timings_b).append(timed(a if this == "a" else b))
    return Comparison(timings_a, timings_b)
