"""The channel of a standing request: requests and answers that lie in a store, one file each.

A standing request is one Flower message that a node answers only at the end. Until then server and node write
to each other below the channel's folder in the run's store::

    ask-NNNNNNNN       the server's requests, each a frame: type of the message, and its content
    answer-NNNNNNNN    the node's answers, each a frame: the content, or an error
    lease              the server's sign of life, a number that grows
    alive              the node's

Everybody who may write to the store could write there. So each file begins with a keyed hash of its own
name and content; the key came in the Flower message, over TLS. An answer cannot pass for another, or for a
request.
"""

import hmac
import threading
import time
from dataclasses import dataclass
from io import BytesIO

from blake3 import blake3
from flwr.app import RecordDict

from photon.errors import PhotonError
from photon.link.frames import Frame, read_frame, write_frame
from photon.link.messages import Stand
from photon.link.store import Store

_MAC_BYTES = 32
#: Bytes of a file of the channel, at most. Large tensors lie in the store by themselves.
MAX_FILE = 2**30
#: Signs of life in the time after which the other side is taken for dead.
SIGNS = 5

LEASE, ALIVE = "lease", "alive"


@dataclass(frozen=True)
class Channel:
    """A channel in a store.

    Attributes
    ----------
    store
        Where it lies.
    order
        What opened it: folder, key, and the seconds of the lease.
    """

    store: Store
    order: Stand

    def ask(self, number: int, frame: Frame) -> None:
        """Write a request; ``number`` counts from 1."""
        self._write(_numbered("ask", number), _bytes_of(frame))

    def asked(self, number: int) -> Frame | None:
        """Return a request; None: it is not there yet."""
        return _frame_of(self._read(_numbered("ask", number), MAX_FILE))

    def answer(self, number: int, frame: Frame) -> None:
        """Write an answer."""
        self._write(_numbered("answer", number), _bytes_of(frame))

    def answered(self, number: int) -> Frame | None:
        """Return an answer; None: it is not there yet."""
        return _frame_of(self._read(_numbered("answer", number), MAX_FILE))

    def clear(self, number: int) -> None:
        """Remove a request and its answer."""
        for kind in ("ask", "answer"):
            self.store.discard(f"{self.order.channel}/{_numbered(kind, number)}")

    def beat(self, name: str, count: int) -> None:
        """Give a sign of life: ``LEASE`` or ``ALIVE``."""
        self._write(name, count.to_bytes(8, "little"))

    def heard(self, name: str) -> int | None:
        """Return the last sign of life of the other side; None: there was none."""
        data = self._read(name, _MAC_BYTES + 8)
        return None if data is None else int.from_bytes(data, "little")

    def _write(self, name: str, data: bytes) -> None:
        with self.store.writing(f"{self.order.channel}/{name}") as write:
            write(memoryview(self._mac(name, data) + data))

    def _read(self, name: str, most: int) -> bytes | None:
        sealed = self.store.small(f"{self.order.channel}/{name}", most)
        if sealed is None:
            return None
        data = sealed[_MAC_BYTES:]
        if not hmac.compare_digest(sealed[:_MAC_BYTES], self._mac(name, data)):
            raise PhotonError(f"standing request: {name} was not written by the other side, or was damaged")
        return data

    def _mac(self, name: str, data: bytes) -> bytes:
        # The length of the name is part of what is hashed, so that name and content cannot change places.
        head = f"{len(name)}:{name}:".encode()
        return blake3(head, key=bytes.fromhex(self.order.key)).update(data).digest()


class Pulse:
    """Whether the other side of a channel still lives, by its signs and this machine's clock.

    Parameters
    ----------
    channel, name
        Whose sign.
    """

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._name = name
        self._last: int | None = None
        self._looked = 0.0
        self.renew()

    @property
    def was_felt(self) -> bool:
        """Whether there ever was a sign."""
        return self._last is not None

    def renew(self) -> None:
        """Begin a new lease."""
        self._until = time.monotonic() + self._channel.order.lease

    def is_lost(self) -> bool:
        """Look for a sign if it is time to, and return whether there was none for a whole lease."""
        now = time.monotonic()
        if now - self._looked > self._channel.order.lease / (2 * SIGNS):
            self._looked = now
            heard = self._channel.heard(self._name)
            if heard is None and self.was_felt:
                # The other side has removed the channel.
                return True
            if heard != self._last:
                self._last = heard
                self.renew()
        return now > self._until


class Heart:
    """Gives signs of life on channels, from a thread of its own, until it is stopped.

    Parameters
    ----------
    lease
        Seconds after which the other side gives up.
    name
        Of the sign.
    """

    def __init__(self, lease: float, name: str) -> None:
        self._name = name
        self._count = 0
        self._channels: set[Channel] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(lease / SIGNS,), daemon=True)
        self._thread.start()

    def add(self, channel: Channel) -> None:
        """Give signs on a channel, the first one at once."""
        with self._lock:
            self._channels.add(channel)
            self._count += 1
            channel.beat(self._name, self._count)

    def remove(self, channel: Channel) -> None:
        """Give no more of them."""
        with self._lock:
            self._channels.discard(channel)

    def stop(self) -> None:
        """Give no more signs at all."""
        self._over.set()
        self._thread.join()

    def _beat(self, every: float) -> None:
        while not self._over.wait(every):
            with self._lock:
                self._count += 1
                for channel in self._channels:
                    try:
                        channel.beat(self._name, self._count)
                    except PhotonError:
                        # A store that cannot be reached now may be by the next sign; if not, the lease ends.
                        continue


def _numbered(kind: str, number: int) -> str:
    return f"{kind}-{number:08d}"


def _bytes_of(frame: Frame) -> bytes:
    stream = BytesIO()
    write_frame(stream, frame)
    return stream.getvalue()


def _frame_of(data: bytes | None) -> Frame | None:
    if data is None:
        return None
    try:
        return read_frame(BytesIO(data), MAX_FILE)
    except EOFError as error:
        raise PhotonError(f"standing request: a file ends early ({error})") from error


def end_frame() -> Frame:
    """Return the request that ends a standing request."""
    return Frame({"end": True}, RecordDict())
