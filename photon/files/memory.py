"""How much memory there is, and giving it back to the system."""

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import psutil

#: Bytes of a model from which it is worth handing back what one phase of a round leaves for the next.
LARGE_BYTES = 256 * 2**20


#: Where a container's bound on memory is told.
_BOUND = Path("/sys/fs/cgroup/memory.max")


@lru_cache(maxsize=1)
def memory_bytes() -> int:
    """Return how much memory this machine has, or the container that this process is in."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(_BOUND.read_text()))
    except (OSError, ValueError):
        return total


def release_freed() -> None:
    """Hand freed heap memory back to the operating system (glibc; elsewhere this does nothing).

    glibc keeps freed blocks of up to 32 MB for itself. After a large reply that is most of a model, which the
    next phase of the round cannot use where its tensors are mapped or of other sizes. Costs milliseconds per
    GB, so it is for large models only.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
