"""Task files: questions with their answers, a row each, as tasks of lm-eval.

What a row asks follows from its columns:

===================================  ======================================================================
columns                              question
===================================  ======================================================================
query, choices, gold                 which of the choices follows; `gold` counts from 0
context_options, continuation, gold  after which of the beginnings the text goes on so
context, continuation                is this the likeliest continuation, token by token
context, answer (aliases,            is one of these what the model writes; a chain of thought is in the
chain_of_thought)                    examples and before the answer
text                                 how likely is it: bits per byte. A .txt or .md file is one such row
===================================  ======================================================================
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.data.file_kinds import PACKINGS, FileKind
from photon.data.folders import UnreadableError, files_of
from photon.data.row_files import rows_of
from photon.data.rows import BOM, BadRow, text_fault
from photon.data.streams import opened, whole
from photon.errors import PhotonError, printable

Row = Mapping[str, Any]

#: Most tokens of an answer, without and with a chain of thought before it.
_ANSWER, _WORKED_ANSWER = 32, 256


class _RowError(Exception):
    """What is wrong with a row."""


@dataclass(frozen=True)
class LocalTask:
    """A task file, read.

    Attributes
    ----------
    file
        The file.
    config
        How lm-eval puts the questions and rates the answers.
    questions
        The rows, as `config` names their columns.
    chance
        The accuracy of guessing; None where nothing is guessed.
    """

    file: Path
    config: dict[str, Any]
    questions: list[dict[str, Any]]
    chance: float | None


def find_files(folder: Path) -> dict[str, list[Path]]:
    """Return the task files below a folder by name, with and without the folders that they are in.

    Raises
    ------
    PhotonError
        If there is no such folder.
    """
    if not folder.is_dir():
        raise PhotonError(f"--task-data {printable(folder)}: no such folder; give one with task files")
    found: dict[str, list[Path]] = {}
    for file, _, _ in _files(folder):
        inner = file.relative_to(folder)
        for name in {_stem(file), (inner.parent / _stem(file)).as_posix()}:
            found.setdefault(name, []).append(file)
    return found


def _files(path: Path) -> list[tuple[Path, str, FileKind]]:
    return files_of(path, lambda _name, _reason: None)


def _stem(file: Path) -> str:
    packed = file.suffix.lower() in PACKINGS
    name = file.name.removesuffix(file.suffix) if packed else file.name
    return name.removesuffix(Path(name).suffix)


def read_task(file: Path, shots: int) -> LocalTask:
    """Read a task file.

    Parameters
    ----------
    file
        The file.
    shots
        Worked examples before each question; they are other rows of the file.

    Raises
    ------
    PhotonError
        If the file cannot be read, a row lacks a column or holds something else in it, or the rows are too
        few for the examples. A row is not left out: the figure would be of another task.
    """
    try:
        ((_, _, kind),) = _files(file)
        rows = list(_plain_row(file, kind) if kind.form == "plain" else _rows(file, kind))
    except UnreadableError as error:
        raise PhotonError(f"{printable(file)}: {error}") from None
    if not rows:
        raise PhotonError(f"{printable(file)}: holds no rows; give it questions, a row each")
    form = _form_of(file, rows[0][1])
    questions = []
    for number, row in rows:
        try:
            questions.append(form.question(row))
        except _RowError as error:
            raise PhotonError(f"{printable(file)}: row {number:,}: {error}; mend or remove the row") from None
    if shots and (not form.examples or shots >= len(questions)):
        why = f"it has {len(questions):,} rows" if form.examples else "a text takes no examples"
        raise PhotonError(f"{printable(file)}: {shots} examples before each question: {why}; lower --shots")
    choices = [len(question["choices"]) for question in questions if "choices" in question]
    chance = sum(1 / count for count in choices) / len(choices) if choices else None
    return LocalTask(file, form.config, questions, 0.0 if chance is None and form.examples else chance)


def _rows(file: Path, kind: FileKind) -> Iterator[tuple[int, Row]]:
    for number, row in rows_of(file, kind, _COLUMNS):
        if isinstance(row, BadRow):
            raise UnreadableError(f"row {number:,}: {row.reason}")
        if not isinstance(row, dict):
            raise UnreadableError(f"row {number:,}: not an object with columns")
        yield number, row


def _plain_row(file: Path, kind: FileKind) -> Iterator[tuple[int, Row]]:
    with opened(file, kind) as stream:
        data = whole(stream, kind).removeprefix(BOM)
    try:
        yield 1, {"text": data.decode()}
    except UnicodeDecodeError:
        raise UnreadableError("not UTF-8") from None


# --- the forms of questions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    columns: tuple[str, ...]
    question: Callable[[Row], dict[str, Any]]
    config: dict[str, Any]
    examples: bool = True


def _form_of(file: Path, row: Row) -> _Form:
    """Return the first form that a file's first row has all columns of."""
    for form in _FORMS:
        if all(row.get(column) is not None for column in form.columns):
            return form
    has = ", ".join(printable(name) for name in list(row)[:8]) or "none"
    wanted = "; or ".join(", ".join(form.columns) for form in reversed(_FORMS))
    raise PhotonError(f"{printable(file)}: a task file needs columns {wanted}; it has {has}")


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise _RowError(f"column {column!r} is missing or holds no text")
    fault = text_fault(value)
    if fault is not None:
        raise _RowError(f"column {column!r}: {fault}")
    return value


