"""Charts as plain data: what a chart shows, without a word of how a browser draws it.

`photon.report.script` draws them. Names are text, and no colour is fixed: each is a variable of the page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

_NUMBERED = 6
_BORDERS = ("solid", "dashed", "dotted", "double")
#: Points of a line, and columns of the grid of cohorts, up to which each is sent.
_MOST_POINTS = 1_200
_MOST_CELLS = 120


@dataclass(frozen=True)
class Style:
    """How one thing looks in every chart of a page: a colour's name and a number of dashes."""

    colour: str
    dash: int = 0
    strong: bool = False

    @classmethod
    def of(cls, index: int) -> "Style":
        """Return the style of the ``index``-th silo or run; 24 differ."""
        return cls(f"c{index % _NUMBERED + 1}", index // _NUMBERED % len(_BORDERS))

    @property
    def css(self) -> str:
        """The same look as a CSS border, for a legend."""
        return f"border-top: {4 if self.strong else 3}px {_BORDERS[self.dash]} var(--{self.colour})"


INK = Style("ink", strong=True)
REFERENCE = Style("muted", dash=1)


@dataclass(frozen=True)
class Series:
    """A line, or a layer of bars: values, or none (NaN, ``None``), over ascending positions."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: Style

    def spec(self) -> dict[str, Any]:
        """Return it as JSON, with at most some thousand points, evenly spread."""
        pairs = list(zip(self.x, self.y, strict=True))
        step = math.ceil(len(pairs) / _MOST_POINTS) or 1
        # The last point is there whatever the step is.
        kept = pairs[(len(pairs) - 1) % step :: step] if pairs else []
        return {
            "name": self.label,
            "colour": self.style.colour,
            "dash": self.style.dash,
            "strong": self.style.strong,
            "x": [_rounded(place) for place, _ in kept],
            "y": [_rounded(value) for _, value in kept],
        }


@dataclass(frozen=True)
class Axis:
    """What an axis says: ``kind`` decides in which unit, and how its values are written."""

    label: str
    kind: Literal["number", "count", "bytes", "seconds", "round", "share"] = "number"
    log: bool = False

    def spec(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"label": self.label, "kind": self.kind, "log": self.log}


@dataclass(frozen=True)
class Chart:
    """What a chart shows.

    Attributes
    ----------
    kind
        ``lines`` over ``x``; ``bars`` that stand on each other over ``x``; ``lying`` bars and ``dots`` with a
        row for each of ``names``, their values along ``x``; ``grid``: `cohort_grid`.
    x, y
        The axes; ``y`` of those with rows is not used.
    series
        The lines, layers of bars, or kinds of dots.
    names
        The rows.
    references
        Horizontal lines at the first ``y`` of each, with their label written on them.
    cells
        The grid alone: its first rounds of each column, and shares and failures by row.
    """

    kind: Literal["lines", "bars", "lying", "dots", "grid"]
    x: Axis
    y: Axis = field(default_factory=lambda: Axis(""))
    series: Sequence[Series] = ()
    names: Sequence[str] = ()
    references: Sequence[Series] = ()
    cells: dict[str, Any] = field(default_factory=dict)

    @property
    def legend(self) -> list[tuple[str, Style]]:
        """What can be switched off, and how it looks; a line that is alone needs none."""
        if self.kind in ("lines", "dots") and len(self.series) == 1:
            return []
        return [(one.label, one.style) for one in self.series]

    def spec(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "kind": self.kind,
            "x": self.x.spec(),
            "y": self.y.spec(),
            "names": list(self.names),
            "series": [one.spec() for one in self.series],
            "references": [one.spec() for one in self.references],
            "cells": self.cells,
        }


def lines(series: Sequence[Series], x: Axis, y: Axis, *, references: Sequence[Series] = ()) -> Chart:
    """Return lines over a common axis; a logarithmic one leaves out what is not positive."""
    return Chart("lines", x, y, series, references=references)


def bars(series: Sequence[Series], x: Axis, y: Axis) -> Chart:
    """Return a bar for each position, with the series on top of each other."""
    return Chart("bars", x, y, series)


def rows(kind: Literal["lying", "dots"], names: Sequence[str], series: Sequence[Series], x: Axis) -> Chart:
    """Return a row for each name: a lying bar of all series, or a dot for each."""
    return Chart(kind, x, series=series, names=names)


def row_series(label: str, values: Sequence[float | None], style: Style) -> Series:
    """Return what one series has in each row."""
    return Series(label, range(len(values)), values, style)


def cohort_grid(
    rounds: Sequence[int],
    names: Sequence[str],
    styles: Sequence[Style],
    took_part: Sequence[Sequence[bool]],
    failed: Sequence[Sequence[bool]],
) -> Chart:
    """Return who took part in which round: a cell per silo (row) and round (column).

    A cell is full where the silo's reply counted, crossed where it failed, empty where the silo was not
    sampled. Many rounds share a cell, which is then the fuller the more of them the silo was part of.

    Parameters
    ----------
    rounds
        The columns, ascending.
    names, styles
        The rows.
    took_part, failed
        For each silo and each round.
    """
    size = math.ceil(len(rounds) / _MOST_CELLS) or 1
    starts = range(0, len(rounds), size)
    cells = {
        "first": [rounds[start] for start in starts],
        "last": [rounds[min(start + size, len(rounds)) - 1] for start in starts],
        "colours": [style.colour for style in styles],
        "shares": [[_share(row[start : start + size]) for start in starts] for row in took_part],
        "failed": [[any(row[start : start + size]) for start in starts] for row in failed],
    }
    return Chart("grid", Axis("round", "round"), names=names, cells=cells)


def _share(parts: Sequence[bool]) -> float:
    return round(sum(parts) / len(parts), 2)


def _rounded(value: float | None) -> float | None:
    """Return a value with the digits that a chart can show; JSON knows no NaN and no infinity."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")
