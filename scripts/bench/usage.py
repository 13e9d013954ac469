"""Memory and CPU time of the processes of a run, watched from outside.

Memory is sampled from /proc/PID/smaps_rollup: the resident set, and its anonymous part, without the clean
pages of mapped files, which the kernel may drop at any time.
"""

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

KINDS = {
    "photon.worker": "worker",
    "superlink": "SuperLink",
    "supernode": "SuperNode",
    "flwr-serverapp": "ServerApp",
    "flwr-clientapp": "ClientApp",
}


@dataclass
class Peak:
    """Most bytes that one process held."""

    resident: int = 0
    anonymous: int = 0

    def sample(self, pid: int) -> None:
        with suppress(OSError, ValueError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
            self.resident = max(self.resident, 1024 * kilobytes["Rss"])
            self.anonymous = max(self.anonymous, 1024 * kilobytes["Anonymous"])

    def __str__(self) -> str:
        return f"{self.resident / 2**20:,.0f} ({self.anonymous / 2**20:,.0f})"


class Usage:
    """Memory of a deployment's processes by kind, and the CPU time of all of them as it grows."""

    def __init__(self) -> None:
        self.peaks: dict[str, Peak] = defaultdict(Peak)
        self._spent: dict[int, float] = {}
        self._kinds: dict[int, str] = {}
        self._history: list[tuple[float, dict[str, float]]] = [(0.0, {})]

    def sample(self, family: list[psutil.Process]) -> None:
        for process in family:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = " ".join(process.cmdline()[:5])
                spent = process.cpu_times()
                self._spent[process.pid] = spent.user + spent.system
                for sign, kind in KINDS.items():
                    if sign in words:
                        self.peaks[kind].sample(process.pid)
                        self._kinds[process.pid] = kind
        by_kind: dict[str, float] = defaultdict(float)
        for pid, seconds in self._spent.items():
            by_kind[self._kinds.get(pid, "others")] += seconds
        self._history.append((time.time(), by_kind))

    def between(self, ends: list[float], kinds: Collection[str] | None = None) -> list[float]:
        """Return the CPU seconds spent between moments (seconds since the epoch).

        Parameters
        ----------
        kinds
            Of the processes that count, as `KINDS` has them; None: all.
        """
        spent = [
            max(
                sum(cpu for kind, cpu in by_kind.items() if kinds is None or kind in kinds)
                for moment, by_kind in self._history
                if moment <= end
            )
            for end in ends
        ]
        return [b - a for a, b in itertools.pairwise(spent)]


@contextmanager
def sampled(sample: Callable[[], None], every: float = 0.1) -> Iterator[None]:
    """Call ``sample`` again and again while the block runs."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(every):
            sample()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
