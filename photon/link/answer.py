"""How a node answers: from a Flower message to a function that does what it asks for, and back.

Nothing heavy is imported here, because a deployed SuperNode starts a new process for every message.
"""

import traceback
from collections.abc import Callable, Mapping
from typing import Literal

from flwr.app import Error, Message, RecordDict

from photon.errors import PhotonError

#: Flower's categories of messages, and what each of them asks a silo for: its description, local steps, or
#: the loss of the model on its validation text.
MessageType = Literal["query", "train", "evaluate"]
#: What a node's operator has set.
NodeConfig = Mapping[str, str | int | float | bool]
#: Does what a message asks for, and returns the content of the reply.
Answer = Callable[[MessageType, RecordDict, NodeConfig], RecordDict]

#: Flower's code for a ClientApp that raised.
CLIENT_APP_RAISED = 2


def reply_to(message: Message, message_type: MessageType, node_config: NodeConfig, answer: Answer) -> Message:
    """Return what ``answer`` makes of a message, or an error that the server shows by its reason."""
    try:
        return Message(answer(message_type, message.content, node_config), reply_to=message)
    except PhotonError as error:
        return Message(Error(CLIENT_APP_RAISED, reason_of(error)), reply_to=message)
    except Exception as error:
        # The full story belongs in the silo's own log; the server gets one line.
        traceback.print_exc()
        return Message(Error(CLIENT_APP_RAISED, reason_of(error)), reply_to=message)


def reason_of(error: Exception) -> str:
    """Return what the server is told of an error."""
    return str(error) if isinstance(error, PhotonError) else f"{type(error).__name__}: {error}"
