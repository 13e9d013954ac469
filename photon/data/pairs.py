"""Pairs of answers to one question, of which one was chosen: rows, and windows.

A window has whole pairs. Each side of a pair is a conversation of its own, with the question before its
answer, so that the window is read as conversations are (`photon.data.chat_windows`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from photon.data.chat_windows import ChatEncoder, Encoded, EncodedRows, bins_of
from photon.data.chats import message_of
from photon.data.documents import Message, Pair
from photon.data.rows import (
    MISSING,
    NamedSource,
    called,
    named_source,
    row_fault,
    text_fault,
    value_of,
)
from photon.data.template import TemplateError

#: Fields of a row; without a prompt both sides begin with it.
FIELDS = ("prompt", "chosen", "rejected")


def pair_of(row: Any, place: str, source_field: str | None = None) -> Pair | str:
    """Return the row's pair, or the reason why it has none.

    Parameters
    ----------
    row
        What was read: ``chosen`` and ``rejected``, each a text or a list of messages, and perhaps a
        ``prompt`` of either kind. Without one the messages that both begin with are it.
    place
        The pair's ``source`` without a ``source_field``.
    source_field
        Field with the source.
    """
    if (fault := row_fault(row)) is not None:
        return fault
    sides: list[list[Message]] = []
    for name, role in zip(FIELDS, ("user", "assistant", "assistant"), strict=True):
        found = _messages(value_of(row, name), name, role)
        if isinstance(found, str):
            return found
        sides.append(found)
    prompt, chosen, rejected = sides
    if chosen == rejected:
        return "chosen and rejected are equal"
    if not prompt:
        most = min(len(chosen), len(rejected)) - 1
        shared = 0
        while shared < most and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        return "no question: neither a prompt, nor messages that both sides begin with"
    for name, answer in zip(FIELDS[1:], (chosen, rejected), strict=True):
        if {message.role for message in answer} != {"assistant"}:
            return f"{name} answers with more than the assistant's messages, or to another question"
    source = NamedSource(place) if source_field is None else named_source(row, source_field)
    if isinstance(source, str):
        return source
    text = "\n\n".join(message.content for message in (*prompt, *chosen, *rejected))
    return Pair(source.name, text, tuple(prompt), tuple(chosen), tuple(rejected))


def _messages(value: Any, name: str, role: str) -> list[Message] | str:
    if value is MISSING or value is None:
        return [] if name == "prompt" else f"no field {name!r}"
    if isinstance(value, str):
        fault = text_fault(value)
        return [Message(role, value)] if fault is None else f"{name}: {fault}"
    if not isinstance(value, list):
        return f"field {name!r} holds {called(value)}, neither text nor a list of messages"
    messages: list[Message] = []
    for item in value:
        message = message_of(item)
        if isinstance(message, str):
            return f"{name}: {message}"
        messages.append(message)
    return messages if messages else f"field {name!r} holds no message"


class EncodedPair(NamedTuple):
    """A pair in tokens: two conversations, in both of which the answer alone is a target."""

    chosen: Encoded
    rejected: Encoded

    def __len__(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)


class PairWindows(NamedTuple):
    """Windows of pairs, arrays of shape (sequences, sequence length).

    Attributes
    ----------
    tokens, positions, targets
        As of `photon.data.chat_windows.ChatWindows`; the targets are the answers of both sides.
    pairs
        2k + 1 for the chosen side of the window's pair k, with its question, 2k + 2 for the rejected one, and
        0 for what fills the window.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    pairs: np.ndarray


class EncodedPairs(EncodedRows[EncodedPair]):
    """Pairs in tokens; none is cut to fit."""

    called = "pairs"


def encode_pairs(pairs: Sequence[Pair], encoder: ChatEncoder, advance: Callable[[int], None]) -> EncodedPairs:
    """Encode pairs; ``advance`` is called with 1 for each."""
    done = EncodedPairs()
    for index, pair in enumerate(pairs):
        try:
            found = EncodedPair(
                *(encoder.answer(pair.prompt, answer) for answer in (pair.chosen, pair.rejected))
            )
            if len(found) > encoder.length:
                raise TemplateError(
                    "both sides together are longer than a window; use a longer --sequence-length"
                )
            if found.chosen.ids == found.rejected.ids:
                raise TemplateError("the template writes both sides alike")
        except TemplateError as error:
            done.faults.add(str(error), pair.source)
        else:
            done.used.append(index)
            done.encoded.append(found)
        advance(1)
    return done


def pack_pairs(encoded: Sequence[EncodedPair], length: int, dtype: np.dtype, end_of_text: int) -> PairWindows:
    """Pack pairs into windows, as `photon.data.chat_windows.pack` packs conversations."""
    windows = bins_of([len(pair) for pair in encoded], length)
    shape = (len(windows), length)
    counted = np.uint16 if length <= 2**16 else np.uint32
    tokens = np.full(shape, end_of_text, dtype=dtype)
    positions, pairs = np.zeros(shape, dtype=counted), np.zeros(shape, dtype=counted)
    targets = np.zeros(shape, dtype=np.uint8)
    for row, window in enumerate(windows):
        start = 0
        for number, side in enumerate(side for index in window for side in encoded[index]):
            end = start + len(side.ids)
            tokens[row, start:end] = side.ids
            positions[row, start:end] = np.arange(end - start)
            targets[row, start:end] = side.targets
            pairs[row, start:end] = number + 1
            start = end
        positions[row, start:] = np.arange(length - start)
    return PairWindows(tokens, positions, targets, pairs)
