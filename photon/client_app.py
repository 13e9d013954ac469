"""Photon's ClientApp: decode the message, let the silo work, encode the answer.

Nothing heavy is imported here: a deployed SuperNode starts a new process for every message.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from photon.config import RunConfig
    from photon.training.silo import SiloSite

app = ClientApp()

#: Flower's code for a ClientApp that raised.
CLIENT_APP_RAISED = 2


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Tell which silos this node hosts."""

    def work() -> RecordDict:
        from photon.link.messages import BODY, Description, pack
        from photon.training import silo

        site, config = _site(message, context)
        return RecordDict({BODY: pack(Description(silos=silo.describe(site, config)))})

    return _answer(message, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on this silo's text and return what the strategy asks for."""

    def work() -> RecordDict:
        from photon.components import build
        from photon.link.messages import BODY, TrainOrder, pack, unpack
        from photon.link.records import decode_groups, encode_groups
        from photon.training import silo

        site, config = _site(message, context)
        order = unpack(message.content, TrainOrder)
        groups, report = silo.train(order, decode_groups(message.content), site, config)
        codecs = [build(codec.as_mapping(), "link.up") for codec in config.link.up]
        content = encode_groups(groups, codecs)
        content[BODY] = pack(report)
        return content

    return _answer(message, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the received model on this silo's validation text."""

    def work() -> RecordDict:
        from photon.link.messages import BODY, EvaluateOrder, pack, unpack
        from photon.link.records import decode_groups
        from photon.training import silo

        site, config = _site(message, context)
        order = unpack(message.content, EvaluateOrder)
        report = silo.evaluate(order, decode_groups(message.content), site, config)
        return RecordDict({BODY: pack(report)})

    return _answer(message, work)


def _answer(message: Message, work: Callable[[], RecordDict]) -> Message:
    """Return the work's result, or an error that the server shows by its reason."""
    from photon.errors import PhotonError

    try:
        return Message(work(), reply_to=message)
    except PhotonError as error:
        return Message(Error(CLIENT_APP_RAISED, str(error)), reply_to=message)
    except Exception as error:
        # The full story belongs in the silo's own log; the server gets one line.
        traceback.print_exc()
        return Message(Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


def _site(message: Message, context: Context) -> "tuple[SiloSite, RunConfig]":
    """Find this node's data and state folders, and the run's configuration.

    A deployed silo names its folders in its own node config, and no word of the server changes them. A
    simulated node has none and lives in the run's folder, on the machine where the run was started.
    """
    from photon.config import parse
    from photon.errors import PhotonError
    from photon.link.messages import unpack_config
    from photon.training.silo import SiloSite

    config = parse(unpack_config(message.content))
    data = context.node_config.get("data-dir")
    if data is not None:
        state = context.node_config.get("state-dir")
        if state is None:
            raise PhotonError("node config: data-dir is set but state-dir is not; set both")
        return SiloSite(Path(str(data)), Path(str(state))), config
    if config.data.path is None or config.run_dir is None:
        raise PhotonError("node config: data-dir and state-dir are not set")
    return SiloSite(Path(config.data.path), Path(config.run_dir) / "silos"), config
