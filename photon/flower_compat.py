"""The private names of Flower that Photon cannot do without, in one place.

Checked against flwr 1.41; a new minor version starts its review here.
"""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
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
    "assign_message_id",
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
