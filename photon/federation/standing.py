"""Rounds that cost no message: a grid whose nodes answer a standing request.

The first training that a node is asked for opens one (`photon.link.standing`), and from then on its requests
and answers go through the run's store. Whoever uses the grid pushes and pulls messages as ever, so cohorts,
deadlines, admission and secure sums are those of single messages. A node that cannot or will not be asked
like that gets ordinary messages, and so does one that has ended a standing request in order.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from photon.config.schema import RunConfig
from photon.errors import PhotonError, RefusedError
from photon.federation.origin import sent_config
from photon.federation.waiting import Waiting
from photon.files.hashing import hash_of
from photon.link.answer import CLIENT_APP_RAISED
from photon.link.frames import Frame
from photon.link.grid import GridInFront
from photon.link.messages import BODY, Stand, Stood, pack, unpack
from photon.link.standing import ALIVE, LEASE, Channel, Heart, Pulse, end_frame
from photon.link.store import Store, open_store
from photon.telemetry.events import EventStream, Notice

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo

#: Flower's code for a node that went away.
_UNAVAILABLE = 5
#: And for one that does not want, or is not able, to answer a standing request: a ClientApp that raised, a
#: bundle that is not approved.
_UNWILLING = (CLIENT_APP_RAISED, 7)
#: Seconds that Flower keeps the message of a standing request.
_TTL = 30 * 86400.0
#: Seconds between questions whether Flower has the answer to a standing request.
_ASK_FLOWER = 0.5
#: Requests after which a new standing request takes the place of one, so that a message passes now and then.
MOST_REQUESTS = 10_000
#: Seconds for which the end of a run waits for its nodes' last words.
_FAREWELL = 5.0


@contextlib.contextmanager
def standing(config: RunConfig, grid: Grid, stream: EventStream) -> Iterator[Grid]:
    """Yield the grid of a run: with standing requests, which end with the block, if it is to have them.

    Parameters
    ----------
    config
        The run's configuration.
    grid
        Flower's.
    stream
        Where warnings go.
    """
    federation, link = config.federation, config.link
    has_store = link.transport != "inline" and link.store.url is not None
    # One that acts as a silo has a run for each request, too short to be worth it.
    is_within = federation.parent is not None
    if federation.lease is None or federation.engine != "deployment" or not has_store or is_within:
        yield grid
        return

    def warn(text: str) -> None:
        stream.emit(Notice(level="warning", message=text))

    made = StandingGrid(grid, config, sent_config(config), warn)
    try:
        yield made
    except BaseException:
        made.close(farewell=False)
        raise
    made.close(farewell=True)


@dataclass(eq=False)
class _Standing:
    """A standing request at a node.

    Attributes
    ----------
    message_id
        Of the Flower message that has opened it.
    asked
        How many requests were written.
    activated
        When Flower had seen the node come online.
    read
        How many answers came.
    pending
        Those that are not answered, by number.
    ending
        Whether the server has asked for its end.
    end
        How it has ended: an error, or in order.
    """

    channel: Channel
    message_id: str
    pulse: Pulse
    activated: str
    asked: int = 0
    read: int = 0
    pending: dict[int, Message] = field(default_factory=dict)
    ending: bool = False
    ask_flower: float = 0.0
    end: Error | str | None = None


class StandingGrid(GridInFront):
    """A deployed grid with standing requests.

    Parameters
    ----------
    grid
        Flower's.
    config, sent
        The run's configuration, and as nodes get it.
    notice
        Told a warning for the user.
    """

    def __init__(self, grid: Grid, config: RunConfig, sent: RunConfig, notice: Callable[[str], None]) -> None:
        super().__init__(grid)
        self._sent = sent
        lease, url = config.federation.lease, config.link.store.url
        assert lease is not None, "or none would be opened"
        assert url is not None, "they go through it"
        self._lease = lease
        self._notice = notice
        self._store: Store = open_store(url)
        self._folder = f"standing/{hash_of(str(config.run_dir).encode())[:32]}"
        # What an earlier attempt at this run has left.
        self._store.remove(self._folder)
        self._nodes: dict[int, _Standing] = {}
        self._ended: list[_Standing] = []
        #: Where the answer to a message is found: at a node, by number; or by the id of another message.
        self._where: dict[str, tuple[_Standing, int] | str] = {}
        self._plain: set[int] = set()
        #: When each node has come online, as Flower last told.
        self._online: dict[int, str] = {}
        #: Nodes that have died, with their last standing request.
        self._dead: dict[int, _Standing] = {}
        self._heart = Heart(self._lease, LEASE)
        self._waiting = Waiting(Path(str(config.run_dir)))

    # --- what every grid has ----------------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are online, without those that are dead as their standing requests showed.

        Flower takes a node for online until it has missed a minute of its heartbeats.
        """
        self._online = {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}
        for node, standing in list(self._dead.items()):
            told = any(True for _ in self._grid.pull_messages([standing.message_id]))
            if told or self._online.get(node, standing.activated) != standing.activated:
                del self._dead[node]
        return [node for node in self._online if node not in self._dead]

    def get_nodes(self) -> Iterable["NodeInfo"]:
        """Return what Flower knows of them."""
        return self._grid.get_nodes()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push ordinary messages and pull all replies."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    # --- messages ---------------------------------------------------------------------------------

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, each the way that its node is asked."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        if node in self._dead:
            return ""
        self._let_go_if_wanted()
        self._sweep()
        standing = self._nodes.get(node)
        if standing is not None and standing.asked >= MOST_REQUESTS:
            self._let_go(node)
            standing = None
        if standing is None and message.metadata.message_type == "train":
            standing = self._open(node)
        if standing is None:
            if (other := self._waiting.holder(node)) is not None and self._waiting.want(node):
                self._notice(
                    f"node {node} answers the standing request of the run {other}, which was asked to let go "
                    "of it: it is free when it has answered what it was asked"
                )
            return next(iter(self._grid.push_messages([message])), "")
        standing.asked += 1
        number = standing.asked
        request = Frame({"message_type": message.metadata.message_type}, message.content)
        try:
            standing.channel.ask(number, request)
        except PhotonError as error:
            self._forget(standing)
            self._use_messages(node, f"the store cannot be written ({error})")
            return next(iter(self._grid.push_messages([message])), "")
        standing.pending[number] = message
        identifier = f"{standing.channel.order.channel}/{number}"
        self._where[identifier] = standing, number
        return identifier

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the answers that are in."""
        for identifier in message_ids:
            where = self._where.get(identifier)
            if isinstance(where, tuple):
                answer = self._answer(identifier, *where)
                if answer is not None:
                    del self._where[identifier]
                    yield answer
            else:
                # One that began its way through a store goes on under Flower's own id.
                for reply in self._grid.pull_messages([identifier if where is None else where]):
                    self._where.pop(identifier, None)
                    yield reply

    def _answer(self, identifier: str, standing: _Standing, number: int) -> Message | None:
        """Return the answer to a request; None: it is not in."""
        self._let_go_if_wanted()
        message = standing.pending[number]
        try:
            frame = standing.channel.answered(number)
        except PhotonError as error:
            del standing.pending[number]
            return Message(Error(CLIENT_APP_RAISED, str(error)), reply_to=message)
        if frame is not None:
            del standing.pending[number]
            standing.read += 1
            with contextlib.suppress(PhotonError):
                standing.channel.clear(number)
            if (reason := frame.fields.get("reason")) is not None:
                return Message(Error(CLIENT_APP_RAISED, str(reason)), reply_to=message)
            return Message(frame.records, reply_to=message)
        ended = self._end_of(standing)
        if ended is None:
            return None
        del standing.pending[number]
        self._forget(standing)
        if isinstance(ended, Error):
            return Message(ended, reply_to=message)
        # It ended in order, or never began: the same request goes its way as an ordinary message.
        other = next(iter(self._grid.push_messages([message])), "")
        if not other:
            return Message(Error(_UNAVAILABLE, "the message could not be delivered"), reply_to=message)
        self._where[identifier] = other
        return None

    # --- standing requests ------------------------------------------------------------------------

    def _open(self, node: int) -> _Standing | None:
        """Open a standing request at a node; None: it is asked by ordinary messages."""
        if node in self._plain or self._waiting.is_wanted(node) or not self._waiting.hold(node):
            return None
        folder = f"{self._folder}/{secrets.token_hex(8)}-{node}"
        order = Stand(channel=folder, key=secrets.token_hex(32), lease=self._lease)
        channel = Channel(self._store, order)
        try:
            self._heart.add(channel)
        except PhotonError as error:
            self._use_messages(node, f"the store cannot be written ({error})")
            return None
        message = Message(
            RecordDict({BODY: pack(order, self._sent)}),
            dst_node_id=node,
            message_type="query",
            ttl=_TTL,
            group_id="standing",
        )
        identifier = next(iter(self._grid.push_messages([message])), "")
        if not identifier:
            self._heart.remove(channel)
            self._waiting.release(node)
            return None
        standing = _Standing(channel, identifier, Pulse(channel, ALIVE), self._online.get(node, ""))
        self._nodes[node] = standing
        return standing

    def _end_of(self, standing: _Standing) -> Error | str | None:
        """Return how a standing request has ended: an error, or in order; None: it has not."""
        if standing.end is None:
            standing.end = self._looked_for_end(standing)
        return standing.end

    def _looked_for_end(self, standing: _Standing) -> Error | str | None:
        lost = standing.pulse.is_lost()
        begun = standing.pulse.was_felt
        if begun and not lost and not standing.ending:
            return None
        now = time.monotonic()
        if now > standing.ask_flower:
            standing.ask_flower = now + _ASK_FLOWER
            for reply in self._grid.pull_messages([standing.message_id]):
                return self._last_words(standing, reply)
        if begun and lost:
            for node in [node for node, one in self._nodes.items() if one is standing]:
                self._dead[node] = standing
            reason = f"no sign of life for {self._lease:g} s (federation.lease)"
            return Error(_UNAVAILABLE, reason)
        return None

    def _last_words(self, standing: _Standing, reply: Message) -> Error | str:
        """Return what Flower's answer to a standing request says of its end."""
        begun = standing.pulse.was_felt
        if reply.has_error():
            reason = reply.error.reason or f"error code {reply.error.code}"
            if begun or reply.error.code not in _UNWILLING:
                return Error(_UNAVAILABLE, reason)
            return self._not_begun(standing, reason)
        try:
            said = unpack(reply.content, Stood)
        except RefusedError as error:
            return self._not_begun(standing, str(error))
        except PhotonError as error:
            return Error(_UNAVAILABLE, f"its answer to the standing request cannot be read ({error})")
        if not standing.read <= said.answered <= standing.asked:
            reason = f"it says that it has answered {said.answered} requests, and {standing.read} came"
            return Error(_UNAVAILABLE, f"{reason} in its name, of {standing.asked}")
        return said.why

    def _not_begun(self, standing: _Standing, reason: str) -> str:
        node = next((node for node, one in self._nodes.items() if one is standing), None)
        if node is not None:
            self._use_messages(node, reason)
        return reason

    def _use_messages(self, node: int, reason: str) -> None:
        self._plain.add(node)
        self._notice(f"node {node} is asked by ordinary messages: {reason}")

    def _let_go_if_wanted(self) -> None:
        for node in self._waiting.wanted():
            if node in self._nodes:
                self._let_go(node)

    def _sweep(self) -> None:
        """Forget the standing requests whose ends were asked for, and came."""
        for standing in list(self._ended):
            if not standing.pending and (last := self._end_of(standing)) is not None:
                self._forget(standing)
                if isinstance(last, Error):
                    self._notice(f"standing request: {last.reason}")

    def _let_go(self, node: int) -> None:
        """Have a node end its standing request when it has answered what it was asked."""
        standing = self._nodes.pop(node)
        standing.ending = True
        standing.asked += 1
        with contextlib.suppress(PhotonError):
            standing.channel.ask(standing.asked, end_frame())
        self._ended.append(standing)
        self._waiting.release(node)

    def _forget(self, standing: _Standing) -> None:
        self._heart.remove(standing.channel)
        if standing in self._ended:
            self._ended.remove(standing)
        for node in [node for node, one in self._nodes.items() if one is standing]:
            del self._nodes[node]
            self._waiting.release(node)

    def close(self, *, farewell: bool) -> None:
        """End all standing requests.

        Parameters
        ----------
        farewell
            Whether to wait a moment for what the nodes say of them, and compare it with what came.
        """
        for node in list(self._nodes):
            self._let_go(node)
        for standing in self._ended:
            # Nobody waits for them any more.
            standing.pending.clear()
        end = time.monotonic() + _FAREWELL
        while farewell and self._ended and time.monotonic() < end:
            self._sweep()
            time.sleep(0.05)
        self._heart.stop()
        self._waiting.close()
        if not self._ended:
            with contextlib.suppress(PhotonError):
                self._store.remove(self._folder)
