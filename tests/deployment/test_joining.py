"""An aggregator and two silos that know of nothing but the new commands and each other's lines."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from photon.data.prepared import PreparedData
from photon.data.separate import separate_silo
from photon.deployment.aggregator import AggregatorPlace
from photon.deployment.superlink import nodes_of
from photon.engine.app_folder import app_folder
from photon.engine.processes import dying_with_us, free_port, stop_tree
from tests.conftest import SMALL_DEPLOYED, write_corpus
from tests.deployment.harness import wait_until

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(2400)]

PHOTON = str(Path(sys.executable).parent / "photon")


class User:
    """Somebody with a home of their own, and a terminal."""

    def __init__(self, home: Path, running: ExitStack) -> None:
        home.mkdir()
        self.home, self._running = home, running

    @property
    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        return kept | {"HOME": str(self.home), "PHOTON_HOME": str(self.home / "photon")}

    def types(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [PHOTON, *words], cwd=self.home, env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def leaves_running(self, *words: str) -> "subprocess.Popen[bytes]":
        with open(self.home / "terminal", "wb") as terminal:
            process = subprocess.Popen(
                [*dying_with_us(), PHOTON, *words],
                cwd=self.home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=terminal,
                start_new_session=True,
            )
        self._running.callback(stop_tree, process, at_once=False, patience=20.0)
        return process

    def sees(self) -> str:
        return (self.home / "terminal").read_text()

    def runs(self, run_dir: Path, *overrides: str) -> None:
        """Do a run to its end with ``flwr run``, in a terminal with the aggregator's environment."""
        text = " ".join([*SMALL_DEPLOYED, *overrides, f"run_dir={run_dir}"])
        with app_folder() as app:
            done = subprocess.run(
                [
                    *("bash", "-euc", 'set -a; . agg/flower.env; set +a; exec flwr run "$@"', "-"),
                    *(str(app), "aggregator", "--stream", "--run-config", f"overrides='{text}'"),
                ],
                cwd=self.home,
                env=self._environment | {"PATH": f"{Path(PHOTON).parent}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
            )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (run_dir / "summary.json").exists(), done.stdout + done.stderr


def line_in(said: str) -> str:
    (line,) = re.findall(r"^photon-[a-z]+-1\.\S+$", said, re.MULTILINE)
    return line


def _standings(place: AggregatorPlace) -> list[str]:
    return [node["status"] for node in nodes_of(place.connection)]


def _leaves(user: User, pid: int) -> None:
    """Let a silo leave; all that it started ends, and it cannot come back by itself."""
    family = psutil.Process(pid).children(recursive=True)
    assert f"stopped process {pid}" in user.types("silo", "leave", "silo")
    wait_until(lambda: not any(one.is_running() for one in family), "the end of all that it started")
    assert "no aggregator was joined" in user.types("silo", "join", "silo", code=2)


def test_two_commands_a_side_join_train_and_leave(tmp_path: Path) -> None:
    corpus = PreparedData.open(write_corpus(tmp_path / "corpus", {"alpha": "abcdefgh", "beta": "ijklmnop"}))
    with ExitStack() as running:
        operator = User(tmp_path / "operator", running)
        silos = {name: User(tmp_path / name, running) for name in ("alpha", "beta")}
        for name, user in silos.items():
            separate_silo(corpus, name, user.home / "silo" / "data")

        port = str(free_port())
        invitation = line_in(
            operator.types("aggregator", "init", "agg", "--host", "127.0.0.1", "--port", port)
        )
        lines = {
            name: line_in(user.types("silo", "init", "silo", "--name", name)) for name, user in silos.items()
        }
        # Admitted before anything runs: the key is registered when the aggregator comes up.
        assert "when `photon aggregator up" in operator.types("aggregator", "admit", "agg", lines["alpha"])
        up = operator.leaves_running("aggregator", "up", "agg")
        wait_until(lambda: invitation in operator.sees() or up.poll() is not None, "the aggregator")
        assert up.poll() is None, operator.sees()
        for command in ("flower-superlink --host 127.0.0.1", "flower-superexec ", "flwr supernode register"):
            assert command in operator.sees()
        assert "is running already" in operator.types("aggregator", "up", "agg", code=2)

        said = silos["beta"].types("silo", "join", "silo", invitation, code=1)
        assert "checks failed (registration)" in said
        assert line_in(said) == lines["beta"]
        assert "is registered" in operator.types("aggregator", "admit", "agg", lines["beta"])
        assert "is registered" in operator.types("aggregator", "admit", "agg", lines["beta"])

        nodes = {
            name: user.leaves_running("silo", "join", "silo", invitation) for name, user in silos.items()
        }
        place = AggregatorPlace(operator.home / "agg")

        wait_until(lambda: _standings(place) == ["online"] * 2, "two nodes online", pause=1.0)
        assert all(node.poll() is None for node in nodes.values()), silos["alpha"].sees()
        assert "photon silo run --superlink 127.0.0.1:" in silos["alpha"].sees()
        assert "is running already" in silos["alpha"].types("silo", "join", "silo", code=2)

        stands = json.loads(operator.types("aggregator", "status", "agg", "--json"))
        assert [(one["name"], one["standing"]) for one in stands["silos"]] == [
            ("alpha", "online"),
            ("beta", "online"),
        ]
        assert stands["process"] == up.pid

        first = operator.home / "agg" / "first"
        operator.runs(first, "rounds=2", "cohort=2", "federation.silos=2")
        assert json.loads((first / "summary.json").read_text())["rounds"] == 2

        # What a silo's operator decides holds from the next message on.
        policy = silos["beta"].home / "silo" / "policy.yaml"
        policy.write_text(policy.read_text().replace("#max_local_steps: null", "max_local_steps: 1"))
        second = operator.home / "agg" / "second"
        operator.runs(second, "rounds=1", "cohort=2", "federation.silos=2", "federation.quorum=1")
        assert "refused by beta's policy: max_local_steps=1" in (second / "events.jsonl").read_text()

        (found,) = json.loads(silos["alpha"].types("silo", "status", "silo", "--json"))
        assert found["connection"]["process"] == nodes["alpha"].pid
        assert {one["check"]: one["level"] for one in found["connection"]["checks"]}["registration"] == "ok"
        assert found["silos"]["alpha"]["runs"]

        _leaves(silos["beta"], nodes["beta"].pid)
        wait_until(lambda: "offline" in _standings(place), "beta's node offline", pause=1.0)
        assert operator.types("aggregator", "status", "agg", code=1).count("finished:completed") == 2

        assert "is unregistered" in operator.types("aggregator", "remove", "agg", "beta")
        assert "was ejected" in operator.types("aggregator", "admit", "agg", lines["beta"], code=2)

        family = psutil.Process(up.pid).children(recursive=True)
        assert len(family) >= 4
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
        wait_until(lambda: not any(one.is_running() for one in family), "the end of all that ran")
