"""Photon's ClientApp: hand each message to the silo, and its answer back.

Nothing heavy is imported here: a deployed SuperNode starts a new process for every message, and that one
hands the work to the silo's worker, which stays.
"""

import traceback
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from photon.errors import PhotonError
from photon.silo.worker_client import ask_worker, has_worker

if TYPE_CHECKING:
    from photon.silo.service import MessageType

app = ClientApp()

#: Flower's code for a ClientApp that raised.
CLIENT_APP_RAISED = 2


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Tell which silos this node hosts."""
    return _answer("query", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on this silo's text and return what the strategy asks for."""
    return _answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on this silo's validation text."""
    return _answer("evaluate", message, context)


def _answer(message_type: "MessageType", message: Message, context: Context) -> Message:
    """Return the silo's answer, or an error that the server shows by its reason."""
    try:
        if has_worker(message.content, context.node_config):
            content = ask_worker(message_type, message.content, context.node_config)
        else:
            from photon.federation.member import answer

            content = answer(message_type, message.content, context.node_config)
        return Message(content, reply_to=message)
    except PhotonError as error:
        return Message(Error(CLIENT_APP_RAISED, str(error)), reply_to=message)
    except Exception as error:
        # The full story belongs in the silo's own log; the server gets one line.
        traceback.print_exc()
        return Message(Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
