"""Which number format the forward and backward pass run in, chosen by what the device is fast at."""

from collections.abc import Callable
from typing import Literal, get_args

import torch

from photon.errors import PhotonError

Precision = Literal["fp32", "bf16", "fp16"]

#: How much faster bf16 must be on a CPU to be chosen.
CLEARLY_FASTER = 1.2


def resolve_precision(
    requested: str, device: torch.device, gain: Callable[[], float] | None = None
) -> Precision:
    """Resolve ``requested`` for ``device``; parameters and optimizer state are float32 in every precision.

    Parameters
    ----------
    requested
        ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``. ``"auto"`` takes bf16 on a GPU that has it and fp16
        on one that has not. On a CPU it takes bf16 only where a measurement has shown that it is at least
        1.2 times as fast as fp32: many CPUs emulate it and are slower.
    device
        Where the training runs.
    gain
        Measures how much faster the model is in bf16 on a CPU; None: it is not measured, and fp32 is taken.

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
    if device.type == "cpu" and gain is not None and gain() >= CLEARLY_FASTER:
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
