"""Processes that take jobs together, whatever the jobs are."""

import os
import sys
import time

import pytest

from photon.errors import PhotonError
from photon.training.devices import ProcessGroup


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ranks(count: int) -> list[dict[str, str]]:
    return [dict(os.environ) | {"RANK": str(rank)} for rank in range(count)]


def test_a_crash_is_told_and_the_others_are_stopped(tmp_path):
    code = f"""
import os, pathlib, time
folder, rank = pathlib.Path(r"{tmp_path}"), os.environ["RANK"]
(folder / f"pid-{{rank}}").write_text(str(os.getpid()))
while len(list(folder.glob("pid-*"))) < 3:
    time.sleep(0.01)
if rank == "1":
    raise ValueError("the disk is on fire")
time.sleep(60)
"""
    started = time.monotonic()
    with pytest.raises(
        PhotonError, match=r"process 1 of 3 ended with exit code 1; .*ValueError: the disk is on fire"
    ):
        ProcessGroup(python(code), ranks(3), tmp_path).work(tmp_path)
    assert time.monotonic() - started < 30
    for rank in (0, 2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{rank}").read_text()), 0)


def test_a_killed_process_is_told(tmp_path):
    with pytest.raises(PhotonError, match=r"process 0 of 1 was killed by signal 9; .* it said: nothing"):
        ProcessGroup(python("import os; os.kill(os.getpid(), 9)"), ranks(1), tmp_path).work(tmp_path)


def test_a_process_that_leaves_without_an_answer_is_told(tmp_path):
    with pytest.raises(PhotonError, match=r"process 0 of 2 ended with exit code 0; .* it said: nothing"):
        ProcessGroup(python("import sys; print('done?')"), ranks(2), tmp_path).work(tmp_path)


def test_user_errors_come_through_as_they_were_said(tmp_path):
    code = "import sys; sys.stderr.write('some noise\\nset x=1\\n'); sys.exit(2)"
    with pytest.raises(PhotonError, match=r"^set x=1$"):
        ProcessGroup(python(code), ranks(2), tmp_path).work(tmp_path)
