"""What the template shows: panels of figures and tables, and the page that holds them."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from photon.report import charts
from photon.report.charts import Axis, Chart, Series, Style

_MOST_ROWS = 200
ROUND = Axis("round", "round")
TOKENS = Axis("tokens trained, all silos", "count")
TIME = Axis("time", "seconds")
PERPLEXITY = Axis("validation perplexity", log=True)


@dataclass(frozen=True)
class Figure:
    """A chart with all that stands around it; ``rows`` are the figures behind it."""

    title: str
    note: str
    chart: Chart
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Table:
    """A table; the first column holds names, ``marks`` the look of what they name."""

    columns: list[str]
    rows: list[list[str]]
    marks: list[Style | None]
    strong_last: bool = False
    #: What share of its colour each cell beside the names has, in a heat map.
    shades: list[list[float]] | None = None
    #: Whether its cells hold text that is broken into lines.
    wraps: bool = False


@dataclass(frozen=True)
class Tables:
    """Tables with all that stands around them, in the place of a chart."""

    title: str
    note: str
    tables: list[Table]


@dataclass(frozen=True)
class TreeRow:
    """A node in the drawing of a tree: ``figure`` is about it, ``edge`` about what joins it to its parent."""

    name: str
    level: int
    is_silo: bool
    figure: str
    edge: str


@dataclass(frozen=True)
class Tree:
    """A tree with all that stands around it; ``nodes`` depth first, ``rows`` the figures behind it."""

    title: str
    note: str
    nodes: list[TreeRow]
    columns: list[str]
    rows: list[list[str]]


Panel = Figure | Tables | Tree


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

    @property
    def panels(self) -> list[tuple[str, list[tuple[str, Panel]]]]:
        """The sections, with a name for each panel that the page can refer to."""
        used: set[str] = set()
        return [(title, [(_name(one.title, used), one) for one in panels]) for title, panels in self.sections]

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """What each chart shows, by the name of its panel."""
        named = (pair for _, panels in self.panels for pair in panels)
        return {name: panel.chart.spec() for name, panel in named if isinstance(panel, Figure)}


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
    return Figure(title, note, charts.lines(series, x, y, references=references), columns, thinned(rows))


def written(write: Callable[[float], str], value: float | None) -> str:
    """Return ``value`` as ``write`` writes it, or a dash for one that is missing."""
    return write(value) if value is not None and math.isfinite(value) else "–"


def thinned(rows: list[list[str]]) -> list[list[str]]:
    """Return at most `_MOST_ROWS` rows, evenly spread, with the first and the last."""
    if len(rows) <= _MOST_ROWS:
        return rows
    last = len(rows) - 1
    return [rows[round(index * last / (_MOST_ROWS - 1))] for index in range(_MOST_ROWS)]


def _name(title: str, used: set[str]) -> str:
    """Return a name of letters and hyphens: the same for the same panel, however many come before it."""
    plain = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-") or "panel"
    numbered = (f"{plain}-{number}" for number in itertools.count(2))
    name = plain if plain not in used else next(one for one in numbered if one not in used)
    used.add(name)
    return name


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
