"""The endpoint's socket, its key, and its life."""

import ipaddress
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from photon import DISTRIBUTION
from photon.engine.signals import heard
from photon.errors import PhotonError

if TYPE_CHECKING:
    from photon.serving.model import ServedModel

#: Where the key is, if no file is named.
KEY_VARIABLE = "PHOTON_SERVE_KEY"
_SHORTEST_KEY = 16


def read_key(file: Path | None) -> str | None:
    """Return the key of a file, or of the environment; None where there is neither.

    Raises
    ------
    PhotonError
        If the file cannot be read, or others can, or the key is short or has spaces.
    """
    where = KEY_VARIABLE if file is None else str(file)
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        if key is None:
            return None
    else:
        try:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                raise PhotonError(f"{file}: other users can read this key; run: chmod 600 {file}")
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise PhotonError(f"{file}: cannot read the key ({error})") from None
    if len(key) < _SHORTEST_KEY or not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
        raise PhotonError(
            f"{where}: a key has at least {_SHORTEST_KEY} letters and digits and no spaces; "
            "`openssl rand -hex 32` makes one"
        )
    return key


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """Return a socket that listens.

    Raises
    ------
    PhotonError
        If the address is not this machine's own to itself and there is no key, or it cannot be listened at.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise PhotonError(f"--host {host}: no such address ({error.strerror})") from None
    family, _, _, _, address = found[0]
    if key is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise PhotonError(
            f"--host {host}: others can reach this address, so it needs a key: --key-file FILE, or "
            f"{KEY_VARIABLE}"
        )
    try:
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise PhotonError(
            f"cannot listen at {host}, port {port} ({os.strerror(error.errno or 0)}); "
            "choose another with --port"
        ) from None


def address_of(listener: socket.socket) -> str:
    """Return where a socket listens, as the beginning of a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(model: "ServedModel", listener: socket.socket, key: str | None, ready: Callable[[], None]) -> None:
    """Answer until the command is asked to end; `ready` is called when the first can be answered.

    Raises
    ------
    PhotonError
        If fastapi or uvicorn is not installed.
    """
    try:
        import uvicorn

        from photon.serving.endpoint import build_app
    except ImportError:
        raise PhotonError(
            f"photon serve needs more packages; run: pip install '{DISTRIBUTION}[serve]'"
        ) from None
    config = uvicorn.Config(
        build_app(model, key),
        log_level="warning",
        # Fewer than there are threads for those that wait for their turn.
        limit_concurrency=32,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    try:
        ready()
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        heard()
    finally:
        model.close()
