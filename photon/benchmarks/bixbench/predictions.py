"""Recorded predictions as tables of comma-separated values: reading and grading again.

The columns are those of the authors' repository: ``uuid, question, predicted, target, unsure,
evaluation_mode``, and of what was graded ``grade, correct, sure``. There the last one says, against its name,
whether the answer refused.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from photon.benchmarks.bixbench.grade import Judge, Verdict, grade_choice, grade_open
from photon.benchmarks.bixbench.metrics import Figures
from photon.benchmarks.bixbench.settings import GradeSettings
from photon.errors import PhotonError, printable

COLUMNS = ("uuid", "question", "predicted", "target", "unsure", "evaluation_mode")
#: What `figures_row` says.
FIGURES = ["file", "answers", "correct", "refused", "ungraded", "accuracy", "precision", "coverage"]
_NEEDED = ("question", "predicted", "target")
_MOST_BYTES, _MOST_CELL = 64 << 20, 1 << 20


def read_predictions(path: Path) -> list[dict[str, str]]:
    """Read a table of predictions.

    Raises
    ------
    PhotonError
        If it cannot be read, or lacks a column.
    """
    shown = printable(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise PhotonError(f"{shown}: a table has {_MOST_BYTES} bytes at most")
        csv.field_size_limit(_MOST_CELL)
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        rows = [{key: value or "" for key, value in row.items() if isinstance(key, str)} for row in reader]
        columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PhotonError(f"{shown}: cannot read the predictions ({error})") from None
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise PhotonError(f"{shown}: no column {missing[0]}; a table of predictions has {', '.join(COLUMNS)}")
    return rows


def is_choice(row: dict[str, str]) -> bool:
    """Return whether a row's target is the letter of an option."""
    return len(row["target"].strip()) == 1 and row["target"].strip().isalpha()


def grade_predictions(
    rows: Sequence[dict[str, str]], settings: GradeSettings, judge: Judge | None
) -> list[Verdict]:
    """Grade predictions: as choices where every target is a letter, else as open answers."""
    rules = settings.effective()
    if all(map(is_choice, rows)):
        return [grade_choice(row["predicted"], row["target"], _refusal(row)) for row in rows]
    return [
        grade_open(
            row["question"],
            row["target"],
            row["predicted"],
            row.get("evaluation_mode") or "llm_verifier",
            judge,
            numeric=rules.range_grader == "numeric",
            partial=rules.partial_match,
        )
        for row in rows
    ]


def _refusal(row: dict[str, str]) -> str | None:
    letter = row.get("unsure", "").strip()
    return letter if len(letter) == 1 else None


def figures_row(file: Path, settings: GradeSettings, judge: Judge | None) -> list[str]:
    """Return the figures of a table of predictions, graded, as they are shown."""
    states = [verdict.state for verdict in grade_predictions(read_predictions(file), settings, judge)]
    figures = Figures(len(states), states.count("correct"), states.count("refused"))
    counts = (figures.total, figures.correct, figures.refused, states.count("ungraded"))
    shares = (figures.accuracy, figures.precision, figures.coverage)
    return [printable(file.name), *(f"{count:,}" for count in counts), *(f"{one:.3f}" for one in shares)]
