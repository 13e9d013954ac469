"""The training of a round: requests go out, and the replies that count come back one at a time."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import Message, RecordDict

from photon.config.schema import RunConfig
from photon.federation.admission import Asked, nbytes_of
from photon.federation.exchange import Failure, StragglerTimeout, exchange
from photon.federation.failures import Failures
from photon.federation.intake import Collected, Intake, as_parameters
from photon.federation.requests import Sent
from photon.federation.round_events import Traffic
from photon.federation.secure import OpenedSums, SecureSum
from photon.federation.sizes import judge_of
from photon.federation.stations import Stations
from photon.link.messages import BODY, Body, TrainRequest, pack
from photon.link.records import count_bytes, dense_groups
from photon.link.transport import message_bytes
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Limits, Participant, Reply


@dataclass(frozen=True)
class Ready:
    """A round that can begin: what goes out, and what the answers pass.

    Attributes
    ----------
    messages
        Participant to message, in cohort order.
    receive
        Makes a reply, or a failure, of a message as it arrives.
    straggler_timeout
        How long to wait by earlier rounds; None: until the deadline.
    intake
        What the answers pass on their way to the fold.
    again
        Returns a participant's message with what the first one left out.
    reply_bytes
        The largest reply that is due.
    """

    messages: dict[str, Message]
    receive: Callable[[str, Message], Reply | Failure]
    straggler_timeout: StragglerTimeout | None
    intake: Intake
    again: Callable[[str], Message]
    reply_bytes: int


def ready(
    at: Stations,
    sent_config: RunConfig,
    checkpoint: Checkpoint,
    cohort: Sequence[Participant],
    collected: Collected,
    last: Collection[str] = (),
) -> Ready:
    """Prepare a cohort's training from a checkpoint.

    Parameters
    ----------
    sent_config
        The configuration that silos are sent.
    collected
        Takes what the replies bring beside their tensors.
    last
        Those of the cohort that also tell what they bring: it is their last round.
    """
    server_round = checkpoint.state.round + 1
    federation = at.config.federation
    if at.strategy.needs_all:
        federation = federation.model_copy(update={"quorum": len(cohort)})
    failures = Failures(federation, at.events, server_round, len(cohort))
    requests = at.requests.train_requests(server_round, checkpoint, cohort, last)
    secure = None
    if at.config.privacy.secure_aggregation:
        secure = begin_secure_sum(at, sent_config, requests, checkpoint, cohort, collected.traffic, failures)
        requests = secure.agree()
        cohort = [participant for participant in cohort if participant.name in requests]
    given = at.evaluation.given
    sent = at.requests.write(server_round, checkpoint, cohort, requests, sent_config, given)
    intake = Intake(
        sent=sent,
        collected=collected,
        failures=failures,
        events=at.events,
        judge=judge_of(at.config, checkpoint),
        spool=at.spool.emptied(),
        secure=secure,
        foldable=None if at.strategy.folds_updates else partial(as_parameters, checkpoint=checkpoint),
        holds=at.strategy.holds_replies,
    )
    return Ready(
        messages=sent.messages,
        receive=receiver(at, sent, collected, secure, checkpoint.state.sequence_length),
        straggler_timeout=failures.straggler_timeout(requests, checkpoint.state.ledger),
        intake=intake,
        again=lambda name: at.requests.whole(name, sent, checkpoint, cohort, sent_config),
        reply_bytes=max((nbytes_of(contract) for contract in sent.contracts.values()), default=0),
    )


def begin_secure_sum(
    at: Stations,
    sent_config: RunConfig,
    requests: Mapping[str, TrainRequest],
    checkpoint: Checkpoint,
    cohort: Sequence[Participant],
    traffic: Traffic,
    failures: Failures,
) -> SecureSum:
    """Return a new attempt at the round's sum.

    Parameters
    ----------
    checkpoint
        That the round starts from.
    """
    config = at.config
    # What is masked is the same for all who take part.
    contract = next(iter(at.requests.contracts(checkpoint.state.round + 1, checkpoint, cohort).values()))
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
        contract,
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
            contract = sent.contracts[name]
            came = groups if update is None else {**groups, "params": update}
            masked = contract.masked_of(came)
            secure.add(name, dense_groups({"params": masked})["params"])
            update = None if update is None else {k: d for k, d in update.items() if k not in masked}
            groups = {} if contract.masks_sums else groups
        sizes = message_bytes(message.content)
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
            tokens=max(1, round(factor * (tokens - one.tokens))),
            leaves=max(1, round(factor * (leaves - one.leaves))),
        )
        for name, one in asked.items()
    }
