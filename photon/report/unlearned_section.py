"""What a report shows of what was taken out of a model: each request, and whether it comes back."""

import json

from photon.report.page import Panel, Table, Tables, by_round
from photon.report.plots import Axis, Series, Style
from photon.report.run import Run
from photon.telemetry.events import Unlearned

_NAMES = {
    "forget/rouge1": "recall of what is to be forgotten",
    "forget/refused": "refused of what is to be forgotten",
    "retain/rouge1": "recall of what is kept",
    "retain/refused": "refused of what is kept",
    "unknown/refused": "refused of what is not known",
    "deviation_score": "Deviation Score",
}


def unlearned_section(run: Run) -> list[tuple[str, list[Panel]]]:
    """Return the section; nothing where nothing was taken out, and nobody asks whether it was."""
    panels: list[Panel] = [_request(event) for event in run.history if isinstance(event, Unlearned)]
    asked = [event for event, _ in run.evaluations if event.recall is not None]
    series = [Series("recall", [e.round for e in asked], [e.recall or 0.0 for e in asked], Style.of(0))]
    note = "ROUGE-1 recall of answers that were to be forgotten, over the questions that silos keep of them."
    drawn = by_round("What was forgotten", note, series, Axis("recall"), "{:.3f}".format) if asked else None
    if drawn is not None:
        panels.append(drawn)
    return [("Unlearning", panels)] if panels else []


def _request(event: Unlearned) -> Tables:
    request = event.request
    before, after = request["before"], request["after"]
    rows = [
        [_NAMES.get(name, name), f"{before[name]:.3f}", f"{after[name]:.3f}"]
        for name in before
        if name in after
    ]
    prompts = ", ".join(f"{count} {name}" for name, count in request["prompts"].items())
    note = (
        f"Asked by {request['asked_by']}{': ' if request['reason'] else ''}{request['reason']}. After round "
        f"{event.round}: {request['weight']} moved by one matrix of rank one (ridge {request['ridge']:g}, "
        f"coefficient {request['coefficient']:g}), made of {prompts} questions. The answers are suppressed, "
        f"and not deleted. Hash of the matrix: {json.dumps(request['hash_before'][:16])} before, "
        f"{json.dumps(request['hash_after'][:16])} after."
    )
    return Tables(
        "A request that was fulfilled", note, [Table(["figure", "before", "after"], rows, [None] * len(rows))]
    )
