"""Start and stop Flower's processes so that they meet no surprises and leave nothing behind."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from photon.errors import RunError
from photon.files.processes import is_gone

START_SECONDS = 90.0
#: How often a SuperExec looks whether a message, or a run, waits for a program. Flower's own is a second.
POLL_VARIABLE, TASK_POLL_SECONDS = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.1"


def flower_settings(home: Path) -> dict[str, str]:
    """Return the environment variables that every process of Flower is started with.

    Parameters
    ----------
    home
        A folder of its own for Flower: connections, unpacked apps.
    """
    return {
        "FLWR_HOME": str(home),
        # Photon's environment is complete, and no run may change it.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        POLL_VARIABLE: TASK_POLL_SECONDS,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Flower's HTTP client would send requests to this very machine through a proxy.
        "NO_PROXY": "127.0.0.1,localhost",
    }


def flower_environment(home: Path) -> dict[str, str]:
    """Return this process's environment with Flower's settings, and its own programs first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | flower_settings(home) | {"PATH": path}


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_healthy(address: str, authority: Path | None = None, *, timeout: float = 1.0) -> bool:
    """Ask a SuperLink or SuperNode whether it is up.

    Parameters
    ----------
    address
        ``host:port``.
    authority
        Certificate that its own must be signed by; None: it speaks plain HTTP.
    timeout
        Seconds to wait for the answer.
    """
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if authority is not None:
        context = ssl.create_default_context(cafile=str(authority))
        handlers.append(urllib.request.HTTPSHandler(context=context))
    scheme = "http" if authority is None else "https"
    try:
        urllib.request.build_opener(*handlers).open(f"{scheme}://{address}/health", timeout=timeout).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def wait_until_healthy(
    process: subprocess.Popen[bytes], address: str, log: Path, authority: Path | None = None
) -> None:
    """Wait until a process that was just started answers.

    Raises
    ------
    RunError
        If it exits, or does not answer within ``START_SECONDS``.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RunError(f"{log.stem} exited with {process.returncode}; see {log}")
        if is_healthy(address, authority):
            return
        time.sleep(0.2)
    raise RunError(f"{address} did not answer within {START_SECONDS:g} s; see {log}")


def dying_with_us() -> list[str]:
    """Have the kernel end a command with its starter, even when that is killed outright (Linux)."""
    # Also where the PATH leads to approved programs alone.
    setpriv = shutil.which("setpriv", path=f"{os.environ.get('PATH', '')}{os.pathsep}{os.defpath}")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def stop_tree(
    process: subprocess.Popen[bytes] | psutil.Process, *, at_once: bool, patience: float = 5.0
) -> None:
    """Stop a process and everything that descends from it.

    The root is asked first, so that it can end its children in order; ``at_once`` asks all of them, for a
    run that is to stop where it is. Whoever does not listen is killed.
    """
    try:
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    alive = family
    for asked in [family] if at_once else [[root], family]:
        for member in asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        alive = _alive_after(family, patience)
        if not alive:
            break
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    _alive_after(alive, patience)
    if isinstance(process, subprocess.Popen):
        process.wait()


def _alive_after(family: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Return who of a family has not ended within some seconds.

    One that has ended and that nobody has waited for yet is no process any more: its parent may be waiting
    for us.
    """
    end = time.monotonic() + seconds
    while (alive := [member for member in family if not is_gone(member)]) and time.monotonic() < end:
        time.sleep(0.02)
    return alive
