"""The hardware that local training runs on: device, threads and their peak speed."""

from functools import lru_cache

import torch

from photon.config.decided import Decided
from photon.config.training import TrainingSection
from photon.errors import PhotonError
from photon.files.processes import usable_cores
from photon.models.roofline import gpu_peak, measure_cpu_roofline
from photon.training.precision import Precision, resolve_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device that ``training.device`` names; ``auto`` takes a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PhotonError(f"training.device={name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PhotonError(f"training.device={name}: this machine has no CUDA device; use training.device=cpu")
    return device


def set_up_torch(training: TrainingSection, processes: int) -> None:
    """Use the CPU threads and the precision of products that ``training`` names, in this whole process.

    Parameters
    ----------
    training
        Without ``threads`` it is a share of the cores.
    processes
        How many share them.
    """
    torch.set_num_threads(training.threads or max(1, usable_cores() // processes))
    torch.set_float32_matmul_precision(training.matmul_precision)


def decided_here(training: TrainingSection, micro_batch_size: int | None = None) -> Decided:
    """Return what this process, set up as `set_up_torch` does it, trains with.

    Parameters
    ----------
    training
        The section in which precision and attention are decided.
    micro_batch_size
        What the batch probe has found; None: it was not asked.
    """
    device = resolve_device(training.device)
    return Decided.model_validate(
        {
            "device": device.type,
            "precision": resolve_precision(training.precision, device),
            "threads": torch.get_num_threads(),
            "micro_batch_size": micro_batch_size,
            "attention": training.attention,
        }
    )


def device_facts(device: torch.device, precision: Precision) -> tuple[str, float | None]:
    """Return the device in words, and its peak in FLOP/s: measured on a CPU, documented on a GPU."""
    dtype, products = DTYPES[precision], torch.get_float32_matmul_precision()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, {precision}", gpu_peak(name, dtype, tf32=products != "highest")
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}, {precision}", _cpu_peak(
        dtype, threads, products
    )


@lru_cache
def _cpu_peak(dtype: torch.dtype, threads: int, products: str) -> float:
    # Once per process and precision of float32 products, which it is measured in: every node of a tree of
    # federations asks for it, and more than once.
    return measure_cpu_roofline(dtype, threads)
