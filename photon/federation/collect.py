"""The replies of a round's training: taken as they come, counted, and handed to the fold one at a time."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import Message, RecordDict

from photon.config.schema import FederationSection, RunConfig
from photon.errors import RunError
from photon.federation.exchange import Failure, StragglerTimeout, exchange
from photon.federation.pace import learnt_timeout
from photon.federation.requests import Sent
from photon.federation.round_events import RoundEvents, Traffic
from photon.federation.secure import OpenedSums, SecureSum
from photon.federation.stations import Stations
from photon.link.messages import BODY, Body, TrainReport, TrainRequest, pack
from photon.link.records import count_bytes, dense_groups
from photon.link.transport import group_bytes
from photon.link.update import subtract
from photon.state.checkpoint import Checkpoint, LedgerEntry
from photon.strategy.base import Participant, Reply


@dataclass
class Collected:
    """What the replies of a round brought beside their tensors.

    Attributes
    ----------
    reports
        Of each participant whose reply is folded.
    arrivals
        Seconds after which each reply was there.
    traffic
        Bytes of all of them.
    """

    reports: dict[str, TrainReport] = field(default_factory=dict)
    arrivals: dict[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)


class Failures:
    """Counts the participants that fail in a round, and ends the run when it cannot count any more.

    Parameters
    ----------
    federation
        Quorum and accepted failures.
    events
        Where failures are told.
    server_round
        The round.
    cohort
        Size of the cohort.
    """

    def __init__(
        self, federation: FederationSection, events: RoundEvents, server_round: int, cohort: int
    ) -> None:
        self._federation = federation
        self._events = events
        self._round = server_round
        self._cohort = cohort
        self._failed: dict[str, Failure] = {}

    def add(self, name: str, failure: Failure) -> None:
        """Count a failure.

        Raises
        ------
        RunError
            If it is one too many.
        """
        self._failed[name] = failure
        self._events.silo_failed(self._round, name, failure)
        if len(self._failed) <= self.bearable(self._cohort):
            return
        accepted = self._federation.max_failures
        reasons = "; ".join(f"{silo}: {one.reason}" for silo, one in self._failed.items())
        too_many = accepted is not None and len(self._failed) > accepted
        limit = f"max_failures={accepted}" if too_many else f"quorum={self._federation.quorum}"
        raise RunError(
            f"round {self._round}: {len(self._failed)} of {self._cohort} silos failed, beyond "
            f"federation.{limit} ({reasons})"
        )

    def straggler_timeout(
        self, requests: Collection[str], ledger: Mapping[str, LedgerEntry]
    ) -> StragglerTimeout | None:
        """Return how long to wait for those who got requests, by earlier rounds; None: until the deadline."""
        return learnt_timeout(
            self._federation.straggler_timeout_factor, requests, ledger, self.bearable(len(requests))
        )

    def bearable(self, cohort: int) -> int:
        """Return how many participants of a cohort may fail in a round that counts."""
        without = cohort - min(self._federation.quorum, cohort)
        accepted = self._federation.max_failures
        return without if accepted is None else min(without, accepted)


def begin_secure_sum(
    at: Stations,
    sent_config: RunConfig,
    requests: Mapping[str, TrainRequest],
    cohort: Sequence[Participant],
    traffic: Traffic,
    failures: Failures,
) -> SecureSum | None:
    """Return a new attempt at the round's sum, if silos are to mask their updates."""
    config = at.config
    if not config.privacy.secure_aggregation:
        return None
    members = {participant.name: participant.members for participant in cohort}

    def ask(bodies: Mapping[str, Body], kind: type[Body]) -> dict[str, Body | Failure]:
        messages = {}
        for name, body in bodies.items():
            content = RecordDict({BODY: pack(body, sent_config)})
            traffic.down += count_bytes(content)
            messages[name] = at.roster.message(content, members[name], "query", "secure")

        def receive(_: str, message: Message) -> Body | Failure:
            traffic.up += count_bytes(message.content)
            return at.admission.shared(message, kind)

        return dict(exchange(at.grid, messages, receive, deadline=config.federation.deadline))

    # As many rounds as a run may go back by.
    opened = OpenedSums(Path(str(config.run_dir)) / "opened.json", keep=config.checkpoint.keep + 1)
    federations = [name for name in requests if at.roster.is_federation(name)]
    return SecureSum(
        config.privacy,
        requests,
        ask,
        failures.add,
        lambda text: at.events.notice("warning", text),
        opened,
        federations,
    )


