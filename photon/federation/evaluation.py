"""The evaluation of a model on every silo's own validation text."""

import math
import time
from collections.abc import Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from photon.config.schema import RunConfig
from photon.federation.admission import Admission, own_nodes
from photon.federation.exchange import Failure, exchange
from photon.federation.once import SentOnce
from photon.federation.roster import Roster
from photon.federation.round_events import RoundEvents
from photon.link.messages import BODY, EvaluateReport, EvaluateRequest, SiloInfo, pack
from photon.link.records import count_bytes
from photon.link.transport import ServerLink
from photon.state.checkpoint import Checkpoint, LedgerEntry
from photon.strategy.contract import PARAMS
from photon.telemetry.events import Evaluated, SiloEvaluation, evaluation_of


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
    """

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        link: ServerLink,
        admission: Admission,
        events: RoundEvents,
        once: SentOnce,
    ) -> None:
        self._grid = grid
        self._roster = roster
        self._link = link
        self._admission = admission
        self._events = events
        self._once = once

    def of(self, checkpoint: Checkpoint, sent_config: RunConfig, *, own: bool) -> Evaluated | None:
        """Let every online silo evaluate a checkpoint's model on its own validation text.

        Parameters
        ----------
        sent_config
            The configuration that silos are sent.
        own
            Whether nodes also evaluate models of their own.

        Returns
        -------
        Evaluated or None
            The event that was emitted; None if no silo could.
        """
        begin = time.perf_counter()
        state = checkpoint.state
        asked = {silo.name: silo for silo in self._asked()}
        messages = self._messages(checkpoint, asked, sent_config, own=own)
        if not messages:
            return None
        traffic = {"up": 0, "down": sum(count_bytes(message.content) for message in messages.values())}

        def receive(name: str, message: Message) -> EvaluateReport | Failure:
            traffic["up"] += count_bytes(message.content)
            return self._admission.evaluated(message, state.round, asked[name], own_nodes(sent_config, name))

        per_silo: dict[str, SiloEvaluation] = {}
        per_node: dict[str, SiloEvaluation] = {}
        deadline = sent_config.federation.deadline
        for name, answer in exchange(self._grid, messages, receive, deadline=deadline):
            if not isinstance(answer, Failure):
                per_silo[name] = per_node[name] = evaluation_of(answer.loss, answer.tokens)
                per_node |= {
                    node: evaluation_of(found["loss"], found["tokens"])
                    for node, found in answer.per_node.items()
                }
            elif answer.kind == "refused":
                self._events.does_not_evaluate(name, answer.reason)
            else:
                self._events.silo_failed(state.round, name, answer)
        self._once.settle(per_silo)
        if not per_silo:
            self._events.notice("warning", f"round {state.round}: no silo could evaluate the model")
            return None
        tokens = sum(silo["tokens"] for silo in per_silo.values())
        loss = math.fsum(silo["loss"] * silo["tokens"] for silo in per_silo.values()) / tokens
        evaluated = Evaluated(
            round=state.round,
            per_silo=per_silo,
            per_node=per_node if own else {},
            loss=loss,
            perplexity=evaluation_of(loss, tokens)["perplexity"],
            tokens_trained=state.tokens,
            bytes_up=traffic["up"],
            bytes_down=traffic["down"],
            seconds=time.perf_counter() - begin,
        )
        self._events.stream.emit(evaluated)
        return evaluated

    def _messages(
        self, checkpoint: Checkpoint, asked: Mapping[str, SiloInfo], sent_config: RunConfig, *, own: bool
    ) -> dict[str, Message]:
        """Return what asks silos for the loss, and brings them what they lack of the model."""
        state = checkpoint.state
        params = checkpoint.load_params()
        groups = self._once.split({PARAMS: params}, params)
        encoded: dict[tuple[str, ...], RecordDict] = {}
        messages: dict[str, Message] = {}
        for silo in asked.values():
            brought, fixed = self._once.left(silo.name, groups)
            if (key := tuple(brought)) not in encoded:
                # The next round trains from what is evaluated here.
                encoded[key] = self._link.send(brought, state.run_id, state.round + 1)
            content = RecordDict(dict(encoded[key]))
            request = EvaluateRequest(
                round=state.round,
                silo=silo.name,
                run_id=state.run_id,
                last_round=state.ledger.get(silo.name, LedgerEntry()).last_round,
                own=own,
                fixed=fixed,
                decided=None if silo.federation else state.decided.get(silo.name),
            )
            content[BODY] = pack(request, sent_config)
            messages[silo.name] = self._roster.message(
                content, [silo.name], "evaluate", f"evaluate-{state.round}"
            )
        return messages

    def _asked(self) -> Sequence[SiloInfo]:
        """Return the online silos that do not keep their validation figures."""
        asked = []
        for silo in self._roster.silos():
            if silo.validation_tokens is None:
                self._events.does_not_evaluate(silo.name, "it keeps its validation figures")
            else:
                asked.append(silo)
        return asked
