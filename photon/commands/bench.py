"""``photon bench``: benchmarks of what models do, over endpoints that speak OpenAI's API."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from photon.benchmarks.bixbench.run import Done

app = typer.Typer(help="Benchmark models at their work.", no_args_is_help=True)
bixbench = typer.Typer(
    help="BixBench: questions on biological data, answered in a notebook.", no_args_is_help=True
)
app.add_typer(bixbench, name="bixbench")

_Settings = Annotated[
    Path | None, typer.Option("--settings", metavar="FILE", help="Settings as YAML; default: the paper's.")
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]
_Agents = Annotated[
    Path | None, typer.Option("--agents", metavar="FILE", help="Endpoints and models, as YAML.")
]
_Cache = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep what models answer; a question that has an answer is not asked."),
]


@bixbench.command()
def run(
    questions: Annotated[
        str, typer.Argument(help="A file of questions, its folder, or hub:futurehouse/BixBench.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run; an earlier run goes on.")],
    agents: _Agents = None,
    agent: Annotated[str | None, typer.Option(help="Which agent of the file; default: its only one.")] = None,
    solver: Annotated[
        str, typer.Option(help="Who answers: model, or to check the benchmark: reference, random, refusing.")
    ] = "model",
    code: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of the reference: a JSON object of questions' names to cells."),
    ] = None,
    settings: _Settings = None,
    changes: _Set = None,
    capsules: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of capsules; default: beside the questions.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first questions only.")] = None,
    cache: _Cache = None,
    python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Interpreter of the kernels, with ipykernel; default: this one."),
    ] = None,
    sandbox: Annotated[
        bool, typer.Option("--sandbox/--no-sandbox", help="Shut kernels in; without, code does as it likes.")
    ] = True,
) -> None:
    """Let a model answer questions; what is there is not done again."""
    _check_packages()
    from photon.benchmarks.bixbench.named import solver_named
    from photon.benchmarks.bixbench.records import Folder
    from photon.benchmarks.bixbench.run import BenchmarkRun
    from photon.benchmarks.bixbench.settings import RunSettings, read_settings
    from photon.benchmarks.bixbench.source import Source
    from photon.benchmarks.notebook.sandbox import Shut

    chosen = read_settings(RunSettings, settings, changes or [])
    source = Source(questions, capsules)
    asked = source.questions()
    if limit is not None:
        asked.questions = asked.questions[:limit]
    how = Shut(isolate=sandbox) if python is None else Shut(isolate=sandbox, python=str(python))
    with ExitStack() as stack:
        answers = solver_named(stack, solver, chosen, agents=agents, agent=agent, code=code, cache=cache)
        bar = stack.enter_context(_progress(len(asked.questions) * chosen.replicas))
        task = BenchmarkRun(source, answers, chosen, Folder(output), how, advance=bar)
        done = task.make(asked)
    _say(done, output)


@bixbench.command()
def grade(
    targets: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or tables of recorded predictions (.csv).")
    ],
    agents: _Agents = None,
    judge: Annotated[
        str | None, typer.Option(help="The agent that judges open answers; default: rules alone.")
    ] = None,
    settings: _Settings = None,
    changes: _Set = None,
    cache: _Cache = None,
) -> None:
    """Grade answers, and print accuracies with their intervals."""
    _check_packages()
    from photon.benchmarks.bixbench import table
    from photon.benchmarks.bixbench.named import judge_named
    from photon.benchmarks.bixbench.predictions import FIGURES, figures_row
    from photon.benchmarks.bixbench.records import Folder
    from photon.benchmarks.bixbench.results import grade_run
    from photon.benchmarks.bixbench.settings import GradeSettings, read_settings

    chosen = read_settings(GradeSettings, settings, changes or [])
    tables = [one for one in targets if one.suffix.lower() == ".csv"]
    with ExitStack() as stack:
        judging = judge_named(stack, judge, agents=agents, cache=cache)
        if tables:
            _print("Recorded predictions", FIGURES, [figures_row(one, chosen, judging) for one in tables])
        results = [grade_run(Folder(one), chosen, judging) for one in targets if one not in tables]
    if results:
        _print("Accuracy", table.COLUMNS, table.rows(results), table.NOTE)
        rows = table.category_rows(results)
        if rows:
            _print("By category", table.CATEGORY_COLUMNS, rows)
        columns, rows = table.majority_rows(results)
        if rows:
            _print("Majority of k answers", columns, rows)
        _print("Cost", *table.cost_rows(results))


@bixbench.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of graded runs.")],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="The page; beside it a folder of pages of questions.")
    ] = Path("bixbench.html"),
) -> None:
    """Write a page of figures, and pages to read what agents did."""
    _check_packages()
    from photon.benchmarks.bixbench.page import check_output, write_report

    check_output(output)
    pages = write_report(folders, output)
    typer.echo(f"{output}: {pages} pages")


def _check_packages() -> None:
    from importlib.util import find_spec

    from photon import DISTRIBUTION
    from photon.errors import PhotonError

    if not all(map(find_spec, ("ipykernel", "jupyter_client", "nbformat"))):
        raise PhotonError(f"photon bench needs more packages; run: pip install '{DISTRIBUTION}[bench]'")


# --- parts ----------------------------------------------------------------------------------------------


def _progress(total: int) -> Any:
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def shown() -> Any:
        with Progress(console=Console(stderr=True), transient=True, disable=total < 2) as bar:
            task = bar.add_task("answers", total=total)
            yield lambda: bar.advance(task)

    return shown()


def _say(done: "Done", output: Path) -> None:
    from photon.errors import RunError, printable

    for where, why in done.left_out[:20]:
        typer.echo(f"left out: {where}: {printable(why)}", err=True)
    if len(done.left_out) > 20:
        typer.echo(f"left out: {len(done.left_out) - 20} more", err=True)
    typer.echo(f"{output}: {done.made} answers made, {done.there} were there")
    if done.failed:
        for kind, number in done.failed.most_common():
            typer.echo(f"missing: {number} ({kind}): {done.examples[kind]}", err=True)
        missing = sum(done.failed.values())
        raise RunError(f"{missing} answers are missing; the same command makes them alone")


def _print(title: str, columns: list[str], rows: list[list[str]], note: str | None = None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from photon.errors import printable

    console = Console()
    table = Table(title=Text(title), caption=None if note is None else Text(note), box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if not console.is_terminal:
        # Whoever reads it from a file wants whole lines.
        console = Console(width=max(console.width, 180))
    console.print(table)
