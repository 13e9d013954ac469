"""Checkouts of the recorded commits: git worktrees in the temporary folder, kept for the next time."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from tests.golden.record import PRESENT


class NoHistoryError(Exception):
    """The commit is not in this clone."""


def full_hash(commit: str) -> str:
    """Return the whole hash of a commit.

    Raises
    ------
    NoHistoryError
        If it is not there.
    """
    found = git(PRESENT, "rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}")
    if found is None:
        raise NoHistoryError(
            f"commit {commit} is not in this clone: run `git fetch --unshallow` "
            f"(or `git fetch origin {commit}`), then `python -m tests.golden compare`"
        )
    return found


def checkout(commit: str) -> Path:
    """Return a clean worktree of a commit, which is made if it is not there.

    Raises
    ------
    NoHistoryError
        If the commit is not in this clone, or no worktree can be made of it.
    """
    commit = full_hash(commit)
    parent = Path(tempfile.gettempdir()) / f"photon-golden-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    folder = parent / commit[:12]
    with FileLock(parent / f"{commit[:12]}.lock"):
        if not _is_clean(folder, commit):
            shutil.rmtree(folder, ignore_errors=True)
            # Forced: git may still know of one that was removed from the temporary folder.
            made = git(PRESENT, "worktree", "add", "--force", "--detach", str(folder), commit)
            if made is None or not _is_clean(folder, commit):
                raise NoHistoryError(f"git worktree add {folder} {commit}: no clean checkout; try it by hand")
    return folder


def _is_clean(folder: Path, commit: str) -> bool:
    if not (folder / ".git").exists() or git(folder, "rev-parse", "HEAD") != commit:
        return False
    return git(folder, "status", "--porcelain") == ""


def git(folder: Path, *arguments: str) -> str | None:
    """Return what git says in a folder, or None if it fails or is not there."""
    # A hook or an editor may have set these for another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
