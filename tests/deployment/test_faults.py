"""Things die, hang, fill up and lie; the run goes on, or goes on later, and loses nothing.

A fault is a row of a table: steps that are taken while a round is under way, and what the events must then
say. Several faults strike one run, each in a round of its own, because a deployed round is slow. Whatever
struck, the run must end with the very weights and ledger of an undisturbed run in which the same silos were
absent from the same rounds: so no window was trained into the model twice, and none was skipped.
"""

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import RecordDict

from photon.client_app import answer
from photon.deployment.local import SUPEREXEC, SUPERLINK
from photon.engine.deployment import COMPLETED
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError
from photon.federation.run import prepare_run, run_federation
from photon.link.answer import MessageType, NodeConfig
from photon.link.messages import TrainRequest, unpack
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import (
    Checkpointed,
    Event,
    RoundFinished,
    RoundStarted,
    RunInterrupted,
    RunStarted,
    SiloFailed,
    SiloFinished,
)
from photon.telemetry.log import read_events
from tests.conftest import SEQUENCE_LENGTH, small_run, write_corpus
from tests.deployment.harness import DeployedRun, Deployment, wait_until
from tests.deployment.pace import HoldRounds

_logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(3000)]

STEPS, BATCH = 4, 4
#: Seconds a round may take. An ordinary one takes 5 s, and on a machine with other work ten times that.
DEADLINE = 120.0
#: Bytes a file may have on a full disk: more than logs need, less than a state of the model below.
FULL = 512 * 2**10
#: A megabyte of parameters, so that its files can be told from small ones by their size.
RUN = [
    *("model.architecture.n_embd=128", "cohort=null", f"local_steps={STEPS}", f"training.batch_size={BATCH}"),
    *(f"federation.deadline={DEADLINE}", "federation.quorum=1", "evaluation.every=1000"),
]


