"""Runs that are done once and kept: a line each of a JSON Lines file, which lies beside the page made of it.

A run that has a line is not done again, so a study may be stopped at any time, and several processes may
share the work.

What a page showed of runs whose lines are gone may lie beside them, in a file that ends in
``-earlier.jsonl``: in the shape of lines, with the digits of the page. Where the page had nothing but a mean,
over seeds or rounds, each of these has it. ``known`` has an earlier run too, until it has a line.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: What is known of a run, by the name of the figure; ``run`` is the name of the run.
Result = dict[str, Any]
Results = Sequence[Result]


def load(file: Path) -> list[Result]:
    """Return the runs that have a line, by name."""
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(map(json.loads, lines), key=lambda one: one["run"])


def known(file: Path) -> list[Result]:
    """Return the runs that have a line, and after them the earlier figures of those that have none."""
    lines = load(file)
    named = {one["run"] for one in lines}
    earlier = load(file.with_name(f"{file.stem}-earlier.jsonl"))
    return lines + [{**one, "earlier": True} for one in earlier if one["run"] not in named]


def has_line(run: Result) -> bool:
    return not run.get("earlier", False)


class Runs:
    """Runs of one file.

    Parameters
    ----------
    file
        JSON Lines; it, and the folder above it, are made when they are not there.
    minutes
        After so long no run begins.
    shown
        The figure of a result that is printed when it is there.
    """

    def __init__(self, file: Path, minutes: float, shown: str = "perplexity") -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._until = time.monotonic() + 60 * minutes
        self._shown = shown

    def once(self, name: str, train: Callable[[], Result]) -> None:
        """Keep what ``train`` returns, with the CPU time it took, under ``name``.

        Nothing is done if that has a line, or if another process is at it.
        """
        if time.monotonic() > self._until:
            return
        with self._claim(name) as claimed:
            if not claimed or any(one["run"] == name for one in load(self._file)):
                return
            began = time.process_time()
            result = {"run": name, **train()}
            result["cpu_seconds"] = round(time.process_time() - began, 1)
            with self._file.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
        figure = f"{self._shown} {result[self._shown]}"
        print(f"{name}: {figure}, {result['cpu_seconds']:.0f} s of CPU", flush=True)

    def results(self) -> list[Result]:
        """Return what is known, by which a study decides what to run next."""
        return known(self._file)

    @contextmanager
    def _claim(self, name: str) -> Iterator[bool]:
        """Say whether no other process is at this run; the system takes the claim back from one that ends."""
        key = hashlib.sha256(f"{self._file.resolve()} {name}".encode()).hexdigest()[:24]
        with (Path(tempfile.gettempdir()) / f"photon-run-{key}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def untried_rates(known: Mapping[float, float], rates: Sequence[float]) -> list[float]:
    """Return the rates to try next: the middle three, then those beside the best.

    Parameters
    ----------
    known
        Rate to perplexity, infinite where a run diverged.
    rates
        The grid, ascending.
    """
    middle = len(rates) // 2
    missing = [rate for rate in rates[max(0, middle - 1) : middle + 2] if rate not in known]
    if missing:
        return missing
    best = rates.index(min(known, key=lambda rate: known[rate]))
    return [rate for rate in rates[max(0, best - 1) : best + 2] if rate not in known]


def tuned_rate(known: Mapping[float, float], rates: Sequence[float]) -> float | None:
    """Return the rate with the lowest perplexity; None as long as one beside it has to be tried."""
    return None if untried_rates(known, rates) else min(known, key=lambda rate: known[rate])
