"""The private names of Flower that Photon cannot do without, in one place.

Checked against flwr 1.41; a new minor version starts its review here.
"""

import itertools

from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

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
