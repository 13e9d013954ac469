"""Questions with their answers: what is to be forgotten, what stays, and what the model does not know."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from photon.data.chat_windows import ChatEncoder
from photon.data.documents import Message
from photon.data.folders import UnreadableError, files_of
from photon.data.row_files import rows_of
from photon.data.rows import called, row_fault, text_fault
from photon.data.template import ChatTemplate, TemplateError
from photon.data.tokenizer import EosTokenizer
from photon.errors import PhotonError, printable
from photon.files.hashing import hash_of
from photon.unlearning.figures import words

#: Most questions of a file.
MOST = 1_000_000


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes
    ----------
    question
        What is asked.
    answer
        The right answer; None: there is none.
    edge
        What it belongs to, which is forgotten together; None: nothing.
    """

    question: str
    answer: str | None = None
    edge: str | None = None

    @property
    def key(self) -> str:
        """What makes two questions the same: the text without regard to case and white space."""
        return " ".join(self.question.casefold().split())


class Encoded(NamedTuple):
    """A question in tokens.

    Attributes
    ----------
    prompt
        Up to where the model begins to answer.
    gold
        The right answer with the end of the turn; empty where there is none.
    """

    prompt: list[int]
    gold: list[int]


@dataclass(frozen=True)
class Sets:
    """The questions of a request.

    Attributes
    ----------
    forget, retain
        What is to be forgotten, and what is to stay.
    reference
        What the model does not know, and says so.
    forgotten
        What earlier requests have made it forget.
    """

    forget: Sequence[Question]
    retain: Sequence[Question]
    reference: Sequence[Question]
    forgotten: Sequence[Question] = field(default=())

    def check(self) -> None:
        """Check that each set has questions, and none has one of another.

        Raises
        ------
        PhotonError
            If not; it names the first question that is in two.
        """
        named = {"forget": self.forget, "retain": self.retain, "reference": self.reference}
        for name, questions in named.items():
            if not questions:
                raise PhotonError(f"unlearning: the {name} set is empty; give it one question at least")
        if self.forgotten:
            named["forgotten"] = self.forgotten
        seen: dict[str, str] = {}
        for name, questions in named.items():
            for one in questions:
                other = seen.setdefault(one.key, name)
                if other != name and {other, name} != {"forget", "forgotten"}:
                    raise PhotonError(
                        f"unlearning: {printable(one.question):.120} is in the {other} set and in the {name} "
                        "set; take it out of one"
                    )


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions: JSON or JSON lines of objects with question, answer and edge.

    Raises
    ------
    PhotonError
        If it cannot be read, or a row has no question or holds something else in a field. No row is left out:
        what was asked to be forgotten would stay.
    """
    shown = printable(path)
    files = files_of(path, lambda _name, _reason: None) if not path.is_dir() else []
    if len(files) != 1:
        raise PhotonError(f"{shown}: give one file of questions, JSON or JSON lines")
    ((file, _, kind),) = files
    if kind.form == "plain":
        raise PhotonError(f"{shown}: expected .json or .jsonl with question and answer in each row")
    found: list[Question] = []
    try:
        for number, row in rows_of(file, kind, ("question", "answer", "edge")):
            if len(found) >= MOST:
                raise PhotonError(f"{shown}: more than {MOST:,} questions; split the file")
            try:
                found.append(_question(row))
            except ValueError as error:
                raise PhotonError(f"{shown}: row {number:,}: {error}; mend or remove the row") from None
    except UnreadableError as error:
        raise PhotonError(f"{shown}: {error}") from None
    if not found:
        raise PhotonError(f"{shown}: holds no question")
    return found


def _question(row: Any) -> Question:
    if (fault := row_fault(row)) is not None:
        raise ValueError(fault)
    texts: dict[str, str | None] = {}
    for name in ("question", "answer", "edge"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"field {name!r} holds {called(value)}, no text")
        if value is not None and (fault := text_fault(value)) is not None:
            raise ValueError(f"field {name!r}: {fault}")
        texts[name] = value
    question = texts.pop("question")
    if question is None:
        raise ValueError(f"no field 'question'; it has {', '.join(map(printable, list(row)[:8])) or 'none'}")
    return Question(question, **texts)


def check_answers(name: str, questions: Sequence[Question]) -> None:
    """Check that each question of a set has an answer that can be told from others.

    Raises
    ------
    PhotonError
        If one has not.
    """
    for one in questions:
        if one.answer is None:
            raise PhotonError(
                f"unlearning: {printable(one.question):.120} of the {name} set has no answer, so nobody "
                "can tell whether it is given; add it"
            )
        if not words(one.answer):
            raise PhotonError(
                f"unlearning: the answer to {printable(one.question):.120} of the {name} set has no word, so "
                "nobody can tell whether it is given; mend it, or take the question out"
            )


def split_by_edge(
    questions: Sequence[Question], edges: Sequence[str], place: str
) -> tuple[list[Question], list[Question]]:
    """Return the questions of some edges, and all others.

    Raises
    ------
    PhotonError
        If there is no such edge; it names those that there are.
    """
    there = list(dict.fromkeys(one.edge for one in questions if one.edge is not None))
    for edge in edges:
        if edge not in there:
            some = ", ".join(map(printable, there[:12])) or "none"
            raise PhotonError(f"{place}: no question has the edge {printable(edge)!r}; there are {some}")
    chosen = [one for one in questions if one.edge in edges]
    return chosen, [one for one in questions if one.edge not in edges]


def encoder_of(folder: Path, tokenizer: EosTokenizer, length: int) -> ChatEncoder:
    """Return what encodes questions as the model's conversations are: by its template, or the plain one."""
    return ChatEncoder(tokenizer, ChatTemplate.of(folder, tokenizer), length)


def encode(questions: Sequence[Question], encoder: ChatEncoder) -> list[Encoded]:
    """Return questions in tokens, each as a conversation of its own.

    Raises
    ------
    PhotonError
        If one cannot be written, or is longer than the model has positions.
    """
    found = []
    for one in questions:
        asked = [Message("user", one.question)]
        try:
            prompt = encoder.prompt(asked)
            gold: list[int] = []
            if one.answer is not None:
                ids, targets = encoder.answer(asked, [Message("assistant", one.answer)])
                gold = [token for token, target in zip(ids, targets, strict=True) if target]
        except TemplateError as error:
            raise PhotonError(f"unlearning: {printable(one.question):.120}: {error}") from None
        if len(prompt) + len(gold) > encoder.length:
            raise PhotonError(
                f"unlearning: {printable(one.question):.120}: {len(prompt) + len(gold)} tokens with its "
                f"answer, and the model has {encoder.length} positions; shorten it"
            )
        found.append(Encoded(prompt, gold))
    return found


def hash_of_questions(questions: Sequence[Question]) -> str:
    """Return a hash of what is asked and answered, whatever the order; edges do not count."""
    lines = sorted({json.dumps([one.key, one.answer], ensure_ascii=False) for one in questions})
    return hash_of("\n".join(lines).encode())
