"""Processes that are stopped by somebody else than the one that has started them."""

import subprocess
import sys
import time

import psutil

from photon.engine.processes import stop_tree
from photon.files.processes import is_gone

SLEEP = "import time; time.sleep(60)"
CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).wait()"


def test_a_process_whose_parent_does_not_wait_is_stopped_and_not_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD]) as parent:
        process = psutil.Process(parent.pid)
        while not (children := process.children()):
            time.sleep(0.02)
        # Nobody waits for it here until it has returned: what has ended stays as a zombie.
        stop_tree(process, at_once=False, patience=1.0)
        assert process.status() == psutil.STATUS_ZOMBIE
        assert is_gone(children[0])