def _texts(row: Row, column: str, least: int) -> list[str]:
    values = row.get(column)
    if not isinstance(values, list) or len(values) < least:
        raise _RowError(f"column {column!r} is missing or no list of at least {least} texts")
    return [_text({column: value}, column) for value in values]


def _gold(row: Row, choices: list[str]) -> int:
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise _RowError(f"column 'gold' is missing or no number from 0 to {len(choices) - 1}")
    return gold


def _asked(text: str) -> str:
    """Return a question as it is put: after ``Question:`` comes ``Answer:``, on a line of its own."""
    text = text.rstrip()
    _, question, rest = text.rpartition("Question:")
    return f"{text}\nAnswer:" if question and "Answer:" not in rest else text


def _choice(row: Row) -> dict[str, Any]:
    choices = _texts(row, "choices", 2)
    return {"asked": _asked(_text(row, "query")), "choices": choices, "gold": _gold(row, choices)}


def _beginning(row: Row) -> dict[str, Any]:
    beginnings = [text.rstrip() for text in _texts(row, "context_options", 2)]
    continuation = _text(row, "continuation").lstrip()
    return {"choices": beginnings, "gold": _gold(row, beginnings), "continuation": continuation}


def _continuation(row: Row) -> dict[str, Any]:
    return {"asked": _asked(_text(row, "context")), "continuation": f" {_text(row, 'continuation').lstrip()}"}


def _answer(row: Row) -> dict[str, Any]:
    context = _text(row, "context")
    answers = [_text(row, "answer"), *(_texts(row, "aliases", 1) if row.get("aliases") else [])]
    asked = _asked(context if "Question:" in context else f"Question: {context}")
    return {"asked": asked, "answers": list(dict.fromkeys(answers))}


def _worked_answer(row: Row) -> dict[str, Any]:
    question = _answer(row)
    worked = f"{_text(row, 'chain_of_thought').strip()} The answer is {question['answers'][0]}"
    return {**question, "worked": worked}


_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_MATCH = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
_SAME = {**_MATCH, "ignore_case": True, "ignore_punctuation": True}
_FORMS = (
    _Form(
        ("query", "choices", "gold"),
        _choice,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "asked",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [_ACCURACY, {**_ACCURACY, "metric": "acc_norm"}],
        },
    ),
    _Form(
        ("context_options", "continuation", "gold"),
        _beginning,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "choices",
            "doc_to_target": "continuation",
            "metric_list": [_ACCURACY],
        },
    ),
    _Form(
        ("context", "chain_of_thought", "answer"),
        _worked_answer,
        {
            "output_type": "generate_until",
            "doc_to_text": "asked",
            "doc_to_target": "answers",
            "fewshot_config": {"doc_to_target": "worked"},
            "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": _WORKED_ANSWER},
            "filter_list": [
                {
                    "name": "none",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"The answer is\s*([^\n]*?)\.?\s*(?:\n|$)"},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [_SAME],
        },
    ),
    _Form(
        ("context", "answer"),
        _answer,
        {
            "output_type": "generate_until",
            "doc_to_text": "asked",
            "doc_to_target": "answers",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": _ANSWER},
            "filter_list": [
                {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [_SAME],
        },
    ),
    _Form(
        ("context", "continuation"),
        _continuation,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "asked",
            "doc_to_target": "continuation",
            "target_delimiter": "",
            "metric_list": [
                _ACCURACY,
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
    ),
    _Form(
        ("text",),
        lambda row: {"text": _text(row, "text")},
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
                for metric, aggregation in (
                    ("bits_per_byte", "bits_per_byte"),
                    ("byte_perplexity", "weighted_perplexity"),
                )
            ],
        },
        examples=False,
    ),
)
_COLUMNS = tuple(dict.fromkeys([*(name for form in _FORMS for name in form.columns), "aliases"]))
