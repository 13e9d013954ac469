"""What a report shows of labels: how often they are right, and how many were sure enough to be trained on."""

import math

from photon.report.charts import Axis, Series, Style
from photon.report.page import Panel, by_round
from photon.report.run import Run
from photon.telemetry.labels import LabelRound, label_rounds
from photon.telemetry.summary import format_share

_NOTE = (
    "Of validation texts with a label: how often the classifier is right. Of silos' own texts, where their "
    "labels are known: how often a label that was trained on is right, and how often any that was given. "
    "Coverage is the share of a silo's texts that were trained on. Means over the silos of a round."
)
_NAMES: dict[str, str] = {
    "accuracy": "classifier",
    "pseudo_label_accuracy": "labels trained on",
    "pseudo_label_accuracy_all": "all labels given",
    "coverage": "coverage",
}


def label_section(run: Run) -> list[tuple[str, list[Panel]]]:
    """Return the section; nothing where a run learns no labels."""
    rounds = label_rounds(run.history)
    series = [
        Series(name, [one["round"] for one in rounds], _values(rounds, key), Style.of(number))
        for number, (key, name) in enumerate(_NAMES.items())
    ]
    drawn = by_round("Labels", _NOTE, series, Axis("share"), format_share)
    return [] if drawn is None else [("Labels", [drawn])]


def _values(rounds: list[LabelRound], key: str) -> list[float]:
    found = [one.get(key) for one in rounds]
    return [float(value) if isinstance(value, int | float) else math.nan for value in found]
