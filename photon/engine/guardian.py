"""Run a program, and end it and everything it started when whoever asked for it has gone.

``python -m photon.engine.guardian --owner FD --run-dir DIR COMMAND ...``

A command that is killed outright can end nothing any more. So what it needs runs under a process that waits
for it: FD is a pipe that only the command holds the other end of, and its end is the end of all. On Linux
this process adopts descendants whose parents have ended, so none escapes. On other systems those that left
their parents, as Ray's daemons do, may stay for as long as Ray lets them.
"""

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from photon.engine.executor import Executor
from photon.engine.processes import stop_tree
from photon.engine.signals import adopt_orphans

#: What the owner writes when it wants the end itself.
IN_ORDER, AT_ONCE = b"o", b"a"
#: Seconds between looks at the program.
_LOOK_SECONDS = 0.5
#: Seconds that those who are asked to end are given.
_PATIENCE = 5.0


def guard(command: list[str], owner: int, run_dir: Path) -> int:
    """Run a program until it ends or its owner asks for that, or is gone; then end what is left.

    Parameters
    ----------
    command
        The program and its arguments.
    owner
        Descriptor of the pipe from the owner.
    run_dir
        Where it is noted if the owner has gone without a word.

    Returns
    -------
    int
        With what the program ended.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    adopt_orphans()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    executor = Executor(process)
    asked = None
    while asked is None and process.poll() is None and not executor.has_died():
        ready, _, _ = select.select([owner], [], [], _LOOK_SECONDS)
        if ready:
            asked = os.read(owner, 1)
    stop_tree(process, at_once=asked in (AT_ONCE, b""), patience=_PATIENCE)
    end_descendants()
    if asked == b"":
        # Only now, when nobody else writes its events.
        from photon.engine.interruption import note_interruption

        note_interruption(run_dir, "the command that had started it was killed")
    return process.returncode


def end_descendants(patience: float = _PATIENCE) -> None:
    """End all that descends from this process; whoever does not listen is killed."""
    end = time.monotonic() + patience
    while left := [one for one in psutil.Process().children(recursive=True) if not _reaped(one)]:
        for one in left:
            try:
                one.kill() if time.monotonic() > end else one.terminate()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=0.5)


def _reaped(process: psutil.Process) -> bool:
    """Tell whether a process has ended; those that were adopted are waited for."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return False
        if process.ppid() == os.getpid():
            process.wait(timeout=0)
    except (psutil.NoSuchProcess, psutil.TimeoutExpired):
        pass
    return True


def main() -> None:
    """Guard the command of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--owner", type=int, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    sys.exit(guard(arguments.command, arguments.owner, arguments.run_dir))


if __name__ == "__main__":
    main()
