"""Which number format the forward and backward pass run in, chosen by what the device is fast at."""

import time
from functools import cache
from typing import Literal, get_args

import torch

from photon.errors import PhotonError

Precision = Literal["fp32", "bf16", "fp16"]

_CLEARLY_FASTER = 1.2
_PROBE_SECONDS = 0.15


def resolve_precision(requested: str, device: torch.device) -> Precision:
    """Resolve ``requested`` for ``device``; parameters and optimizer state are float32 in every precision.

    Parameters
    ----------
    requested
        ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``. ``"auto"`` takes bf16 on a GPU that has it and fp16
        on one that has not. On a CPU it takes bf16 only when a short measurement shows that it is at least
        1.2 times as fast as fp32: many CPUs emulate it and are slower.
    device
        Where the training runs.

    Raises
    ------
    PhotonError
        For an unknown name, and for fp16 on a CPU.
    """
    for precision in get_args(Precision):
        if precision != requested:
            continue
        if precision == "fp16" and device.type == "cpu":
            raise PhotonError("precision=fp16 needs a GPU; use precision=auto, fp32 or bf16 on this CPU")
        return precision
    if requested != "auto":
        raise PhotonError(f"precision={requested} is unknown; use auto, fp32, bf16 or fp16")
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and bf16_speedup_on_cpu() >= _CLEARLY_FASTER:
        return "bf16"
    return "fp32"


@cache
def bf16_speedup_on_cpu() -> float:
    """Measure how much faster a small layer trains in bf16 than in fp32 on this CPU, once per process.

    Both formats run in turn (A B A B), so a change of the machine's load meets both; the fastest run of each
    counts. Takes about 0.2 s.

    Returns
    -------
    float
        Seconds in fp32 / seconds in bf16 of a forward and backward pass; above 1 means bf16 is faster.
    """
    with torch.random.fork_rng(devices=[]):
        layers = torch.nn.Sequential(
            torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)
        ).requires_grad_(True)
        inputs = torch.randn(256, 256)
    deadline = time.perf_counter() + _PROBE_SECONDS
    _timed_pass(layers, inputs, bf16=False)
    _timed_pass(layers, inputs, bf16=True)  # The first pass of each compiles kernels and is not counted.
    fp32 = _timed_pass(layers, inputs, bf16=False)
    bf16 = _timed_pass(layers, inputs, bf16=True)
    while time.perf_counter() < deadline:
        fp32 = min(fp32, _timed_pass(layers, inputs, bf16=False))
        bf16 = min(bf16, _timed_pass(layers, inputs, bf16=True))
    return fp32 / bf16


def _timed_pass(layers: torch.nn.Module, inputs: torch.Tensor, *, bf16: bool) -> float:
    started = time.perf_counter()
    layers.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = layers(inputs).float().square().mean()
    loss.backward()
    return time.perf_counter() - started
