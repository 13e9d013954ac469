"""Local steps by speed, and a wait that is learnt from earlier rounds."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from photon.client_app import answer
from photon.config.schema import RunConfig
from photon.engine.inprocess import InProcessGrid
from photon.federation.exchange import StragglerTimeout, exchange
from photon.federation.pace import adaptive_local_steps, learnt_timeout
from photon.federation.run import prepare_run, run_federation
from photon.link.messages import BODY, TrainReport, TrainRequest, pack, unpack
from photon.state.checkpoint import CheckpointStore, LedgerEntry
from photon.state.tensors import load_groups
from photon.telemetry.events import RoundStarted, SiloFailed, SiloFinished
from photon.telemetry.log import read_events
from tests.federation.test_exchange import ScriptedGrid, messages, name_of

Make = Callable[..., RunConfig]


def entry(speed: float | None = None, arrival: float | None = None) -> LedgerEntry:
    return LedgerEntry(last_round=1, steps_per_second=speed, arrival_seconds=arrival)


# --- steps by speed -----------------------------------------------------------------------------------


def test_steps_follow_speed_within_their_bounds() -> None:
    ledger = {"fast": entry(10.0), "half": entry(5.1), "slow": entry(0.001), "absent": entry(99.0)}
    cohort = ["fast", "half", "new", "slow"]
    assert adaptive_local_steps(64, cohort, ledger) == {"fast": 64, "half": 33, "new": 64, "slow": 1}
    assert adaptive_local_steps(64, ["half", "slow"], ledger) == {"half": 64, "slow": 1}, (
        "the cohort's own fastest"
    )
    assert adaptive_local_steps(64, ["slow"], ledger) == {"slow": 64}
    assert adaptive_local_steps(64, ["new", "old"], {"old": entry()}) == {"new": 64, "old": 64}


def test_one_that_claims_a_speed_that_nobody_has_changes_little() -> None:
    ledger = {"liar": entry(1e9), "a": entry(10.0), "b": entry(11.0)}
    assert adaptive_local_steps(64, list(ledger), ledger) == {"liar": 64, "a": 6, "b": 6}


class SlowSilo(InProcessGrid):
    """Lets silos report speeds that differ by fixed factors; notes the requests."""

    def __init__(self, seconds_per_step: dict[str, float]) -> None:
        super().__init__(answer, {1: {}})
        self._seconds = seconds_per_step
        self.requests: list[TrainRequest] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        kept = list(messages)
        self.requests += [unpack(m.content, TrainRequest) for m in kept if m.metadata.message_type == "train"]
        return super().push_messages(kept)

    def pull_messages(self, message_ids: Any) -> Any:
        for reply in super().pull_messages(message_ids):
            if reply.metadata.message_type == "train" and not reply.has_error():
                report = unpack(reply.content, TrainReport)
                took = report.steps * self._seconds[report.silo]
                seconds = report.seconds | {"training": took, "total": took}
                reply.content[BODY] = pack(report.model_copy(update={"seconds": seconds}))
            yield reply

    def steps(self) -> dict[tuple[int, str], int]:
        return {(request.round, request.silo): request.steps for request in self.requests}


SPEEDS = {"alpha": 0.1, "beta": 0.2, "gamma": 100.0}
MATCHED = ["cohort=3", "rounds=3", "local_steps=4", "federation.adaptive_local_steps=true"]
STEPS = {
    **{(1, silo): 4 for silo in SPEEDS},
    **{
        (server_round, silo): steps
        for server_round in (2, 3)
        for silo, steps in {"alpha": 4, "beta": 2, "gamma": 1}.items()
    },
}


def test_slow_silos_get_fewer_steps_and_count_by_their_tokens(small_config: Make, tmp_path: Path) -> None:
    grid = SlowSilo(SPEEDS)
    config = prepare_run(small_config(*MATCHED, "checkpoint.keep=9"))
    summary = run_federation(config, grid, resume=False, live=False)
    assert grid.steps() == STEPS
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    states = [store.load(server_round).state for server_round in range(4)]
    assert [state.global_step for state in states] == [0, 4, 8, 12], "one schedule, whatever a silo's steps"
    assert {request.global_step for request in grid.requests if request.round == 3} == {8}
    assert summary["tokens"] == sum(STEPS.values()) * 4 * 16
    for silo, entry in states[3].ledger.items():
        assert entry.position == 4 * sum(steps for (_, name), steps in STEPS.items() if name == silo)
    # The fold: silos that trained 4, 2 and 1 steps weigh 4/7, 2/7 and 1/7.
    replies = {
        silo: load_groups(tmp_path / "run" / "silos" / silo / "round-000003" / "reply.safetensors")["params"]
        for silo in SPEEDS
    }
    for name, found in store.load(3).load_params().items():
        expected = (4 * replies["alpha"][name] + 2 * replies["beta"][name] + replies["gamma"][name]) / 7
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_a_resumed_run_requests_the_same_steps(small_config: Make, tmp_path: Path) -> None:
    whole = run_federation(
        prepare_run(small_config(*MATCHED, name="whole")), SlowSilo(SPEEDS), resume=False, live=False
    )
    part = prepare_run(small_config(*MATCHED, name="parts"))
    run_federation(part.model_copy(update={"rounds": 1}), SlowSilo(SPEEDS), resume=False, live=False)
    resumed = SlowSilo(SPEEDS)
    run_federation(part, resumed, resume=True, live=False)
    assert resumed.steps() == {key: steps for key, steps in STEPS.items() if key[0] > 1}
    assert whole["tokens"] == sum(STEPS.values()) * 4 * 16


def test_without_matching_every_silo_takes_all_steps(small_config: Make) -> None:
    grid = SlowSilo(SPEEDS)
    run_federation(prepare_run(small_config("cohort=3", "rounds=2")), grid, resume=False, live=False)
    assert set(grid.steps().values()) == {4}


# --- stragglers ---------------------------------------------------------------------------------------


def test_patience_is_learnt_from_the_slowest_of_the_cohort() -> None:
    ledger = {"a": entry(arrival=2.0), "b": entry(arrival=7.0), "c": entry(arrival=90.0), "old": entry()}
    straggler_timeout = learnt_timeout(1.5, ["a", "b"], ledger, may_fail=1)
    assert straggler_timeout is not None
    assert (straggler_timeout.seconds, straggler_timeout.may_fail) == (10.5, 1)
    assert (
        straggler_timeout.reason
        == "federation.straggler_timeout_factor=1.5 times the 7 s that the slowest silo of this cohort last "
        "took"
    )
    assert learnt_timeout(None, ["a", "b"], ledger, may_fail=1) is None
    assert learnt_timeout(1.5, ["a", "new"], ledger, may_fail=1) is None, "nobody knows how long new takes"
    assert learnt_timeout(1.5, ["a", "old"], ledger, may_fail=1) is None


class Clock:
    """Stands for the module ``time``: asking it the time lets a tenth of a second pass."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def monotonic(self) -> float:
        return next(self._ticks) / 10

    def sleep(self, seconds: float) -> None:
        pass


