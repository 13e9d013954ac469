"""The largest micro-batch that fits the memory, found by trying."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from photon.errors import PhotonError
from photon.files.memory import release_freed

_CGROUP = Path("/sys/fs/cgroup")
_SHARE_OF_AVAILABLE = 0.8
_SAMPLE_SECONDS = 0.001


def find_micro_batch_size(make_step: Callable[[int], None], batch_size: int) -> int:
    """Return the largest divisor of ``batch_size`` whose forward and backward pass fits the memory.

    A process that fills the host's memory is killed and not told, so its use is measured at one and two
    sequences and extrapolated first. Then sizes are tried from the largest that may fit down: a GPU says
    when it is full.

    Parameters
    ----------
    make_step
        Runs a forward and backward pass of the given number of sequences, with everything in memory that
        training holds (such as the optimizer's state).
    batch_size
        Sequences per local step.

    Raises
    ------
    PhotonError
        When not even one sequence fits.
    """
    sizes = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    for size in _fitting_host_memory(make_step, sizes):
        if _fits(make_step, size):
            return size
    raise PhotonError(
        "not even one sequence fits the memory of this device; take a smaller model or sequence_length, or "
        "set training.activation_checkpointing=true"
    )


def _fitting_host_memory(make_step: Callable[[int], None], sizes: list[int]) -> list[int]:
    """Return those of ``sizes`` that the host's memory allows by extrapolation."""
    if len(sizes) < 2 or not _fits(make_step, 1):
        return sizes[-1:]
    if not _fits(make_step, 2):
        return [1]
    one = _peak_memory(make_step, 1)
    two = _peak_memory(make_step, 2)
    room = _SHARE_OF_AVAILABLE * _available_memory() - max(0, two - _resident_memory())
    return [size for size in sizes if size <= 2 or (size - 2) * (two - one) <= room]


def _fits(make_step: Callable[[int], None], size: int) -> bool:
    try:
        make_step(size)
        return True
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    # Only outside the handler: the error's traceback keeps the tensors of the failed pass alive.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return False


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _peak_memory(make_step: Callable[[int], None], size: int) -> int:
    """Return the largest resident size of this process (bytes) while it runs a step of ``size``."""
    # What the allocator has kept would be used first, and the step would seem to need nothing.
    gc.collect()
    release_freed()
    peak = _resident_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_SECONDS):
            peak = max(peak, _resident_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        make_step(size)
    finally:
        done.set()
        watcher.join()
    return peak


def _resident_memory() -> int:
    return int(psutil.Process().memory_info().rss)


def _available_memory() -> int:
    """Return the bytes this process may still take: the machine's, or its container's if fewer."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used))
