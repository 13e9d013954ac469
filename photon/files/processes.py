"""Whether a process is still there, and how many can work at once."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def is_gone(process: "psutil.Process") -> bool:
    """Tell whether a process has ended; one that nobody has waited for yet has."""
    import psutil

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def usable_cores() -> int:
    """Return how many CPU cores this process may use: all, where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