@pytest.mark.parametrize(
    ("may_fail", "deadline", "reasons"),
    [
        (2, 60, {"a": "within 3 s (because)", "d": "within 3 s (because)"}),
        (1, 60, {"a": "within 3 s (because)", "d": "within 60 s (federation.deadline)"}),
        (0, 60, {"a": "within 60 s (federation.deadline)", "d": "within 60 s (federation.deadline)"}),
        (2, 2, {"a": "within 2 s (federation.deadline)", "d": "within 2 s (federation.deadline)"}),
    ],
)
def test_patience_ends_only_where_the_round_can_do_without(
    monkeypatch: pytest.MonkeyPatch, may_fail: int, deadline: float, reasons: dict[str, str]
) -> None:
    monkeypatch.setattr("photon.federation.exchange.time", Clock())
    grid = ScriptedGrid(["b", "c"])
    straggler_timeout = StragglerTimeout(seconds=3.0, may_fail=may_fail, reason="because")
    answers = dict(
        exchange(grid, messages("abcd"), name_of, deadline=deadline, straggler_timeout=straggler_timeout)
    )
    assert (answers["b"], answers["c"]) == ("b", "c")
    assert {name: answers[name].kind for name in "ad"} == {"a": "deadline", "d": "deadline"}
    for name, reason in reasons.items():
        assert answers[name].reason == f"no reply {reason}"


class SilentFrom(InProcessGrid):
    """Never brings the train replies of one silo from a round on."""

    def __init__(self, silo: str, first_round: int) -> None:
        super().__init__(answer, {1: {}})
        self._silo, self._first = silo, first_round

    def pull_messages(self, message_ids: Any) -> Any:
        for identifier in message_ids:
            message = self._mailbox.get(identifier)
            if message is not None and message.metadata.message_type == "train":
                request = unpack(message.content, TrainRequest)
                if request.silo == self._silo and request.round >= self._first:
                    continue
            yield from super().pull_messages([identifier])


def test_a_silo_that_falls_silent_holds_a_round_no_longer_than_patience(
    small_config: Make, tmp_path: Path
) -> None:
    """Round 1 teaches, the run is stopped and resumed, and round 2 no longer waits for the deadline."""
    overrides = ["cohort=3", "federation.deadline=600", "federation.straggler_timeout_factor=1.5"]
    config = prepare_run(small_config(*overrides, "rounds=2"))
    run_federation(config.model_copy(update={"rounds": 1}), SilentFrom("beta", 2), resume=False, live=False)
    ledger = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].state.ledger
    longest = max(entry.arrival_seconds or 0.0 for entry in ledger.values())
    run_federation(config, SilentFrom("beta", 2), resume=True, live=False)
    history = read_events(tmp_path / "run" / "events.jsonl")
    (failure,) = [event for event in history if isinstance(event, SiloFailed)]
    assert (failure.round, failure.silo, failure.kind) == (2, "beta", "deadline")
    assert (
        f"no reply within {1.5 * longest:.3g} s (federation.straggler_timeout_factor=1.5 times"
        in failure.reason
    )
    (began,) = [event for event in history if isinstance(event, RoundStarted) and event.round == 2]
    assert failure.time - began.time >= 1.5 * longest
    done = [event.silo for event in history if isinstance(event, SiloFinished) and event.round == 2]
    assert done == ["alpha", "gamma"]


def test_a_reply_that_was_trained_before_a_crash_teaches_no_haste(small_config: Make, tmp_path: Path) -> None:
    """A silo that has a reply on its disk answers at once; the ledger takes the seconds of its report."""
    config = prepare_run(small_config("cohort=3", "rounds=1"))
    run_federation(config, SlowSilo(SPEEDS), resume=False, live=False)
    ledger = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].state.ledger
    assert ledger["gamma"].arrival_seconds == 4 * SPEEDS["gamma"]
    assert ledger["gamma"].steps_per_second == 1 / SPEEDS["gamma"]
