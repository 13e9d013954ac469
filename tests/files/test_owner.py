"""One owner of a run at a time, until its last process has ended."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from photon.errors import PhotonError
from photon.files.owner import LOCK, is_going_on, owned, refuse_if_going_on


def test_a_second_owner_is_refused_and_told_who_owns_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "x"
    assert not is_going_on(run_dir)
    refuse_if_going_on(run_dir)
    with owned(run_dir):
        assert is_going_on(run_dir)
        code = f"""
from pathlib import Path
from photon.files.owner import owned
with owned(Path({str(run_dir)!r})): pass
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"still going on in another process (started by process {os.getpid()})" in done.stderr
        with pytest.raises(PhotonError, match="still going on"):
            refuse_if_going_on(run_dir)
    assert not is_going_on(run_dir)
    with owned(run_dir):
        pass


def test_it_stays_owned_while_a_process_lives_that_has_inherited_the_lock(tmp_path: Path) -> None:
    """A command that was killed has let go; what it started has not."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with owned(tmp_path) as lock:
        heir = subprocess.Popen(sleep, pass_fds=(lock,))
        other = subprocess.Popen(sleep)
    try:
        assert is_going_on(tmp_path)
        heir.kill()
        heir.wait()
        assert not is_going_on(tmp_path), "programs that were not given the lock hold it"
    finally:
        for process in (heir, other):
            process.kill()
            process.wait()


def test_an_owner_that_was_killed_is_waited_for_until_what_it_started_has_ended(tmp_path: Path) -> None:
    code = f"""
import os, subprocess, sys
from pathlib import Path
from photon.files.owner import owned
with owned(Path({str(tmp_path)!r})) as lock:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"], pass_fds=(lock,))
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.Popen([sys.executable, "-c", code])
    killed.wait()
    assert is_going_on(tmp_path)
    refuse_if_going_on(tmp_path)
    with owned(tmp_path):
        pass


def test_a_run_that_nobody_has_launched_but_somebody_trains_is_not_owned_twice(tmp_path: Path) -> None:
    with FileLock(tmp_path / LOCK), pytest.raises(PhotonError, match="still going on"), owned(tmp_path):
        pass


def test_whoever_only_asks_does_not_keep_an_owner_out(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from photon.files.owner import is_going_on
print(flush=True)
while True:
    is_going_on(Path({str(tmp_path)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as asking:
        try:
            assert asking.stdout is not None
            asking.stdout.readline()
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                with owned(tmp_path):
                    pass
        finally:
            asking.kill()


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(PhotonError, match=r"cannot be written .*; choose another"),
        owned(tmp_path / "run"),
    ):
        pass
