"""What a report shows of requests that something be forgotten: what was changed, and what came of it."""

from collections.abc import Sequence
from datetime import UTC, datetime

from photon.errors import PhotonError, printable
from photon.report.charts import Axis, Series, Style
from photon.report.page import Figure, Panel, Table, Tables, by_round
from photon.report.run import Run
from photon.state.unlearned import NAME, Changed, Unlearned, read_unlearned
from photon.telemetry.events import Unlearned as Fulfilled

#: Figures that are shown, and their headings.
_SHOWN = {
    "forget/rouge1": "forgotten: ROUGE-1",
    "forget/refused": "refused",
    "retain/rouge1": "retained: ROUGE-1",
    "retain/refused": "refused",
    "unknown/refused": "unknown: refused",
}
_NOTE = (
    "Each request as the ledger beside the model has it; figures before and after, shares from 0 to 1. What "
    "was forgotten is suppressed and not deleted: attacks say how much of it comes back, as ROUGE-1 recall."
)


def unlearned_section(run: Run) -> list[tuple[str, list[Panel]]]:
    """Return the section; nothing where no model was made to forget, and nobody asks whether one was.

    The rounds of a run may have fulfilled a request; and models in its folder say what they were made to
    forget.
    """
    panels: list[Panel] = []
    done = [Unlearned.model_validate(event.request) for event in run.history if isinstance(event, Fulfilled)]
    if done:
        panels.append(_requests("Requests, in this run", done))
    for file in sorted([*run.folder.glob(NAME), *run.folder.glob(f"*/{NAME}")]):
        where = printable(file.parent.relative_to(run.folder))
        title = "Requests" if where == "." else f"Requests, {where}"
        try:
            panels.append(_requests(title, read_unlearned(file.parent)))
        except PhotonError as error:
            panels.append(Tables(title, str(error), []))
    if (drawn := _recall(run)) is not None:
        panels.append(drawn)
    return [("Forgetting", panels)] if panels else []


def _recall(run: Run) -> Figure | None:
    """Draw what models answer to questions that were to be forgotten, where silos keep some."""
    asked = [event for event, _ in run.evaluations if event.recall is not None]
    if not asked:
        return None
    series = [Series("recall", [e.round for e in asked], [e.recall or 0.0 for e in asked], Style.of(0))]
    note = "ROUGE-1 recall of answers that were to be forgotten, over the questions that silos keep of them."
    return by_round("What was forgotten", note, series, Axis("recall"), "{:.3f}".format)


def _requests(title: str, requests: Sequence[Unlearned]) -> Tables:
    figures = [_row(number, one) for number, one in enumerate(requests, 1)]
    columns = ["request", "asked by", "when", "changed", *_SHOWN.values()]
    tables = [Table(columns, figures, [None] * len(figures))]
    attacks = list(dict.fromkeys(name for one in requests for name in one.attacks))
    if attacks:
        rows = [
            [str(number), *(_number(one.attacks.get(name)) for name in attacks)]
            for number, one in enumerate(requests, 1)
        ]
        tables.append(Table(["request", *attacks], rows, [None] * len(rows)))
    return Tables(title, _NOTE, tables)


def _row(number: int, one: Unlearned) -> list[str]:
    when = datetime.fromtimestamp(min(one.time, 4e9), UTC).strftime("%Y-%m-%d %H:%M")
    matrices: list[Changed | Unlearned] = [one, *one.also]
    changed = ", ".join(
        f"{printable(each.weight)} (ridge {each.ridge:g}, coefficient {each.coefficient:g})"
        for each in matrices
    )
    cells = [_both(one, name) for name in _SHOWN]
    return [str(number), printable(one.asked_by), f"{when} UTC", changed, *cells]


def _both(one: Unlearned, name: str) -> str:
    values: Sequence[float | None] = (one.before.get(name), one.after.get(name))
    return " → ".join(map(_number, values))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
