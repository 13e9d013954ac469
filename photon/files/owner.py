"""Who owns a run: one command at a time, from its first step to the end of the last process it started."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from photon.errors import PhotonError, printable

#: Held by the command that started the run, and by whoever ends its processes.
OWNER = ".owner"
#: Held by the process that trains the run.
LOCK = ".lock"
#: Seconds for which a lock is tried: whoever only asks whether a run is going on holds it for a moment.
_TRY_SECONDS = 0.5
#: And when its owner has been killed, and what that had started is being ended.
_ENDING_SECONDS = 20.0


#: What a run writes by itself into its folder: files, and folders.
_FILES = (LOCK, "config.yaml", "events.jsonl", "report.html", "summary.json")
_FOLDERS = ("checkpoints", "export", "silos", "store")


@contextmanager
def owned(run_dir: Path) -> Iterator[int]:
    """Own the run in a folder, which is made where it is missing.

    Yields
    ------
    int
        Descriptor of the lock. It is free again when every process that has inherited it has ended, too.

    Raises
    ------
    PhotonError
        If the run is going on in another process, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / OWNER, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PhotonError(
            f"{run_dir}: cannot be written ({error.strerror}); choose another run_dir"
        ) from error
    try:
        if not take(lock, _TRY_SECONDS if _owner(run_dir) else _ENDING_SECONDS):
            raise going_on(run_dir)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        # A run that `flwr run` has started has no owner, but somebody who trains it.
        if is_held(run_dir / LOCK):
            raise going_on(run_dir)
        yield lock
    finally:
        os.close(lock)


@contextmanager
def held(folder: Path, named_by: str = "--output") -> Iterator[bool]:
    """Hold the folder of a command's results, which is made where it is missing.

    Parameters
    ----------
    folder
        The folder.
    named_by
        The option or key that names it, for the message.

    Yields
    ------
    bool
        Whether it is held now; False: another process is at work there.

    Raises
    ------
    PhotonError
        If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PhotonError(
            f"{printable(folder)}: cannot be written ({error.strerror}); choose another {named_by}"
        ) from None
    try:
        yield take(lock, _TRY_SECONDS)
    finally:
        os.close(lock)


def check_kinds(run_dir: Path) -> None:
    """Check that nothing of another kind is where a run writes: it would be noticed when a round is done.

    Raises
    ------
    PhotonError
        If there is.
    """
    for names, fits, kind in ((_FILES, Path.is_file, "file"), (_FOLDERS, Path.is_dir, "folder")):
        for name in names:
            place = run_dir / name
            if place.exists() and not fits(place):
                raise PhotonError(f"{place}: is no {kind}, and a run keeps one there; move it away")


def is_going_on(run_dir: Path) -> bool:
    """Tell whether a process is at work on the run."""
    return is_held(run_dir / OWNER) or is_held(run_dir / LOCK)


def refuse_if_going_on(run_dir: Path) -> None:
    """Raise the error of `owned` at once if the run is going on, and touch nothing."""
    # What an owner that was killed has started is about to end.
    if is_going_on(run_dir) and (_owner(run_dir) or not (run_dir / OWNER).exists()):
        raise going_on(run_dir)


def going_on(run_dir: Path) -> PhotonError:
    """Return the error that a run which is going on is refused with."""
    owner = _owner(run_dir)
    # One that finds the run that it has started itself in other hands did not start those.
    process = f" (started by process {owner})" if owner not in (None, os.getpid()) else ""
    return PhotonError(
        f"{run_dir}: the run is still going on in another process{process}; stop that first, "
        f"or look at it with `photon watch {run_dir}`"
    )


def _owner(run_dir: Path) -> int | None:
    """Return the process that owns the run; None: it has none, or it was killed."""
    import psutil

    with suppress(OSError, ValueError):
        pid = int((run_dir / OWNER).read_text())
        return pid if psutil.pid_exists(pid) else None
    return None


def take(lock: int, seconds: float, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file; return whether that succeeded within some seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)


def is_held(path: Path) -> bool:
    """Tell whether a process has locked a file."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared, so that those who ask do not see each other.
        return not take(lock, 0.0, fcntl.LOCK_SH)
    finally:
        os.close(lock)
