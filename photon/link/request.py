"""A request as a node reads it before anything else: bounded in size, and of the types that it must have.

Nothing of the configuration is parsed here, and no tensor is read.
"""

from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from photon.errors import PhotonError
from photon.link import BODY
from photon.link.answer import MessageType
from photon.link.messages import (
    AdvertiseKeys,
    CheckShares,
    Describe,
    EvaluateRequest,
    Query,
    ShareKeys,
    Stand,
    TrainRequest,
    Unmask,
    unpack,
    unpack_config,
)

#: Bytes of a run's configuration, and of the typed body. Real ones have a few kilobytes; only the shares of a
#: large secure sum and the scalars of a local optimizer make a body larger.
MAX_CONFIG, MAX_BODY = 2**20, 2**24
#: Characters of the names of a run and of a model, which become keys of what a silo keeps.
MAX_ID = 200
#: Largest of the whole numbers in a request.
MAX_NUMBER = 2**48
_COUNTED = ("round", "global_step", "steps", "batch_size", "last_round", "position", "cohort")

#: What a message of the category ``query`` asks.
Question = Describe | Stand | AdvertiseKeys | ShareKeys | CheckShares | Unmask


@dataclass(frozen=True)
class NodeRequest:
    """What a message asks a node for.

    Attributes
    ----------
    body
        What is asked.
    config
        Text of the run's configuration.
    """

    body: Question | TrainRequest | EvaluateRequest
    config: str

    @property
    def silo(self) -> str | None:
        """The participant that is asked; None: whoever lives at the node."""
        return None if isinstance(self.body, Describe | Stand) else self.body.silo


def read_request(message_type: MessageType, content: RecordDict) -> NodeRequest:
    """Read the typed part of a message.

    Raises
    ------
    PhotonError
        If the message is of no known type, a part of it is missing, too large or of another type, or a
        number or a name in it is out of bounds.
    """
    record = content.get(BODY)
    if isinstance(record, ConfigRecord):
        for key, most in (("config", MAX_CONFIG), ("body", MAX_BODY)):
            text = record.get(key)
            if isinstance(text, str) and len(text.encode(errors="replace")) > most:
                raise PhotonError(f"message: its {key} has more than {most:,} bytes")
    config = unpack_config(content)
    body: Question | TrainRequest | EvaluateRequest
    if message_type == "query":
        body = unpack(content, Query).root
    elif message_type == "train":
        body = unpack(content, TrainRequest)
    elif message_type == "evaluate":
        body = unpack(content, EvaluateRequest)
    else:
        raise PhotonError(f"message: {message_type!r} is no type of message")
    _check_values(body)
    return NodeRequest(body, config)


def _check_values(body: Question | TrainRequest | EvaluateRequest) -> None:
    """Check names and numbers that become keys and counts of what a silo keeps."""
    for name in ("run_id", "model_id"):
        if len(getattr(body, name, "")) > MAX_ID:
            raise PhotonError(f"message: {name}: longer than {MAX_ID} characters")
        if not getattr(body, name, "").isprintable():
            raise PhotonError(f"message: {name}: has a sign that is not printed")
    if isinstance(body, TrainRequest) and not body.run_id:
        raise PhotonError("message: run_id: empty; a run has a name")
    for name in _COUNTED:
        if getattr(body, name, 0) > MAX_NUMBER:
            raise PhotonError(f"message: {name}: larger than {MAX_NUMBER:,}")
    if isinstance(body, TrainRequest) and len(set(body.members)) < len(body.members):
        raise PhotonError("message: members: a silo is named twice")
