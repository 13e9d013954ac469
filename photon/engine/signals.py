"""What asks a command to end: signals, and the end of whoever started it."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C, a service manager, a closed terminal.
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds after which an interruption that was not heard comes again.
_AGAIN_SECONDS = 1.0


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat whatever asks this process to end as Ctrl-C, until it is heard.

    Code of others may swallow an interruption: that of a callback, or an import that catches everything. It
    then comes again. What is put in order after one is not disturbed by another.

    A signal that is ignored stays ignored: ``nohup`` and background jobs of scripts ask for that. In a thread
    other than the main one nothing changes, as Python hands signals to the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*_ASKING, signal.SIGALRM)}
    taken = [number for number in _ASKING if before[number] not in (signal.SIG_IGN, None)]

    def interrupt(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        if not _is_heard():
            raise KeyboardInterrupt

    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGALRM) is interrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before[signal.SIGALRM])
        for number in taken:
            signal.signal(number, before[number])


def heard() -> None:
    """Say that an interruption has been dealt with, and that work goes on: it does not come again."""
    if threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)


def _is_heard() -> bool:
    """Return whether this thread deals with an interruption, in a handler or on its way out."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


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
