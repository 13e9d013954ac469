"""How a node answers: from a Flower message to a function that does what it asks for, and back.

Nothing heavy is imported here, because a deployed SuperNode starts a new process for every message.
"""

import json
import traceback
from collections.abc import Callable, Mapping
from typing import Literal

from flwr.app import ConfigRecord, Error, Message, RecordDict

from photon.errors import PhotonError
from photon.link import BODY
from photon.link.joined import Joiner, crosses_superlink, part

#: Flower's categories of messages, and what each of them asks a silo for: its description, local steps, or
#: the loss of the model on its validation text.
MessageType = Literal["query", "train", "evaluate"]
#: What a node's operator has set.
NodeConfig = Mapping[str, str | int | float | bool]
#: Does what a message asks for, and returns the content of the reply.
Answer = Callable[[MessageType, RecordDict, NodeConfig], RecordDict]

#: Characters of the body of a message that opens a standing request, at most.
_LONGEST = 1000
#: Flower's code for a ClientApp that raised.
CLIENT_APP_RAISED = 2


def reply_to(message: Message, message_type: MessageType, node_config: NodeConfig, answer: Answer) -> Message:
    """Return what ``answer`` makes of a message, or an error that the server shows by its reason."""
    return Message(outcome_of(message_type, message.content, node_config, answer), reply_to=message)


def outcome_of(
    message_type: MessageType, content: RecordDict, node_config: NodeConfig, answer: Answer
) -> RecordDict | Error:
    """Return what ``answer`` makes of the content of a message, or an error.

    What crosses a SuperLink has all arrays in one, both ways.
    """
    try:
        reply = answer(message_type, part(content), node_config)
        return Joiner().join(reply) if crosses_superlink(content) else reply
    except PhotonError as error:
        return Error(CLIENT_APP_RAISED, reason_of(error))
    except Exception as error:
        # The full story belongs in the silo's own log; the server gets one line.
        traceback.print_exc()
        return Error(CLIENT_APP_RAISED, reason_of(error))


def reason_of(error: Exception) -> str:
    """Return what the server is told of an error."""
    return str(error) if isinstance(error, PhotonError) else f"{type(error).__name__}: {error}"


def is_standing(content: RecordDict) -> bool:
    """Tell whether a message opens a standing request."""
    record = content.get(BODY)
    text = record.get("body") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str) or len(text) > _LONGEST:
        return False
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body.get("kind") == "stand"
