"""The questions of both versions, as one kind of record.

Version 1.5 has a question per row; version 1.0 has a capsule per row, with its questions as the literal of a
Python list. Rows that cannot be read are left out and named.
"""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.errors import PhotonError, printable

#: How an answer to an open question may be verified.
VERIFIERS = ("str_verifier", "range_verifier", "llm_verifier")
#: Bytes of a file of questions, of one row; rows.
_MOST_FILE, _MOST_ROW, _MOST_ROWS = 64 << 20, 1 << 20, 20_000
#: Characters of one text of a row.
_MOST_TEXT = 20_000
_NAME = re.compile(r"[a-z0-9][a-z0-9_.\-]{0,99}")


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes
    ----------
    id
        Its name, in small letters.
    capsule
        Identity of the capsule that it is of; questions of one are not independent.
    text, ideal, distractors
        What is asked, the right answer, and wrong ones.
    verifier
        How an open answer is verified, as the row has it; it may be none of `VERIFIERS`.
    archive
        Name of the file or folder with the capsule's data, or None.
    categories
        What it is about.
    version
        Of the benchmark.
    """

    id: str
    capsule: str
    text: str
    ideal: str
    distractors: tuple[str, ...]
    verifier: str
    archive: str | None
    categories: tuple[str, ...]
    version: str


@dataclass
class QuestionSet:
    """Questions of a file, and the rows that were left out: where, and why."""

    questions: list[Question] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @property
    def version(self) -> str:
        """The versions of the questions, with a plus between."""
        return "+".join(sorted({question.version for question in self.questions}))


def read_questions(path: Path) -> QuestionSet:
    """Read a JSON Lines file of either version.

    Raises
    ------
    PhotonError
        If it cannot be read, is too large, or has no question that can be used.
    """
    shown = printable(path)
    try:
        if path.stat().st_size > _MOST_FILE:
            raise PhotonError(f"{shown}: a file of questions has {_MOST_FILE} bytes at most")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PhotonError(f"{shown}: cannot read the questions ({error})") from None
    found = QuestionSet()
    known: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        for where, made in _of_line(line, number):
            if isinstance(made, str):
                found.left_out.append((where, made))
            elif made.id in known:
                found.left_out.append((where, f"{made.id} is the name of an earlier question"))
            elif len(known) >= _MOST_ROWS:
                found.left_out.append((where, f"more than {_MOST_ROWS} questions"))
            else:
                known.add(made.id)
                found.questions.append(made)
    if not found.questions:
        why = f"; {found.left_out[0][0]}: {found.left_out[0][1]}" if found.left_out else ""
        raise PhotonError(f"{shown}: no question in it{why}")
    return found


def _of_line(line: str, number: int) -> Iterator[tuple[str, Question | str]]:
    where = f"line {number}"
    try:
        if len(line) > _MOST_ROW:
            raise ValueError(f"more than {_MOST_ROW} characters")
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("no JSON object")
        if "questions" not in row:
            yield where, _question_of_row(row)
            return
        entries = _literal(row["questions"])
        if not isinstance(entries, list):
            raise ValueError("questions: no list")
    except (ValueError, RecursionError) as error:
        yield where, printable(error)[:200]
        return
    for place, entry in enumerate(entries, 1):
        try:
            yield f"{where}, question {place}", _question_of_capsule(row, entry)
        except ValueError as error:
            yield f"{where}, question {place}", printable(error)[:200]


def _question_of_row(row: dict[str, Any]) -> Question:
    """Return the question of a row of version 1.5."""
    distractors = _literal(row.get("distractors") or [])
    if not isinstance(distractors, list):
        raise ValueError("distractors: no list")
    name = _name(_text(row, "question_id"))
    return Question(
        id=name,
        capsule=_text(row, "capsule_uuid", row.get("short_id") or name.rpartition("-")[0] or name).lower(),
        text=_text(row, "question"),
        ideal=_text(row, "ideal"),
        distractors=tuple(_text({"distractor": one}, "distractor") for one in distractors),
        verifier=_text(row, "eval_mode", "llm_verifier"),
        archive=_archive(row),
        categories=_categories(row.get("categories")),
        version=_text(row, "version", "1.5"),
    )


def _question_of_capsule(row: dict[str, Any], entry: Any) -> Question:
    """Return one question of a capsule of version 1.0, which a model's judgement verifies."""
    if not isinstance(entry, dict):
        raise ValueError("no mapping")
    short, own = _text(row, "short_id"), _text(entry, "id")
    numbers = sorted(key for key in entry if re.fullmatch(r"distractor_\d", str(key)))
    return Question(
        id=_name(own if own.lower().startswith(short.lower()) else f"{short}-{own}"),
        capsule=_text(row, "uuid", short).lower(),
        text=_text(entry, "question"),
        ideal=_text(entry, "ideal answer"),
        distractors=tuple(_text(entry, key) for key in numbers),
        verifier="llm_verifier",
        archive=_archive(row),
        categories=_categories(row.get("categories")),
        version=_text(row, "version", "1.0"),
    )


def _text(row: dict[str, Any], key: str, default: Any = None) -> str:
    value = row.get(key)
    if value is None:
        value = default
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: missing, or no text")
    if len(value) > _MOST_TEXT:
        raise ValueError(f"{key}: more than {_MOST_TEXT} characters")
    return value.strip()


def _name(text: str) -> str:
    """Return the name of a question as it is used for files: two of version 1.5 begin with a capital."""
    name = text.lower().replace("_", "-")
    if not _NAME.fullmatch(name):
        raise ValueError(f"question_id: {text!r} is no name")
    return name


def _archive(row: dict[str, Any]) -> str | None:
    value = row.get("data_folder")
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[\w][\w .\-]{0,199}", value):
        raise ValueError("data_folder: no name of a file")
    return value


def _categories(value: Any) -> tuple[str, ...]:
    """Return the categories: a list, a text with commas, or the literal of a Python list."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = _literal(value)
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(dict.fromkeys(str(part).strip()[:100] for part in parts if str(part).strip()))


def _literal(value: Any) -> Any:
    """Return what the literal of a Python value stands for; what is none already is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("a text that is no Python literal") from None
