"""Photon's ClientApp: hand each message to the node, and its answer back.

Nothing heavy is imported here: a deployed SuperNode starts a new process for every message, and that one
hands the work to the silo's worker, which stays.
"""

from functools import partial

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from photon.link.answer import MessageType, NodeConfig, is_standing, reply_to
from photon.link.batch import answer_batch, is_batch
from photon.silo.worker_client import ask_worker, has_worker

app = ClientApp()

#: The module that a silo's worker runs.
WORKER = "photon.worker"


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Tell which silos this node hosts, take part in agreeing on masks, or answer a standing request."""
    if is_standing(message.content):
        from photon.silo.standing import stand

        return reply_to(message, "query", context.node_config, partial(stand, answer=answer))
    return reply_to(message, "query", context.node_config, answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on this silo's text and return what the strategy asks for."""
    return reply_to(message, "train", context.node_config, answer_all)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on this silo's validation text."""
    return reply_to(message, "evaluate", context.node_config, answer_all)


def answer_all(message_type: MessageType, content: RecordDict, node_config: NodeConfig) -> RecordDict:
    """Answer a message, of several requests where the node is a simulated one."""
    if "partition-id" in node_config and is_batch(content):
        return answer_batch(message_type, content, node_config, answer)
    return answer(message_type, content, node_config)


def answer(message_type: MessageType, content: RecordDict, node_config: NodeConfig) -> RecordDict:
    """Let the silo's worker answer where there is one, and this process elsewhere."""
    if has_worker(content, node_config):
        return ask_worker(message_type, content, node_config, WORKER)
    from photon.node import answer as answer_here

    return answer_here(message_type, content, node_config, islands=answer)