class Scene:
    """A run under way, and the steps with which faults disturb its current round."""

    def __init__(
        self, deployment: Deployment, run: DeployedRun, overrides: list[str], store: Path, paces: Path
    ) -> None:
        self.deployment = deployment
        self.run = run
        self.round = 1
        self._overrides = overrides
        self._store = store
        self._paces = paces
        self._starts: dict[str, int] = {}

    def next_round(self) -> None:
        """Wait until the next round has begun. Its requests go out with the first step that waits."""
        self._let_go()
        self.round += 1
        self.run.wait_for(lambda _: self._started() is not None, f"round {self.round}")

    def halt(self, silo: str) -> None:
        """Halt the silo's worker, so that its ClientApp waits."""
        self.deployment.worker(silo).suspend()

    def wake(self, silo: str) -> None:
        """Let the silo's worker go on."""
        self.deployment.worker(silo).resume()

    def asked(self, silo: str) -> None:
        """Wait until the silo has the round's request: in a message of its own, or in the store."""
        self._let_go()
        begin = self._started()
        assert begin is not None

        def has_message() -> bool:
            apps = self.deployment.children(silo, "flwr-clientapp")
            return any(child.create_time() > begin.time for child in apps)

        def has_file() -> bool:
            # The worker is halted, so its request stays there.
            files = list(self._store.glob(f"standing/*/*-{self._node_id(silo)}/ask-*"))
            return any(file.stat().st_mtime > begin.time for file in files)

        self.run.wait_for(lambda _: has_message() or has_file(), f"{silo} at work")

    def failed(self, silo: str) -> None:
        """Wait until the server has noticed that the silo failed."""
        self._let_go()
        self.run.wait_for(
            lambda events: any(
                isinstance(e, SiloFailed) and (e.round, e.silo) == (self.round, silo) for e in events
            ),
            f"the failure of {silo}",
        )

    def kill(self, program: str) -> None:
        """End a program outright."""
        self._starts[program] = len(self._node_ids(program))
        self.deployment.kill(program)

    def back(self, silo: str) -> None:
        """Wait until a SuperNode that was killed is let in again: until then it may pass for online."""
        self._let_go()
        wait_until(lambda: len(self._node_ids(silo)) > self._starts[silo], f"{silo} back", pause=1.0)

    def start(self, program: str) -> None:
        """Start a program, and wait until it answers if it is the SuperLink."""
        self.deployment.start(program)
        if program == SUPERLINK:
            self.deployment.federation.wait_until_up(self.deployment.processes[SUPERLINK])

    def supervise(self, silo: str) -> None:
        """Start a SuperNode anew as often as it takes."""
        self.deployment.start(silo, supervised=True)

    def all_online(self) -> None:
        """Wait until every silo is online."""
        self._let_go()
        self.deployment.wait_online(len(self.deployment.federation.silos))

    def fill_disk(self, silo: str) -> None:
        """Leave no room on the silo's disk."""
        self.deployment.limit_files(silo, FULL)

    def free_disk(self, silo: str) -> None:
        """Make room again."""
        self.deployment.limit_files(silo, psutil.RLIM_INFINITY)

    def halt_server(self) -> None:
        """Halt the ServerApp."""
        self._server().suspend()

    def wake_server(self) -> None:
        """Let the ServerApp go on."""
        self._server().resume()

    def kill_server(self) -> None:
        """End the ServerApp outright."""
        self._server().kill()

    def damage_reply(self) -> None:
        """Change a byte of the one reply of this round that lies in the store, as soon as it is there."""
        pattern = f"*/round-{self.round:06d}/up-*"
        wait_until(lambda: any(self._store.glob(pattern)), "a reply in the store")
        (reply,) = self._store.glob(pattern)
        with open(reply, "r+b") as file:
            file.seek(reply.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 0x40]))

    def resume(self) -> None:
        """Wait until the run has ended, and go on with it."""
        self._let_go()
        wait_until(lambda: self.run.status().startswith("finished"), "the run's end", pause=2.0)
        assert self.run.status() != COMPLETED
        self.run = self.deployment.submit(self._overrides, run_dir=self.run.run_dir, resume=True)

    def _started(self) -> Event | None:
        """Return the event that the current round began with, if it has begun."""
        begun = (e for e in self.run.events() if isinstance(e, RoundStarted) and e.round == self.round)
        return next(begun, None)

    def _let_go(self) -> None:
        """Let the requests of the current round go out, where it is held."""
        self._paces.mkdir(exist_ok=True)
        (self._paces / f"go-{self.round}").touch()

    def _node_id(self, silo: str) -> str:
        """Return the node of a silo, as its SuperNode told it."""
        return self._node_ids(silo)[-1]

    def _node_ids(self, program: str) -> list[str]:
        """Return what a SuperNode was told whenever it was let in."""
        log = self.deployment.program(program).log.read_text(errors="replace")
        return re.findall(r"SuperNode ID: (\d+)", log)

    def _server(self) -> psutil.Process:
        (server,) = self.deployment.children(SUPEREXEC, "flwr-serverapp")
        return server


