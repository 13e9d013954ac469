"""Keep a program running: ``python -m photon.deployment.supervise --log FILE COMMAND ...``.

A SuperNode leaves whenever the aggregator turns it away, for instance within a minute after it was killed,
because the SuperLink still takes it for online. It is then simply started again. A machine with systemd needs
none of this: ``Restart=always`` does the same.
"""

import argparse
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType

from photon.engine.processes import dying_with_us, stop_tree


def supervise(command: list[str], log: Path, *, pause: float) -> None:
    """Run a command, and run it again whenever it ends, until this process is asked to stop.

    Parameters
    ----------
    command
        The program and its arguments.
    log
        File that its output, and a line for every end of it, is appended to.
    pause
        Seconds from its end to the next start.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    with open(log, "ab", buffering=0) as output:
        while True:
            process = subprocess.Popen(
                [*dying_with_us(), *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            try:
                code = process.wait()
            finally:
                stop_tree(process, at_once=False)
            said = f"{time.strftime('%F %T')} {command[0]} ended with {code}; again in {pause:g} s\n"
            output.write(said.encode())
            time.sleep(pause)


def _stop(_: int, __: FrameType | None) -> None:
    raise SystemExit


def main() -> None:
    """Supervise the command of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--pause", type=float, default=5.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    supervise(arguments.command, arguments.log, pause=arguments.pause)


if __name__ == "__main__":
    main()
