"""Whether a process is still there, and how many can work at once."""

import os
import signal
import threading
import time
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


#: Seconds between looks at whether the parent is still there.
_LOOK_SECONDS = 1.0


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


@cache
def end_with_parent() -> None:
    """Ask this process to end when its parent is gone, within a second or two; it may have been killed.

    One thread looks, however often this is called.
    """
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()
