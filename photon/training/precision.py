"""Which number format the forward and backward pass run in, chosen by what the device is fast at."""

import json
import platform
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch

from photon.config.folders import photon_home
from photon.errors import PhotonError
from photon.files.atomic import write_text

Precision = Literal["fp32", "bf16", "fp16"]

#: How much faster bf16 must be on a CPU to be chosen.
CLEARLY_FASTER = 1.2
#: Passes of each format that are timed, at least and at most, and seconds of CPU time for all of them.
_LEAST_PASSES, _MOST_PASSES, _PROBE_SECONDS = 15, 500, 0.5
#: Shortest time that is told apart from none.
_TICK = 1e-6


def resolve_precision(requested: str, device: torch.device) -> Precision:
    """Resolve ``requested`` for ``device``; parameters and optimizer state are float32 in every precision.

    Parameters
    ----------
    requested
        ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``. ``"auto"`` takes bf16 on a GPU that has it and fp16
        on one that has not. On a CPU it takes bf16 only where a measurement has shown that it is at least
        1.2 times as fast as fp32: many CPUs emulate it and are slower.
    device
        Where the training runs.

    Raises
    ------
    PhotonError
        For an unknown name, and for a format that the device has not.
    """
    for precision in get_args(Precision):
        if precision == requested:
            _check_device(precision, device)
            return precision
    if requested != "auto":
        raise PhotonError(f"precision={requested} is unknown; use auto, fp32, bf16 or fp16")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and bf16_speedup_on_cpu() >= CLEARLY_FASTER:
        return "bf16"
    return "fp32"


def _check_device(precision: str, device: torch.device) -> None:
    if precision == "fp16" and device.type == "cpu":
        raise PhotonError("precision=fp16 needs a GPU; use precision=auto, fp32 or bf16 on this CPU")
    if precision != "bf16" or device.type != "cuda" or not torch.cuda.is_available():
        return
    # A run that began with it must not go on in an emulation of it.
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise PhotonError(
            "precision=bf16: this GPU has no bf16; train on one that has, or start anew with precision=fp16 "
            "or fp32"
        )


@cache
def bf16_speedup_on_cpu() -> float:
    """Return how much faster bf16 is on this machine's CPU, measured once and remembered for good.

    What was measured lies in ``machine.json`` of Photon's home, so that all processes and all runs on a
    machine choose alike. Where that cannot be written every process measures for itself.
    """
    from filelock import FileLock

    file = photon_home() / "machine.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Processes that start together must not measure each other.
        with FileLock(file.with_suffix(".lock")):
            measured = _remembered(file)
            if (known := measured.get(_machine())) is None:
                known = measure_bf16_speedup()
                content = {"bf16_speedup": {**measured, _machine(): known}}
                write_text(file, json.dumps(content, indent=1) + "\n")
            return known
    except OSError:
        return measure_bf16_speedup()


def _remembered(file: Path) -> dict[str, float]:
    try:
        measured = json.loads(file.read_text())["bf16_speedup"]
        return {str(machine): float(speedup) for machine, speedup in measured.items()}
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


def measure_bf16_speedup() -> float:
    """Measure how much faster a small layer trains in bf16 than in fp32 on this CPU.

    In one thread and by its own CPU time, which other work on the machine hardly changes. Both formats run
    in turn (A B A B); their medians count. Takes about half a second.

    Returns
    -------
    float
        Seconds in fp32 / seconds in bf16 of a forward and backward pass; above 1 means bf16 is faster.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        layers = torch.nn.Sequential(
            torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)
        ).requires_grad_(True)
        inputs = torch.randn(256, 256)
    torch.set_num_threads(1)
    try:
        for bf16 in (False, True):
            _timed_pass(layers, inputs, bf16=bf16)  # The first pass of each compiles kernels.
        fp32: list[float] = []
        bf16s: list[float] = []
        for passes in range(_MOST_PASSES):
            if passes >= _LEAST_PASSES and sum(fp32) + sum(bf16s) >= _PROBE_SECONDS:
                break
            fp32.append(_timed_pass(layers, inputs, bf16=False))
            bf16s.append(_timed_pass(layers, inputs, bf16=True))
    finally:
        torch.set_num_threads(threads)
    return max(_TICK, statistics.median(fp32)) / max(_TICK, statistics.median(bf16s))


def _timed_pass(layers: torch.nn.Module, inputs: torch.Tensor, *, bf16: bool) -> float:
    started = time.thread_time()
    layers.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = layers(inputs).float().square().mean()
    loss.backward()
    return time.thread_time() - started
