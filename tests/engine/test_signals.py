"""An interruption ends a command at any moment, once, and without a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from photon.engine.signals import heard, interruptible
from tests.deployment.harness import wait_until

BIN = Path(sys.executable).parent
ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def ask(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers() -> None:
    """As in a terminal: in the background of a script Ctrl-C is ignored, and under nohup a hang-up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number", ASKING)
def test_each_is_an_interruption_and_is_what_it_was_afterwards(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        ask(number)
    assert signal.getsignal(number) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_what_is_put_in_order_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.engine.signals._AGAIN_SECONDS", 0.05)
    done = []

    def interrupted() -> None:
        try:
            ask(signal.SIGINT)
        finally:
            for number in ASKING:
                ask(number)
                time.sleep(0.1)
                done.append(number)

    with pytest.raises(KeyboardInterrupt), interruptible():
        interrupted()
    assert done == ASKING


def test_one_that_is_swallowed_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.engine.signals._AGAIN_SECONDS", 0.05)
    swallowed = []

    def swallow() -> None:
        try:
            if not swallowed:
                ask(signal.SIGTERM)
            time.sleep(20)
        except BaseException as error:
            swallowed.append(error)

    def work() -> None:
        swallow()
        swallow()
        time.sleep(20)

    with pytest.raises(KeyboardInterrupt), interruptible():
        work()
    assert len(swallowed) == 2


def test_one_that_is_dealt_with_does_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.engine.signals._AGAIN_SECONDS", 0.05)
    with interruptible():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                ask(signal.SIGINT)
            heard()
            time.sleep(0.2)


def test_one_that_is_ignored_stays_ignored() -> None:
    """``nohup`` asks for that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            ask(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform != "linux", reason="it looks at /proc")
@pytest.mark.parametrize(("number", "seconds"), [*((each, 0.0) for each in ASKING), (signal.SIGINT, 1.0)])
def test_a_command_that_has_hardly_begun_ends_in_silence(
    number: signal.Signals, seconds: float, tmp_path: Path
) -> None:
    """While it imports. Before its first line, Python itself has the word."""
    command = [str(BIN / "photon"), "train", "federation=inprocess", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    )
    wait_until(lambda: _listens(process.pid), "its first line", 60, pause=0.01)
    time.sleep(seconds)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "Traceback" not in said


def _listens(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    # Python itself handles SIGINT from its start on; SIGTERM only Photon does.
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)))
