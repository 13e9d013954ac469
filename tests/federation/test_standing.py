"""One message for many rounds: the run is that of ordinary messages, whatever happens to it on the way."""

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from photon.config.schema import RunConfig
from photon.errors import PhotonError, RunError
from photon.federation import standing
from photon.federation.run import prepare_run, run_federation
from photon.federation.waiting import Waiting
from photon.flower_compat import assign_message_id, ensure_task_identity
from photon.link.answer import MessageType, NodeConfig, is_standing, reply_to
from photon.link.messages import Stand
from photon.link.standing import ALIVE, LEASE, Channel, Heart, Pulse, end_frame
from photon.link.store import FolderStore
from photon.node import answer
from photon.silo.standing import stand
from photon.telemetry.events import Notice, RoundStarted, SiloFailed
from photon.telemetry.log import read_events
from tests.conftest import SMALL_DEPLOYED, composed

RUN = [*SMALL_DEPLOYED, "federation.silos=2", "cohort=null", "federation.wait_for_silos=20"]
#: Torch draws from one generator, and what two nodes do at once would not repeat.
_TORCH = threading.Lock()


@dataclass
class NodeInfo:
    node_id: int
    public_key: bytes = b""
    last_activated_at: str = "today"


@dataclass
class Nodes(Grid):
    """SuperNodes as threads: each takes one message at a time, and stays at it until it is answered."""

    nodes: dict[int, NodeConfig]
    #: May change what a node answers, or raise.
    between: Callable[[int, MessageType, RecordDict], None] = lambda *_: None
    #: Types of the messages that came, by node, and of the requests that were answered.
    came: list[tuple[int, str]] = field(default_factory=list)
    answered: list[tuple[int, str]] = field(default_factory=list)
    #: When a node has come back.
    since: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ensure_task_identity()
        self._replies: dict[str, Message] = {}
        self._queues: dict[int, queue.Queue[Message]] = {node: queue.Queue() for node in self.nodes}
        for node in self.nodes:
            threading.Thread(target=self._serve, args=(node,), daemon=True).start()

    run = property(lambda self: None)

    def set_run(self, run: object) -> None: ...

    def create_message(self, *_: object) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: object, *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[Any]:
        return [NodeInfo(node, last_activated_at=self.since.get(node, "today")) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            identifiers.append(assign_message_id(message))
            kind = "stand" if is_standing(message.content) else message.metadata.message_type
            self.came.append((message.metadata.dst_node_id, kind))
            self._queues[message.metadata.dst_node_id].put(message)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for identifier in message_ids:
            if identifier in self._replies:
                yield self._replies.pop(identifier)

    def _serve(self, node: int) -> None:
        def act(kind: MessageType, content: RecordDict, config: NodeConfig) -> RecordDict:
            if not is_standing(content):
                self.between(node, kind, content)
                self.answered.append((node, kind))
            with _TORCH:
                return answer(kind, content, config)

        while True:
            message = self._queues[node].get()
            act_on = partial(stand, answer=act) if is_standing(message.content) else act
            kind = message.metadata.message_type
            with contextlib.suppress(SystemExit):
                reply = reply_to(message, kind, self.nodes[node], act_on)
                self._replies[message.metadata.message_id] = reply


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def nodes_of(folders: dict[str, Path], tmp_path: Path, **more: Any) -> Nodes:
    return Nodes(
        {
            number: {
                "data-dir": str(folder),
                "state-dir": str(tmp_path / f"state-{name}"),
                "store-url": str(tmp_path / "store"),
            }
            for number, (name, folder) in enumerate(folders.items(), 1)
        },
        **more,
    )


def config_of(tmp_path: Path, *overrides: str, lease: float | None = 5.0, name: str = "run") -> RunConfig:
    store = [f"link.store.url={tmp_path / 'store'}", f"federation.lease={'null' if lease is None else lease}"]
    return composed(*RUN, *store, *overrides).model_copy(update={"run_dir": str(tmp_path / name)})


def trained(config: RunConfig, grid: Grid, *, resume: bool = False) -> dict[str, Any]:
    return run_federation(prepare_run(config), grid, resume=resume, live=False)


@pytest.fixture(scope="module")
def weights(silo_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the weights that ordinary messages lead to."""
    folder = tmp_path_factory.mktemp("messages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHOTON_HOME", str(folder / "home"))
        summary = trained(config_of(folder, lease=None), nodes_of(silo_folders, folder))
    return str(summary["weights_sha256"])


@pytest.fixture
def expected(weights: str, home: Path) -> str:
    """The same, for a run in a home of its own."""
    return weights


def notices(tmp_path: Path) -> list[str]:
    return [e.message for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, Notice)]


def failures(tmp_path: Path) -> list[tuple[int, str, str]]:
    events = read_events(tmp_path / "run" / "events.jsonl")
    return [(e.round, e.silo, e.kind) for e in events if isinstance(e, SiloFailed)]


@pytest.mark.few(1)
@pytest.mark.parametrize("link", ["link.transport=auto", "link.transport=store"])
def test_a_run_of_standing_requests_is_that_of_messages(
    link: str, silo_folders: dict[str, Path], tmp_path: Path, home: Path
) -> None:
    summaries = {}
    for lease in (None, 5.0):
        folder = tmp_path / str(lease)
        grid = nodes_of(silo_folders, folder)
        summaries[lease] = trained(config_of(folder, link, lease=lease), grid)
        kinds = [kind for _, kind in grid.came]
        # Descriptions and the evaluation of round 0 come before the first training.
        assert kinds.count("train") == (0 if lease else 6)
        assert kinds.count("stand") == (2 if lease else 0)
        assert kinds.count("evaluate") == (2 if lease else 8)
        assert [kind for _, kind in grid.answered].count("train") == 6
    assert summaries[5.0]["weights_sha256"] == summaries[None]["weights_sha256"]
    assert summaries[5.0]["bytes"]["per_group"] == summaries[None]["bytes"]["per_group"]
    # Nothing is left in the store, and both nodes said how many they had answered.
    assert not list((tmp_path / "5.0" / "store").rglob("ask-*"))
    assert notices(tmp_path / "5.0") == []


def test_new_ones_take_their_turn(
    silo_folders: dict[str, Path], tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "MOST_REQUESTS", 2)
    grid = nodes_of(silo_folders, tmp_path)
    assert trained(config_of(tmp_path), grid)["weights_sha256"] == expected
    # Two requests for each: train 1, evaluate 1 | train 2, evaluate 2 | train 3, evaluate 3.
    assert grid.came.count((1, "stand")) == grid.came.count((2, "stand")) == 3
    assert notices(tmp_path) == []


def test_a_node_that_will_not_stand_gets_messages(
    silo_folders: dict[str, Path], tmp_path: Path, expected: str
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("standing: false\nmin_round_windows: null\nchosen_positions: true\n")
    grid = nodes_of(silo_folders, tmp_path)
    grid.nodes[1] = {**grid.nodes[1], "policy": str(policy)}
    assert trained(config_of(tmp_path), grid)["weights_sha256"] == expected
    assert grid.came.count((1, "stand")) == grid.came.count((2, "stand")) == 1
    assert grid.came.count((1, "train")) == 3
    assert grid.came.count((2, "train")) == 0
    (said,) = notices(tmp_path)
    assert "node 1 is asked by ordinary messages: refused by the node's policy: standing=false" in said


def test_a_run_that_stopped_goes_on(silo_folders: dict[str, Path], tmp_path: Path, expected: str) -> None:
    tried: list[int] = []

    def fail_once(node: int, kind: MessageType, content: RecordDict) -> None:
        if (node, kind) == (1, "train"):
            tried.append(node)
            if len(tried) == 2:
                raise PhotonError("not now")

    grid = nodes_of(silo_folders, tmp_path, between=fail_once)
    config = config_of(tmp_path, "federation.quorum=2")
    with pytest.raises(RunError, match=r"federation\.quorum=2"):
        trained(config, grid)
    assert failures(tmp_path) == [(2, "alpha", "error")]
    assert trained(config, grid, resume=True)["weights_sha256"] == expected
    assert grid.came.count((1, "stand")) == grid.came.count((2, "stand")) == 2
    assert not list((tmp_path / "store").rglob("ask-*"))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "kind",
    [
        [
            "privacy.secure_aggregation=true",
            "privacy.clip_norm=1.0",
            "link.uplink_payload=update",
            "strategy.weighting=uniform",
        ],
        ["strategy=scaffold", "optimizer=sgd"],
        [
            "strategy=diloco",
            "link.downlink_payload=update",
            "link.uplink_payload=update",
            "strategy.weighting=uniform",
        ],
    ],
    ids=["secure", "scaffold", "changes"],
)
def test_what_rounds_are_made_of_makes_no_difference(
    kind: list[str], silo_folders: dict[str, Path], tmp_path: Path, home: Path
) -> None:
    weights = set()
    for lease in (None, 5.0):
        folder = tmp_path / str(lease)
        grid = nodes_of(silo_folders, folder)
        summary = trained(config_of(folder, "rounds=2", *kind, lease=lease), grid)
        weights.add(summary["weights_sha256"])
        assert failures(folder) == []
        assert grid.came.count((1, "train")) == (0 if lease else 2)
    assert len(weights) == 1


def test_a_policy_holds_from_the_next_round_on(
    silo_folders: dict[str, Path], tmp_path: Path, home: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_local_steps: 100\n")

    def forbid(node: int, kind: MessageType, content: RecordDict) -> None:
        if (node, kind) == (1, "evaluate") and grid.answered.count((1, "train")) == 2:
            policy.write_text("max_local_steps: 1\n")

    grid = nodes_of(silo_folders, tmp_path, between=forbid)
    grid.nodes[1] = {**grid.nodes[1], "policy": str(policy)}
    trained(config_of(tmp_path), grid)
    assert failures(tmp_path) == [(3, "alpha", "refused")]
    assert grid.came.count((1, "train")) == 0


def test_another_run_is_told_and_gets_its_turn(
    silo_folders: dict[str, Path], tmp_path: Path, expected: str
) -> None:
    other = Waiting(tmp_path / "other")
    held: list[str | None] = []

    def interrupt(node: int, kind: MessageType, content: RecordDict) -> None:
        if (node, kind) == (1, "train") and grid.answered.count((1, "train")) == 1:
            assert not other.hold(1)
            held.append(other.holder(1))
            other.want(1)
            # Until the run has looked.
            time.sleep(1.2)
        if (node, kind) == (1, "train") and grid.answered.count((1, "train")) == 2:
            # It was let go, and stays free for as long as it is wanted.
            held.append(other.holder(1))
            time.sleep(1.2)

    grid = nodes_of(silo_folders, tmp_path, between=interrupt)
    assert trained(config_of(tmp_path), grid)["weights_sha256"] == expected
    assert held == [str(tmp_path / "run"), None]
    assert grid.came.count((1, "train")) >= 1
    assert grid.came.count((2, "train")) == 0
    other.close()


def test_who_waits_for_a_node_says_why(silo_folders: dict[str, Path], tmp_path: Path, expected: str) -> None:
    other = Waiting(tmp_path / "other")
    assert other.hold(1)
    grid = nodes_of(silo_folders, tmp_path)
    assert trained(config_of(tmp_path), grid)["weights_sha256"] == expected
    assert grid.came.count((1, "stand")) == 0
    (said,) = notices(tmp_path)
    assert f"node 1 answers the standing request of the run {tmp_path / 'other'}" in said
    assert not other.wanted(), "the run is over, and waits no more"
    other.close()


def test_a_node_that_dies_is_noticed_within_the_lease(
    silo_folders: dict[str, Path], tmp_path: Path, home: Path
) -> None:
    begin: list[float] = []

    def die(node: int, kind: MessageType, content: RecordDict) -> None:
        if (node, kind) == (1, "train") and len(begin) == 0 and grid.answered.count((1, "train")) == 1:
            begin.append(time.monotonic())
            raise SystemExit
        if (node, kind) == (2, "train") and grid.answered.count((2, "train")) == 3:
            grid.since[1] = "a moment ago"

    grid = nodes_of(silo_folders, tmp_path, between=die)
    trained(config_of(tmp_path, "rounds=5", lease=2.0), grid)
    # It neither trains nor evaluates in that round, and is not drawn again until it has come back.
    assert failures(tmp_path) == [(2, "alpha", "unavailable")] * 2
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [len(e.cohort) for e in events if isinstance(e, RoundStarted)] == [2, 2, 1, 1, 2]
    assert grid.came.count((1, "stand")) == 2
    assert grid.came.count((1, "train")) == 0


def test_a_node_whose_supernode_is_gone_answers_no_more(
    silo_folders: dict[str, Path], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker has ended with the SuperNode, which must not become an answer of the silo."""
    gone = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    process = psutil.Process(gone.pid)
    monkeypatch.setattr("photon.silo.standing.owner", lambda: process)

    def lose(node: int, kind: MessageType, content: RecordDict) -> None:
        if kind == "train" and grid.answered.count((1, "train")) == 1:
            gone.kill()
            gone.wait()
            raise PhotonError("silo worker: it ended while at work")

    grid = nodes_of({"alpha": silo_folders["alpha"]}, tmp_path, between=lose)
    config = config_of(tmp_path, "federation.silos=1", "federation.max_failures=0", lease=2.0)
    with pytest.raises(RunError):
        trained(config, grid)
    assert failures(tmp_path) == [(2, "alpha", "unavailable")]


def channel(folder: Path, key: str = "0" * 64, lease: float = 2.0) -> Channel:
    return Channel(FolderStore(folder), Stand(channel="standing/one", key=key, lease=lease))


def test_a_node_notices_that_the_server_is_gone(tmp_path: Path) -> None:
    ours = channel(tmp_path)
    heart = Heart(2.0, LEASE)
    heart.add(ours)
    pulse = Pulse(ours, LEASE)
    time.sleep(2.5)
    assert not pulse.is_lost(), "it beats"
    heart.stop()
    begin = time.monotonic()
    while not pulse.is_lost():
        time.sleep(0.02)
    assert time.monotonic() - begin < 2.3
    # Removed: at once.
    other = Pulse(ours, LEASE)
    assert not other.is_lost()
    FolderStore(tmp_path).remove("standing")
    time.sleep(0.25)
    assert other.is_lost()
    assert other.was_felt


def test_what_others_write_to_a_channel_is_refused(tmp_path: Path) -> None:
    ours, stranger = channel(tmp_path), channel(tmp_path, key="1" * 64)
    ours.ask(1, end_frame())
    frame = ours.asked(1)
    assert frame is not None
    assert frame.fields == {"end": True}
    assert ours.asked(2) is None
    stranger.ask(2, end_frame())
    with pytest.raises(PhotonError, match="not written by the other side"):
        ours.asked(2)
    # A request is no answer, and not another request.
    folder = tmp_path / "standing" / "one"
    for name in ("answer-00000001", "ask-00000003"):
        (folder / name).write_bytes((folder / "ask-00000001").read_bytes())
    with pytest.raises(PhotonError, match="not written by the other side"):
        ours.answered(1)
    with pytest.raises(PhotonError, match="not written by the other side"):
        ours.asked(3)
    for damage in (lambda data: data[:20], lambda data: data[:-1] + b"x", lambda data: b""):
        (folder / "ask-00000004").write_bytes(damage((folder / "ask-00000001").read_bytes()))
        with pytest.raises(PhotonError, match="not written by the other side"):
            ours.asked(4)
    assert ours.heard(ALIVE) is None


def test_a_run_without_a_way_for_them_is_refused(small_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(PhotonError, match="standing requests are of a deployment"):
        small_config("federation.lease=30")
    for link in ("link.transport=auto", "link.transport=inline link.store.url=/s"):
        with pytest.raises(PhotonError, match="go through a store"):
            small_config("federation=deployment", "federation.lease=30", *link.split())
