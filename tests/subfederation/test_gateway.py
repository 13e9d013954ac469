"""The gateway of a sub-federation: its file, and which run on its SuperLink a request means."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.errors import PhotonError, RunError
from photon.federation.assignment import Assignment, Outcome
from photon.federation.run import prepare_run
from photon.preflight import preflight
from photon.silo.policy import NO_POLICY
from photon.silo.site import SiloSite
from photon.state.checkpoint import CheckpointStore, ServerState
from photon.subfederation import gateway
from photon.subfederation.config import member_config


class FakeSuperLink:
    """Stands in for a connection; ``work`` is what a submitted run does at once."""

    name = "north"

    def __init__(self, work: Callable[[Path], None]) -> None:
        self.work = work
        self.submitted: list[tuple[str, bool]] = []
        self.running: set[str] = set()
        self.stopped: list[str] = []

    def submit(self, config: RunConfig, *, resume: bool, settings: Path) -> str:
        run_id = str(len(self.submitted) + 1)
        self.submitted.append((run_id, resume))
        self.running.add(run_id)
        self.work(settings.parent)
        return run_id

    def status(self, run_id: str) -> str:
        return "running" if run_id in self.running else "finished:stopped"

    def flwr(self, *arguments: str, check: bool) -> str:
        assert arguments[0] == "stop"
        self.stopped.append(arguments[1])
        self.running.discard(arguments[1])
        return ""


def finish(run_dir: Path, error: str | None = None) -> None:
    Outcome(assignment=Assignment.read(run_dir).key, error=error).write(run_dir)


def assign(run_dir: Path, server_round: int = 1, begins: int = 0) -> Assignment:
    assignment = Assignment(
        kind="train", round=server_round, model_id=f"m{server_round}", begins=begins, ends=begins + 1
    )
    assignment.write(run_dir, {"params": {"w": torch.zeros(2)}})
    return assignment


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeSuperLink], Any]:
    def make(superlink: FakeSuperLink) -> Any:
        monkeypatch.setattr(gateway, "deployed_connection", lambda *_: superlink)
        return gateway.drive(gateway.GatewaySettings(name="north"))

    return make


def config_of(small_config: Callable[..., RunConfig]) -> tuple[RunConfig, Path]:
    config = small_config()
    run_dir = Path(str(config.run_dir))
    run_dir.mkdir()
    return config, run_dir


def test_a_finished_assignment_ends_the_wait(
    small_config: Callable[..., RunConfig], drive: Callable[[FakeSuperLink], Any]
) -> None:
    config, run_dir = config_of(small_config)
    superlink = FakeSuperLink(finish)
    assign(run_dir)
    drive(superlink)(config, False)
    assert superlink.submitted == [("1", False)]
    assert not superlink.stopped


def test_why_an_assignment_failed_is_told(
    small_config: Callable[..., RunConfig], drive: Callable[[FakeSuperLink], Any]
) -> None:
    config, run_dir = config_of(small_config)
    assign(run_dir)
    with pytest.raises(RunError, match="both members are gone"):
        drive(FakeSuperLink(lambda folder: finish(folder, "both members are gone")))(config, False)


def test_a_gateway_that_comes_back_finds_the_run_of_the_same_order(
    small_config: Callable[..., RunConfig], drive: Callable[[FakeSuperLink], Any]
) -> None:
    config, run_dir = config_of(small_config)
    superlink = FakeSuperLink(finish)
    key = assign(run_dir).key
    (run_dir / gateway.RUNNING).write_text(json.dumps({"run_id": "7", "assignment": key}))
    superlink.running.add("7")
    original = superlink.status

    def ends_meanwhile(run_id: str) -> str:
        status = original(run_id)
        finish(run_dir)
        return status

    superlink.status = ends_meanwhile  # type: ignore[method-assign]
    drive(superlink)(config, True)
    assert not superlink.submitted
    assert not superlink.stopped


@pytest.mark.parametrize("begins", [0, 1])
def test_the_run_of_an_earlier_order_is_stopped_and_what_it_did_since_forgotten(
    small_config: Callable[..., RunConfig], drive: Callable[[FakeSuperLink], Any], begins: int
) -> None:
    config, run_dir = config_of(small_config)
    superlink = FakeSuperLink(finish)
    (run_dir / gateway.RUNNING).write_text(json.dumps({"run_id": "7", "assignment": "another"}))
    superlink.running.add("7")
    store = CheckpointStore(run_dir / "checkpoints", keep=9)
    for number in range(3):
        state = ServerState(
            run_id="r",
            round=number,
            global_step=0,
            tokens=0,
            vocab_size=8,
            sequence_length=4,
            tokenizer_sha256="t",
        )
        store.save(state, {"w": torch.zeros(2)}, {})
    assign(run_dir, server_round=2, begins=begins)
    drive(superlink)(config, True)
    assert superlink.stopped == ["7"]
    assert store.rounds() == ([0, 1] if begins else [])
    assert superlink.submitted == [("1", begins > 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: north\nrunds: 2\n", "runds: unknown key; did you mean 'rounds'"),
        ("connection: north\n", "name"),
        ("name: north\nchildren: [a]\n", "the members are those of its SuperLink"),
        ("name: north\nrounds: 0\n", "rounds=0"),
        ("name: no/rth\n", "'no/rth' is not a name"),
        ("- north\n", "expected name"),
        ("name: [\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "north.yaml"
    file.write_text(text)
    with pytest.raises(PhotonError, match=message) as error:
        gateway.read_gateway(file)
    assert "\n" not in str(error.value)


def test_rules_of_the_node_are_read(tmp_path: Path) -> None:
    file = tmp_path / "north.yaml"
    file.write_text("name: north\nsilos: 3\nrounds: 2\nprivacy: {clip_norm: 1.0}\n")
    settings = gateway.read_gateway(file)
    assert settings.node.rounds == 2
    assert settings.node.privacy == {"clip_norm": 1.0}
    assert settings.node.is_silo, "its members are not in the tree"
    assert gateway.below(settings)["silos"] == 3


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        # What the run above is made from lies with those who started it.
        ["adapter=lora", "model.warm_start=elsewhere"],
        ["evaluation.tasks=[a_task_of_their_own]", "evaluation.task_data=elsewhere"],
    ],
)
def test_what_a_gateway_submits_can_begin(
    overrides: list[str], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    above = small_config(*overrides, "strategy=worldlm", "cohort=null")
    sent = above.model_copy(update={"model": above.model.model_copy(update={"warm_start": None})})
    site = SiloSite(tmp_path / "state", tmp_path / "state", None, NO_POLICY, above.privacy)
    settings = gateway.GatewaySettings(name="north", silos=2)
    own = member_config(sent, settings.node, tmp_path / "north", site, gateway.below(settings))
    config = prepare_run(preflight(parse(own.text)))
    assert config.federation.engine == "deployment"
    assert config.run_dir == str(tmp_path / "north")
