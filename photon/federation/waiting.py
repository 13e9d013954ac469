"""Who stands at a node, and who waits for it: the runs of one aggregator, by files in Photon's home.

A SuperNode works on one message at a time, so a run whose standing request a node answers keeps it from all
others. They say here that they want the node, and the run lets go of it. Each file is locked by the process
that wrote it, so what a process that was killed has left says nothing.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from photon.config.folders import photon_home
from photon.files.owner import is_held, take

#: Seconds between looks for those who wait.
_LOOK = 1.0
_LONGEST = 4096


class Waiting:
    """What a run holds and wants of an aggregator's nodes.

    Parameters
    ----------
    run_dir
        The run, by which others name it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._folder = photon_home() / "standing"
        self._files: dict[Path, int] = {}
        self._wanted: set[int] = set()
        self._looked = 0.0

    def hold(self, node: int) -> bool:
        """Stand at a node; return whether no other run does."""
        return self._lock(self._holding(node))

    def release(self, node: int) -> None:
        """Stand there no longer."""
        self._unlock(self._holding(node))

    def holder(self, node: int) -> str | None:
        """Return the other run that stands at a node, if there is one."""
        path = self._holding(node)
        if path in self._files or not is_held(path):
            return None
        with suppress(OSError), open(path, errors="replace") as file:
            return file.read(_LONGEST).strip()
        return None

    def want(self, node: int) -> bool:
        """Say that a node is waited for; return whether that is new."""
        path = self._folder / f"{node}.wanted-{os.getpid()}"
        return path not in self._files and self._lock(path)

    def is_wanted(self, node: int) -> bool:
        """Tell whether another run waits for a node."""
        return node in self.wanted()

    def wanted(self) -> set[int]:
        """Return the nodes that other runs wait for."""
        now = time.monotonic()
        if now > self._looked + _LOOK:
            self._looked = now
            found = [path for path in self._folder.glob("*.wanted-*") if path not in self._files]
            self._wanted = {int(path.name.partition(".")[0]) for path in found if is_held(path)}
        return self._wanted

    def close(self) -> None:
        """Hold and want nothing more."""
        for path in list(self._files):
            self._unlock(path)

    def _holding(self, node: int) -> Path:
        return self._folder / f"{node}.held"

    def _lock(self, path: Path) -> bool:
        if path in self._files:
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not take(lock, 0.0):
            os.close(lock)
            return False
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{self._run_dir}\n".encode(), 0)
        self._files[path] = lock
        return True

    def _unlock(self, path: Path) -> None:
        if (lock := self._files.pop(path, None)) is not None:
            os.close(lock)
