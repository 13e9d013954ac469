"""A federation in this process in which silo alpha lies: in every round in another way."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message

from photon.client_app import answer
from photon.config.schema import RunConfig
from photon.engine.inprocess import InProcessGrid
from photon.federation.run import prepare_run, run_federation
from photon.link.messages import BODY
from photon.telemetry.events import Event
from photon.telemetry.log import read_events
from tests.adversary.lies import Lie, read_body, write_body

LIAR = "alpha"


class LyingGrid(InProcessGrid):
    """Lets the liar's replies of one kind be changed, by the round that they answer.

    Parameters
    ----------
    kind
        ``train`` or ``evaluate``.
    lies
        By round.
    """

    def __init__(self, kind: str, lies: Mapping[int, Lie]) -> None:
        super().__init__(answer, {1: {}})
        self._kind = kind
        self._lies = lies

    def _answer(self, message: Message) -> Message:
        asked = read_body(message.content)
        reply = super()._answer(message)
        lie = self._lies.get(asked.get("round", -1))
        if message.metadata.message_type != self._kind or asked.get("silo") != LIAR or lie is None:
            return reply
        if reply.has_error():
            return reply
        body = read_body(reply.content)
        other = lie.change(body, reply.content, message)
        if other is not None:
            return other
        if body and BODY in reply.content:
            write_body(reply.content, json.dumps(body))
        return reply


def run_with(kind: str, lies: Sequence[Lie], config: RunConfig) -> dict[str, list[Event]]:
    """Run a round with each lie, after an honest one; return the events of each lie's round."""
    by_round = dict(enumerate(lies, 2))
    run_federation(prepare_run(config), LyingGrid(kind, by_round), resume=False, live=False)
    events: dict[str, list[Event]] = {lie.name: [] for lie in lies}
    for event in read_events(Path(str(config.run_dir)) / "events.jsonl"):
        number: Any = getattr(event, "round", None)
        if number in by_round:
            events[by_round[number].name].append(event)
    return events
