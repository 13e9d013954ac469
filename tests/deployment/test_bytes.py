"""``bytes`` of summary.json is what crosses the wire, but for what Flower adds, counted outside of Photon."""

import json
import logging
from pathlib import Path

import pytest
from flwr.app import ArrayRecord

from photon.engine.deployment import COMPLETED
from photon.link.joined import part
from tests.conftest import write_corpus
from tests.deployment.harness import Deployment
from tests.deployment.wire import Relay, delivered

_logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(1800)]

#: 0.4 million parameters, so that payloads are most of what crosses.
RUN = ["model.architecture.n_embd=128", "model.architecture.n_layer=2", "cohort=null", "rounds=2"]

#: Bytes that Flower adds to each part of a message. Measured: 109 to 145. Equal parts cross once.
PER_OBJECT = (90, 180)
#: Bytes by which the line of a tensor in a message is longer than what is counted of it, at most.
PER_TENSOR = 40
#: And to each call, with those of its message's parts. Measured: 1,010 and 290.
PER_CALL = {"up": 1100, "down": 350}


@pytest.mark.parametrize(
    "cell",
    [["strategy=sparsyfed", "strategy.sparsity=0.95", "link=sparse"], ["strategy=photon", "link=int8"]],
    ids=["sparsyfed-sparse", "photon-int8"],
)
def test_reported_bytes_cross_the_wire(cell: list[str], tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus", {"alpha": "abcdefgh", "beta": "ijklmnop"})
    with (
        Deployment(tmp_path / "fed", data, secure=False) as deployment,
        Relay(deployment.federation.port) as relay,
    ):
        deployment.seen_by_silos = relay.address
        deployment.up()
        run = deployment.submit([*RUN, *cell])
        assert run.wait() == COMPLETED, run.log()
        calls = relay.calls()
        wire = {"up": relay.up, "down": relay.down}
    reported = json.loads((run.run_dir / "summary.json").read_text())["bytes"]
    messages = delivered(calls)
    bundle = sum(len(call.response) for call in calls if call.path == "get-fab")
    for direction in ("up", "down"):
        crossed = [message for message in messages if message.down == (direction == "down")]
        counted = [message for message in crossed if message.message_type in ("train", "evaluate")]
        assert len(crossed) == 2 * (1 + 2 + 3), (
            "each silo is asked for itself, two rounds and three evaluations"
        )
        # The payloads of the updates, and of the models that they started from: to the byte.
        payloads = sum(
            len(array.data)
            for message in counted
            if message.message_type == "train"
            for record in message.content.values()
            if isinstance(record, ArrayRecord)
            for array in record.values()
        )
        assert payloads == reported["per_group"]["params"][direction]
        # Whole messages: names, encodings, requests and reports are counted, Flower's own bookkeeping is not.
        framing = sum(message.nbytes for message in counted) - reported[direction]
        parts = sum(message.objects for message in counted)
        tensors = sum(
            len(record)
            for message in counted
            for record in part(message.content).values()
            if isinstance(record, ArrayRecord)
        )
        assert PER_OBJECT[0] * parts < framing < PER_OBJECT[1] * parts + PER_TENSOR * tensors, (
            framing,
            parts,
            tensors,
        )
        # However many tensors a message has, they are one array.
        assert parts < 15 * len(counted)
        # All that crossed: messages, silos' descriptions, the app's bundle, and the calls that carry them.
        described = sum(message.nbytes for message in crossed if message not in counted)
        rest = wire[direction] - reported[direction] - described - (bundle if direction == "down" else 0)
        assert 0 < rest < PER_CALL[direction] * len(calls), (rest, len(calls))
        read = sum(getattr(call, direction) for call in calls)
        assert read <= wire[direction] < read + 2000, "what is left is at most a call that has no answer yet"
        _logger.info(
            "%s %s: %d reported, %d to frame %d objects, %d for the app, %d in %d calls; %d on the wire",
            *(cell, direction, reported[direction], framing, parts),
            *(bundle, rest - framing, len(calls), wire[direction]),
        )
