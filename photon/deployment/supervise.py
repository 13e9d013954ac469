"""Keep a program running: ``python -m photon.deployment.supervise --log FILE COMMAND ...``.

A SuperNode leaves whenever the aggregator turns it away, for instance within a minute after it was killed,
because the SuperLink still takes it for online. It is then simply started again. A machine with systemd needs
none of this: ``Restart=always`` does the same.

A SuperNode whose SuperExec has ended stays, is taken for online, and answers nothing. It is started again,
too, and with ``--until-it-ends`` that is all: when the program itself ends, so does this. ``photon silo run``
becomes that.
"""

import argparse
import signal
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path
from types import FrameType

from photon.engine.executor import Executor
from photon.engine.processes import dying_with_us, stop_tree

#: Seconds between looks at the program.
_LOOK_SECONDS = 0.5


def supervise(command: list[str], log: FileIO, *, pause: float, until_it_ends: bool = False) -> int:
    """Run a command, and run it again whenever it ends, until this process is asked to stop.

    Parameters
    ----------
    command
        The program and its arguments.
    log
        Where its output, and a line for every end of it, goes; it has no buffer.
    pause
        Seconds from its end to the next start.
    until_it_ends
        Run it again only if it has lost its SuperExec.

    Returns
    -------
    int
        With what it ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    while True:
        process = subprocess.Popen(
            [*dying_with_us(), *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            executor = Executor(process)
            while not (lost := executor.has_died()) and process.poll() is None:
                time.sleep(_LOOK_SECONDS)
        finally:
            stop_tree(process, at_once=False, patience=10.0)
        if until_it_ends and not lost:
            return process.returncode
        why = "has lost its SuperExec and was stopped" if lost else f"ended with {process.returncode}"
        log.write(f"{time.strftime('%F %T')} {command[0]} {why}; again in {pause:g} s\n".encode())
        time.sleep(pause)


def _stop(_: int, __: FrameType | None) -> None:
    raise SystemExit


def main() -> None:
    """Supervise the command of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--log", type=Path, help="default: standard output")
    parser.add_argument("--pause", type=float, default=5.0)
    parser.add_argument("--until-it-ends", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    with open(arguments.log or sys.stdout.fileno(), "ab", buffering=0) as log:
        sys.exit(
            supervise(arguments.command, log, pause=arguments.pause, until_it_ends=arguments.until_it_ends)
        )


if __name__ == "__main__":
    main()
