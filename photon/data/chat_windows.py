"""Conversations in windows: encoded by a chat template, packed whole, with what the assistant says marked."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer

from photon.data.documents import Chat, Message
from photon.data.rows import Faults
from photon.data.template import ChatTemplate, TemplateError
from photon.data.tokenizer import EosTokenizer

T = TypeVar("T")


class Encoded(NamedTuple):
    """A conversation in tokens.

    Attributes
    ----------
    ids
        Token ids.
    targets
        Which of them the assistant says. The first is never one: nothing is before it.
    """

    ids: list[int]
    targets: list[bool]


@dataclass(frozen=True)
class ChatEncoder:
    """From conversations to tokens.

    Attributes
    ----------
    tokenizer, template
        How text is encoded, and how a conversation becomes text.
    length
        Most tokens of a conversation.
    """

    tokenizer: EosTokenizer
    template: ChatTemplate
    length: int

    @cached_property
    def _with_special(self) -> Tokenizer:
        # In documents special tokens are text; those of a template are what they say.
        own = Tokenizer.from_str(self.tokenizer.tokenizer.to_str())
        own.encode_special_tokens = False
        return own

    def encode(self, chat: Chat) -> tuple[Encoded, bool]:
        """Return a conversation in tokens, and whether its oldest turns were left out to fit.

        A turn is what the user says and all up to the next thing that the user says. What the system says
        before the first turn stays.

        Raises
        ------
        TemplateError
            If it cannot be used; the text says why.
        """
        self._check_marks(chat.messages)
        turns = 0
        while chat.messages[turns].role == "system":
            turns += 1
        system, said = chat.messages[:turns], chat.messages[turns:]
        starts = [0, *(i for i, message in enumerate(said) if i and message.role == "user")]
        whole = self._encoded((*system, *said))
        if len(whole.ids) <= self.length:
            return self._checked(whole), False
        kept = bisect_left(
            starts[1:], True, key=lambda i: len(self._encoded((*system, *said[i:])).ids) <= self.length
        )
        if kept == len(starts) - 1:
            raise TemplateError("longer than a window by its last turn alone; use a longer --sequence-length")
        return self._checked(self._encoded((*system, *said[starts[kept + 1] :]))), True

    def answer(self, prompt: Sequence[Message], answer: Sequence[Message]) -> Encoded:
        """Return a conversation in tokens, of which the last messages alone are targets.

        Raises
        ------
        TemplateError
            If it cannot be used; the text says why.
        """
        self._check_marks((*prompt, *answer))
        return self._checked(self._encoded((*prompt, *answer), answers=len(answer)))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant begins to speak.

        Raises
        ------
        TemplateError
            If it cannot be used; the text says why.
        """
        self._check_marks(messages)
        return self._ids(self.template.prompt(messages)).ids

    def _check_marks(self, messages: Sequence[Message]) -> None:
        for message in messages:
            for token in self.template.marks:
                if token in message.content:
                    raise TemplateError(f"a message spells the special token {token}")

    def _encoded(self, messages: Sequence[Message], answers: int = 0) -> Encoded:
        text, spans = self.template.render(messages)
        spans = spans[-answers:]
        found = self._ids(text)
        ends = [end for _, end in spans]
        targets = []
        for start, _ in found.offsets:
            nearest = bisect_left(ends, start + 1)
            targets.append(nearest < len(spans) and spans[nearest][0] <= start)
        return Encoded(found.ids, targets)

    def _ids(self, text: str) -> Encoding:
        try:
            return self._with_special.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise TemplateError(f"the tokenizer cannot write it ({error})") from None

    @staticmethod
    def _checked(encoded: Encoded) -> Encoded:
        if encoded.targets:
            encoded.targets[0] = False
        if not any(encoded.targets):
            raise TemplateError("the template writes nothing that the assistant says")
        return encoded


class ChatWindows(NamedTuple):
    """Windows of conversations, arrays of shape (sequences, sequence length).

    Attributes
    ----------
    tokens
        Token ids; what no conversation fills is the end of text.
    positions
        Place of each token in its conversation, from 0. So a conversation begins where it is 0.
    targets
        Whether the assistant says it, as uint8.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


@dataclass
class EncodedRows(Generic[T]):
    """Rows in tokens.

    Attributes
    ----------
    used, encoded
        Index of each that can be used, and its tokens.
    shortened
        How many of them were cut to fit.
    faults
        Why others were left out.
    """

    #: What the rows are.
    called: ClassVar[str]

    used: list[int] = field(default_factory=list)
    encoded: list[T] = field(default_factory=list)
    shortened: int = 0
    faults: Faults = field(default_factory=Faults)

    def told(self) -> list[str]:
        """Return a line for each thing that was left out."""
        return list(self.faults.told(len(self.used), self.called))


class EncodedChats(EncodedRows[Encoded]):
    """Conversations in tokens; of those that are shortened the oldest turns are gone."""

    called = "conversations"

    def told(self) -> list[str]:
        """Return a line for each thing that was left out."""
        lines = super().told()
        if self.shortened:
            lines.append(
                f"{self.shortened:,} of {len(self.used):,} conversations that are used: longer than a "
                "window, their oldest turns were left out"
            )
        return lines


def encode_chats(chats: Sequence[Chat], encoder: ChatEncoder, advance: Callable[[int], None]) -> EncodedChats:
    """Encode conversations; ``advance`` is called with 1 for each."""
    done = EncodedChats()
    for index, chat in enumerate(chats):
        try:
            found, shortened = encoder.encode(chat)
        except TemplateError as error:
            done.faults.add(str(error), chat.source)
        else:
            done.used.append(index)
            done.encoded.append(found)
            done.shortened += shortened
        advance(1)
    return done


def bins_of(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Put items of some lengths into bins, the longest first, each where it leaves the least room.

    Parameters
    ----------
    lengths
        Of the items, at most ``length``.
    length
        Of a bin.

    Returns
    -------
    list[list[int]]
        Indices of the items in each bin.
    """
    room: list[tuple[int, int]] = []
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[item], 0))
        if place < len(room):
            free, index = room.pop(place)
        else:
            free, index = length, len(bins)
            bins.append([])
        bins[index].append(item)
        insort(room, (free - lengths[item], index))
    return bins


def pack(encoded: Sequence[Encoded], length: int, dtype: np.dtype, end_of_text: int) -> ChatWindows:
    """Pack conversations into windows: none is cut, and each goes where it leaves the least room.

    Parameters
    ----------
    encoded
        Conversations of at most ``length`` tokens; the longest go first.
    length
        Tokens in a window.
    dtype
        Of the tokens.
    end_of_text
        Token that fills what is left.
    """
    windows = [
        [encoded[index] for index in window] for window in bins_of([len(e.ids) for e in encoded], length)
    ]
    shape = (len(windows), length)
    tokens = np.full(shape, end_of_text, dtype=dtype)
    positions = np.zeros(shape, dtype=np.uint16 if length <= 2**16 else np.uint32)
    targets = np.zeros(shape, dtype=np.uint8)
    for row, window in enumerate(windows):
        start = 0
        for one in window:
            end = start + len(one.ids)
            tokens[row, start:end] = one.ids
            positions[row, start:end] = np.arange(end - start)
            targets[row, start:end] = one.targets
            start = end
        positions[row, start:] = np.arange(length - start)
    return ChatWindows(tokens, positions, targets)
