"""A grid without Flower processes: ClientApps are called in this process.

It serves tests, sweeps and sub-federations. Messages and apps are the very same as under Flower's
engines, so a run gives the same result on all of them.
"""

import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from photon.federation.flower_compat import assign_message_id, ensure_task_identity, with_own_records

NodeValue = str | int | float | bool

#: Flower's code for a ClientApp that raised.
CLIENT_APP_RAISED = 2


class InProcessGrid(Grid):
    """Call a ClientApp when its reply is pulled, so one reply at a time is in memory.

    Parameters
    ----------
    client_app
        The app of every node.
    nodes
        Node id to node config; ``partition-id`` and ``num-partitions``
        are added, as in a simulation of Flower's.
    """

    def __init__(self, client_app: ClientApp, nodes: Mapping[int, Mapping[str, NodeValue]]) -> None:
        ensure_task_identity()
        self._app = client_app
        self._contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": index, "num-partitions": len(nodes), **settings},
                state=RecordDict(),
                run_config={},
            )
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

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message (deprecated in Flower in favour of its constructor)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

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
        # A client may take records out of its message; the server's own must stay whole.
        copy = with_own_records(message)
        try:
            return self._app(copy, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            traceback.print_exc()
            return Message(Error(CLIENT_APP_RAISED, repr(error)), reply_to=message)


class ParallelGrid(InProcessGrid):
    """Call the ClientApps at once, each in a thread: for nodes whose work is done by other processes."""

    def __init__(self, client_app: ClientApp, nodes: Mapping[int, Mapping[str, NodeValue]]) -> None:
        super().__init__(client_app, nodes)
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
