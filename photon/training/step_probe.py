"""How fast a training step is in one way of computing it and in another, on this machine's CPU."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from photon.config.folders import photon_home
from photon.files.atomic import write_text

#: Turns that are timed, at least and at most, and seconds of CPU time for all of them.
_LEAST_TURNS, _MOST_TURNS, _SECONDS = 7, 200, 1.5
#: Seconds after which as few turns as this will do.
_LONG, _FEWEST_TURNS = 15.0, 3
#: Shortest time that is told apart from none.
_TICK = 1e-6
#: Models that are remembered of a machine; the oldest is forgotten.
_REMEMBERED = 100

Gains = Mapping[str, float]


def measure_gains(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Measure how much faster each step is than the first one.

    In one thread and by its own CPU time, which other work on the machine hardly changes. The steps run in
    turn (A B C, C B A), and the median over the turns of their ratios counts.

    Parameters
    ----------
    steps
        Name to a forward and backward pass; the first is what the others are compared with.

    Returns
    -------
    dict
        Name of each other step to CPU seconds of the first / its own; above 1 means faster.
    """
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            for step in steps.values():
                step()  # The first pass of each compiles kernels.
            for turn in range(_MOST_TURNS):
                if _enough(turn, sum(map(sum, seconds.values()))):
                    break
                for name in list(steps) if turn % 2 == 0 else reversed(list(steps)):
                    seconds[name].append(_timed(steps[name]))
    finally:
        torch.set_num_threads(threads)
    reference, *others = steps
    return {
        name: statistics.median(
            first / own for first, own in zip(seconds[reference], seconds[name], strict=True)
        )
        for name in others
    }


def _enough(turns: int, seconds: float) -> bool:
    if turns < _LEAST_TURNS:
        return turns >= _FEWEST_TURNS and seconds >= _LONG
    return seconds >= _SECONDS


def _timed(step: Callable[[], object]) -> float:
    started = time.thread_time()
    step()
    return max(_TICK, time.thread_time() - started)


def remembered_gains(model: str, measure: Callable[[], Gains]) -> Gains:
    """Return what was measured of a model on this machine, once and for good.

    It lies in ``machine.json`` of Photon's home, so that all processes and all runs on a machine choose
    alike. Where that cannot be written every process measures for itself.

    Parameters
    ----------
    model
        What the speed depends on beside the machine.
    measure
        Measures it.
    """
    from filelock import FileLock

    file, machine = photon_home() / "machine.json", _machine()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Processes that start together must not measure each other.
        with FileLock(file.with_suffix(".lock")):
            found = _read(file)
            of_machine = found.get(machine, {})
            if (known := of_machine.get(model)) is None:
                known = measure()
                newest = list({**of_machine, model: dict(known)}.items())[-_REMEMBERED:]
                content = {"steps": {**found, machine: dict(newest)}}
                write_text(file, json.dumps(content, indent=1) + "\n")
            return known
    except OSError:
        return measure()


def _read(file: Path) -> dict[str, dict[str, Gains]]:
    try:
        return {
            str(machine): {
                str(model): {str(name): float(gain) for name, gain in gains.items()}
                for model, gains in models.items()
            }
            for machine, models in json.loads(file.read_text())["steps"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _machine() -> str:
    """Return what the speed depends on: several machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name or platform.processor() or platform.machine()}, {capability}, torch {torch.__version__}"
