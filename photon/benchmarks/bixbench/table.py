"""The figures as tables: by regime and by category, beside the paper's."""

from collections.abc import Sequence
from typing import Any

from photon.benchmarks.bixbench.choices import CHANCE, REGIMES
from photon.benchmarks.bixbench.paper import ROWS

COLUMNS = [
    *("model", "version", "mode", "regime", "answers", "correct", "accuracy", "95 % (Wilson)"),
    *("95 % (capsules)", "precision", "coverage", "ungraded", "missing"),
]
CATEGORY_COLUMNS = ["model", "regime", "category", "answers", "correct", "accuracy", "95 % (Wilson)"]
NOTE = (
    "Accuracy counts what is ungraded or missing as wrong. Wilson's interval takes answers for independent; "
    "that of capsules takes into account that questions of a capsule are not. Rows marked † are the paper's: "
    "made elsewhere, on its own questions; ‡ read from a figure."
)


def rows(results: Sequence[dict[str, Any]], *, paper: bool = True) -> list[list[str]]:
    """Return the rows of `COLUMNS`: one for each run and regime, then those of chance and of the paper."""
    made = []
    for one in results:
        for regime in (name for name in REGIMES if name in one["regimes"]):
            figures = one["regimes"][regime]
            made.append(
                [
                    *(one["name"], one["version"], one["mode"], regime),
                    *(f"{figures['total']:,}", f"{figures['correct']:,}", share(figures["accuracy"])),
                    *(interval(figures["wilson"]), interval(figures["clustered"])),
                    *(share(figures["precision"]), share(figures["coverage"])),
                    *(f"{figures['ungraded']:,}", f"{figures['missing']:,}"),
                ]
            )
    for regime in REGIMES:
        if any(regime in one["regimes"] for one in results) and (chance := CHANCE[regime]) is not None:
            made.append(["chance", "", "", regime, "", "", share(chance), *[""] * 6])
    versions = {"1.5", *(one["version"] for one in results)}
    for row in (row for row in ROWS if paper and row.version in versions):
        for regime, accuracy in row.accuracy.items():
            mark = "†‡" if row.read else "†"
            made.append(
                [f"{row.model} {mark}", row.version, row.mode, regime, "", "", share(accuracy), *[""] * 6]
            )
    return made


def category_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of `CATEGORY_COLUMNS`."""
    made = []
    for one in results:
        for regime in (name for name in REGIMES if name in one["regimes"]):
            for category, figures in one["regimes"][regime]["categories"].items():
                counts = (f"{figures['total']:,}", f"{figures['correct']:,}", share(figures["accuracy"]))
                made.append([one["name"], regime, category, *counts, interval(figures["wilson"])])
    return made


def majority_rows(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the accuracy of the majority of k answers, with its columns; no rows below two answers."""
    curves = [
        (one["name"], regime, one["regimes"][regime].get("majority", []))
        for one in results
        for regime in ("mcq-refusal", "mcq")
        if regime in one["regimes"]
    ]
    most = max((len(curve) for _, _, curve in curves), default=0)
    numbers = sorted({number for number in (1, 2, 3, 5, 7, 10, 20, 50) if number <= most} | {most} - {0})
    columns = ["model", "regime", *(f"k = {number}" for number in numbers)]
    made = [
        [name, regime, *(share(curve[k - 1]) if k <= len(curve) else "" for k in numbers)]
        for name, regime, curve in curves
        if len(curve) > 1
    ]
    return columns, made


def cost_rows(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return what the runs cost, with its columns."""
    columns = ["model", "requests", "prompt tokens", "completion tokens", "without count", "agents' seconds"]
    made = []
    for one in results:
        cost = one["cost"]
        keys = ("requests", "prompt_tokens", "completion_tokens", "unreported", "seconds")
        made.append([one["name"], *(f"{cost[key]:,}" for key in keys)])
    return columns, made


def share(value: float) -> str:
    """Return a share as it is shown."""
    return f"{value:.3f}"


def interval(bounds: Sequence[float] | None) -> str:
    """Return an interval as it is shown."""
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"
