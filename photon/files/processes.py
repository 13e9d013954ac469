"""Whether a process is still there."""

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