Step = tuple[Any, ...]


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a round.

    Attributes
    ----------
    name
        What it is, in words.
    steps
        Methods of :class:`Scene`, and what they are called with.
    failed
        Silo to the kind of its failure, and words in the reason.
    interrupted
        Words in the reason for which the run stopped; None: it told no more, or did not stop.
    """

    name: str
    steps: tuple[Step, ...]
    failed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    interrupted: str | None = None


HANGS = Fault(
    "a silo hangs",
    ((Scene.halt, "beta"), (Scene.failed, "beta"), (Scene.wake, "beta")),
    {"beta": ("deadline", f"no reply within {DEADLINE:g} s (federation.deadline)")},
)
DAMAGED = Fault(
    "a reply is damaged",
    (
        *((Scene.halt, "alpha"), (Scene.halt, "beta"), (Scene.asked, "alpha"), (Scene.asked, "beta")),
        *((Scene.halt_server,), (Scene.wake, "alpha"), (Scene.damage_reply,)),
        *((Scene.wake, "beta"), (Scene.wake_server,), (Scene.failed, "alpha")),
    ),
    {"alpha": ("rejected", "BLAKE3 hash differs")},
)
DISK_FULL = Fault(
    "a silo's disk is full",
    ((Scene.fill_disk, "alpha"), (Scene.failed, "alpha"), (Scene.free_disk, "alpha")),
    {"alpha": ("error", "File too large")},
)
JOINS = Fault(
    "a silo joins while a round is under way",
    ((Scene.halt, "alpha"), (Scene.start, "beta"), (Scene.all_online,), (Scene.wake, "alpha")),
)
CALM = Fault("nothing, so that the silo that joined has a state to go on from", ())
KILLED = Fault(
    "a SuperNode is killed and comes back",
    (
        *((Scene.halt, "beta"), (Scene.asked, "beta"), (Scene.kill, "beta"), (Scene.wake, "beta")),
        *((Scene.supervise, "beta"), (Scene.failed, "beta"), (Scene.next_round,)),
        *((Scene.halt, "alpha"), (Scene.back, "beta"), (Scene.all_online,), (Scene.wake, "alpha")),
    ),
    {"beta": ("unavailable", "")},
)
SERVER_KILLED = Fault(
    "the ServerApp is killed",
    (
        (Scene.halt, "beta"),
        (Scene.asked, "beta"),
        (Scene.kill_server,),
        (Scene.wake, "beta"),
        (Scene.resume,),
    ),
)
SUPERLINK_KILLED = Fault(
    "the SuperLink is killed and starts again",
    (
        *((Scene.halt, "beta"), (Scene.asked, "beta"), (Scene.kill, SUPERLINK)),
        *((Scene.start, SUPERLINK), (Scene.all_online,), (Scene.wake, "beta")),
    ),
)
QUORUM_MISSED = Fault(
    "too many silos hang",
    (
        *((Scene.halt, "alpha"), (Scene.halt, "beta"), (Scene.failed, "beta")),
        *((Scene.wake, "alpha"), (Scene.wake, "beta"), (Scene.resume,)),
    ),
    {"alpha": ("deadline", "federation.deadline"), "beta": ("deadline", "federation.deadline")},
    interrupted="2 of 2 silos failed, beyond federation.quorum=1",
)


@dataclass(frozen=True)
class Campaign:
    """Faults that strike one run, from round 2 on, and the silos that are there when it starts."""

    faults: tuple[Fault, ...]
    rounds: int
    secure: bool = False
    silos: tuple[str, ...] = ("alpha", "beta")


#: After the last fault comes a round in which everybody must take part.
CAMPAIGNS = {
    "silos": Campaign((DAMAGED, HANGS, DISK_FULL), rounds=5),
    "nodes": Campaign((JOINS, CALM, KILLED), rounds=6, secure=True, silos=("alpha",)),
    "aggregator": Campaign((SERVER_KILLED, SUPERLINK_KILLED, QUORUM_MISSED), rounds=5),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with two silos."""
    return write_corpus(tmp_path_factory.mktemp("pair"), {"alpha": "abcdefgh", "beta": "ijklmnop"})


#: A message for every request, and standing requests.
MODES = {"messages": [], "standing": ["federation.lease=10"]}


def held(paces: Path, rounds: int) -> str:
    """Return the setting that has each round but the first and the last wait for its fault."""
    log = "{_target_: photon.telemetry.log.event_log}"
    hold = f"_target_: {HoldRounds.__module__}.HoldRounds, folder: {paces}, first: 2, last: {rounds - 1}"
    return f"telemetry.listeners=[{log}, {{{hold}}}]"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_nothing_is_lost(name: str, mode: str, pair: Path, tmp_path: Path) -> None:
    campaign, store = CAMPAIGNS[name], tmp_path / "store"
    overrides = [*RUN, f"rounds={campaign.rounds}", f"federation.silos={len(campaign.silos)}"]
    paces = tmp_path / "paces"
    stored = ["link.transport=store", f"link.store.url={store}", *MODES[mode], held(paces, campaign.rounds)]
    struck: dict[int, Fault] = {}
    with Deployment(
        tmp_path / "fed", pair, secure=campaign.secure, node_config=f'store-url="{store}"'
    ) as deployment:
        deployment.up(campaign.silos)
        run = deployment.submit([*overrides, *stored])
        scene = Scene(deployment, run, [*overrides, *stored], store, paces)
        for fault in campaign.faults:
            scene.next_round()
            begin = time.monotonic()
            struck[scene.round] = fault
            for action, *arguments in fault.steps:
                action(scene, *arguments)
            _logger.info("%s, round %d: %.0f s", fault.name, scene.round, time.monotonic() - begin)
        assert scene.run.wait() == COMPLETED, scene.run.log()
    events = run.events()
    _check_told(events, struck, campaign.rounds)
    accepted = _accepted(events)
    assert accepted[campaign.rounds] == {"alpha", "beta"}
    _check_same_as_undisturbed(run.run_dir, accepted, [*overrides, "federation.silos=2"], pair, tmp_path)
    for silo in ("alpha", "beta"):
        _check_trained_once(deployment.state_folder(silo) / silo, run.run_dir, silo, struck)


