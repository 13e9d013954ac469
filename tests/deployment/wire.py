"""What crosses the wire between SuperNodes and their SuperLink, counted without a word of Photon's.

A relay of TCP connections keeps every byte in both directions. What it kept is read as HTTP/1.1, because that
is what Flower's SuperNodes speak, so each byte belongs to a call; and the calls' bodies as Flower's messages,
whose parts ("objects") travel in calls of their own.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from flwr.app import RecordDict
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Call:
    """A request and its response.

    Attributes
    ----------
    path
        Last part of the request's path: ``pull-object``, ``push-object``, ``pull-messages``, …
    request, response
        Their bodies.
    up, down
        Bytes on the wire, with HTTP's heads.
    """

    path: str
    request: bytes
    response: bytes
    up: int
    down: int


@dataclass(frozen=True)
class Delivered:
    """A message that crossed.

    Attributes
    ----------
    message_type
        ``query``, ``train`` or ``evaluate``.
    down
        Whether it went to a silo; otherwise it is a reply.
    objects
        In how many parts it crossed, equal ones once.
    nbytes
        What they have together.
    content
        What it holds, put together again from the parts.
    """

    message_type: str
    down: bool
    objects: int
    nbytes: int
    content: RecordDict


@dataclass
class _Recorded:
    """All that crossed one connection."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


class Relay:
    """Pass connections on to a server on this machine, and keep what crosses.

    Parameters
    ----------
    port
        The server's.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[_Recorded] = []
        self._listener = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    @property
    def up(self) -> int:
        """Bytes that clients have sent."""
        return sum(len(connection.up) for connection in self._connections)

    @property
    def down(self) -> int:
        """Bytes that the server has sent."""
        return sum(len(connection.down) for connection in self._connections)

    def calls(self) -> list[Call]:
        """Return all calls that are answered, connection by connection."""
        return [call for connection in self._connections for call in _calls(connection)]

    def _accept(self) -> None:
        # The listener is closed at the end, and then there is nothing left to accept.
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self._port))
                recorded = _Recorded()
                self._connections.append(recorded)
                for source, sink, record in (
                    (client, server, recorded.up),
                    (server, client, recorded.down),
                ):
                    threading.Thread(target=_pump, args=(source, sink, record), daemon=True).start()


def delivered(calls: Sequence[Call]) -> list[Delivered]:
    """Return the messages that crossed in ``calls``."""
    contents: dict[str, bytes] = {}
    for call in calls:
        if call.path == "pull-object":
            answer = PullObjectResponse.FromString(call.response)
            if answer.object_available:
                contents[PullObjectRequest.FromString(call.request).object_id] = answer.object_content
        elif call.path == "push-object":
            pushed = PushObjectRequest.FromString(call.request)
            contents[pushed.object_id] = pushed.object_content
    found = []
    for call in calls:
        if call.path == "pull-messages":
            pulled = PullMessagesResponse.FromString(call.response)
            heads, trees = pulled.messages_list, pulled.message_object_trees
        elif call.path == "push-messages":
            replies = PushMessagesRequest.FromString(call.request)
            heads, trees = replies.messages_list, replies.message_object_trees
        else:
            continue
        for head, tree in zip(heads, trees, strict=True):
            kind = head.metadata.message_type
            found.append(_delivered(kind, call.path == "pull-messages", tree, contents))
    return found


def _delivered(message_type: str, down: bool, tree: ObjectTree, contents: Mapping[str, bytes]) -> Delivered:
    parts = {part.object_id: contents[part.object_id] for part in iterate_object_tree(tree)}
    nbytes = sum(map(len, parts.values()))
    # Putting them together takes them out of the mapping.
    message = inflate_object_from_contents(tree.object_id, dict(parts))
    return Delivered(message_type, down, len(parts), nbytes, message.content)


def _pump(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            record += data
            sink.sendall(data)
    # The one side has ended, so the other hears of it, too.
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _calls(recorded: _Recorded) -> Iterator[Call]:
    responses = _http(bytes(recorded.down))
    for (line, request, up), (_, response, down) in zip(_http(bytes(recorded.up)), responses, strict=False):
        path = line.split(" ")[1].rpartition("/")[2]
        yield Call(path, request, response, up, down)


def _http(stream: bytes) -> Iterator[tuple[str, bytes, int]]:
    """Yield the first line, the body and the length of each complete message."""
    at = 0
    while (end := stream.find(b"\r\n\r\n", at)) >= 0:
        line, *rest = stream[at:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)}
        body, stop = _body(stream, end + 4, headers)
        if stop > len(stream):
            return
        yield line, body, stop - at
        at = stop


def _body(stream: bytes, at: int, headers: Mapping[str, str]) -> tuple[bytes, int]:
    assert "transfer-encoding" not in headers, "Flower's calls say how long they are"
    assert "content-encoding" not in headers, "Flower's calls are not compressed"
    stop = at + int(headers.get("content-length", 0))
    return stream[at:stop], stop
