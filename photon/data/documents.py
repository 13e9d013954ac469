"""The unit that corpora are read, split and partitioned in."""

from dataclasses import dataclass
from typing import Literal

#: Running text, conversations, pairs of answers, or questions of which some are to be forgotten.
TextKind = Literal["text", "chat", "pairs", "questions"]


@dataclass(frozen=True)
class Document:
    """One text that is never cut between train and validation.

    Attributes
    ----------
    source
        Where the text came from: a file, a row of a file, a module. With the partition ``field:NAME`` it is
        the value of the field, which names the silo.
    text
        The text itself, decoded.
    """

    source: str
    text: str


@dataclass(frozen=True)
class Message:
    """What one side says in a conversation: its role, such as ``user``, and the text."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat(Document):
    """A conversation. Its ``text`` is what was said, by which it is compared, split and measured.

    Attributes
    ----------
    messages
        In the order in which they were said; at least one is the assistant's.
    """

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Pair(Document):
    """Two answers to one question, of which one was chosen.

    Attributes
    ----------
    prompt
        What was said before.
    chosen, rejected
        What the assistant says then.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


@dataclass(frozen=True)
class Question(Document):
    """A question, and what a model says to it.

    Attributes
    ----------
    question, answer
        The texts; of a reference the answer may be empty.
    set
        ``"forget"``, ``"retain"`` or ``"reference"``.
    """

    question: str
    answer: str
    set: str