def receiver(
    at: Stations,
    sent: Sent,
    collected: Collected,
    secure: SecureSum | None,
    sequence_length: int,
) -> Callable[[str, Message], Reply | Failure]:
    """Return what makes a reply, or a failure, of a message as it arrives.

    Parameters
    ----------
    secure
        What masked updates are added to; None: nothing is masked.
    sequence_length
        Tokens of a window.
    """
    begin = time.monotonic()
    text_tokens = {silo.name: silo.train_tokens for silo in at.roster.silos()}

    def receive(name: str, message: Message) -> Reply | Failure:
        arrived = time.monotonic() - begin
        trained = at.admission.trained(
            message,
            sent.requests[name],
            sent.contracts[name],
            sent.tickets[name],
            sequence_length=sequence_length,
            text_tokens=sum(text_tokens.get(member, 0) for member in sent.requests[name].members),
            federation=at.roster.is_federation(name),
        )
        if isinstance(trained, Failure):
            return trained
        report, groups = trained.report, trained.groups
        # A silo that had trained the round before a crash answers at once; that is not what it takes.
        collected.arrivals[name] = max(arrived, report.seconds["total"])
        update = groups.pop("params", None) if at.config.link.uplink_payload == "update" else None
        if secure is not None:
            summed = sent.contracts[name].masked
            assert update is not None, "the configuration sees to it"
            masked = {key: delta for key, delta in update.items() if key in summed}
            secure.add(name, dense_groups({"params": masked})["params"])
            update = {key: delta for key, delta in update.items() if key not in summed}
        sizes = count_bytes(message.content), group_bytes(message.content)
        return Reply(name, report, dense_groups(groups), *sizes, update)

    return receive


def collect(
    answers: Iterator[tuple[str, Reply | Failure]],
    sent: Sent,
    collected: Collected,
    failures: Failures,
    events: RoundEvents,
    secure: SecureSum | None,
    foldable: Callable[[Reply], Reply] | None,
) -> Iterator[Reply]:
    """Yield the replies that count in cohort order, and note what they brought.

    Under secure aggregation none of them is known by itself: all are yielded with the mean of all at the end.

    Parameters
    ----------
    foldable
        Makes of a reply what the strategy folds; None: it folds what comes.
    """
    made = foldable or (lambda reply: reply)
    waiting: list[Reply] = []
    for name, answer in answers:
        if isinstance(answer, Failure):
            failures.add(name, answer)
            continue
        down = sent.down[name]
        collected.reports[name] = answer.report
        collected.traffic.add(answer, *down)
        events.silo_finished(answer, *down)
        if secure is None:
            yield made(answer)
        else:
            waiting.append(answer)
        del answer
    if secure is not None:
        # Of each the mean of all, whose mean it is; beside what it has sent without a mask.
        mean = secure.mean()
        secure.check_norm(mean, collected.reports)
        for answer in waiting:
            yield made(replace(answer, update={**mean, **(answer.update or {})}))


def as_parameters(reply: Reply, checkpoint: Checkpoint) -> Reply:
    """Turn a reply's update into parameters, for a strategy that folds those."""
    if reply.update is None:
        return reply
    sent = checkpoint.load_params()
    params = {key: subtract(sent[key], delta) for key, delta in reply.update.items()}
    return replace(reply, update=None, groups={**reply.groups, "params": params})
