"""The runs of a sweep by a figure of their summaries: in a file, in a terminal, and again later."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple
from urllib.parse import quote

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from photon.commands.hydra_line import key_of
from photon.commands.jobs import Job, Plan, jobs_in
from photon.commands.tables import print_whole
from photon.components import nearest
from photon.errors import PhotonError
from photon.files.atomic import write_text

#: The file of a sweep's folder.
RANKING = "ranking.md"
SEED = "seed"
DEFAULT_METRIC = "perplexity.final"
#: Figures of ``summary.json`` that rank runs, and beginnings of more, which end with a dot.
METRICS = (
    DEFAULT_METRIC,
    "perplexity.mean_of_silos",
    "perplexity.per_node.",
    "perplexity.per_silo.",
    "tasks.tasks.",
    "tasks.suites.",
    "labels.accuracy",
    "recall_of_forgotten",
    "density",
    "tokens",
    "tokens_per_second",
    "mfu",
    "bytes.up",
    "bytes.down",
    "seconds.total",
    "seconds.training",
    "seconds.overhead",
    "failures",
)


class Ranked(NamedTuple):
    """A run of a sweep: its figure, or in words why it has none."""

    job: Job
    value: float | None
    without: str


class OverSeeds(NamedTuple):
    """Runs that differ in their seed alone: their mean, and their standard deviation (None: of one run)."""

    values: str
    mean: float
    deviation: float | None
    runs: int


def check_metric(metric: str) -> None:
    """Check that a summary has such a figure.

    Raises
    ------
    PhotonError
        If it has not; the nearest is named.
    """
    if any(metric == one or (one.endswith(".") and metric.startswith(one)) for one in METRICS):
        return
    names = ", ".join(one + ("…" if one.endswith(".") else "") for one in METRICS)
    near = nearest(metric, METRICS)
    raise PhotonError(f"--metric={metric}: no figure of summary.json{near}; those that rank: {names}")


def ranked(folder: Path, metric: str, *, maximize: bool) -> list[Ranked]:
    """Return the runs of a sweep, the best first, and those without the figure at the end."""

    def row(job: Job) -> Ranked:
        value = job.value(metric)
        if value is not None:
            return Ranked(job, value, "")
        if job.reason is not None:
            return Ranked(job, None, job.reason)
        return Ranked(job, None, f"has no {metric}" if job.is_finished else "not finished")

    rows = [row(job) for job in jobs_in(folder)]
    good = sorted((one for one in rows if one.value is not None), key=lambda one: one.value or 0.0)
    return [*(reversed(good) if maximize else good), *(one for one in rows if one.value is None)]


def over_seeds(rows: Sequence[Ranked], plan: Plan) -> list[OverSeeds]:
    """Return the means of runs that differ in their seed alone, the best first.

    Returns
    -------
    list
        Empty if the sweep has one seed, or nothing but seeds: then there is nothing to compare.
    """
    if SEED not in plan.swept or len(plan.swept) < 2:
        return []
    alike: dict[str, list[float]] = {}
    for row in rows:
        if row.value is not None:
            alike.setdefault(_values(row.job, plan, without=SEED), []).append(row.value)
    means = [
        OverSeeds(values, fmean(figures), stdev(figures) if len(figures) > 1 else None, len(figures))
        for values, figures in alike.items()
    ]
    return sorted(means, key=lambda one: one.mean, reverse=plan.maximize)


def write_ranking(folder: Path, rows: Sequence[Ranked], plan: Plan) -> None:
    """Write a ranking to the sweep's folder, each run with a link to its report."""
    order = "largest" if plan.maximize else "smallest"
    lines = [
        f"# Runs by {plan.metric}, the {order} first",
        "",
        f"| | {plan.metric} | values | run |",
        "|---|---|---|---|",
    ]
    for place, row in enumerate(rows, start=1):
        name = row.job.folder.name
        link = f"[{name}]({quote(_shown_file(row.job).relative_to(folder).as_posix())})"
        cells = (
            [str(place), f"{row.value:.6g}", _values(row.job, plan), link]
            if row.value is not None
            else ["–", "–", _values(row.job, plan), f"{link}: {row.without}"]
        )
        lines.append(_line(cells))
    if means := over_seeds(rows, plan):
        lines += ["", "## Means over seeds", ""]
        lines += [_line([plan.metric, "±", "runs", "values"]), _line(["---"] * 4)]
        lines += [_line(_cells(one)) for one in means]
    write_text(folder / RANKING, "\n".join(lines) + "\n")


def print_ranking(rows: Sequence[Ranked], plan: Plan) -> None:
    """Print a ranking, each run with the path of its report."""
    order = "largest" if plan.maximize else "smallest"
    table = Table(
        title=f"Runs by {plan.metric}, the {order} first",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("", plan.metric):
        table.add_column(heading, justify="right")
    for heading in ("values", "report"):
        table.add_column(heading)
    for place, row in enumerate(rows, start=1):
        figure = ["–", "–"] if row.value is None else [str(place), f"{row.value:.6g}"]
        table.add_row(*figure, Text(_values(row.job, plan)), Text(str(_shown_file(row.job))))
    console = Console()
    print_whole(console, table)
    # Below the table: a reason is a sentence, and would make every row as long as itself.
    for row in rows:
        if row.value is None:
            console.print(Text(f"{_values(row.job, plan)}: {row.without}", style="yellow"), soft_wrap=True)
    if means := over_seeds(rows, plan):
        table = Table(title="Means over seeds", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for heading in (plan.metric, "±", "runs"):
            table.add_column(heading, justify="right")
        table.add_column("values")
        for one in means:
            table.add_row(*map(Text, _cells(one)))
        print_whole(console, table)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cells(one: OverSeeds) -> list[str]:
    spread = "–" if one.deviation is None else f"{one.deviation:.2g}"
    return [f"{one.mean:.6g}", spread, str(one.runs), one.values]


def _values(job: Job, plan: Plan, *, without: str = "") -> str:
    """Return the overrides that tell a run from the others of its sweep."""
    return " ".join(one for one in job.overrides if key_of(one) in plan.swept and key_of(one) != without)


def _shown_file(job: Job) -> Path:
    """Return the report of a run, or its folder if it has none."""
    report = job.folder / "report.html"
    return report if report.is_file() else job.folder
