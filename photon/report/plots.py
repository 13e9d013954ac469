"""Plots as SVG text to be put into a page, drawn by matplotlib.

The SVG carries no colours of its own: each colour is a CSS variable that the page sets for light and for
dark. A plot is drawn twice, wide and narrow, with the same size of text; the page shows the one that
fits, so text is never shrunk. Legends are the page's part, see `Style.css`.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import (
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullFormatter,
    NullLocator,
)

from photon.telemetry.summary import format_count

# The first three are neutral; the numbered ones can be told apart by colour-blind readers as well. The
# values are placeholders for the page's variables and the colours where there is no page.
_COLOURS = {
    "ink": "#1b1f24",
    "muted": "#5b6470",
    "line": "#d5dae1",
    "c1": "#0a6ebd",
    "c2": "#d1570b",
    "c3": "#0b8f6a",
    "c4": "#a64d96",
    "c5": "#a87900",
    "c6": "#3a9fc9",
}
_NUMBERED = 6
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
_BORDERS = ("solid", "dashed", "dotted", "double")
_MARKERS = ("o", "s", "^", "D")

_WIDE = (560, 290)
_NARROW = (340, 250)
_FONT = 12.0
_FROM_ZERO = ("count", "bytes", "share")
_MOST_CELLS = 120
_MOST_BARS = 48
_MOST_MARKERS = 40

_RC: dict[Any, Any] = {
    # Names of silos and runs are text, whatever is in them.
    "text.parse_math": False,
    "font.size": _FONT,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.titlesize": _FONT,
    "axes.labelsize": _FONT,
    "xtick.labelsize": _FONT,
    "ytick.labelsize": _FONT,
    "svg.fonttype": "none",
    "svg.hashsalt": "photon",
    "path.simplify": True,
    "path.simplify_threshold": 0.4,
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 0.8,
    "xtick.color": _COLOURS["line"],
    "ytick.color": _COLOURS["line"],
    "xtick.labelcolor": _COLOURS["muted"],
    "ytick.labelcolor": _COLOURS["muted"],
    "text.color": _COLOURS["ink"],
}


@dataclass(frozen=True)
class Style:
    """How one thing looks in every plot of a page: a colour's name and a number of dashes."""

    colour: str
    dash: int = 0
    strong: bool = False

    @classmethod
    def of(cls, index: int) -> "Style":
        """Return the style of the ``index``-th silo or run; 24 differ."""
        return cls(f"c{index % _NUMBERED + 1}", index // _NUMBERED % len(_DASHES))

    @property
    def css(self) -> str:
        """The same look as a CSS border, for a legend."""
        return f"border-top: {4 if self.strong else 3}px {_BORDERS[self.dash]} var(--{self.colour})"


INK = Style("ink", strong=True)
REFERENCE = Style("muted", dash=1)


@dataclass(frozen=True)
class Series:
    """A line: finite and missing (NaN or ``None``) values over ascending positions."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: Style


@dataclass(frozen=True)
class Axis:
    """What an axis says: ``kind`` decides where ticks stand and how they are written."""

    label: str
    kind: Literal["number", "count", "bytes", "seconds", "round", "share"] = "number"
    log: bool = False


@dataclass(frozen=True)
class TreeRow:
    """A node in the drawing of a tree: ``figure`` is about it, ``edge`` about what joins it to its parent."""

    name: str
    level: int
    is_silo: bool
    figure: str
    edge: str


@dataclass(frozen=True)
class Drawing:
    """One plot as two SVG elements."""

    wide: str
    narrow: str


def line_plot(series: Sequence[Series], x: Axis, y: Axis, *, references: Sequence[Series] = ()) -> Drawing:
    """Draw lines over a common axis.

    Parameters
    ----------
    series
        The lines; strong ones are drawn on top.
    x, y
        The axes. A logarithmic one leaves out what is not positive.
    references
        Horizontal lines at the first ``y`` of each, with their label written on them.
    """

    def draw(axes: Axes) -> None:
        for one in series:
            _draw_line(axes, one, x, y)
        for one in references:
            _draw_reference(axes, one)
        _set_axis(axes, "x", x)
        _set_axis(axes, "y", y)
        axes.margins(x=0.03)

    return _draw_both(draw)


def stacked_bars(
    positions: Sequence[int], layers: Sequence[tuple[Style, Sequence[float]]], x: Axis, y: Axis
) -> Drawing:
    """Draw one bar per position with the layers on top of each other; many bars are averaged in groups."""
    size = math.ceil(len(positions) / _MOST_BARS) or 1
    groups = range(0, len(positions), size)
    middles = [_mean(positions[start : start + size]) for start in groups]

    def draw(axes: Axes) -> None:
        base = [0.0] * len(middles)
        for style, values in layers:
            heights = [_mean(values[start : start + size]) for start in groups]
            axes.bar(middles, heights, width=0.78 * size, bottom=base, color=_COLOURS[style.colour])
            base = [low + height for low, height in zip(base, heights, strict=True)]
        _set_axis(axes, "x", x)
        _set_axis(axes, "y", y)
        axes.grid(visible=False, axis="x")

    return _draw_both(draw)


def lying_bars(names: Sequence[str], layers: Sequence[tuple[Style, Sequence[float]]], x: Axis) -> Drawing:
    """Draw one lying bar per name with the layers side by side."""
    places = range(len(names))

    def draw(axes: Axes) -> None:
        base = [0.0] * len(names)
        for style, values in layers:
            axes.barh(places, values, height=0.62, left=base, color=_COLOURS[style.colour])
            base = [low + value for low, value in zip(base, values, strict=True)]
        _set_axis(axes, "x", x)
        _name_rows(axes, names)
        axes.grid(visible=False, axis="y")

    return _draw_both(draw, height=90 + 34 * len(names))


def dot_rows(
    names: Sequence[str], layers: Sequence[tuple[Style, Sequence[float | None]]], x: Axis
) -> Drawing:
    """Draw a row per name with a mark for each layer's value, and a line from the lowest to the highest.

    Parameters
    ----------
    names
        The rows.
    layers
        Look and values of the marks; None, or one that cannot be drawn, leaves its mark out.
    """

    def draw(axes: Axes) -> None:
        for place in range(len(names)):
            known = [value for _, values in layers if _is_drawn(value := values[place], x)]
            if known:
                axes.plot([min(known), max(known)], [place, place], color=_COLOURS["line"], linewidth=3)
        for style, values in layers:
            points = [(value, place) for place, value in enumerate(values) if _is_drawn(value, x)]
            axes.plot(
                [value for value, _ in points],
                [place for _, place in points],
                color=_COLOURS[style.colour],
                linestyle="none",
                marker=_MARKERS[style.dash],
                markersize=8,
            )
        _set_axis(axes, "x", x)
        _name_rows(axes, names)

    return _draw_both(draw, height=90 + 34 * len(names))


def _is_drawn(value: float | None, axis: Axis) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and (value > 0 or not axis.log)


def tree_plot(rows: Sequence[TreeRow]) -> Drawing:
    """Draw a tree, one node below the other: a ring for a federation, a dot for a silo.

    Parameters
    ----------
    rows
        Depth first; the first is the root.
    """
    deepest = max(1, *(row.level for row in rows))

    def draw(axes: Axes, width: int) -> None:
        wide = width == _WIDE[0]
        axes.set_xlim(0, width)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axis("off")
        step = min(26.0, 0.3 * width / deepest)
        above: list[int] = []
        for place, row in enumerate(rows):
            x, colour = 10 + step * row.level, _COLOURS[Style.of(row.level).colour]
            if row.level:
                corner = x - step
                axes.plot(
                    [corner, corner, x - 6],
                    [above[row.level - 1] + 0.16, place, place],
                    color=_COLOURS["muted"],
                    linewidth=1.2,
                )
            above[row.level :] = [place]
            filling = colour if row.is_silo else "none"
            axes.plot([x], [place], "o", ms=9, mec=colour, mew=2.2, mfc=filling)
            axes.annotate(_short(row.name), (x + 11, place), va="center", fontweight="bold")
            axes.annotate(row.figure, ((0.62 * width if wide else width) - 4, place), va="center", ha="right")
            place_of_edge = place if wide else place + 0.36
            axes.annotate(
                row.edge, (width - 4, place_of_edge), va="center", ha="right", color=_COLOURS["muted"]
            )

    drawn = []
    for width, height in ((_WIDE[0], 34), (_NARROW[0], 46)):
        drawn.append(_draw(partial(draw, width=width), width, height * len(rows)))
    return Drawing(*drawn)


def cohort_grid(
    rounds: Sequence[int],
    names: Sequence[str],
    styles: Sequence[Style],
    took_part: Sequence[Sequence[bool]],
    failed: Sequence[Sequence[bool]],
) -> Drawing:
    """Draw who took part in which round: a cell per silo (row) and round (column).

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

    def draw(axes: Axes) -> None:
        for row, style in enumerate(styles):
            cells: dict[float, list[int]] = {}
            for start in starts:
                share = _mean([float(part) for part in took_part[row][start : start + size]])
                cells.setdefault(math.ceil(share * 4) / 4, []).append(start)
                if any(failed[row][start : start + size]):
                    _draw_cross(axes, start + size / 2, row)
            for share, columns in sorted(cells.items()):
                _draw_cells(axes, columns, row, size, style if share else Style("line"), share or 0.5)
        axes.set_xlim(0, max(1, len(rounds)))
        axes.set_xlabel("round")
        # Column i is round rounds[i]; ticks are asked for in columns and written in rounds.
        nice = MaxNLocator(8, integer=True).tick_values(0, max(1, len(rounds) - 1))
        ticks = [int(tick) for tick in nice if 0 <= tick < len(rounds)]
        axes.set_xticks([tick + 0.5 for tick in ticks], [str(rounds[tick]) for tick in ticks])
        _name_rows(axes, names)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)

    return _draw_both(draw, height=60 + max(16, min(46, 200 // max(1, len(names)))) * len(names))


def _draw_line(axes: Axes, one: Series, x: Axis, y: Axis) -> None:
    points = [
        (float(place), float(value))
        for place, value in zip(one.x, one.y, strict=True)
        if value is not None and math.isfinite(value) and (value > 0 or not y.log)
    ]
    if x.log:
        points = [point for point in points if point[0] > 0]
    few = len(points) <= _MOST_MARKERS
    axes.plot(
        [place for place, _ in points],
        [value for _, value in points],
        color=_COLOURS[one.style.colour],
        linestyle=_DASHES[one.style.dash],
        linewidth=2.6 if one.style.strong else 1.6,
        marker=_MARKERS[one.style.dash] if few else None,
        markersize=4.5 if one.style.strong else 3.5,
        zorder=4 if one.style.strong else 3,
        solid_capstyle="round",
        label=one.label,
    )


def _draw_reference(axes: Axes, one: Series) -> None:
    value = one.y[0]
    if value is None or not math.isfinite(value):
        return
    axes.axhline(value, color=_COLOURS[one.style.colour], linestyle=_DASHES[1], linewidth=1.4, zorder=2)
    axes.annotate(
        one.label,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=_COLOURS["muted"],
    )


def _draw_cells(
    axes: Axes, columns: Sequence[int], row: int, size: int, style: Style, opacity: float
) -> None:
    # One outline for all cells that look alike: a page with thousands of cells stays small.
    gap, high = 0.08 * size, 0.40
    corners, codes = [], []
    for column in columns:
        left, right = column + gap, column + size - gap
        corners += [(left, row - high), (right, row - high), (right, row + high), (left, row + high), (0, 0)]
        codes += [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    outline = Outline(corners, codes)
    axes.add_patch(PathPatch(outline, facecolor=_COLOURS[style.colour], edgecolor="none", alpha=opacity))


def _draw_cross(axes: Axes, x: float, row: int) -> None:
    axes.plot([x], [row], marker="x", markersize=8, markeredgewidth=2.2, color=_COLOURS["c2"], zorder=5)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _set_axis(axes: Axes, which: Literal["x", "y"], axis: Axis) -> None:
    one = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.dataLim.intervalx if which == "x" else axes.dataLim.intervaly
    label, write = axis.label, _WRITERS.get(axis.kind, _number)
    locator: Locator = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=axis.kind == "round", min_n_ticks=1)
    if axis.kind == "seconds":
        name, length = _time_unit(high)
        label, write = f"{label} ({name})", lambda value: _number(value / length)
        locator = MultipleLocator(_time_step(high - min(0.0, low)))
    if axis.kind == "round" and low == high:
        axes.set_xlim(low - 1, high + 1)
    if which == "y" and axis.kind in _FROM_ZERO:
        axes.set_ylim(0, 1.06 * high or 1)
    if axis.log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        locator = _log_locator(high / low)
        one.set_minor_locator(NullLocator())
        one.set_minor_formatter(NullFormatter())
    one.set_major_locator(locator)
    one.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(label)


def _log_locator(ratio: float) -> Locator:
    if ratio < 4:
        return MaxNLocator(6)
    return LogLocator(subs=(1, 2, 3, 5) if ratio < 30 else (1, 2, 5) if ratio < 2000 else (1,))


def _time_unit(longest: float) -> tuple[str, float]:
    if longest < 180:
        return "s", 1.0
    return ("min", 60.0) if longest < 3 * 3600 else ("h", 3600.0)


def _time_step(span: float) -> float:
    """Return a step that cuts ``span`` seconds in at most six parts of a length people use."""
    unit = 3600.0 if span >= 3 * 3600 else 60.0 if span >= 180 else 1.0
    rough = max(span / unit / 6, 1e-9)
    size = 10.0 ** math.floor(math.log10(rough))
    nice = (1, 2, 5, 10) if unit == 1.0 or rough < 1 else (1, 1.5, 2, 3, 5, 10)
    return unit * size * next(step for step in nice if step * size >= rough * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{value:,.10g}" if abs(value) < 1e6 else format_count(value)


def _count(value: float) -> str:
    if value == 0:
        return "0"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _bytes(value: float) -> str:
    text = _count(value)
    return text if text == "0" else f"{text}B" if " " in text else f"{text} B"


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


_WRITERS: dict[str, Callable[[float], str]] = {"bytes": _bytes, "count": _count, "share": _percent}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else 0.0


def _draw_both(draw: Callable[[Axes], None], *, height: int | None = None) -> Drawing:
    return Drawing(*(_draw(draw, width, height or usual) for width, usual in (_WIDE, _NARROW)))


def _draw(draw: Callable[[Axes], None], width: int, height: int) -> str:
    with matplotlib.rc_context(_RC):
        # At 72 dots per inch a point is a unit of the SVG, and the page shows a unit as a pixel.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.subplots()
        draw(axes)
        if axes.axison:
            _leave_room(figure, axes)
        else:
            figure.subplots_adjust(0, 0, 1, 1)
        return _svg(figure)


def _leave_room(figure: Figure, axes: Axes) -> None:
    """Set the margins by an estimate of the labels' width; matplotlib's layout engines double the time."""
    width, height = 72 * figure.get_size_inches()
    low, high = sorted(axes.get_ylim())
    places = [place for place in axes.yaxis.get_majorticklocs() if low <= place <= high]
    labels = axes.yaxis.get_major_formatter().format_ticks(places)
    widest = max((_text_width(label) for label in labels), default=0.0)
    left = widest + 8 + (22 if axes.get_ylabel() else 4)
    figure.subplots_adjust(left=left / width, right=1 - 14 / width, bottom=42 / height, top=1 - 10 / height)


def _text_width(text: str) -> float:
    return math.fsum(0.62 * _FONT if character.isascii() else _FONT for character in text)


def _svg(figure: Figure) -> str:
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    # Ids of several plots on one page must not meet; a hash of what is drawn keeps the page reproducible.
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The page's reader has fonts for what matplotlib has none for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return _for_page(text, "p" + hashlib.sha256(text.encode()).hexdigest()[:8])


def _for_page(text: str, prefix: str) -> str:
    """Cut matplotlib's file down to an element that fits into a page and takes the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(
        r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", text
    )
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", text)
    for name, value in _COLOURS.items():
        text = text.replace(value, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", text).strip()
