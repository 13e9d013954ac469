"""What a report shows of silos' own models: what each silo brought to the last merge, and what it got."""

import json
import math
from pathlib import Path
from typing import Any

from photon.config.tree import read_tree
from photon.report import charts
from photon.report.charts import Axis, Style
from photon.report.page import Figure, Panel
from photon.report.run import Run
from photon.telemetry.summary import format_perplexity

#: Largest file of figures that is read: it may have been handed over by a member.
_MOST_BYTES = 2**22
_STYLES = {
    "before the merge": Style("c2", 1),
    "after the merge": Style.of(0),
    "after its own tuning": Style("c3", 2),
}


def own_section(run: Run) -> list[tuple[str, list[Panel]]]:
    """Return the section; nothing where no silo has told what it brought, and none has tuned."""
    names = _silos(run)
    brought = {name: found for reply in run.replies for name, found in reply.before_merge.items()}
    tuned = {name: _tuned(run, name) for name in names}
    if not brought and not any(told != "not tuned" for _, told in tuned.values()):
        return []
    last = run.evaluations[-1][0] if run.evaluations else None
    after = {} if last is None else {**last.per_silo, **last.per_node}
    before_values = [brought[name]["perplexity"] if name in brought else None for name in names]
    after_values = [after[name]["perplexity"] if name in after else None for name in names]
    tuned_values = [tuned[name][0] for name in names]
    series = [
        charts.row_series(label, values, style)
        for (label, style), values in zip(
            _STYLES.items(), (before_values, after_values, tuned_values), strict=True
        )
    ]
    chart = charts.rows("dots", names, series, Axis("validation perplexity", log=True))
    rows = [
        [name, format_perplexity(before), format_perplexity(value), tuned[name][1]]
        for name, before, value in zip(names, before_values, after_values, strict=True)
    ]
    note = (
        "Perplexity of each silo's held-out text, the lower the better: of the model that its last local "
        "steps ended with, of the one that it has after the last merge, and of the one that it tuned from "
        "that alone."
    )
    title, heads = "What each silo brought, and what it got", ["silo", *_STYLES]
    figure = Figure(title, note, chart, heads, rows)
    return [("Own models", [figure])]


def _silos(run: Run) -> list[str]:
    if run.started.tree is not None:
        return list(read_tree(run.started.tree).silos())
    return list(run.silos)


def _tuned(run: Run, silo: str) -> tuple[float | None, str]:
    """Return the perplexity that a silo has reached alone, and what a table says of it."""
    folder = run.folder / "tuned" / silo
    if not (folder / "summary.json").is_file():
        return None, "not finished" if (folder / "events.jsonl").is_file() else "not tuned"
    try:
        found = _read(folder / "summary.json")["perplexity"]["per_silo"][silo]["final"]
        begun = _read(folder / "origin.json").get("round") if (folder / "origin.json").is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, "cannot be read"
    if not isinstance(found, int | float) or isinstance(found, bool) or not 1 <= found < math.inf:
        return None, "cannot be read"
    told = format_perplexity(float(found))
    done = run.summary["rounds"]
    return float(found), told if begun in (None, done) else f"{told} (from round {begun})"


def _read(file: Path) -> Any:
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} is too large")
    return json.loads(file.read_text(encoding="utf-8"))
