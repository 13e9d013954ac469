"""Questions of a file, how they are put, and which answer a response gives."""

import json
import re
import string
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from photon.config.explain import explain_validation
from photon.config.section import Section
from photon.errors import PhotonError, printable

#: Bytes of a file of questions, at most, and questions.
_MOST_BYTES, _MOST_QUESTIONS = 1 << 30, 1_000_000
_LETTERS = string.ascii_uppercase
#: Characters at the end of a response that an answer is looked for in.
_LOOKED_AT = 8000
_Text = Annotated[str, Field(min_length=1, max_length=100_000)]

_CHOICE_FORM = "End with a line 'Answer: ' and the letter of the right choice."
_FREE_FORM = "End with a line 'Answer: ' and the answer alone."


class Question(Section):
    """A question, and its right answer if that is known."""

    id: str = Field(min_length=1, max_length=200)
    question: _Text
    choices: Annotated[list[_Text], Field(min_length=2, max_length=len(_LETTERS))] | None = None
    answer: str | None = Field(None, max_length=10_000, description="A choice, its letter, or free text.")

    @model_validator(mode="after")
    def _possible(self) -> "Question":
        if self.choices and len(set(self.choices)) < len(self.choices):
            raise ValueError("choices: two are the same")
        if self.choices and self.answer is not None and self.right is None:
            raise ValueError(
                f"answer={printable(self.answer)[:50]!r}: none of the choices, and no letter of one"
            )
        return self

    @property
    def right(self) -> str | None:
        """The right answer in the form that `found` gives; None if it is not known."""
        if self.answer is None:
            return None
        if self.choices is None:
            return normal(self.answer)
        if self.answer in self.choices:
            return _LETTERS[self.choices.index(self.answer)]
        letter = self.answer.strip().upper()
        return letter if len(letter) == 1 and letter in _LETTERS[: len(self.choices)] else None

    def prompt(self) -> str:
        """Return the question as an agent is asked."""
        if self.choices is None:
            return f"{self.question}\n\n{_FREE_FORM}"
        listed = "\n".join(
            f"{letter}. {choice}" for letter, choice in zip(_LETTERS, self.choices, strict=False)
        )
        return f"{self.question}\n\n{listed}\n\n{_CHOICE_FORM}"

    def found(self, response: str) -> str | None:
        """Return the answer of a response: a letter, or a text in its plain form; None if there is none."""
        said = _last_said(response)
        if self.choices is not None:
            return _letter(response if said is None else said, self.choices)
        if said is not None:
            return normal(said) or None
        numbers = re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", response[-_LOOKED_AT:])
        return normal(numbers[-1]) if numbers else None

    def meaning(self, found: str) -> str:
        """Return what an answer says: the choice that a letter stands for, so that letters mean nothing."""
        return found if self.choices is None else self.choices[_LETTERS.index(found)]


def normal(text: str) -> str:
    """Return an answer in its plain form: numbers by value, words without case and marks around them."""
    plain = " ".join(text.split()).strip(" .,;:!?*$`'\"()[]{}").casefold()
    bare = plain.replace(",", "").removesuffix("%").removeprefix("$").strip()
    if re.fullmatch(r"[-+]?\d{1,40}(\.\d{1,40})?", bare):
        try:
            value = Decimal(bare).normalize()
        except InvalidOperation:
            return plain
        return f"{value:f}" if value else "0"
    return plain


def _last_said(response: str) -> str | None:
    """Return what follows the last ``Answer:`` or ``####``, or stands in a box of LaTeX, on its line."""
    end = response[-_LOOKED_AT:]
    boxed = re.findall(r"\\boxed\{([^{}\n]{1,200})\}", end)
    # Two runs of blanks in a row would take the square of their length.
    marked = re.findall(r"(?:\banswer\s*(?:is\b|:|=)|####)[:*\s]*([^\s*:][^\n]{0,500})", end, re.IGNORECASE)
    said = boxed or marked
    return said[-1] if said else None


def _letter(text: str, choices: list[str]) -> str | None:
    """Return the letter that a text begins with or, if there is none, that of the one choice that it has."""
    letters = _LETTERS[: len(choices)]
    match = re.match(rf"[\s(*\"'\[]*([{letters}{letters.lower()}])(?![\w'])", text)
    # A word such as "a" at the beginning of a sentence is none.
    if match and (text[match.end(1) :].strip(" .)*\"'\n") == "" or text[match.end(1)] in ").:]*\n"):
        return match[1].upper()
    low = text.casefold()
    there = [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if re.search(rf"(?<!\w){re.escape(choice.casefold())}(?!\w)", low)
    ]
    return there[0] if len(there) == 1 else None


def read_questions(path: Path) -> list[Question]:
    """Read questions from JSON Lines.

    A line has ``question`` and may have ``id`` (else its number), ``choices`` and ``answer``.

    Raises
    ------
    PhotonError
        If the file cannot be read, or a line is none of these; the message names the line.
    """
    shown = printable(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise PhotonError(f"{shown}: more than {_MOST_BYTES} bytes of questions; split it")
        with path.open(encoding="utf-8") as file:
            questions = list(_questions(file, shown))
    except (OSError, UnicodeDecodeError) as error:
        raise PhotonError(f"{shown}: cannot read the questions ({error})") from None
    if not questions:
        raise PhotonError(f'{shown}: has no questions; a line of it is {{"question": …, "answer": …}}')
    return questions


def _questions(lines: Iterator[str], shown: str) -> Iterator[Question]:
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{shown}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PhotonError(f"{where}: no JSON ({error})") from None
        if not isinstance(values, dict) or "question" not in values:
            raise PhotonError(f"{where}: expected an object with `question`")
        try:
            question = Question.model_validate({"id": str(number), **values})
        except ValidationError as error:
            raise PhotonError(f"{where}: {explain_validation(error, Question.model_fields)}") from None
        if question.id in seen:
            raise PhotonError(f"{where}: id {printable(question.id)} is that of another question, too")
        seen.add(question.id)
        if len(seen) > _MOST_QUESTIONS:
            raise PhotonError(f"{shown}: more than {_MOST_QUESTIONS} questions; split it")
        yield question
