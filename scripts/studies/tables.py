"""Tables and plots of the pages: rows in Markdown, and a mark on every figure that has no line."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import Result, Results, has_line

MARK = "†"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)
) -> Iterator[str]:
    """Yield a table and an empty line; the columns whose numbers are in ``left`` begin at their left."""
    yield row_of(columns)
    yield f"|{'|'.join('---' if number in left else '---:' for number in range(len(columns)))}|"
    yield from map(row_of, rows)
    yield ""


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def marked(text: str, *runs: Result) -> str:
    """Return a figure that comes of these runs, with a mark unless each of them has a line."""
    return text if not text or all(map(has_line, runs)) else text + MARK


def with_lines(runs: Results) -> list[Result]:
    """Return what a mean is taken of: the runs that have lines or, if none has, all."""
    return list(filter(has_line, runs)) or list(runs)


def by_rate(texts: Mapping[float, str], rates: Iterable[float], best: float | None = None) -> list[str]:
    """Return a cell for each rate, the best one in bold."""
    cells = {rate: texts.get(rate, "–") for rate in rates}
    return [f"**{cell}**" if rate == best else cell for rate, cell in cells.items()]


def perplexity(value: float | None, digits: int = 1) -> str:
    return "diverged" if value is None or math.isinf(value) else f"{value:.{digits}f}"


def percent(share: float, digits: int = 0, sign: str = "") -> str:
    return f"{100 * share:{sign}.{digits}f} %"


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as SVG that is the same, byte for byte, whenever its content is."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "photon"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
