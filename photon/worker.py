"""The silo worker: one process per silo that lives across rounds.

It keeps what is costly: imports, model, compiled graph, process group. `photon.silo.worker_client` starts it
and gives it one message after the other through a socket in the silo's state folder. It ends with the
SuperNode. It also ends, and leaves a clean start to the next message, when an error that nobody foresaw may
have left it in disorder, and when the process that waits for its answer is gone, because the run was stopped.
"""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil

from photon import code
from photon.errors import PhotonError
from photon.files.processes import is_gone
from photon.link.frames import Frame, read_frame, write_frame
from photon.silo.worker_client import LOG, check_peer

#: A message comes at once or not at all; only an answer takes its time.
_TRANSFER_SECONDS = 60.0
_WATCH_SECONDS = 0.25
_LARGEST_LOG = 8 * 2**20


class _Watch:
    """End this process as soon as it has nobody left to work for.

    Parameters
    ----------
    owner
        Process id of the SuperNode.
    """

    def __init__(self, owner: int) -> None:
        self._owner = psutil.Process(owner)
        self._lock = threading.Lock()
        self._waiting: socket.socket | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def working_for(self, connection: socket.socket) -> Iterator[None]:
        """Watch the process at the other end of ``connection``, too."""
        with self._lock:
            self._waiting = connection
        try:
            yield
        finally:
            with self._lock:
                self._waiting = None

    def _watch(self) -> None:
        while True:
            time.sleep(_WATCH_SECONDS)
            with self._lock:
                given_up = self._waiting is not None and _hung_up(self._waiting)
            if given_up or is_gone(self._owner):
                _say("nobody waits for the answer" if given_up else "the SuperNode is gone")
                # All that is on the disk survives this at any moment, and a group of devices ends with it.
                os._exit(0)


def main(folder: Path, listener: socket.socket, owner: int) -> int:
    """Serve messages, one at a time, until the end. Returns the exit code.

    Parameters
    ----------
    folder
        The silo's state folder.
    listener
        The listening socket.
    owner
        Process id of the SuperNode.
    """
    faulthandler.enable()
    # Not SystemExit: the flush of a broken connection would put its own error in that one's place.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    own_code = code.fingerprint()
    try:
        watch = _Watch(owner)
    except psutil.NoSuchProcess:
        return 0
    _say(f"process {os.getpid()} serves for process {owner}")
    sound = True
    while sound:
        connection, _ = listener.accept()
        _limit_log(folder / LOG)
        with connection:
            try:
                sound = _serve(connection, own_code, watch, folder)
            except (OSError, EOFError, PhotonError) as error:
                _say(f"a connection was given up: {error}")
    return 1


def _serve(connection: socket.socket, own_code: str, watch: _Watch, folder: Path) -> bool:
    """Answer one message; return whether this process is fit for another."""
    check_peer(connection)
    connection.settimeout(_TRANSFER_SECONDS)
    with connection.makefile("rwb") as stream:
        write_frame(stream, Frame({"code": own_code, "pid": os.getpid()}))
        try:
            request = read_frame(stream)
        except PhotonError as error:
            write_frame(stream, Frame({"error": str(error)}))
            raise
        with watch.working_for(connection):
            reply, sound = _answer(request, folder)
        write_frame(stream, reply)
    return sound


def _answer(request: Frame, folder: Path) -> tuple[Frame, bool]:
    begin = time.monotonic()
    try:
        message_type, node_config = request.fields["message_type"], request.fields["node_config"]
        _say(f"{message_type}: begun")
        # Here, so that the SuperNode's end is noticed while torch is being imported.
        from photon.node import answer

        records = answer(message_type, request.records, node_config)
    except PhotonError as error:
        _say(f"{message_type}: refused: {error}")
        return Frame({"error": str(error)}), True
    except Exception as error:
        traceback.print_exc()
        return Frame({"error": f"{type(error).__name__}: {error}; see {folder / LOG}"}), False
    _say(f"{message_type}: done in {time.monotonic() - begin:.3f} s")
    return Frame({}, records), True


def _hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    # Nothing but the end of the other side, which is always told.
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _limit_log(path: Path) -> None:
    """Begin the log anew when it has grown large; the one before stays beside it."""
    if path.stat().st_size < _LARGEST_LOG:
        return
    os.replace(path, path.with_name(f"{path.name}.1"))
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3])))
