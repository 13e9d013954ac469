"""What asks a command to end: signals, and the end of whoever started it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C, a service manager, a closed terminal.
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds between looks at whether the parent is still there.
_LOOK_SECONDS = 1.0


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat whatever asks this process to end as Ctrl-C, once: what it then puts in order is not disturbed.

    A signal that is ignored stays ignored: ``nohup`` and background jobs of scripts ask for that. In a thread
    other than the main one nothing changes, as Python hands signals to the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ASKING}
    taken = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    def interrupt(_: int, __: FrameType | None) -> None:
        for number in taken:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def end_with_parent() -> None:
    """Ask this process to end when its parent is gone, within a second or two; it may have been killed."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def adopt_orphans() -> bool:
    """Become the parent of every descendant whose own parent ends, and return whether that is possible here.

    Linux calls such a process a child subreaper. On other systems an orphan is given to the first process of
    the machine, and nobody can tell any more who started it.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    pr_set_child_subreaper = 36
    return ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0
