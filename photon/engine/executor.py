"""The SuperExec that a SuperNode or a SuperLink has started, and does not miss when it ends."""

import contextlib
import subprocess

import psutil

from photon.files.processes import is_gone

#: Word of its command line.
_NAME = "flower-superexec"


class Executor:
    """Tells whether a program still has its SuperExec: without one it stays online, and runs nothing.

    Parameters
    ----------
    process
        The SuperNode or SuperLink, just started. One that starts no SuperExec has none to lose.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._executor: psutil.Process | None = None

    def has_died(self) -> bool:
        """Return whether it had one, which has ended."""
        if self._executor is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._executor = executor_of(psutil.Process(self._process.pid))
            return False
        return is_gone(self._executor)


def executor_of(process: psutil.Process) -> psutil.Process | None:
    """Return the SuperExec that a process or a descendant of it has started and that has not ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            # Before it is executed it has the command line of whoever starts it, and after its end none.
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if any(word.endswith(_NAME) for word in child.cmdline()):
                    return child
    return None
