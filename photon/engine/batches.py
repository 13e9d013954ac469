"""A grid of simulated nodes that are asked for several silos at a time.

Flower's simulation engine takes some ten milliseconds for a message, and hands a node one every tenth of a
second: more than a small silo trains. All simulated nodes host all silos, so it does not matter which of them
is asked.
"""

import time
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from photon.config.schema import RunConfig
from photon.link.answer import CLIENT_APP_RAISED
from photon.link.batch import error_in, pack_batch, unpack_batch
from photon.link.grid import GridInFront

#: Silos in one message, at most: so many replies are in memory at a time, and are lost with a process.
MOST = 16
#: Seconds between two looks for the same reply.
PAUSE = 0.01
#: Flower's code for a node that could not be reached.
UNAVAILABLE = 5


def batching(grid: Grid, config: RunConfig) -> Grid:
    """Return a grid that batches messages, where nothing waits for one silo and not for another."""
    federation = config.federation
    waits_for_each = federation.deadline is not None or federation.straggler_timeout_factor is not None
    return grid if federation.engine != "simulation" or waits_for_each else BatchGrid(grid)


class BatchGrid(GridInFront):
    """Spreads the messages that are pushed before a reply is asked for evenly over the nodes.

    Parameters
    ----------
    grid
        Where the nodes are.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._pushed: dict[str, Message] = {}
        self._serial = 0
        #: Id of a message that was sent to the ids, and stubs, of those in it.
        self._sent: dict[str, dict[str, Message]] = {}
        self._looked: dict[str, float] = {}
        #: Id of a message that was pushed to that of the one it is in.
        self._within: dict[str, str] = {}
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; they are sent when a reply is asked for."""
        identifiers = []
        for message in messages:
            self._serial += 1
            identifiers.append(f"batched-{self._serial}")
            self._pushed[identifiers[-1]] = message
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that are there."""
        self._send()
        for identifier in message_ids:
            if (sent := self._within.get(identifier)) is not None and identifier not in self._replies:
                self._look(sent)
            if (reply := self._replies.pop(identifier, None)) is not None:
                yield reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and wait for all replies."""
        waiting = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        found: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            for identifier in list(waiting):
                for reply in self.pull_messages([identifier]):
                    waiting.discard(identifier)
                    found.append(reply)
            time.sleep(PAUSE)
        return found

    def _send(self) -> None:
        """Send what was pushed, all messages of one kind in as few as there are nodes."""
        kinds: dict[str, list[str]] = {}
        for identifier, message in self._pushed.items():
            kinds.setdefault(message.metadata.message_type, []).append(identifier)
        for kind, identifiers in kinds.items():
            nodes = sorted(self._grid.get_node_ids())
            groups = max(1, min(len(nodes), len(identifiers)), -(-len(identifiers) // MOST))
            for number in range(groups):
                self._send_one(kind, identifiers[number::groups], nodes[number % len(nodes)])

    def _send_one(self, kind: str, identifiers: Sequence[str], node: int) -> None:
        messages = {identifier: self._pushed.pop(identifier) for identifier in identifiers}
        contents = [message.content for message in messages.values()]
        first = next(iter(messages.values())).metadata
        content = contents[0] if len(contents) == 1 else pack_batch(contents)
        together = Message(content, node, kind, ttl=first.ttl, group_id=first.group_id)
        sent = next((each for each in self._grid.push_messages([together]) if each), None)
        # What answers belong to, without what they were sent.
        stubs = {
            identifier: Message(content=RecordDict(), metadata=message.metadata)  # type: ignore[call-overload]
            for identifier, message in messages.items()
        }
        if sent is None:
            self._fail(stubs, UNAVAILABLE, "the message could not be delivered")
            return
        self._sent[sent] = stubs
        self._within |= dict.fromkeys(identifiers, sent)

    def _look(self, sent: str) -> None:
        """Take the reply to a message that was sent, if it is there, apart."""
        now = time.monotonic()
        if now < self._looked.get(sent, 0.0) + PAUSE:
            return
        self._looked[sent] = now
        for reply in self._grid.pull_messages([sent]):
            stubs = self._sent.pop(sent)
            self._looked.pop(sent, None)
            for identifier in stubs:
                del self._within[identifier]
            if reply.has_error():
                self._fail(stubs, reply.error.code, reply.error.reason or f"error code {reply.error.code}")
                continue
            contents = [reply.content] if len(stubs) == 1 else unpack_batch(reply.content)
            for (identifier, stub), content in zip(stubs.items(), contents, strict=True):
                if (reason := error_in(content)) is not None:
                    self._fail({identifier: stub}, CLIENT_APP_RAISED, reason)
                else:
                    self._replies[identifier] = Message(content, reply_to=stub)

    def _fail(self, stubs: dict[str, Message], code: int, reason: str) -> None:
        for identifier, stub in stubs.items():
            self._replies[identifier] = Message(Error(code, reason), reply_to=stub)
