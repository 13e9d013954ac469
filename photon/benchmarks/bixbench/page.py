"""The report: a page of figures, and a page for each question with what agents did.

Nothing on it is believed: all that models and kernels wrote is text, the pages have no scripts, and their
content security policy forbids them to load anything.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from photon.benchmarks.bixbench import table
from photon.benchmarks.bixbench.questions import Question
from photon.benchmarks.bixbench.records import Folder
from photon.benchmarks.bixbench.results import read_grades, read_results
from photon.benchmarks.notebook.document import cut
from photon.errors import PhotonError, printable
from photon.report.page import Page, Table
from photon.report.write import write_page

#: Trajectories of a question that its page shows, steps of one, and characters of a step.
_MOST_TRAJECTORIES, _MOST_STEPS, _MOST_CHARACTERS = 50, 200, 6_000


def write_report(folders: Sequence[Path], output: Path) -> int:
    """Write the report on runs: ``output``, and beside it a folder of pages of questions.

    Returns
    -------
    int
        Pages that were written.

    Raises
    ------
    PhotonError
        If a folder has no results, or a page cannot be written.
    """
    runs = [(Folder(folder), read_results(folder)) for folder in folders]
    names = [results["name"] for _, results in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        for (folder, results), name in zip(runs, names, strict=True):
            if name in twice:
                results["name"] = f"{name} ({folder.path.name})"
    beside = output.with_name(f"{output.stem}-questions")
    questions: dict[str, Question] = {}
    for folder, _ in runs:
        questions |= {one.id: one for one in folder.questions()}
    grades = {results["name"]: _by_question(read_grades(folder.path)) for folder, results in runs}
    for question in questions.values():
        write_page(_question_page(question, runs, grades), beside / f"{question.id}.html")
    write_page(_overview(runs, grades, questions, beside.name), output)
    return len(questions) + 1


def _by_question(grades: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for grade in grades:
        found.setdefault(str(grade["question"]), []).append(grade)
    return found


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    return Table(columns, rows, [None] * len(rows))


def _overview(
    runs: Sequence[tuple[Folder, dict[str, Any]]],
    grades: dict[str, dict[str, list[dict[str, Any]]]],
    questions: dict[str, Question],
    beside: str,
) -> Page:
    results = [one for _, one in runs]
    tables = [("Accuracy", _table(table.COLUMNS, table.rows(results)))]
    for title, columns, rows in (
        ("By category", table.CATEGORY_COLUMNS, table.category_rows(results)),
        ("Majority of k answers", *table.majority_rows(results)),
        ("Cost", *table.cost_rows(results)),
    ):
        if rows:
            tables.append((title, _table(columns, rows)))
    tables.append(("Questions", _question_table(results, grades, questions)))
    return Page(
        title="BixBench",
        subtitle=[one["name"] for one in results],
        status="",
        status_kind="",
        cards=[],
        tables=tables,
        sections=[],
        log=_log(runs),
        configs=[
            (f"{one['name']}: how it was run and graded", json.dumps(_settings(one), indent=2))
            for one in results
        ],
        commands=[f"photon bench bixbench report {' '.join(printable(folder.path) for folder, _ in runs)}"],
        facts=[("How to read it", table.NOTE)],
        links=[(name, f"{beside}/{name}.html") for name in sorted(questions)],
    )


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    return {key: results[key] for key in ("run", "mode", "version", "grading", "judge")}


def _question_table(
    results: list[dict[str, Any]],
    grades: dict[str, dict[str, list[dict[str, Any]]]],
    questions: dict[str, Question],
) -> Table:
    names = [one["name"] for one in results]
    rows = []
    for name in sorted(questions):
        cells = []
        for model in names:
            given = grades[model].get(name, [])
            right = sum(grade["state"] == "correct" for grade in given)
            cells.append(f"{right} of {len(given)}" if given else "–")
        rows.append([name, ", ".join(questions[name].categories), *cells])
    return _table(["question", "categories", *names], rows)


def _log(runs: Sequence[tuple[Folder, dict[str, Any]]]) -> list[tuple[str, str, str, str]]:
    """Return what went wrong, each kind once with its number and an example."""
    log = []
    for folder, results in runs:
        examples: dict[str, str] = {}
        counts: dict[str, int] = {}
        for answer in folder.answers().values():
            if answer.failed is not None:
                counts[answer.failed] = counts.get(answer.failed, 0) + 1
                examples.setdefault(answer.failed, answer.detail)
        log += [
            ("bad", results["name"], f"{kind}: {counts[kind]} missing", examples[kind]) for kind in counts
        ]
        for regime, figures in results["regimes"].items():
            for kind, number in figures["faults"].items():
                log.append(
                    ("warn", results["name"], f"{kind}: {number}", f"actions that were none, {regime}")
                )
            for end, number in figures["ends"].items():
                if end != "answered":
                    log.append(
                        (
                            "warn",
                            results["name"],
                            f"{end}: {number}",
                            f"work that ended without an answer, {regime}",
                        )
                    )
            for by, number in figures["by"].items():
                if by.startswith(("judge:", "no judge", "unknown verifier")):
                    log.append(
                        ("warn", results["name"], f"{by}: {number}", f"answers left ungraded, {regime}")
                    )
    return log


# --- one question ---------------------------------------------------------------------------------------


def _question_page(
    question: Question,
    runs: Sequence[tuple[Folder, dict[str, Any]]],
    grades: dict[str, dict[str, list[dict[str, Any]]]],
) -> Page:
    rows: list[list[str]] = []
    texts: list[tuple[str, str]] = []
    for folder, results in runs:
        name = results["name"]
        for grade in grades[name].get(question.id, []):
            said = cut(str(grade["predicted"] or "–"), 200)
            rows.append(
                [
                    name,
                    str(grade["replica"]),
                    grade["regime"],
                    said,
                    cut(str(grade["target"]), 200),
                    grade["state"],
                    grade["by"],
                ]
            )
        for replica in range(results["run"]["replicas"]):
            if len(texts) < _MOST_TRAJECTORIES and (text := _trajectory(folder, question.id, replica)):
                texts.append((f"{name}, replica {replica}", text))
    columns = ["model", "replica", "regime", "answer", "right", "grade", "by"]
    return Page(
        title=question.id,
        subtitle=[*question.categories, f"version {question.version}", question.verifier],
        status="",
        status_kind="",
        cards=[],
        tables=[("Answers", _table(columns, rows))] if rows else [],
        sections=[],
        log=[],
        configs=[("question", f"{question.text}\n\nright: {question.ideal}"), *texts],
        commands=[],
        facts=[],
        texts_title="What was asked and done",
    )


def _trajectory(folder: Folder, question: str, replica: int) -> str:
    """Return an agent's work as a text to read."""
    parts = []
    for number, step in enumerate(folder.steps(question, replica)[:_MOST_STEPS], 1):
        fault = f" [{step.get('fault')}]" if step.get("fault") else ""
        parts.append(f"──── step {number}: {step.get('tool') or 'no action'}{fault}")
        said = str(step.get("said") or "").strip()
        if said:
            parts.append(cut(said, _MOST_CHARACTERS))
        arguments = step.get("arguments")
        if isinstance(arguments, dict):
            parts += [
                f"{key}:\n{cut(str(value), _MOST_CHARACTERS)}"
                for key, value in arguments.items()
                if value is not None
            ]
        parts.append(f"→ {cut(str(step.get('observation') or '(nothing)'), _MOST_CHARACTERS)}")
    return "\n".join(parts)


def check_output(output: Path) -> None:
    """Raise a `PhotonError` if ``output`` cannot be a page."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise PhotonError(f"--output {printable(output)}: expected a name that ends in .html")
