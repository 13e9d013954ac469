"""What a run tells of labels: how often they are right, and for which share of the texts silos are sure."""

import math
from collections.abc import Iterable, Mapping
from typing import TypedDict

from photon.telemetry.events import Diagnostics, Evaluated, Event

#: Figures of silos' own labels in diagnostics, as ``FIGURE/SILO``.
ACCURACY, OF_ALL, COVERAGE = "pseudo_label_accuracy", "pseudo_label_accuracy_all", "coverage"


class LabelRound(TypedDict):
    """A round: the classifier's accuracy on validation texts, and means over the silos of the round.

    ``pseudo_label_accuracy`` is of the labels that were trained on, ``pseudo_label_accuracy_all`` of all that
    silos gave; both are of silos whose texts have labels to compare with. None: nobody told.
    """

    round: int
    accuracy: float | None
    pseudo_label_accuracy: float | None
    pseudo_label_accuracy_all: float | None
    coverage: float | None


def label_rounds(history: Iterable[Event]) -> list[LabelRound]:
    """Return what a run tells of labels, round by round; empty where it learns none."""
    accuracies: dict[int, float] = {}
    told: dict[int, Mapping[str, float]] = {}
    for event in history:
        if isinstance(event, Evaluated) and "accuracy" in event.figures:
            accuracies[event.round] = event.figures["accuracy"]
        if isinstance(event, Diagnostics) and any(name.startswith(f"{COVERAGE}/") for name in event.values):
            told[event.round] = event.values
    if not told:
        return []
    return [
        LabelRound(
            round=number,
            accuracy=accuracies.get(number),
            pseudo_label_accuracy=_mean(told.get(number, {}), ACCURACY),
            pseudo_label_accuracy_all=_mean(told.get(number, {}), OF_ALL),
            coverage=_mean(told.get(number, {}), COVERAGE),
        )
        for number in sorted({*accuracies, *told})
    ]


def _mean(values: Mapping[str, float], figure: str) -> float | None:
    found = [value for name, value in values.items() if name.partition("/")[0] == figure]
    return math.fsum(found) / len(found) if found else None
