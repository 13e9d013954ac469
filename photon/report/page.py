"""What the template shows: panels of figures and tables, and the page that holds them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from photon.report import plots
from photon.report.plots import Axis, Drawing, Series, Style

_MOST_ROWS = 200
ROUND = Axis("round", "round")
TOKENS = Axis("tokens trained, all silos", "count")
TIME = Axis("time", "seconds")
PERPLEXITY = Axis("validation perplexity", log=True)


@dataclass(frozen=True)
class Figure:
    """A plot with all that stands around it; ``rows`` are the figures behind it."""

    title: str
    note: str
    drawing: Drawing
    columns: list[str]
    rows: list[list[str]]
    legend: list[tuple[str, Style]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """A table; the first column holds names, ``marks`` the look of what they name."""

    columns: list[str]
    rows: list[list[str]]
    marks: list[Style | None]
    strong_last: bool = False
    #: What share of its colour each cell beside the names has, in a heat map.
    shades: list[list[float]] | None = None


@dataclass(frozen=True)
class Tables:
    """Tables with all that stands around them, in the place of a plot."""

    title: str
    note: str
    tables: list[Table]


Panel = Figure | Tables


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    subtitle: list[str]
    status: str
    status_kind: str
    cards: list[tuple[str, str, str]]
    tables: list[tuple[str, Table]]
    sections: list[tuple[str, Sequence[Panel]]]
    log: list[tuple[str, str, str, str]]
    configs: list[tuple[str, str]]
    commands: list[str]
    facts: list[tuple[str, str]]
    #: Pages beside this one: what they are on, and where they lie.
    links: list[tuple[str, str]] = field(default_factory=list)
    #: Over the texts of ``configs``.
    texts_title: str = "Configuration"


def draw_sections(
    what: Any, sections: Sequence[tuple[str, Sequence[Callable[[Any], Figure | None]]]]
) -> list[tuple[str, Sequence[Panel]]]:
    """Draw each section's figures of ``what``, and leave out what there is nothing to draw of."""
    drawn: list[tuple[str, Sequence[Panel]]] = []
    for title, makers in sections:
        figures = [figure for figure in (maker(what) for maker in makers) if figure is not None]
        if figures:
            drawn.append((title, figures))
    return drawn


def by_round(
    title: str, note: str, series: Sequence[Series], y: Axis, write: Callable[[float], str]
) -> Figure | None:
    """Draw lines over rounds, with a table of a row per round."""
    values = [dict(zip(one.x, one.y, strict=True)) for one in series]
    rounds = sorted({int(number) for one in series for number in one.x})
    rows = [[str(number), *(written(write, found.get(number)) for found in values)] for number in rounds]
    columns = ["round", *(one.label for one in series)]
    return line_figure(title, note, series, ROUND, y, columns, rows)


def line_figure(
    title: str,
    note: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    columns: list[str],
    rows: list[list[str]],
    references: Sequence[Series] = (),
) -> Figure | None:
    """Draw lines; return None if there is no finite value."""
    if not any(_is_number(value) for one in series for value in one.y):
        return None
    legend = [(one.label, one.style) for one in series] if len(series) > 1 else []
    drawing = plots.line_plot(series, x, y, references=references)
    return Figure(title, note, drawing, columns, thinned(rows), legend)


def written(write: Callable[[float], str], value: float | None) -> str:
    """Return ``value`` as ``write`` writes it, or a dash for one that is missing."""
    return write(value) if value is not None and math.isfinite(value) else "–"


def thinned(rows: list[list[str]]) -> list[list[str]]:
    """Return at most `_MOST_ROWS` rows, evenly spread, with the first and the last."""
    if len(rows) <= _MOST_ROWS:
        return rows
    last = len(rows) - 1
    return [rows[round(index * last / (_MOST_ROWS - 1))] for index in range(_MOST_ROWS)]


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
