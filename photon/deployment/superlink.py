"""How an aggregator's programs are started, and what its SuperLink is asked."""

import contextlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from photon.engine.deployment import Connection
from photon.errors import RunError


def say_command(home: Path, command: Sequence[str]) -> None:
    """Print a command that is about to run, so that the same can be done by hand."""
    print(f"FLWR_HOME={shlex.quote(str(home))} {shlex.join(command)}", flush=True)


def superlink_command(host: str, port: int, database: Path, keys: Path | None) -> tuple[str, ...]:
    """Return what starts a SuperLink whose database survives it.

    Parameters
    ----------
    host, port
        Where it listens.
    database
        Its file.
    keys
        Folder of the aggregator's keys, for TLS and node keys; None: without both.
    """
    if keys is None:
        security = ["--insecure"]
    else:
        security = [
            *("--ssl-ca-certfile", str(keys / "authority.crt"), "--ssl-certfile", str(keys / "server.crt")),
            *("--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth", *_secret(keys)),
        ]
    return (
        *("flower-superlink", "--host", host, "--port", str(port)),
        *("--isolation", "process", "--database", str(database), *security),
    )


def superexec_command(address: str, keys: Path | None) -> tuple[str, ...]:
    """Return what starts ServerApps: a process of its own, so that runs outlive a SuperLink."""
    if keys is None:
        security = ["--insecure"]
    else:
        security = ["--root-certificates", str(keys / "authority.crt"), *_secret(keys)]
    return "flower-superexec", "--runtime-api-address", address, *security


def registration(public: Path | str, connection: str, name: str) -> list[str]:
    """Return the words after ``flwr`` that register a node's public key."""
    return ["supernode", "register", str(public), connection, "--name", name]


def register(connection: Connection, words: list[str]) -> str | None:
    """Register a node's public key.

    Returns
    -------
    str or None
        The id of the node; None: the SuperLink knows the key already.

    Raises
    ------
    RunError
        If the SuperLink does not take it.
    """
    try:
        answer = connection.flwr(*words, "--format", "json")
    except RunError as error:
        answer = str(error)
    with contextlib.suppress(ValueError, KeyError):
        return str(json.loads(answer)["node-id"])
    if "already in use" in answer:
        return None
    raise RunError(f"flwr supernode register: {answer.strip()[-500:]}")


def nodes_of(connection: Connection) -> list[dict[str, Any]]:
    """Return what the SuperLink knows of the nodes: ``node-id``, ``status`` and more."""
    return _listed(connection, "nodes", "supernode", "list")


def runs_of(connection: Connection) -> list[dict[str, Any]]:
    """Return what the SuperLink knows of the runs: ``run-id``, ``status``, ``elapsed`` (s) and more."""
    return _listed(connection, "runs", "list")


def _listed(connection: Connection, what: str, *words: str) -> list[dict[str, Any]]:
    answer = connection.flwr(*words, connection.name, "--format", "json", check=False)
    with contextlib.suppress(ValueError, KeyError):
        found: list[dict[str, Any]] = json.loads(answer)[what]
        return found
    return []


def _secret(keys: Path) -> list[str]:
    return ["--superexec-auth-secret-file", str(keys / "superexec")]
