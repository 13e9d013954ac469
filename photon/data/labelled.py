"""Texts with labels: rows that hold one, and windows with one text each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from photon.data.documents import Document, Labelled
from photon.data.rows import MISSING, NamedSource, called, document_of, named_source, value_of
from photon.data.tokenizer import EosTokenizer

#: In place of the number of a class: nobody has given the text one.
NO_LABEL = -1
#: Most classes, and characters of a class's name.
MOST_CLASSES, LONGEST_NAME = 10_000, 128


def labelled_of(
    row: Any, place: str, text_field: str, label_field: str, source_field: str | None = None
) -> Labelled | str:
    """Return the row's text with its label, or the reason why it has none; a row may lack the label.

    Parameters
    ----------
    row, place, text_field, source_field
        As of `photon.data.rows.document_of`.
    label_field
        Field with the label: a text, a whole number, or true or false. A dot reaches into an inner object.
    """
    found = document_of(row, place, text_field, source_field)
    if isinstance(found, str):
        return found
    value = value_of(row, label_field)
    if value is MISSING or value is None:
        return Labelled(found.source, found.text, None)
    if isinstance(value, float):
        return f"label field {label_field!r} holds {called(value)} that is not whole"
    named = named_source({label_field: value}, label_field)
    if not isinstance(named, NamedSource):
        return f"label {named}"
    if len(named.name) > LONGEST_NAME or not named.name.isprintable():
        return f"label field {label_field!r} holds no name of up to {LONGEST_NAME} characters"
    return Labelled(found.source, found.text, named.name)


class LabelledWindows(NamedTuple):
    """Windows with one text each.

    Attributes
    ----------
    tokens
        The beginning of the text, and ends of text behind it, (texts, sequence length).
    lengths
        Tokens of the text, uint32 of shape (texts, 1).
    labels
        Number of its class, or `NO_LABEL`: int32 of shape (texts, 1).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


def label_windows(
    documents: Sequence[Document],
    tokenizer: EosTokenizer,
    classes: Sequence[str],
    length: int,
    dtype: np.dtype,
    advance: Callable[[int], None],
) -> LabelledWindows:
    """Write each document into a window of its own; of a longer one the beginning.

    Parameters
    ----------
    classes
        Names of the classes, in the order of their numbers.
    length
        Tokens in a window.
    dtype
        Of a token.
    advance
        Called with 1 for each document.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    ids_of = tokenizer.encoder()
    tokens = np.full((len(documents), length), tokenizer.eos_token_id, dtype=dtype)
    lengths = np.ones((len(documents), 1), dtype=np.uint32)
    labels = np.full((len(documents), 1), NO_LABEL, dtype=np.int32)
    for row, document in enumerate(documents):
        ids = ids_of(document.text)[:length]
        tokens[row, : len(ids)] = ids
        # A text without a token of its own is an end of text.
        lengths[row] = max(1, len(ids))
        if isinstance(document, Labelled) and document.label is not None:
            labels[row] = numbers[document.label]
        advance(1)
    return LabelledWindows(tokens, lengths, labels)
