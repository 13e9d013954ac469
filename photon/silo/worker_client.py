"""Hand a message to the silo worker, and start one where none answers.

Flower starts a new process for every message to a deployed silo. Such a process must be quick, so nothing
heavy is imported here; what is costly lives in the worker (`photon.worker`), which stays.
"""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, RecordDict

from photon import code
from photon.errors import PhotonError
from photon.files.processes import is_gone
from photon.link import BODY
from photon.link.answer import MessageType, NodeConfig
from photon.link.frames import Frame, read_frame, write_frame

if TYPE_CHECKING:
    import psutil

SOCKET, LOG, LOCK = "worker.sock", "worker.log", "worker.lock"
#: Bytes that every platform takes as a socket's path.
_LONGEST_PATH = 103
_GRACE_SECONDS = 10.0


def has_worker(content: RecordDict, node_config: NodeConfig) -> bool:
    """Tell whether a worker is to do what a message asks for.

    That is so in a deployment, unless the operator has set ``worker=false``. Everywhere else the process that
    is asked stays by itself.
    """
    record = content.get(BODY)
    deployed = isinstance(record, ConfigRecord) and record.get("engine") == "deployment"
    wanted = node_config.get("worker", True)
    if not isinstance(wanted, bool):
        raise PhotonError(f"node config: worker={wanted!r} is neither true nor false")
    return deployed and wanted and _trains(node_config) and hasattr(socket, "AF_UNIX")


def _trains(node_config: NodeConfig) -> bool:
    """Tell whether a node trains itself; a federation has others that do (`NodeSettings.is_federation`)."""
    if "state-dir" not in node_config or "federation" in node_config:
        return False
    return "island" in node_config or node_config.get("islands", 1) == 1


def ask_worker(
    message_type: MessageType, content: RecordDict, node_config: NodeConfig, program: str
) -> RecordDict:
    """Have the silo's worker do what a message asks for; see `photon.node.answer`.

    Parameters
    ----------
    message_type, content, node_config
        As for `photon.node.answer`.
    program
        Module that a worker runs.

    Raises
    ------
    PhotonError
        What the worker says went wrong, or that it ended without an answer. The next message starts another.
    """
    folder = Path(str(node_config["state-dir"])).absolute()
    with find_worker(folder, program) as worker:
        try:
            request = {"message_type": message_type, "node_config": dict(node_config)}
            write_frame(worker.stream, Frame(request, content))
            reply = read_frame(worker.stream)
        except (OSError, EOFError) as error:
            raise PhotonError(
                f"silo worker: process {worker.pid} ended while at work on a {message_type} message, and the "
                f"next message starts another; {_last_words(folder)}"
            ) from error
    if "error" in reply.fields:
        raise PhotonError(str(reply.fields["error"]))
    return reply.records


def check_peer(connection: socket.socket) -> None:
    """Check that the process at the other end belongs to this user, where the platform tells.

    Raises
    ------
    PhotonError
        If it does not.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    uid = struct.unpack("iII", credentials)[1]
    if uid != os.geteuid():
        raise PhotonError(f"silo worker: the other end of {SOCKET} belongs to uid {uid}, not {os.geteuid()}")


@dataclass(frozen=True)
class Worker:
    """A connection to a worker that has greeted."""

    connection: socket.socket
    stream: BufferedIOBase
    pid: int

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        # A worker that is gone cannot take what is still in the buffer.
        with contextlib.suppress(OSError):
            self.stream.close()
        self.connection.close()


def find_worker(folder: Path, program: str) -> Worker:
    """Return the worker of a state folder, which waits for a message; start it if there is none.

    Raises
    ------
    PhotonError
        If the folder cannot be used, or the worker ends at once.
    """
    _make_private(folder)
    if (worker := _greet(folder)) is not None:
        return worker
    from filelock import FileLock

    # Of two messages that come at once, one starts the worker, and the other finds it.
    with FileLock(folder / LOCK):
        if (worker := _greet(folder)) is not None:
            return worker
        _start(folder, program)
    if (worker := _greet(folder)) is None:
        raise PhotonError(f"silo worker: it ended as soon as it was started; {_last_words(folder)}")
    return worker


def _greet(folder: Path) -> Worker | None:
    """Return the worker that runs this very code, if there is one; end one that runs other code."""
    connection = _connect(folder)
    if connection is None:
        return None
    stream = connection.makefile("rwb")
    try:
        hello = read_frame(stream, max_payload=0).fields
    except (OSError, EOFError):
        # It was there, and ended before it came to this message.
        connection.close()
        return None
    worker = Worker(connection, stream, int(hello["pid"]))
    if hello["code"] == code.fingerprint():
        return worker
    with worker:
        _end(worker.pid)
    return None


def _connect(folder: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _address(folder) as address:
            connection.connect(address)
        check_peer(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def _start(folder: Path, program: str) -> None:
    path = folder / SOCKET
    path.unlink(missing_ok=True)
    ends_with = owner()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    # The socket listens before the worker runs, so there is nothing to wait for and no moment between.
    with socket.socket(socket.AF_UNIX) as listener, os.fdopen(log, "ab") as output:
        with _address(folder) as address:
            listener.bind(address)
        path.chmod(0o600)
        listener.listen()
        arguments = [str(folder), str(listener.fileno()), str(ends_with.pid)]
        worker = subprocess.Popen(
            [*code.command(program), *arguments],
            env=code.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    # In a process that stays, somebody has to take note of the worker's end.
    threading.Thread(target=worker.wait, daemon=True).start()


def owner() -> "psutil.Process":
    """Return the process that a worker is to end with: the SuperNode that this ClientApp belongs to.

    A SuperExec that was started by itself is not below the SuperNode, and stands for it. Where there is
    neither, the worker ends with this process.
    """
    import psutil

    here = psutil.Process()
    for program in ("flower-supernode", "flower-superexec"):
        for process in reversed(here.parents()):
            with contextlib.suppress(psutil.Error):
                # The program itself, or the interpreter that runs it.
                if program in [Path(word).name for word in process.cmdline()[:2]]:
                    return process
    return here


def _end(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + _GRACE_SECONDS
        while not is_gone(process):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


@contextlib.contextmanager
def _address(folder: Path) -> Iterator[str]:
    """Yield what a socket in ``folder`` is called; the system takes short names only."""
    path = os.fsencode(folder / SOCKET)
    if len(path) <= _LONGEST_PATH:
        yield os.fsdecode(path)
        return
    if not sys.platform.startswith("linux"):
        raise PhotonError(
            f"state-dir: {folder} is too long a path for a socket; choose one of less than "
            f"{_LONGEST_PATH - len(SOCKET)} bytes, or set worker=false in the node config"
        )
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid():
            raise PhotonError(
                f"state-dir: {folder} belongs to uid {status.st_uid}, and this silo runs as {os.geteuid()}; "
                "change its owner, or set worker=false in the node config"
            )
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise PhotonError(f"state-dir: {folder} cannot be used ({error.strerror})") from error


def _last_words(folder: Path) -> str:
    path = folder / LOG
    with open(path, "rb") as log:
        log.seek(max(0, path.stat().st_size - 4096))
        lines = log.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f"see {path}, which " + (f"ends with: {said[-1][:300]}" if said else "is empty")
