"""How much memory there is, and giving it back to the system."""

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import psutil

from photon.errors import PhotonError

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


def check_batch(batch: int, micro: int | str | None, *, length: int, vocabulary: int) -> None:
    """Check that what a model says of one micro-batch fits this machine's memory, before there is a batch.

    The system may promise more memory than it has, and then ends whoever uses it.

    Parameters
    ----------
    batch, micro
        Sequences of a step, and of a forward pass: None for all of them, auto for what will be probed.
    length, vocabulary
        Tokens of a sequence, and entries that a token may be.

    Raises
    ------
    PhotonError
        If it does not: of half floats, which are the smallest.
    """
    sequences = batch if micro is None else micro if isinstance(micro, int) else 1
    # The batch itself is of int64, whatever the micro-batches are.
    needed = max(2 * sequences * length * vocabulary, 8 * batch * length)
    if needed > memory_bytes():
        raise PhotonError(
            f"training: a micro-batch of {sequences:,} sequences takes {needed / 2**30:,.0f} GiB, and "
            f"this machine has {memory_bytes() / 2**30:,.0f}; lower "
            "training.micro_batch_size or training.batch_size"
        )


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
