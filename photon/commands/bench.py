"""``photon bench``: benchmarks of what models do, over endpoints that speak OpenAI's API."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from photon.benchmarks.bixbench.judge import ModelJudge
    from photon.benchmarks.bixbench.run import Done
    from photon.benchmarks.bixbench.settings import GradeSettings, RunSettings
    from photon.benchmarks.bixbench.solvers import Solver
    from photon.endpoints.agent import Agent

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
        answers = _solver(stack, solver, agents, agent, code, chosen, cache)
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
    from photon.benchmarks.bixbench import table
    from photon.benchmarks.bixbench.records import Folder
    from photon.benchmarks.bixbench.results import grade_run
    from photon.benchmarks.bixbench.settings import GradeSettings, read_settings

    chosen = read_settings(GradeSettings, settings, changes or [])
    tables = [one for one in targets if one.suffix.lower() == ".csv"]
    with ExitStack() as stack:
        judging = _judge(stack, agents, judge, cache)
        if tables:
            _print("Recorded predictions", _PREDICTIONS, [_regraded(one, chosen, judging) for one in tables])
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
    from photon.benchmarks.bixbench.page import check_output, write_report

    check_output(output)
    pages = write_report(folders, output)
    typer.echo(f"{output}: {pages} pages")


# --- parts ----------------------------------------------------------------------------------------------

_PREDICTIONS = ["file", "answers", "correct", "refused", "ungraded", "accuracy", "precision", "coverage"]


def _regraded(file: Path, settings: "GradeSettings", judge: "ModelJudge | None") -> list[str]:
    from photon.benchmarks.bixbench.metrics import Figures
    from photon.benchmarks.bixbench.predictions import grade_predictions, read_predictions
    from photon.benchmarks.bixbench.table import share
    from photon.errors import printable

    verdicts = grade_predictions(read_predictions(file), settings, judge)
    states = [verdict.state for verdict in verdicts]
    figures = Figures(len(states), states.count("correct"), states.count("refused"))
    counts = (figures.total, figures.correct, figures.refused, states.count("ungraded"))
    shares = (figures.accuracy, figures.precision, figures.coverage)
    return [printable(file.name), *(f"{count:,}" for count in counts), *map(share, shares)]


def _chosen(agents: Path | None, name: str | None, option: str) -> "Agent":
    from photon.components import nearest
    from photon.endpoints.agent import read_agents
    from photon.errors import PhotonError, printable

    if agents is None:
        raise PhotonError(f"{option} needs --agents FILE, which says where the models are")
    known = {agent.name: agent for agent in read_agents(agents)}
    if name is None:
        if len(known) > 1:
            raise PhotonError(f"{printable(agents)} has {len(known)} agents; name one of them with {option}")
        return next(iter(known.values()))
    if name not in known:
        raise PhotonError(
            f"{option} {printable(name)}: no such agent in {printable(agents)}{nearest(name, known)}"
        )
    return known[name]


def _solver(
    stack: ExitStack,
    name: str,
    agents: Path | None,
    agent: str | None,
    code: Path | None,
    settings: "RunSettings",
    cache: Path | None,
) -> "Solver":
    from photon.benchmarks.bixbench.model_solver import ModelSolver
    from photon.benchmarks.bixbench.solvers import RandomSolver, RefusingSolver, ScriptedSolver
    from photon.components import nearest
    from photon.endpoints.client import Client
    from photon.errors import PhotonError, printable

    kinds = ("model", "reference", "random", "refusing")
    if name not in kinds:
        raise PhotonError(
            f"--solver {printable(name)}: expected one of {', '.join(kinds)}{nearest(name, kinds)}"
        )
    if (code is None) == (name == "reference"):
        raise PhotonError("--code has the cells of --solver reference; give both, or neither")
    if name == "model":
        chosen = _chosen(agents, agent, "--agent")
        client = stack.enter_context(Client(cache, concurrency=settings.parallel))
        client.check([chosen])
        return ModelSolver(chosen, client, settings)
    if agents is not None or agent is not None:
        raise PhotonError(f"--agents and --agent are of --solver model, not of {name}")
    if name == "reference":
        assert code is not None
        return ScriptedSolver(_cells(code))
    return RandomSolver() if name == "random" else RefusingSolver()


def _cells(file: Path) -> dict[str, list[str]]:
    from pydantic import TypeAdapter, ValidationError

    from photon.errors import PhotonError, printable

    try:
        return TypeAdapter(dict[str, list[str]]).validate_json(file.read_bytes())
    except OSError as error:
        raise PhotonError(f"--code {printable(file)}: cannot be read ({error.strerror})") from None
    except ValidationError:
        raise PhotonError(
            f"--code {printable(file)}: expected a JSON object of names to lists of cells"
        ) from None


def _judge(
    stack: ExitStack, agents: Path | None, name: str | None, cache: Path | None
) -> "ModelJudge | None":
    from photon.benchmarks.bixbench.judge import ModelJudge
    from photon.endpoints.client import Client
    from photon.errors import PhotonError

    if name is None:
        if agents is not None:
            raise PhotonError("--agents says where models are; name the one that judges with --judge")
        return None
    chosen = _chosen(agents, name, "--judge")
    client = stack.enter_context(Client(cache))
    client.check([chosen])
    return ModelJudge(chosen, client)


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
