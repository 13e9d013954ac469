"""The engine without Flower's processes: nodes answer in this process.

It serves tests, sweeps and sub-federations. Messages and what answers them are the very same as under
Flower's engines, so a run gives the same result on all of them.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from flwr.app import Message
from flwr.supercore.run import Run

from photon.config.schema import RunConfig
from photon.federation.run import run_federation
from photon.flower_compat import assign_message_id, ensure_task_identity, with_own_records
from photon.link.answer import Answer, MessageType, NodeConfig, reply_to
from photon.link.grid import PhotonGrid


def run_inprocess(
    config: RunConfig,
    answer: Answer,
    node_config: NodeConfig | None = None,
    *,
    resume: bool,
    live: bool = True,
) -> dict[str, Any]:
    """Run the federation in this process, without Flower's engines.

    Parameters
    ----------
    config, resume, live
        As for `photon.federation.run.run_federation`.
    answer
        Does what a message asks a node for.
    node_config
        What the node's operator has set, if it is one that has an operator.
    """
    # One node is enough: outside a deployment a node hosts every silo.
    return run_federation(config, InProcessGrid(answer, {1: node_config or {}}), resume=resume, live=live)


class InProcessGrid(PhotonGrid):
    """Let a node answer when its reply is pulled, so one reply at a time is in memory.

    Parameters
    ----------
    answer
        Does what a message asks a node for.
    nodes
        Node id to node config; ``partition-id`` and ``num-partitions``
        are added, as in a simulation of Flower's.
    """

    def __init__(self, answer: Answer, nodes: Mapping[int, NodeConfig]) -> None:
        ensure_task_identity()
        self._answer_of = answer
        self._nodes: dict[int, NodeConfig] = {
            node: {"partition-id": index, "num-partitions": len(nodes), **settings}
            for index, (node, settings) in enumerate(nodes.items())
        }
        self._mailbox: dict[str, Message] = {}
        self._run: Run | None = None

    def set_run(self, run: Run) -> None:
        """Remember the run; nothing here depends on it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that was set."""
        if self._run is None:
            raise RuntimeError("no run was set")
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; they wait until their replies are pulled."""
        identifiers = []
        for message in messages:
            identifier = assign_message_id(message)
            self._mailbox[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Let the addressed nodes work, and yield their replies."""
        for identifier in message_ids:
            message = self._mailbox.pop(identifier, None)
            if message is not None:
                yield self._answer(message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and pull all replies."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _answer(self, message: Message) -> Message:
        # A node may take records out of its message; the server's own must stay whole.
        copy = with_own_records(message)
        metadata = message.metadata
        kind = cast(MessageType, metadata.message_type)
        return reply_to(copy, kind, self._nodes[metadata.dst_node_id], self._answer_of)


class ParallelGrid(InProcessGrid):
    """Let the nodes answer at once, each in a thread: for nodes whose work is done by other processes."""

    def __init__(self, answer: Answer, nodes: Mapping[int, NodeConfig]) -> None:
        super().__init__(answer, nodes)
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the addressed nodes begin their work."""
        identifiers = list(super().push_messages(messages))
        for identifier in identifiers:
            # A thread must not keep the process from ending, which those at work then notice.
            threading.Thread(target=self._work, args=(identifier,), daemon=True).start()
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that are there."""
        for identifier in message_ids:
            reply = self._replies.pop(identifier, None)
            if reply is not None:
                yield reply

    def _work(self, identifier: str) -> None:
        self._replies[identifier] = self._answer(self._mailbox.pop(identifier))
