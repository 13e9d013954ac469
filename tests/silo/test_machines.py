"""A silo of two machines, both of them this one, trains as two processes of one machine do."""

import signal
import socket
import subprocess
import sys

import pytest

from photon.errors import PhotonError, RunError
from photon.preflight import preflight
from photon.silo.site import find_site
from photon.training import machines
from photon.training.devices import stop_group
from tests.conftest import composed

TWO = ["training.processes=2", "rounds=2", "cohort=1"]


#: Of each of two machines' one process.
BATCH = "training.batch_size=2"


def meeting_at(rendezvous):
    return ["training.machines=2", f"training.rendezvous={rendezvous}"]


@pytest.fixture
def rendezvous():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def other_machine(rendezvous, tmp_path):
    command = [sys.executable, "-m", "photon.cli", "silo", "machine", rendezvous, "--machine", "1"]
    with open(tmp_path / "other.log", "wb") as log:
        process = subprocess.Popen([*command, "--below", str(tmp_path)], stdout=log, stderr=log)
    yield process
    stop_group()
    process.kill()
    process.wait()


def test_two_machines_train_as_one(run_small, rendezvous, other_machine):
    alone = run_small("rounds=2", "cohort=1", name="alone")
    together = run_small(*TWO, *meeting_at(rendezvous), name="together")
    assert together["perplexity"]["final"] == pytest.approx(alone["perplexity"]["final"], rel=1e-5)
    assert other_machine.poll() is None


@pytest.mark.slow
def test_other_machines_stay_for_another_model(run_small, rendezvous, other_machine, tmp_path):
    """It needs other processes: they begin anew on all machines, and the program of each stays."""
    first = run_small(*TWO, *meeting_at(rendezvous), name="first")
    assert first["weights_sha256"] == run_small(*TWO, name="alone")["weights_sha256"]
    second = run_small(*TWO, *meeting_at(rendezvous), "optimizer.lr=0.02", name="second")
    assert first["weights_sha256"] != second["weights_sha256"]
    assert other_machine.poll() is None
    said = (tmp_path / "other.log").read_text()
    assert said.count(f"joined {rendezvous} as machine 1 of 2") == 2, said


def test_a_machine_that_is_gone_is_named(run_small, rendezvous, other_machine, monkeypatch):
    monkeypatch.setattr(machines, "ARRIVAL_SECONDS", 1.0)
    other_machine.send_signal(signal.SIGKILL)
    other_machine.wait()
    with pytest.raises(RunError, match=r"machine 1 has not come to .* within 1 s; start `photon silo"):
        run_small(*TWO, *meeting_at(rendezvous))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["training.processes=2", "training.batch_size=2", "training.machines=2"], "go together"),
        (["training.rendezvous=h:1"], "go together"),
        (["training.processes=3", "training.batch_size=3", "training.machines=2"], "does not divide"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, why):
    with pytest.raises(PhotonError, match=why):
        composed(*overrides)


def test_silos_at_the_same_time_are_refused():
    given = [
        "training.processes=2",
        "training.machines=2",
        "training.rendezvous=h:1",
        "training.batch_size=2",
    ]
    with pytest.raises(PhotonError, match=r"silos_in_parallel=2: silos that train at the same time cannot"):
        preflight(composed(*given, "federation=simulation", "federation.silos_in_parallel=2"))


def test_a_server_names_no_machines_of_a_silo(tmp_path):
    given = [
        "training.processes=2",
        "training.machines=2",
        "training.rendezvous=h:1",
        "training.batch_size=2",
    ]
    node = {"data-dir": str(tmp_path), "state-dir": str(tmp_path)}
    with pytest.raises(PhotonError, match=r"machines=2: a silo's machines are its own; leave it at 1"):
        find_site(node, composed(*given))
    own = {**node, "processes": 2, "machines": 2, "rendezvous": "h:2"}
    _, config = find_site(own, composed(BATCH))
    assert (config.training.machines, config.training.rendezvous) == (2, "h:2")
