"""The process that ends what a command started, whatever became of the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from photon import code
from photon.engine.guardian import AT_ONCE, IN_ORDER
from photon.telemetry.events import Notice, RunInterrupted
from photon.telemetry.log import EventLog, read_events
from tests.deployment.harness import wait_until

#: A program that starts one which leaves its parents and does not listen, and says both ids.
FAMILY = '''
import os, signal, subprocess, sys, time
stubborn = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
leaving = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {stubborn!r}], start_new_session=True).pid, flush=True)
"""
subprocess.run([sys.executable, "-c", leaving], check=True)
print(os.getpid(), flush=True)
'''
GOES_ON = FAMILY + "time.sleep(600)"


class Guarded:
    """A guardian that this test is the owner of."""

    def __init__(self, program: list[str], run_dir: Path) -> None:
        reader, self.pipe = os.pipe()
        self.process = subprocess.Popen(
            [
                *code.command("photon.engine.guardian"),
                *("--owner", str(reader), "--run-dir", str(run_dir), *program),
            ],
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(reader,),
            env=code.environment(),
        )
        os.close(reader)

    def pids(self, count: int) -> list[int]:
        assert self.process.stdout is not None
        return [int(self.process.stdout.readline()) for _ in range(count)]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def all_gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
@pytest.mark.parametrize("word", [IN_ORDER, AT_ONCE, b""])
def test_nothing_is_left_of_a_command_that_is_gone(word: bytes, tmp_path: Path) -> None:
    """Also not what has left its parents, and does not listen; the events say so if nobody else can."""
    with EventLog(tmp_path / "events.jsonl") as log:
        log(Notice(level="info", message="begun"))
    guarded = Guarded(python(GOES_ON), tmp_path)
    pids = guarded.pids(2)
    assert not all_gone(pids)
    os.write(guarded.pipe, word)
    os.close(guarded.pipe)
    guarded.process.wait(30)
    assert all_gone(pids)
    last = read_events(tmp_path / "events.jsonl")[-1]
    # A command that was killed has said nothing.
    assert isinstance(last, RunInterrupted) == (word == b"")
    if isinstance(last, RunInterrupted):
        assert "was killed" in last.reason


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    guarded = Guarded(python(FAMILY + "sys.exit(7)"), tmp_path)
    pids = guarded.pids(2)
    assert guarded.process.wait(30) == 7
    assert all_gone(pids)
    os.close(guarded.pipe)


def test_it_ignores_what_a_terminal_sends(tmp_path: Path) -> None:
    """Ctrl-C is the command's to hear, which then ends all in order."""
    guarded = Guarded(python(GOES_ON), tmp_path)
    guarded.pids(2)
    for number in (signal.SIGINT, signal.SIGHUP):
        guarded.process.send_signal(number)
    time.sleep(1.0)
    assert guarded.process.poll() is None
    os.close(guarded.pipe)
    guarded.process.wait(30)


def test_a_program_without_its_superexec_is_ended(tmp_path: Path) -> None:
    """A SuperLink without one takes runs, and starts none."""
    executor = tmp_path / "flower-superexec"
    executor.write_text(f"#!{sys.executable}\nimport time; time.sleep(600)")
    executor.chmod(0o700)
    program = (
        "import subprocess, time\n"
        f"print(subprocess.Popen([{str(executor)!r}]).pid, flush=True)\n"
        "time.sleep(600)"
    )
    guarded = Guarded(python(program), tmp_path)
    (pid,) = guarded.pids(1)
    wait_until(lambda: str(executor) in " ".join(psutil.Process(pid).cmdline()), "its start", 20)
    time.sleep(1.5)
    assert guarded.process.poll() is None
    os.kill(pid, 9)
    guarded.process.wait(30)
    os.close(guarded.pipe)
