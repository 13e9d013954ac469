"""The replies of a round's training: taken as they come, counted, and handed to the fold one at a time."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message, RecordDict

from photon.config.schema import FederationSection, RunConfig
from photon.errors import RunError
from photon.federation.admission import Asked
from photon.federation.exchange import Failure, StragglerTimeout, exchange
from photon.federation.pace import learnt_timeout
from photon.federation.requests import Sent
from photon.federation.round_events import RoundEvents, Traffic
from photon.federation.secure import SecureSum
from photon.federation.sizes import Plausibility, Sizes
from photon.federation.spool import Spool
from photon.federation.stations import Stations
from photon.link.messages import BODY, Body, TrainReport, TrainRequest, pack
from photon.link.records import count_bytes, dense_groups
from photon.link.transport import group_bytes
from photon.link.update import subtract
from photon.state.checkpoint import Checkpoint, LedgerEntry
from photon.strategy.base import Limits, Participant, Reply


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
    sizes
        How large each reply is, as `photon.federation.sizes` has it.
    rejected
        Participants whose reply was rejected.
    """

    reports: dict[str, TrainReport] = field(default_factory=dict)
    arrivals: dict[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    sizes: dict[str, Sizes] = field(default_factory=dict)
    rejected: set[str] = field(default_factory=set)


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

    return SecureSum(config.privacy, requests, ask, failures.add)


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
    asked = _asked(at, sent, sequence_length)
    limits = limits_of(asked, at.config.federation.max_weight)

    def receive(name: str, message: Message) -> Reply | Failure:
        arrived = time.monotonic() - begin
        trained = at.admission.trained(message, asked[name])
        if isinstance(trained, Failure):
            return trained
        report, groups = trained.report, trained.groups
        # A silo that had trained the round before a crash answers at once; that is not what it takes.
        collected.arrivals[name] = max(arrived, report.seconds["total"])
        collected.sizes[name] = trained.measured.sizes
        update = groups.pop("params", None) if at.config.link.uplink_payload == "update" else None
        if secure is not None:
            summed = sent.contracts[name].masked
            assert update is not None, "the configuration sees to it"
            masked = {key: delta for key, delta in update.items() if key in summed}
            secure.add(name, dense_groups({"params": masked})["params"])
            update = {key: delta for key, delta in update.items() if key not in summed}
        sizes = count_bytes(message.content), group_bytes(message.content)
        return Reply(name, report, dense_groups(groups), *sizes, update, limits[name])

    return receive


def _asked(at: Stations, sent: Sent, sequence_length: int) -> dict[str, Asked]:
    """Return what each participant was asked, and what it and its members have said of themselves."""
    silos = {silo.name: silo for silo in at.roster.silos()}
    warmup = at.config.transition.local_steps if at.config.transition is not None else None
    return {
        name: Asked(
            request=request,
            contract=sent.contracts[name],
            ticket=sent.tickets[name],
            sent=sent.params,
            silo=silos.get(name),
            sequence_length=sequence_length,
            text_tokens=sum(silos[member].train_tokens for member in request.members if member in silos),
            local_steps=max(at.config.local_steps, warmup or 0),
        )
        for name, request in sent.requests.items()
    }


def limits_of(asked: Mapping[str, Asked], share: float) -> dict[str, Limits | None]:
    """Return what each participant counts for at most, so that none has more than a share of its round.

    With m the share, w_i ≤ m / (1 − m) · Σ_{j≠i} w_j, of what was asked of the cohort. In a round in which
    others fail, what is left weighs more.
    """
    if share >= 1 or len(asked) < 2:
        return dict.fromkeys(asked)
    tokens, leaves = (sum(getattr(one, what) for one in asked.values()) for what in ("tokens", "leaves"))
    factor = share / (1 - share)
    return {
        name: Limits(
            tokens=max(1, int(factor * (tokens - one.tokens))),
            leaves=max(1, int(factor * (leaves - one.leaves))),
        )
        for name, one in asked.items()
    }


@dataclass(frozen=True)
class Intake:
    """What the answers of a round pass on their way to the fold.

    Attributes
    ----------
    sent, collected
        What went out, and what replies bring beside their tensors.
    failures, events
        Where failures are counted, and where both are told.
    judge
        Whether sizes are plausible.
    spool
        Where replies wait.
    secure
        What masked updates were added to; None: nothing is masked.
    foldable
        Makes of a reply what the strategy folds; None: it folds what comes.
    holds
        Whether the strategy looks at all replies together.
    """

    sent: Sent
    collected: Collected
    failures: Failures
    events: RoundEvents
    judge: Plausibility
    spool: Spool
    secure: SecureSum | None
    foldable: Callable[[Reply], Reply] | None
    holds: bool

    def replies(self, answers: Iterator[tuple[str, Reply | Failure]]) -> Iterator[Reply]:
        """Yield the replies that count, in cohort order.

        One that is as large as earlier ones were is folded at once. All others wait until every reply is in,
        or late, and are then judged beside each other: in the first round all, later hardly any.

        Under secure aggregation none of them is known by itself: all are yielded with the mean of all at the
        end.
        """
        waiting: dict[str, Reply] = {}
        for name, answer in answers:
            if isinstance(answer, Failure):
                self._fail(name, answer)
            elif self.secure is None and self.judge.at_once(self.collected.sizes[name]):
                yield self._accepted(answer)
            else:
                waiting[name] = self.spool.keep(answer)
            del answer
        sizes = {name: self.collected.sizes[name] for name in waiting}
        # Those who were accepted at once are beside them, too: the median is that of the round.
        others = {name: self.collected.sizes[name] for name in self.collected.reports}
        for name, problem in self.judge.problems({**others, **sizes}).items():
            if waiting.pop(name, None) is not None:
                self._fail(name, Failure("rejected", problem))
        # Of each the mean of all, whose mean it is; beside what it has sent without a mask.
        mean = self.secure.mean() if self.secure is not None else None
        for name in list(waiting):
            reply = waiting.pop(name)
            if mean is not None:
                reply = replace(reply, update={**mean, **(reply.update or {})})
            yield self._accepted(reply)
            del reply
        # What is mapped from there stays what it is.
        self.spool.clear()

    def _fail(self, name: str, failure: Failure) -> None:
        if failure.kind == "rejected":
            self.collected.rejected.add(name)
        self.failures.add(name, failure)

    def _accepted(self, reply: Reply) -> Reply:
        down = self.sent.down[reply.participant]
        self.collected.reports[reply.participant] = reply.report
        self.collected.traffic.add(reply, *down)
        self.events.silo_finished(reply, *down)
        folded = reply if self.foldable is None else self.foldable(reply)
        return self.spool.keep(folded) if self.holds else folded


def as_parameters(reply: Reply, checkpoint: Checkpoint) -> Reply:
    """Turn a reply's update into parameters, for a strategy that folds those."""
    if reply.update is None:
        return reply
    sent = checkpoint.load_params()
    params = {key: subtract(sent[key], delta) for key, delta in reply.update.items()}
    return replace(reply, update=None, groups={**reply.groups, "params": params})
