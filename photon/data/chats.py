"""A row that holds a conversation, and the reasons why it may hold none."""

from typing import Any, get_args

from photon.data.documents import Chat, Message
from photon.data.rows import MISSING, NamedSource, called, named_source, row_fault, text_fault, value_of
from photon.data.template import Role

ROLES: tuple[str, ...] = get_args(Role)


def chat_of(row: Any, place: str, field: str, source_field: str | None = None) -> Chat | str:
    """Return the row's conversation, or the reason why it has none.

    What comes after the assistant's last message is left out: nobody answers it.

    Parameters
    ----------
    row
        What was read.
    place
        The conversation's ``source`` without a ``source_field``.
    field
        Field with the messages: a list of objects with ``role`` and ``content``. A dot reaches into an inner
        object.
    source_field
        Field with the source.
    """
    if (fault := row_fault(row)) is not None:
        return fault
    found = value_of(row, field)
    if found is MISSING:
        return f"no field {field!r} with messages; name another with --text-field"
    if not isinstance(found, list):
        return f"field {field!r} holds {called(found)}, no list of messages"
    messages: list[Message] = []
    for item in found:
        message = message_of(item)
        if isinstance(message, str):
            return message
        messages.append(message)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        return "no message of the assistant"
    source = NamedSource(place) if source_field is None else named_source(row, source_field)
    if isinstance(source, str):
        return source
    text = "\n\n".join(f"{message.role}: {message.content}" for message in messages)
    return Chat(source.name, text, tuple(messages))


def message_of(item: Any) -> Message | str:
    """Return a message, or the reason why it is none."""
    if not isinstance(item, dict):
        return f"a message is {called(item)}, no object with role and content"
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else called(role)
        return f"a message has the unknown role {shown}; known are {', '.join(ROLES)}"
    if item.get("tool_calls"):
        return "a message calls tools, which is not supported"
    if not isinstance(content, str):
        return f"a message of the {role} holds {called(content)}, no text"
    fault = text_fault(content)
    return Message(role, content) if fault is None else f"a message of the {role}: {fault}"
