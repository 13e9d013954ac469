"""The exchange with a cohort: order, failures, deadlines, memory."""

import itertools
import time
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from photon.engine.inprocess import InProcessGrid
from photon.federation.exchange import Failure, exchange
from photon.flower_compat import assign_message_id, ensure_task_identity


class ScriptedGrid(InProcessGrid):
    """Answers in a given order of arrival, whatever order is asked for."""

    def __init__(self, arrival: list[str], errors: dict[str, Error] | None = None) -> None:
        ensure_task_identity()
        self.arrival = arrival
        self.errors = errors or {}
        self.sent: dict[str, Message] = {}
        self.pulled: list[str] = []
        self.polls = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        identifiers = []
        for message in messages:
            if message.metadata.group_id == "undeliverable":
                continue
            identifiers.append(assign_message_id(message))
            self.sent[identifiers[-1]] = message
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.polls += 1
        ready = self.arrival[: 1 + self.polls // 4]
        for identifier in message_ids:
            message = self.sent[identifier]
            name = str(message.content.config_records["who"]["name"])
            if name in ready and name not in self.pulled:
                self.pulled.append(name)
                if name in self.errors:
                    yield Message(self.errors[name], reply_to=message)
                else:
                    yield Message(RecordDict({"who": ConfigRecord({"name": name})}), reply_to=message)


def messages(names: Iterable[str], group: str = "round-1") -> dict[str, Message]:
    ensure_task_identity()
    return {
        name: Message(
            RecordDict({"who": ConfigRecord({"name": name})}),
            dst_node_id=index,
            message_type="train",
            group_id=group,
        )
        for index, name in enumerate(names, start=1)
    }


def name_of(participant: str, message: Message) -> str:
    assert message.content.config_records["who"]["name"] == participant
    return participant


@pytest.mark.parametrize("arrival", list(itertools.permutations("abc")))
def test_answers_come_in_cohort_order_whatever_the_arrival(arrival: tuple[str, ...]) -> None:
    grid = ScriptedGrid(list(arrival))
    answers = list(exchange(grid, messages("abc"), name_of, deadline=5))
    assert answers == [("a", "a"), ("b", "b"), ("c", "c")]


def test_large_early_replies_stay_in_the_superlink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.federation.exchange.HELD_BYTES", 1)
    grid = ScriptedGrid(["c", "b", "a"])
    received: list[str] = []
    stream = exchange(grid, messages("abc"), lambda p, _: received.append(p) or p, deadline=5)
    assert next(stream) == ("a", "a")
    assert received == ["a"], "only the reply whose turn it is"
    assert [name for name, _ in stream] == ["b", "c"]


def test_failures_are_named_and_counted_once() -> None:
    grid = ScriptedGrid(list("abc"), {"a": Error(2, "boom"), "c": Error(5, "node gone")})
    sent = messages("abc") | messages("d", group="undeliverable")
    answers = dict(exchange(grid, sent, name_of, deadline=5))
    assert answers["a"] == Failure("error", "boom")
    assert answers["b"] == "b"
    assert answers["c"] == Failure("unavailable", "node gone")
    assert answers["d"].kind == "unavailable"


def test_a_reply_that_takes_too_much_memory_is_its_senders_fault() -> None:
    def receive(participant: str, _: Message) -> str:
        if participant == "a":
            raise MemoryError
        return participant

    answers = dict(exchange(ScriptedGrid(list("ab")), messages("ab"), receive, deadline=5))
    assert answers == {"a": Failure("rejected", "its reply takes more memory than there is"), "b": "b"}


def test_a_silent_node_ends_at_the_deadline_and_the_rest_counts() -> None:
    grid = ScriptedGrid(["b", "c"])
    begin = time.monotonic()
    answers = dict(exchange(grid, messages("abc"), name_of, deadline=0.3))
    assert time.monotonic() - begin < 2
    assert answers["a"].kind == "deadline"
    assert answers["b"] == "b"
    assert answers["c"] == "c"


def test_sent_messages_are_let_go() -> None:
    sent = messages("ab")
    next(exchange(ScriptedGrid(["a", "b"]), sent, name_of, deadline=5))
    assert sent == {}
