"""Several requests in one message, and their answers in one reply: for a simulation of many silos.

Each request is answered for itself, through the same gate as alone. Records that requests share, such as the
model, travel once.
"""

import traceback
from collections.abc import Sequence

from flwr.app import ConfigRecord, RecordDict

from photon.errors import PhotonError
from photon.link.answer import Answer, MessageType, NodeConfig, reason_of

#: Name of the record that says how many there are.
BATCH = "batch"
#: Name of the record of a request that could not be answered.
ERROR = "error"


def pack_batch(contents: Sequence[RecordDict]) -> RecordDict:
    """Put the contents of several messages into one."""
    batch = RecordDict({BATCH: ConfigRecord({"count": len(contents)})})
    for number, content in enumerate(contents):
        for name, record in content.items():
            batch[f"{number}/{name}"] = record
    return batch


def is_batch(content: RecordDict) -> bool:
    """Tell whether a message is one of several."""
    return BATCH in content


def unpack_batch(content: RecordDict) -> list[RecordDict]:
    """Return the contents of the messages in one.

    Raises
    ------
    PhotonError
        If a record is none of theirs.
    """
    header = content[BATCH]
    count = header.get("count") if isinstance(header, ConfigRecord) else None
    if not isinstance(count, int) or not 0 < count <= len(content):
        raise PhotonError("message: a batch does not say how many requests it has")
    contents = [RecordDict() for _ in range(count)]
    for name, record in content.items():
        if name == BATCH:
            continue
        number, _, own = name.partition("/")
        if not number.isdecimal() or int(number) >= count:
            raise PhotonError(f"message: {name!r:.80} is of no request of its batch")
        contents[int(number)][own] = record
    return contents


def answer_batch(
    message_type: MessageType, content: RecordDict, node_config: NodeConfig, answer: Answer
) -> RecordDict:
    """Answer each request of a message; what one of them comes to is nothing to the others."""
    replies = []
    for request in unpack_batch(content):
        try:
            replies.append(answer(message_type, request, node_config))
        except Exception as error:
            if not isinstance(error, PhotonError):
                traceback.print_exc()
            replies.append(RecordDict({ERROR: ConfigRecord({"reason": reason_of(error)})}))
    return pack_batch(replies)


def error_in(content: RecordDict) -> str | None:
    """Return why a request of a batch could not be answered; None: it was."""
    record = content.get(ERROR)
    return str(record.get("reason")) if isinstance(record, ConfigRecord) else None