def _check_told(events: list[Event], struck: Mapping[int, Fault], rounds: int) -> None:
    """Check that the events tell every fault and nothing else, and every round once."""
    for kind in (RoundFinished, Checkpointed):
        assert [event.round for event in events if isinstance(event, kind)] == list(range(1, rounds + 1))
    failures = [event for event in events if isinstance(event, SiloFailed)]
    for failure in failures:
        _logger.info("round %d: %s %s: %s", failure.round, failure.silo, failure.kind, failure.reason)
    expected = {
        (number, silo): told for number, fault in struck.items() for silo, told in fault.failed.items()
    }
    assert {(event.round, event.silo): event.kind for event in failures} == {
        key: kind for key, (kind, _) in expected.items()
    }
    assert len(failures) == len(expected)
    for event in failures:
        assert expected[event.round, event.silo][1] in event.reason
    resumed = [event.resumed_from for event in events if isinstance(event, RunStarted)]
    stopped = [number for number, fault in struck.items() if (Scene.resume,) in fault.steps]
    assert resumed == [None, *(number - 1 for number in stopped)]
    reasons = [event.reason for event in events if isinstance(event, RunInterrupted)]
    words = [fault.interrupted for fault in struck.values() if fault.interrupted]
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def _accepted(events: list[Event]) -> dict[int, set[str]]:
    """Return whose replies counted, by round; of a round that began twice, the second time."""
    accepted: dict[int, set[str]] = {}
    for event in events:
        if isinstance(event, RoundStarted):
            accepted[event.round] = set()
        elif isinstance(event, SiloFinished):
            accepted[event.round].add(event.silo)
    return accepted


def _check_same_as_undisturbed(
    run_dir: Path, accepted: Mapping[int, set[str]], overrides: list[str], data: Path, folder: Path
) -> None:
    """Check weights and ledger against an in-process run in which the same silos were absent."""

    def with_absences(message_type: MessageType, content: RecordDict, node_config: NodeConfig) -> RecordDict:
        if message_type == "train":
            request = unpack(content, TrainRequest)
            if request.silo not in accepted[request.round]:
                raise PhotonError("absent")
        return answer(message_type, content, node_config)

    reference = folder / "reference"
    config = prepare_run(small_run(*overrides, data=data, run_dir=reference))
    grid = InProcessGrid(with_absences, {1: {}})
    summary = run_federation(config, grid, resume=False, live=False)
    assert _accepted(read_events(reference / "events.jsonl")) == accepted
    assert json.loads((run_dir / "summary.json").read_text())["weights_sha256"] == summary["weights_sha256"]
    here, there = (_ledger(path) for path in (run_dir, reference))
    counts = defaultdict(int)
    for silos in accepted.values():
        for silo in silos:
            counts[silo] += 1
    for silo, count in counts.items():
        assert here[silo].position == count * STEPS * BATCH
        assert here[silo].tokens == there[silo].tokens
        assert here[silo].last_round == there[silo].last_round


def _check_trained_once(state: Path, run_dir: Path, silo: str, struck: Mapping[int, Fault]) -> None:
    """Check that a silo trained what was accepted, and beyond that no more than the rounds that failed.

    It counts before it works, so one that was killed has counted what it began again.
    """
    (used,) = json.loads((state / "counts.json").read_text())["content"].values()
    wasted = used["tokens"] - _ledger(run_dir)[silo].tokens
    lost = sum(silo in fault.failed or fault.interrupted is not None for fault in struck.values())
    assert 0 <= wasted <= lost * STEPS * BATCH * SEQUENCE_LENGTH


def _ledger(run_dir: Path) -> Mapping[str, Any]:
    return CheckpointStore(run_dir / "checkpoints").latest()[0].state.ledger
