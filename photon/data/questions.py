"""Questions of which a model is to forget some: rows, and windows of one question each.

A question is of one of three sets: those that the model is to forget, those whose answers it is to keep, and
those that it says it has no answer to, by which it learns what that looks like.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from photon.data.chat_windows import ChatEncoder, EncodedRows
from photon.data.documents import Document, Message, Question
from photon.data.rows import MISSING, NamedSource, named_source, row_fault, text_fault, value_of
from photon.data.template import TemplateError
from photon.errors import PhotonError, printable

#: Fields of a row; a reference needs no answer.
FIELDS = ("question", "answer", "set")
#: The sets, in the order of their numbers in the array ``sets``, from 1.
SETS = ("forget", "retain", "reference")


def question_of(row: Any, place: str, source_field: str | None = None) -> Question | str:
    """Return the row's question, or the reason why it has none.

    Parameters
    ----------
    row
        What was read: ``question``, ``answer``, and ``set``: one of `SETS`. Without that the file's name says
        it, as in ``forget.jsonl``.
    place
        The file and the row, which is the question's ``source`` without a ``source_field``.
    source_field
        Field with the source.
    """
    if (fault := row_fault(row)) is not None:
        return fault
    texts = []
    for name in FIELDS[:2]:
        value = value_of(row, name)
        if value is MISSING or value is None:
            value = ""
        if not isinstance(value, str):
            return f"field {name!r} holds no text"
        if value.strip() and (fault := text_fault(value)) is not None:
            return f"{name}: {fault}"
        texts.append(value.strip())
    question, answer = texts
    of = value_of(row, "set")
    if of is MISSING or of is None:
        of = PurePath(place.rpartition(":")[0]).name.partition(".")[0]
    if of not in SETS:
        shown = repr(of[:40]) if isinstance(of, str) else "none"
        return f"its set is {shown}; set is one of {', '.join(SETS)}, or the file is called so"
    if not question:
        return "no field 'question' with text"
    if not answer and of != "reference":
        return "no field 'answer' with text, without which nothing is measured"
    if of != "reference" and re.search(r"\w", answer) is None:
        return "field 'answer' has no word, so nobody can tell whether it is given"
    source = NamedSource(place) if source_field is None else named_source(row, source_field)
    if isinstance(source, str):
        return source
    return Question(source.name, f"{question}\n\n{answer}".strip(), question, answer, of)


def check_apart(documents: Mapping[str, Sequence[Document]]) -> None:
    """Check that no question is both to be forgotten and to be kept, wherever it is.

    Raises
    ------
    PhotonError
        If one is.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, of in documents.items():
        for one in of:
            if not isinstance(one, Question) or one.set == "reference":
                continue
            key = " ".join(one.question.lower().split())
            before, where = seen.setdefault(key, (one.set, name))
            if before != one.set:
                raise PhotonError(
                    f"the question {printable(one.question)!r:.120} is to be forgotten and to be kept (silos "
                    f"{where} and {name}); leave it in one set"
                )


class EncodedQuestion(NamedTuple):
    """A question in tokens: what the model is asked, and what it is to say, which may be nothing."""

    prompt: list[int]
    answer: list[int]
    set: int


class QuestionWindows(NamedTuple):
    """Windows of one question each, arrays of shape (questions, sequence length).

    Attributes
    ----------
    tokens, positions, targets
        As of `photon.data.chat_windows.ChatWindows`; the targets are the answer.
    sets
        The number of the question's set, in `SETS` from 1, and 0 for what fills the window.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    sets: np.ndarray


class EncodedQuestions(EncodedRows[EncodedQuestion]):
    """Questions in tokens; none is cut to fit."""

    called = "questions"


def encode_questions(
    questions: Sequence[Question], encoder: ChatEncoder, advance: Callable[[int], None]
) -> EncodedQuestions:
    """Encode questions; ``advance`` is called with 1 for each.

    Raises
    ------
    PhotonError
        If one that is to be forgotten cannot be used: it would stay.
    """
    done = EncodedQuestions()
    for index, one in enumerate(questions):
        try:
            asked = [Message("user", one.question)]
            prompt, answer = encoder.prompt(asked), list[int]()
            if one.answer:
                ids, targets = encoder.answer(asked, [Message("assistant", one.answer)])
                answer = [token for token, target in zip(ids, targets, strict=True) if target]
            if len(prompt) + len(answer) > encoder.length:
                raise TemplateError(
                    "question and answer are longer than a window; use a longer --sequence-length"
                )
        except TemplateError as error:
            if one.set == "forget":
                raise PhotonError(
                    f"{printable(one.question):.120}: {error}; it would not be forgotten, so mend it "
                    "or take it out"
                ) from None
            done.faults.add(str(error), one.source)
        else:
            done.used.append(index)
            done.encoded.append(EncodedQuestion(prompt, answer, SETS.index(one.set) + 1))
        advance(1)
    return done


def pack_questions(
    encoded: Sequence[EncodedQuestion], length: int, dtype: np.dtype, end_of_text: int
) -> QuestionWindows:
    """Put each question into a window of its own; the rest of it is the end of text."""
    shape = (len(encoded), length)
    counted = np.uint16 if length <= 2**16 else np.uint32
    tokens = np.full(shape, end_of_text, dtype=dtype)
    positions, sets = np.zeros(shape, dtype=counted), np.zeros(shape, dtype=counted)
    targets = np.zeros(shape, dtype=np.uint8)
    for row, one in enumerate(encoded):
        begin, end = len(one.prompt), len(one.prompt) + len(one.answer)
        tokens[row, :end] = [*one.prompt, *one.answer]
        positions[row, :end] = np.arange(end)
        positions[row, end:] = np.arange(length - end)
        targets[row, begin:end] = 1
        sets[row, :end] = one.set
    return QuestionWindows(tokens, positions, targets, sets)


def unpack_questions(arrays: Mapping[str, np.ndarray]) -> list[EncodedQuestion]:
    """Return the questions of some windows, as `pack_questions` has put them there."""
    found = []
    for tokens, targets, sets in zip(arrays["tokens"], arrays["targets"], arrays["sets"], strict=True):
        length = int((sets > 0).sum())
        begin = length - int(targets.sum())
        row = [int(token) for token in tokens[:length]]
        found.append(EncodedQuestion(row[:begin], row[begin:], int(sets[0])))
    return found
