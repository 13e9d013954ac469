"""From answers to figures: every answer graded, and the figures of each regime and category."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from photon.benchmarks.bixbench.choices import REGIMES, Regime, choices_of
from photon.benchmarks.bixbench.grade import Judge, Verdict, grade_choice, grade_open
from photon.benchmarks.bixbench.judge import ModelJudge, rubric_hash
from photon.benchmarks.bixbench.metrics import Figures, clustered, grouped, majority_votes, wilson
from photon.benchmarks.bixbench.questions import Question
from photon.benchmarks.bixbench.records import Answer, Folder
from photon.benchmarks.bixbench.settings import GradeSettings
from photon.benchmarks.bixbench.solvers import Cost
from photon.errors import PhotonError, printable
from photon.files.atomic import write_text

_RESULTS, _GRADES = "results.json", "grades.jsonl"
#: Answers that are judged at the same time; how many requests there are, the client bounds.
_AT_ONCE = 8


@dataclass(frozen=True)
class Graded:
    """An answer and what it is worth; ``answer`` is None where none was made."""

    question: Question
    replica: int
    answer: Answer | None
    verdict: Verdict


def grade_run(folder: Folder, settings: GradeSettings, judge: ModelJudge | None) -> dict[str, Any]:
    """Grade a run's answers, and keep grades and figures in its folder.

    Returns
    -------
    dict
        What ``results.json`` holds.

    Raises
    ------
    PhotonError
        If the folder holds no run.
    """
    told, questions, answers = folder.told(), folder.questions(), folder.answers()
    rules = settings.effective()
    regimes: dict[str, Any] = {}
    lines: list[str] = []
    replicas, asked = told["run"]["replicas"], told["run"]["regimes"]
    for regime in (one for one in REGIMES if one in asked):
        having = [one for one in questions if regime == "open" or choices_of(one, refusal=False) is not None]
        pairs = [
            (question, replica, answers.get((question.id, replica, regime)))
            for question in having
            for replica in range(replicas)
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            verdicts = list(pool.map(lambda pair: _grade(pair[0], pair[2], rules, judge), pairs))
        graded = [Graded(*pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True)]
        lines += [_line(one, regime) for one in graded]
        regimes[regime] = figures_of(graded, regime, rules)
    results = {
        "name": told["run"]["name"],
        "version": told["identity"]["version"],
        "mode": told["identity"]["settings"]["mode"],
        "run": told["run"],
        "grading": rules.model_dump(),
        "judge": None if judge is None else judge.agent.identity() | {"rubric": rubric_hash()},
        "regimes": regimes,
        "cost": _cost(answers.values()),
    }
    write_text(folder.path / _GRADES, "".join(lines))
    write_text(folder.path / _RESULTS, json.dumps(results, indent=1))
    return results


def read_results(folder: Path) -> dict[str, Any]:
    """Return the figures that `grade_run` has kept.

    Raises
    ------
    PhotonError
        If the folder has none.
    """
    try:
        found = json.loads((folder / _RESULTS).read_text())
        if not isinstance(found["regimes"], dict):
            raise ValueError("no results")
    except (OSError, ValueError, KeyError, TypeError):
        raise PhotonError(
            f"{printable(folder)}: no results; `photon bench bixbench grade` makes them"
        ) from None
    return dict(found)


def read_grades(folder: Path) -> list[dict[str, Any]]:
    """Return the grades that `grade_run` has kept."""
    try:
        return [json.loads(line) for line in (folder / _GRADES).read_text().splitlines()]
    except (OSError, ValueError):
        return []


def figures_of(graded: Sequence[Graded], regime: Regime, rules: GradeSettings) -> dict[str, Any]:
    """Return the figures of one regime: of all its answers, and of each category's."""
    counted = [one for one in graded if rules.denominator == "fixed" or _is_answered(one)]
    categories = sorted({category for one in counted for category in one.question.categories})
    figures = _figures(counted, regime, rules)
    figures["missing"] = sum(one.answer is None or one.answer.failed is not None for one in graded)
    figures["by"] = dict(Counter(one.verdict.by for one in graded).most_common())
    figures["ends"] = dict(
        Counter(one.answer.end for one in graded if one.answer and one.answer.end).most_common()
    )
    figures["faults"] = dict(
        sum((Counter(one.answer.faults) for one in graded if one.answer), Counter[str]())
    )
    figures["categories"] = {
        category: _figures([one for one in counted if category in one.question.categories], regime, rules)
        for category in categories
    }
    if regime != "open":
        figures["majority"] = _majority(graded, upstream=rules.compat)
    return figures


def _figures(graded: Sequence[Graded], regime: Regime, rules: GradeSettings) -> dict[str, Any]:
    refusals = regime != "open" or rules.open_refusals == "counted"
    states = Counter(one.verdict.state for one in graded)
    counts = Figures(len(graded), states["correct"], states["refused"] if refusals else 0)
    clusters = clustered(grouped([(one.question.capsule, one.verdict.correct) for one in graded]))
    return {
        "total": counts.total,
        "correct": counts.correct,
        "refused": states["refused"],
        "ungraded": states["ungraded"],
        "accuracy": counts.accuracy,
        "precision": counts.precision,
        "coverage": counts.coverage,
        "wilson": list(wilson(counts.accuracy, counts.total)),
        "clustered": None if clusters is None else list(clusters),
    }


def _is_answered(one: Graded) -> bool:
    return one.answer is not None and one.answer.failed is None and one.answer.predicted is not None


def _majority(graded: Sequence[Graded], *, upstream: bool) -> list[float]:
    letters: dict[str, list[str | None]] = {}
    targets: dict[str, str] = {}
    for one in graded:
        letters.setdefault(one.question.id, []).append(None if one.answer is None else one.answer.predicted)
        if one.answer is not None and one.answer.target:
            targets[one.question.id] = one.answer.target
    known = {name: given for name, given in letters.items() if name in targets}
    return majority_votes(known, targets, upstream=upstream) if known else []


def _grade(question: Question, answer: Answer | None, rules: GradeSettings, judge: Judge | None) -> Verdict:
    if answer is None:
        return Verdict("incorrect", "not made")
    if answer.failed is not None:
        return Verdict("incorrect", answer.failed)
    if answer.regime != "open":
        return grade_choice(answer.predicted, answer.target, answer.refusal)
    return grade_open(
        question.text,
        question.ideal,
        answer.predicted,
        question.verifier,
        judge,
        numeric=rules.range_grader == "numeric",
        partial=rules.partial_match,
    )


def _line(one: Graded, regime: Regime) -> str:
    answer = one.answer
    made = {
        "question": one.question.id,
        "replica": one.replica,
        "regime": regime,
        "state": one.verdict.state,
        "by": one.verdict.by,
        "predicted": None if answer is None else answer.predicted,
        "target": one.question.ideal if answer is None or not answer.target else answer.target,
    }
    return json.dumps(made, ensure_ascii=True) + "\n"


def _cost(answers: Any) -> dict[str, Any]:
    cost, seconds, failed = Cost(), 0.0, Counter[str]()
    for answer in answers:
        cost.add(answer.cost)
        seconds += answer.seconds
        if answer.failed is not None:
            failed[answer.failed] += 1
    return {**asdict(cost), "seconds": round(seconds, 1), "failed": dict(failed)}
