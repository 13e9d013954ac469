"""The private names of Flower that Photon cannot do without, in one place.

Checked against flwr 1.41; a new minor version starts its review here.
"""

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)
from flwr.supercore.task_identity import TaskIdentity

from photon.errors import PhotonError

__all__ = [
    "TASK_PROGRAMS",
    "answer_task",
    "assign_message_id",
    "build_bundle",
    "bytes_to_private_key",
    "bytes_to_public_key",
    "decrypt",
    "encrypt",
    "ensure_task_identity",
    "generate_key_pairs",
    "generate_shared_key",
    "is_registered",
    "parse_node_config",
    "private_key_to_bytes",
    "public_key_to_bytes",
    "with_own_records",
]

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_serial = itertools.count(1)

#: The programs that a SuperExec starts, by the kind of a task. A SuperNode is told the kind by the SuperLink.
TASK_PROGRAMS = (
    "flwr-agentapp",
    "flwr-clientapp",
    "flwr-connector",
    "flwr-model",
    "flwr-serverapp",
    "flwr-simulation",
)

#: Flower's codes for a ClientApp that raised, and for a bundle that is not to be run.
_CLIENT_APP_RAISED, _INVALID_BUNDLE = 2, 7


def ensure_task_identity() -> None:
    """Let this process construct messages, as a process that Flower started may."""
    if TaskIdentity._run_id is None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def assign_message_id(message: Message) -> str:
    """Give ``message`` an id that is unique in this process and return it."""
    identifier = f"inprocess-{next(_serial)}"
    message.metadata.__dict__["_message_id"] = identifier
    return identifier


def with_own_records(message: Message) -> Message:
    """Return ``message`` with a record dictionary of its own; the records themselves are shared."""
    return Message(content=RecordDict(dict(message.content)), metadata=message.metadata)  # type: ignore[call-overload]


def is_registered(address: str, authority: Path, key: "EllipticCurvePrivateKey") -> bool:
    """Ask a SuperLink whether a node's key is registered with it; nothing changes there.

    A node that wants to become active is turned away for an unknown key first and for an impossible
    heartbeat second, so the reason for which this one is turned away tells.

    Parameters
    ----------
    address
        ``host:port`` of the SuperLink.
    authority
        Certificate that its own is signed by.
    key
        The node's private key.

    Raises
    ------
    httpx.HTTPError
        If the SuperLink cannot be reached, or gives neither of the two reasons.
    """
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=-1.0)
    interceptors = [NodeAuthHttpInterceptor(key, key.public_key())]
    with FleetHttpClient.from_server_address(address, False, str(authority), interceptors) as client:
        try:
            client.ActivateNode(request)
        except httpx.HTTPStatusError as error:
            reason = FlowerError.from_json(error.response.text)
            code = reason.code if reason else None
            if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
                return True
            if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                return False
            raise
    raise AssertionError("a heartbeat of -1 s was accepted")


def parse_node_config(text: str) -> dict[str, str | int | float | bool]:
    """Read what ``--node-config`` of a SuperNode says, as it does.

    Raises
    ------
    PhotonError
        If it is not made of ``key=value`` pairs.
    """
    import click
    from flwr.common.config import parse_config_args

    try:
        settings: dict[str, str | int | float | bool] = parse_config_args([text])
    except (click.ClickException, OSError, ValueError) as error:
        raise PhotonError(f"--node-config: {' '.join(str(error).split())}") from error
    if text.strip() and not settings:
        raise PhotonError(f"--node-config {text!r}: no key=value pair in it")
    return settings


def build_bundle(folder: Path) -> bytes:
    """Return the bundle that ``flwr run`` makes of a folder; the same files make the same bytes.

    Raises
    ------
    PhotonError
        If the folder holds no app.
    """
    import click
    from flwr.cli.build import build_fab_from_disk

    try:
        bundle: bytes = build_fab_from_disk(folder)
    except (click.ClickException, OSError, ValueError) as error:
        raise PhotonError(f"{folder}: no Flower app ({' '.join(str(error).split())})") from error
    return bundle


def answer_task(arguments: list[str], choose: Callable[[bytes, str, str], Callable[..., Message]]) -> None:
    """Do what ``flwr-clientapp`` does, without unpacking the bundle or running anything of it.

    Parameters
    ----------
    arguments
        Those that a SuperExec starts the program with.
    choose
        Returns the ClientApp for a bundle's content, and the name and version that the SuperLink gives it. A
        `PhotonError` of it is the reply.
    """
    from flwr.supercore.app_utils import start_parent_process_monitor
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--runtime-api-address", "--token"):
        parser.add_argument(option, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--root-certificates")
    parser.add_argument("--insecure", action="store_true")
    given = parser.parse_args(arguments)
    start_parent_process_monitor(given.parent_pid)
    retries = make_simple_http_retry_invoker()
    client = RuntimeHttpClient.from_server_address(
        server_address=given.runtime_api_address,
        insecure=given.insecure,
        root_certificates=validate_and_resolve_root_certificates(given.root_certificates, given.insecure),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(given.token),
        ],
        retry_invoker=retries,
    )
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    context, outcome = None, ("failed", "it ended without a reply")
    try:
        message, context, run, bundle = pull_task_input(client)
        reply = _reply(message, context, lambda: choose(bundle.content, run.fab_id, run.fab_version))
        push_message(client, reply, context)
        outcome = "completed", ""
    finally:
        # A SuperNode that is gone is not waited for.
        retries.max_tries = 1
        push_task_output(client, context, *outcome)
        # The heartbeat is not stopped: that would wait for it, and it asks a SuperNode that is gone for ever.
        # Its thread ends with the process.
        client.close()


def _reply(message: Message, context: Context, choose: Callable[[], Callable[..., Message]]) -> Message:
    try:
        return choose()(message=message, context=context)
    except PhotonError as error:
        sys.stderr.write(f"photon: refused: {error}\n")
        return Message(Error(_INVALID_BUNDLE, str(error)), reply_to=message)
    except Exception as error:
        traceback.print_exc()
        return Message(Error(_CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
