"""A node that answers a standing request: one request after the other, from the run's store.

Each is handed to the same function as a message, so the gate, the policy as it is then, and what is counted
hold for each. This lives in the ClientApp of the one Flower message, beside the silo's worker, and ends with
the SuperNode as any ClientApp does.
"""

import sys
import time
from typing import TYPE_CHECKING

from flwr.app import Error, RecordDict

from photon.errors import PhotonError
from photon.files.processes import is_gone
from photon.link import BODY
from photon.link.answer import Answer, MessageType, NodeConfig, is_standing, outcome_of
from photon.link.frames import Frame
from photon.link.messages import Stand, Stood, pack, unpack
from photon.link.standing import ALIVE, LEASE, Channel, Heart, Pulse
from photon.link.store import open_store
from photon.silo.worker_client import owner

if TYPE_CHECKING:
    import psutil

#: Seconds between looks for the next request: from the first to the second as the wait grows.
_SOONEST, _LATEST = 0.004, 0.25


def stand(
    message_type: MessageType, content: RecordDict, node_config: NodeConfig, answer: Answer
) -> RecordDict:
    """Answer the requests that come through the store until the server ends that, or is gone.

    Parameters
    ----------
    message_type, content, node_config
        Of the message that opens the standing request.
    answer
        Answers a message.

    Returns
    -------
    RecordDict
        How many were answered, or the node's refusal.

    Raises
    ------
    PhotonError
        If the gate does not let the message in, the store cannot be reached, or the SuperNode is gone.
    """
    allowed = answer(message_type, content, node_config)
    if "refused" in allowed[BODY]:
        return allowed
    order = unpack(content, Stand)
    channel = Channel(open_store(str(node_config["store-url"])), order)
    heart = Heart(order.lease, ALIVE)
    try:
        heart.add(channel)
        done = _follow(channel, node_config, answer, owner())
    finally:
        heart.stop()
    _say(f"standing request: {done.answered} answered, ended: {done.why}")
    return RecordDict({BODY: pack(done)})


def _follow(channel: Channel, node_config: NodeConfig, answer: Answer, node: "psutil.Process") -> Stood:
    pulse = Pulse(channel, LEASE)
    number, since = 1, time.monotonic()
    while True:
        request = channel.asked(number)
        if request is None:
            _check_node(node)
            if pulse.is_lost():
                return Stood(
                    answered=number - 1,
                    why=f"no sign of the server for {channel.order.lease:g} s",
                )
            waited = time.monotonic() - since
            time.sleep(min(_LATEST, max(_SOONEST, 0.02 * waited)))
            continue
        if request.fields.get("end") is True:
            return Stood(answered=number - 1, why="the server has ended it")
        reply = _answered(request, node_config, answer)
        # The worker has ended with it, and of that the server is not to make an answer.
        _check_node(node)
        channel.answer(number, reply)
        number, since = number + 1, time.monotonic()
        # It was not looked at meanwhile.
        pulse.renew()


def _check_node(node: "psutil.Process") -> None:
    if is_gone(node):
        raise PhotonError("standing request: the SuperNode is gone")


def _answered(request: Frame, node_config: NodeConfig, answer: Answer) -> Frame:
    kind = request.fields.get("message_type")
    if kind not in ("query", "train", "evaluate"):
        raise PhotonError(f"standing request: {kind!r} is no type of message")
    if kind == "query" and is_standing(request.records):
        raise PhotonError("standing request: it asks for another one")
    outcome = outcome_of(kind, request.records, node_config, answer)
    if isinstance(outcome, Error):
        return Frame({"code": outcome.code, "reason": outcome.reason})
    return Frame({}, outcome)


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
