"""``scripts/federation.sh``: what it refuses, what it leaves alone, and what its supervisors do."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from photon.config.compose import compose
from photon.deployment import federation
from photon.deployment.local import LocalFederation
from photon.errors import PhotonError
from tests.deployment.harness import wait_until


@pytest.fixture
def supervised(tmp_path: Path) -> "subprocess.Popen[bytes]":
    """A supervised program that says which process it is, and goes on until it is stopped."""
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "photon.deployment.supervise", "--log", str(tmp_path / "log")),
            *("--pause", "0.1", sys.executable, "-c", program),
        ]
    )


def pids_said(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split("\n") if line.isdigit()] if log.exists() else []


def test_a_supervisor_starts_its_program_again_and_ends_with_it(
    supervised: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    log = tmp_path / "log"
    try:
        wait_until(lambda: len(pids_said(log)) == 1, "the first start")
        os.kill(pids_said(log)[0], signal.SIGKILL)
        wait_until(lambda: len(pids_said(log)) == 2, "the second start")
        assert "ended with -9; again in 0.1 s" in log.read_text()
    finally:
        supervised.terminate()
        supervised.wait(30)
    assert not psutil.pid_exists(pids_said(log)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_program_ends_with_a_supervisor_that_is_killed(
    supervised: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    wait_until(lambda: len(pids_said(tmp_path / "log")) == 1, "the first start")
    supervised.kill()
    supervised.wait()
    (pid,) = pids_said(tmp_path / "log")
    wait_until(lambda: not psutil.pid_exists(pid), "the program's end", 10)


@pytest.mark.parametrize("until_it_ends", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_program_that_has_lost_its_superexec_is_started_again(tmp_path: Path, until_it_ends: bool) -> None:
    """A SuperNode notices nothing, and stays online."""
    executor = tmp_path / "flower-superexec"
    executor.write_text(f"#!{sys.executable}\nimport time; time.sleep(600)")
    executor.chmod(0o700)
    program = f"""
import subprocess, sys, time
print(subprocess.Popen([{str(executor)!r}]).pid, flush=True)
time.sleep(600)
"""
    log = tmp_path / "log"
    options = ["--until-it-ends"] if until_it_ends else []
    supervisor = subprocess.Popen(
        [
            *(sys.executable, "-m", "photon.deployment.supervise", "--log", str(log), *options),
            *("--pause", "0.1", sys.executable, "-c", program),
        ]
    )
    try:
        wait_until(lambda: len(pids_said(log)) == 1, "the first start")
        first = psutil.Process(pids_said(log)[0])
        wait_until(lambda: str(executor) in first.cmdline(), "the SuperExec")
        time.sleep(1.5)
        assert len(pids_said(log)) == 1
        first.kill()
        wait_until(lambda: len(pids_said(log)) == 2, "the second start")
        assert "has lost its SuperExec and was stopped; again in 0.1 s" in log.read_text()
        second = psutil.Process(pids_said(log)[1]).parent()
        assert second is not None
        second.kill()
        if until_it_ends:
            assert supervisor.wait(30) != 0
    finally:
        supervisor.terminate()
        supervisor.wait(30)
        # Flower's own SuperExec ends with its parent; this one does not.
        for pid in pids_said(log):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_down_leaves_a_process_alone_that_has_taken_the_pid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LocalFederation.create(tmp_path, ["alpha"], secure=False)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        (tmp_path / "pids").mkdir()
        (tmp_path / "pids" / "alpha").write_text(f"{other.pid} {time.time() - 3600}\n")
        federation.down(tmp_path)
        assert capsys.readouterr().out == "nothing was running\n"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("silos", "said"), [("4", "has 3 silos"), ("0", "has 3 silos"), ("alpha,delta", "no silo 'delta'")]
)
def test_silos_that_are_not_there_are_refused(corpus: Path, tmp_path: Path, silos: str, said: str) -> None:
    with pytest.raises(PhotonError, match=said):
        federation.up(tmp_path / "fed", silos=silos, data=corpus, secure=True)
    assert not (tmp_path / "fed").exists()


def test_a_folder_without_a_federation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="holds no federation"):
        federation.status(tmp_path)


def test_a_federation_is_read_back_and_keeps_its_keys(tmp_path: Path) -> None:
    made = LocalFederation.create(tmp_path, ["alpha", "beta"], secure=True)
    assert LocalFederation.open(tmp_path) == made
    key = made.node_key("alpha").read_bytes()
    again = LocalFederation.create(tmp_path, ["alpha"], secure=True)
    assert again.node_key("alpha").read_bytes() == key
    command = " ".join(again.superlink().command)
    assert "--enable-supernode-auth" in command
    assert "--insecure" not in command
    insecure = LocalFederation.create(tmp_path / "open", ["alpha"], secure=False)
    assert all("--insecure" in program.command for program in insecure.programs())


@pytest.mark.parametrize(("silos", "cohort"), [(["a", "b"], None), (["a", "b", "c", "d"], 3)])
def test_what_it_says_to_train_with_fits_the_silos(
    silos: list[str], cohort: int | None, tmp_path: Path
) -> None:
    made = LocalFederation.create(tmp_path, silos, secure=False)
    config = compose(federation._overrides(made, tmp_path / "run"))
    assert (config.federation.silos, config.cohort) == (len(silos), cohort)


def below(supervisor: psutil.Process, program: str) -> list[psutil.Process]:
    """Return the processes of a program below another, without those that have ended meanwhile."""
    found = []
    for process in supervisor.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(program in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.deployment
@pytest.mark.timeout(900)
def test_a_killed_supernode_is_started_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From up to down: every command is printed, a killed node comes back, nothing is left."""
    folder = tmp_path / "fed"
    federation.up(folder, silos="2", data=corpus, secure=True)
    try:
        said = capsys.readouterr().out
        for command in (
            "flower-superlink",
            "flower-superexec",
            "flwr supernode register",
            "photon silo run",
        ):
            assert command in said
        assert federation.status(folder)
        supervisors = dict(federation._running(folder))
        family = [p for s in supervisors.values() for p in [s, *s.children(recursive=True)]]
        for lost in ("flower-superexec", "flower-supernode"):
            # One that has just been started has its command line a moment later.
            wait_until(lambda lost=lost: below(supervisors["alpha"], lost), f"{lost} to run", 20)
            # The last: what keeps a SuperNode running has its name in its command line, too.
            below(supervisors["alpha"], lost)[-1].kill()
            wait_until(lambda: not federation.status(folder), "the status to tell", 20)
            if lost == "flower-superexec":
                assert "without a SuperExec" in capsys.readouterr().out
            wait_until(lambda: federation.status(folder), "all nodes online again", 300, pause=2.0)
        with pytest.raises(PhotonError, match="is running there"):
            federation.up(folder, silos="2", data=corpus, secure=True)
    finally:
        federation.down(folder)
    assert not any(process.is_running() and process.status() != "zombie" for process in family)
    assert federation._running(folder) == []
