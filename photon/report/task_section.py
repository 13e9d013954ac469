"""What a report shows of tasks: a curve over the rounds, and the last figures."""

import json
from collections.abc import Mapping
from typing import Any

from photon.report.charts import Axis, Series, Style
from photon.report.page import Figure, Panel, Table, Tables, by_round
from photon.report.run import Run
from photon.telemetry.events import TasksEvaluated
from photon.telemetry.summary import main_figure

#: Largest file of results that is read.
_MOST_BYTES = 2**24
_NAMES = {"acc": "accuracy", "exact_match": "exact match", "bits_per_byte": "bits per byte"}


def task_section(run: Run) -> list[tuple[str, list[Panel]]]:
    """Return the section on tasks; nothing where none were asked."""
    asked = [event for event in run.history if isinstance(event, TasksEvaluated) and event.failure is None]
    panels: list[Panel] = [*_curves(asked), *_newest(asked), *_of_export(run)]
    return [("Tasks", panels)] if panels else []


def _curves(asked: list[TasksEvaluated]) -> list[Figure]:
    """Draw the figure that each task is compared by, one plot for each kind of figure."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for event in asked:
        for task, entry in event.tasks.items():
            if (figure := main_figure(entry)) is not None:
                found.setdefault(figure[0], {}).setdefault(task, {})[event.round] = figure[1]
        for suite, means in event.suites.items():
            if means["accuracy"] is not None:
                name = f"{suite}, mean"
                found.setdefault("acc", {}).setdefault(name, {})[event.round] = means["accuracy"]
    figures = []
    for kind, tasks in found.items():
        title = _NAMES.get(kind, kind.replace("_", " "))
        series = [
            Series(task, list(values), list(values.values()), Style.of(number))
            for number, (task, values) in enumerate(tasks.items())
        ]
        note = "What the aggregator found when it asked the global model the questions of tasks."
        drawn = by_round(f"Tasks: {title}", note, series, Axis(title), "{:.4f}".format)
        if drawn is not None:
            figures.append(drawn)
    return figures


def _newest(asked: list[TasksEvaluated]) -> list[Tables]:
    if not asked:
        return []
    last = asked[-1]
    note = f"After round {last.round}; the error is lm-eval's."
    if last.missing:
        note += f" Not there: {', '.join(last.missing)}."
    return [Tables("Figures of tasks", note, [_table(last.tasks)])]


def _of_export(run: Run) -> list[Tables]:
    """Show what `photon evaluate` has found of the run's export, where that was asked for."""
    file = run.folder / "export" / "tasks.json"
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            return []
        results = json.loads(file.read_text(encoding="utf-8"))
        table = _table(results["tasks"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        note = f"{file} cannot be read; photon evaluate writes it anew."
        return [Tables("Figures of the export", note, [])]
    return [Tables("Figures of the export", "As photon evaluate has found them.", [table])]


def _table(tasks: Mapping[str, Any]) -> Table:
    rows = []
    for task, entry in tasks.items():
        metrics, questions, chance = entry["metrics"], entry.get("questions"), entry.get("chance")
        for name in (name for name in metrics if "_stderr" not in name):
            base, comma, chosen = name.partition(",")
            error = metrics.get(f"{base}_stderr{comma}{chosen}")
            rows.append(
                [
                    str(task),
                    name.replace("_", " "),
                    f"{metrics[name]:.4f}" if metrics[name] is not None else "–",
                    "–" if error is None else f"±{error:.4f}",
                    f"{chance:.4f}" if chance is not None and name in {"acc", "acc_norm"} else "–",
                    "–" if questions is None else f"{questions:,}",
                    str(entry["shots"]),
                ]
            )
    columns = ["task", "figure", "value", "error", "guessing", "questions", "examples"]
    return Table(columns, rows, [None] * len(rows))
