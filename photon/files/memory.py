"""Give memory back to the system."""

import ctypes
import sys

#: Bytes of a model from which it is worth handing back what one phase of a round leaves for the next.
LARGE_BYTES = 256 * 2**20


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
