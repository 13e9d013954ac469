"""Whose name a silo's name is: a federation of nodes with keys, some of which use names of others."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.node_pb2 import NodeInfo
from typer.testing import CliRunner

from photon.client_app import answer
from photon.commands.app import app
from photon.config.schema import RunConfig
from photon.deployment.keys import make_node_key, show_key_file
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError
from photon.federation.names import ADMITTED, Names, admit, eject, fingerprint_of
from photon.federation.run import prepare_run, run_federation
from photon.telemetry.events import Notice, SiloFinished
from photon.telemetry.log import read_events
from tests.conftest import SMALL_DEPLOYED

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Public keys of three nodes."""
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_node_key(folder, name)[1].read_bytes() for name in ("a", "b", "liar")}


class KeyedGrid(InProcessGrid):
    """Nodes with keys, which join in the round that they are given."""

    def __init__(self, sites: dict[int, dict[str, Any]], keys: dict[int, bytes], late: Iterable[int]) -> None:
        super().__init__(answer, sites)
        self._keys = keys
        self._late = set(late)
        self.rounds = 0

    def get_node_ids(self) -> list[int]:
        """Count the rounds: the roster asks once at the start, and once in each."""
        self.rounds += 1
        return [node for node in super().get_node_ids() if node not in self._late or self.rounds > 2]

    def get_nodes(self) -> list[NodeInfo]:
        """Return the nodes with their keys."""
        return [NodeInfo(node_id=node, public_key=key) for node, key in self._keys.items()]


def _run(
    keys: dict[int, bytes],
    folders: dict[int, Path],
    tmp_path: Path,
    late: Iterable[int] = (),
    on_round: Callable[[int], None] = lambda _: None,
) -> tuple[list[tuple[int, str]], str]:
    """Return who finished which round, and all notices."""
    from tests.conftest import composed

    class Grid(KeyedGrid):
        def get_node_ids(self) -> list[int]:
            found = super().get_node_ids()
            on_round(self.rounds)
            return found

    run_dir = tmp_path / "run"
    config = composed(*SMALL_DEPLOYED, "cohort=null", "federation.wait_for_silos=0", "local_steps=1")
    config = config.model_copy(update={"run_dir": str(run_dir)})
    sites = {
        node: {"data-dir": str(data), "state-dir": str(tmp_path / f"state-{node}"), "worker": False}
        for node, data in folders.items()
    }
    run_federation(prepare_run(config), Grid(sites, keys, late), resume=False, live=False)
    events = list(read_events(run_dir / "events.jsonl"))
    told = "\n".join(event.message for event in events if isinstance(event, Notice))
    return [(event.round, event.silo) for event in events if isinstance(event, SiloFinished)], told


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photon's home of this test."""
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_one_that_joins_under_a_name_that_is_taken_is_turned_away(
    keys: dict[str, bytes], silo_folders: dict[str, Path], tmp_path: Path
) -> None:
    folders = {1: silo_folders["alpha"], 2: silo_folders["beta"], 3: silo_folders["alpha"]}
    done, told = _run({1: keys["a"], 2: keys["b"], 3: keys["liar"]}, folders, tmp_path, late=[3])
    assert done == [(each, silo) for each in (1, 2, 3) for silo in ("alpha", "beta")]
    assert "node 3: silo alpha is turned away: node 1, which is online, has that name" in told


def test_an_admitted_name_waits_for_its_key(
    home: Path, keys: dict[str, bytes], silo_folders: dict[str, Path], tmp_path: Path
) -> None:
    admit(home / ADMITTED, "alpha", fingerprint_of(keys["a"]))
    folders = {1: silo_folders["alpha"], 2: silo_folders["beta"], 3: silo_folders["alpha"]}
    done, told = _run({1: keys["liar"], 2: keys["b"], 3: keys["a"]}, folders, tmp_path, late=[3])
    assert f"silo alpha is turned away: the name belongs to the key {fingerprint_of(keys['a'])}" in told
    assert done == [(1, "beta"), (2, "alpha"), (2, "beta"), (3, "alpha"), (3, "beta")]


def test_one_that_is_ejected_is_out_in_the_next_round(
    home: Path, keys: dict[str, bytes], silo_folders: dict[str, Path], tmp_path: Path
) -> None:
    admit(home / ADMITTED, "alpha", fingerprint_of(keys["a"]))

    def on_round(number: int) -> None:
        if number == 3:
            eject(home / ADMITTED, "alpha")

    folders = {1: silo_folders["alpha"], 2: silo_folders["beta"]}
    done, told = _run({1: keys["a"], 2: keys["b"]}, folders, tmp_path, on_round=on_round)
    assert done == [(1, "alpha"), (1, "beta"), (2, "beta"), (3, "beta")]
    assert "was ejected" in told


def test_a_run_remembers_with_which_key_a_name_was_first_seen(keys: dict[str, bytes], tmp_path: Path) -> None:
    names = Names(tmp_path, tmp_path / ADMITTED)
    assert names.problem("alpha", keys["a"]) is None
    again = Names(tmp_path, tmp_path / ADMITTED)
    assert again.problem("alpha", keys["a"]) is None
    assert "belongs to the key" in (again.problem("alpha", keys["liar"]) or "")
    assert again.problem("alpha", b"") is None  # where nodes have no keys, names belong to nobody
    admit(tmp_path / ADMITTED, "alpha", fingerprint_of(keys["b"]))
    assert again.problem("alpha", keys["b"]) is None  # the operator's word counts
    assert "belongs to the key" in (again.problem("alpha", keys["a"]) or "")
    eject(tmp_path / ADMITTED, "alpha")
    assert "was ejected" in (again.problem("beta", keys["b"]) or "")
    (tmp_path / ADMITTED).write_text("{")
    with pytest.raises(PhotonError, match="mend or remove it"):
        again.problem("alpha", keys["a"])


def test_the_commands_admit_and_eject(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "keys", "alpha")[1]
    runner = CliRunner()
    done = runner.invoke(app, ["federation", "admit", "alpha", str(public)])
    fingerprint = show_key_file(public)["fingerprint"]
    assert (done.exit_code, done.output.strip()) == (0, f"alpha belongs to {fingerprint}")
    assert fingerprint in runner.invoke(app, ["federation", "eject", "alpha"]).output
    for words, problem in (
        (["eject", "alpha"], "alpha was not admitted"),
        (["admit", "a b", str(public)], "is no name of a silo"),
        (["admit", "alpha", str(tmp_path / "nothing")], "nothing"),
        (["admit", "alpha", __file__], "no public key"),
    ):
        assert problem in str(runner.invoke(app, ["federation", *words]).exception)
