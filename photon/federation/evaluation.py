"""The evaluation of a model on every silo's own validation text."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from photon.config.schema import RunConfig
from photon.federation.admission import Admission, own_nodes
from photon.federation.exchange import Failure, exchange
from photon.federation.measuring import mean_loss, measuring, standard_error
from photon.federation.once import SentOnce
from photon.federation.requests import Given
from photon.federation.roster import Roster
from photon.federation.round_events import RoundEvents
from photon.link.messages import BODY, EvaluateReport, EvaluateRequest, SiloInfo, pack
from photon.link.records import count_bytes
from photon.link.transport import ServerLink
from photon.state.checkpoint import Checkpoint, LedgerEntry, ServerState
from photon.state.received import tensors_hash
from photon.strategy.contract import PARAMS
from photon.telemetry.events import Evaluated, Remembered, SiloEvaluation, evaluation_of


@dataclass(frozen=True)
class _Question:
    """What is asked of a model.

    Attributes
    ----------
    sent_config
        The configuration that silos are sent.
    send
        Makes records of state groups.
    groups
        The model as it travels: ``params``, and what is sent once of it.
    source, received
        The hash of ``params``, and that of what silos decode of it; None: it is not to be kept.
    keep, has
        Silos that are to keep it, and those that already have it.
    from_seed
        Whether silos can build it.
    """

    sent_config: RunConfig
    send: Callable[[Mapping[str, Mapping[str, torch.Tensor]]], RecordDict]
    groups: Mapping[str, Mapping[str, torch.Tensor]]
    source: str | None
    received: str | None
    keep: Collection[str]
    has: Collection[str]
    from_seed: bool

    @cached_property
    def _encoded(self) -> dict[tuple[str, ...], RecordDict]:
        return {}

    def records(self, brought: Mapping[str, Mapping[str, torch.Tensor]]) -> RecordDict:
        """Return the records of a message that brings groups; all messages share their memory."""
        if (key := tuple(brought)) not in self._encoded:
            self._encoded[key] = self.send(brought)
        return RecordDict(dict(self._encoded[key]))

    def given(self, kept: Collection[str], before: Given | None) -> Given | None:
        """Return the model that silos have after this, ``kept`` and those that had this very one before."""
        if self.source is None or self.received is None:
            return None
        earlier = before.silos if before is not None and before.source == self.source else frozenset()
        return Given(self.source, self.received, frozenset(kept) | earlier)


class Evaluation:
    """Lets silos evaluate the models of a run.

    Parameters
    ----------
    grid, roster
        Where the silos are.
    link
        Encodes the model.
    admission
        Judges the answers.
    events
        Where the result, and what went wrong, is told.
    once
        Knows what silos have that is sent once.
    warm
        Whether the first model is not that of the run's seed.

    Attributes
    ----------
    given
        The model that silos have measured last, and kept; None: there is none.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        link: ServerLink,
        admission: Admission,
        events: RoundEvents,
        once: SentOnce,
        *,
        warm: bool,
    ) -> None:
        self._grid = grid
        self._roster = roster
        self._link = link
        self._admission = admission
        self._events = events
        self._once = once
        self._warm = warm
        self.given: Given | None = None

    def of(
        self,
        checkpoint: Checkpoint,
        sent_config: RunConfig,
        *,
        own: bool,
        cohort: Collection[str] | None = None,
    ) -> Evaluated | None:
        """Let online silos evaluate a checkpoint's model on their own validation text.

        Parameters
        ----------
        sent_config
            The configuration that silos are sent.
        own
            Whether nodes also evaluate models of their own.
        cohort
            Participants of the next round, who train from this model; None: all silos evaluate it.

        Returns
        -------
        Evaluated or None
            The event that was emitted; None if no silo could.
        """
        begin, state = time.perf_counter(), checkpoint.state
        silos = {silo.name: silo for silo in self._willing()}
        names: Sequence[str] = list(silos)
        names = names if cohort is None else measuring(sent_config, names, cohort, state.round)
        if not names:
            return None
        question = self._question(checkpoint, sent_config, cohort)
        messages = {name: self._message(question, silos[name], state, own=own) for name in names}
        traffic = {"up": 0, "down": sum(count_bytes(message.content) for message in messages.values())}
        kept: set[str] = set()

        def receive(name: str, message: Message) -> EvaluateReport | Failure:
            traffic["up"] += count_bytes(message.content)
            nodes = own_nodes(sent_config, name)
            return self._admission.evaluated(message, state.round, silos[name], nodes)

        def again(name: str) -> Message:
            message = self._message(question, silos[name], state, own=own, whole=True)
            traffic["down"] += count_bytes(message.content)
            return message

        per_silo: dict[str, SiloEvaluation] = {}
        per_node: dict[str, SiloEvaluation] = {}
        remembered: dict[str, Remembered] = {}
        deadline = sent_config.federation.deadline
        for name, answer in exchange(self._grid, messages, receive, deadline=deadline, again=again):
            if not isinstance(answer, Failure):
                per_silo[name] = per_node[name] = evaluation_of(answer.loss, answer.tokens)
                remembered |= _remembered(name, answer)
                per_node |= _of_nodes(answer)
                kept |= {name} if answer.kept else set()
            else:
                self._has_failed(state.round, name, answer)
        self._once.settle(per_silo)
        self.given = question.given(kept, self.given)
        if not per_silo:
            self._events.notice("warning", f"round {state.round}: no silo could evaluate the model")
            return None
        loss = mean_loss(per_silo)
        evaluated = Evaluated(
            round=state.round,
            per_silo=per_silo,
            per_node=per_node if own else {},
            loss=loss,
            perplexity=evaluation_of(loss, 1)["perplexity"],
            tokens_trained=state.tokens,
            bytes_up=traffic["up"],
            bytes_down=traffic["down"],
            seconds=time.perf_counter() - begin,
            asked=len(names),
            of_silos=len(silos),
            error=standard_error(per_silo, len(silos)),
            remembered=remembered,
        )
        self._events.evaluated(evaluated, state.unlearned)
        return evaluated

    def _has_failed(self, server_round: int, name: str, failure: Failure) -> None:
        """Tell why a silo's answer does not count; a policy that leaves it out is no failure."""
        if failure.kind == "refused":
            self._events.does_not_evaluate(name, failure.reason)
        else:
            self._events.silo_failed(server_round, name, failure)

    def _question(
        self, checkpoint: Checkpoint, sent_config: RunConfig, cohort: Collection[str] | None
    ) -> "_Question":
        """Return what is asked of a model, and who need not be sent it."""
        state, link = checkpoint.state, sent_config.link
        params = checkpoint.load_params()
        groups = self._once.split({PARAMS: params}, params)
        moving = groups[PARAMS]
        source = received = None
        # A change is added to what a silo has decoded of earlier ones, which is not what is measured.
        if cohort is not None and link.keep_received and link.downlink_payload == "parameters":
            source = tensors_hash(moving)
            as_received = self._link.as_received(moving)
            received = source if as_received is moving else tensors_hash(as_received)
        from_seed = state.round == 0 and received is not None and received == source and not self._warm
        before = self.given
        has = before.silos if before is not None and before.source == source else frozenset()
        return _Question(
            sent_config=sent_config,
            # The next round trains from what is evaluated here.
            send=lambda groups: self._link.send(groups, state.run_id, state.round + 1),
            groups=groups,
            source=source,
            received=received,
            keep=frozenset(cohort or ()),
            has=has,
            from_seed=from_seed,
        )

    def _message(
        self, question: "_Question", silo: SiloInfo, state: ServerState, *, own: bool, whole: bool = False
    ) -> Message:
        """Return the message to a silo; ``whole``: it has lost the model if it had it."""
        needs = whole or not (question.from_seed or silo.name in question.has)
        brought, fixed = self._once.left(silo.name, question.groups)
        if not needs:
            brought = {group: tensors for group, tensors in brought.items() if group != PARAMS}
        keeps = silo.name in question.keep or silo.name in question.has or question.from_seed
        request = EvaluateRequest(
            round=state.round,
            silo=silo.name,
            run_id=state.run_id,
            last_round=state.ledger.get(silo.name, LedgerEntry()).last_round,
            own=own,
            fixed=fixed,
            decided=None if silo.federation else state.decided.get(silo.name),
            model_hash=question.received if keeps else None,
            from_seed=question.from_seed and not needs,
        )
        content = question.records(brought)
        content[BODY] = pack(request, question.sent_config)
        return self._roster.message(content, [silo.name], "evaluate", f"evaluate-{state.round}")

    def _willing(self) -> Sequence[SiloInfo]:
        """Return the online silos that do not keep their validation figures."""
        willing = []
        for silo in self._roster.silos():
            if silo.validation_tokens is None:
                self._events.does_not_evaluate(silo.name, "it keeps its validation figures")
            else:
                willing.append(silo)
        return willing


def _of_nodes(report: EvaluateReport) -> dict[str, SiloEvaluation]:
    """Return what the models give that nodes have of their own."""
    return {name: evaluation_of(found["loss"], found["tokens"]) for name, found in report.per_node.items()}


def _remembered(name: str, report: EvaluateReport) -> dict[str, Remembered]:
    """Return what a model says to what a silo has had forgotten; empty where the silo tells nothing."""
    told = report.forgotten
    if told is None:
        return {}
    return {
        name: {
            "asked": told.asked,
            "rouge1": told.rouge1 / told.asked,
            "refused": told.refused / told.asked,
        }
    }
