"""Several requests in one message of a simulation."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from photon import client_app
from photon.engine.batches import MOST, BatchGrid, batching
from photon.engine.inprocess import InProcessGrid, run_inprocess
from photon.errors import PhotonError
from photon.federation.run import prepare_run, run_federation
from photon.flower_compat import ensure_task_identity
from photon.link.batch import answer_batch, is_batch, pack_batch, unpack_batch
from photon.node import answer


class Counting(InProcessGrid):
    """Counts what it is sent, and answers as a simulated node does."""

    def __init__(self, nodes: int) -> None:
        super().__init__(client_app.answer_all, {node: {} for node in range(1, nodes + 1)})
        self.sent: list[tuple[str, int, int]] = []

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        for message in messages:
            content = message.content
            count = len(unpack_batch(content)) if is_batch(content) else 1
            self.sent.append((message.metadata.message_type, message.metadata.dst_node_id, count))
        return super().push_messages(messages)


@pytest.mark.few(1)
@pytest.mark.parametrize("method", [["cohort=null"], ["cohort=2", "strategy=desloc"]])
def test_a_run_in_batches_ends_as_one_without(method: list[str], small_config: Any) -> None:
    plain = run_inprocess(prepare_run(small_config(*method, name="plain")), answer, resume=False)
    grid = Counting(nodes=2)
    config = prepare_run(small_config(*method, name="batched"))
    batched = run_federation(config, BatchGrid(grid), resume=False, live=False)
    assert batched["weights_sha256"] == plain["weights_sha256"]
    assert batched["perplexity"] == plain["perplexity"]
    for way in ("up", "down"):
        # The folders' names are not equally long.
        assert batched["bytes"][way] == pytest.approx(plain["bytes"][way], rel=1e-3)
    evaluations = [entry for entry in grid.sent if entry[0] == "evaluate"]
    # Three silos on two nodes.
    assert evaluations[:2] == [("evaluate", 1, 2), ("evaluate", 2, 1)]


def request(number: int) -> Message:
    return Message(
        RecordDict({"who": ConfigRecord({"number": number})}), dst_node_id=1, message_type="train", ttl=60.0
    )


def echo(kind: str, content: RecordDict, node_config: Any) -> RecordDict:
    number = content["who"]["number"]
    if number == 3:
        raise PhotonError("three is one too many")
    return content


def test_many_are_spread_evenly_and_each_answer_is_its_own() -> None:
    ensure_task_identity()
    nodes = InProcessGrid(
        lambda *asked: answer_batch(*asked, echo) if is_batch(asked[1]) else echo(*asked),
        {1: {}, 2: {}, 3: {}},
    )
    sizes: list[int] = []
    push = nodes.push_messages

    def counting(messages: Any) -> Any:
        messages = list(messages)
        sizes.extend(len(unpack_batch(m.content)) if is_batch(m.content) else 1 for m in messages)
        return push(messages)

    nodes.push_messages = counting  # type: ignore[method-assign]
    grid = BatchGrid(nodes)
    count = 3 * MOST + 5
    identifiers = [next(iter(grid.push_messages([request(number)]))) for number in range(count)]
    assert sizes == []
    replies = {}
    for identifier in reversed(identifiers):
        found = list(grid.pull_messages([identifier]))
        while not found:
            found = list(grid.pull_messages([identifier]))
        (replies[identifier],) = found
    assert max(sizes) <= MOST
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == count
    for number, identifier in enumerate(identifiers):
        if number == 3:
            assert replies[identifier].error.reason == "three is one too many"
        else:
            assert replies[identifier].content["who"]["number"] == number


def test_what_is_shared_travels_once() -> None:
    import pickle

    shared = ConfigRecord({"model": b"x" * 100_000})
    batch = pack_batch([RecordDict({"params": shared}) for _ in range(8)])
    assert len(pickle.dumps(batch)) < 2 * 100_000


@pytest.mark.parametrize("name", ["8/who", "x/who", "who"])
def test_a_record_of_no_request_is_refused(name: str) -> None:
    batch = pack_batch([RecordDict({"who": ConfigRecord({"number": 1})})])
    batch[name] = ConfigRecord({"number": 2})
    with pytest.raises(PhotonError, match="of no request"):
        unpack_batch(batch)


def test_a_deployed_node_takes_no_batch() -> None:
    batch = pack_batch([RecordDict({"who": ConfigRecord({"number": 1})})])
    with pytest.raises(PhotonError, match=r"brings no configuration|no photon body"):
        client_app.answer_all(
            "train", batch, {"data-dir": "/nowhere", "state-dir": "/nowhere", "worker": False}
        )


def test_where_somebody_waits_for_each_silo_each_has_a_message(small_config: Any) -> None:
    grid = InProcessGrid(answer, {1: {}})
    simulated = small_config("federation=simulation")
    assert isinstance(batching(grid, simulated), BatchGrid)
    assert batching(grid, small_config()) is grid
    assert batching(grid, small_config("federation=simulation", "federation.deadline=60")) is grid
