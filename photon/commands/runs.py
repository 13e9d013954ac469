"""Commands on what is there: look at runs, lay them side by side, export and import models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from photon.commands.given import RunFolder
from photon.errors import PhotonError, printable
from photon.files.owner import is_going_on

if TYPE_CHECKING:
    from rich.table import Table

    from photon.telemetry.listing import Listed


def watch(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run, on this machine.")],
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for a run that has yet to start.")
    ] = 60.0,
) -> None:
    """Show a run that another process trains; exits with 0 when it finishes, with 1 when it stops."""
    from photon.engine.watch import watch as watch_run

    watch_run(run_dir, wait=wait)


def ui(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUNS]...",
            help="Folders of runs, or folders that hold some; without any, `runs` here and in Photon's home.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")
    ] = 8765,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Watch runs in a browser, until Ctrl-C.

    The page lists the runs, follows those that are going on, and lays several side by side. It needs no
    account and no network, and only this machine can reach it.

    `photon ui` shows what is in `runs`; `photon ui runs/first` one run; `photon ui runs --port 9000` takes
    another port.

    From elsewhere: `ssh -L 8765:127.0.0.1:8765 MACHINE`, and then open http://127.0.0.1:8765 there.
    To keep or send a page, write it as a file: `photon report RUN --output report.html`.
    """
    from photon.config.folders import photon_home
    from photon.ui.server import HOST, listen

    where = runs or [folder for folder in (Path("runs"), photon_home() / "runs") if folder.is_dir()]
    if not where:
        raise PhotonError("no folder `runs` is here; name the folder of a run, or one that holds some")
    with listen(where, port) as server:
        address = f"http://{HOST}:{server.server_port}"
        typer.echo(f"photon ui: {address} (Ctrl-C ends it)")
        if open_:
            typer.launch(address)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            typer.echo("")


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that the runs lie in.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects, for programs.")] = False,
) -> None:
    """List the runs in a folder and below it, newest first: how far each is, and how it ended."""
    import dataclasses
    import json

    from rich.console import Console

    from photon.telemetry.listing import list_runs

    if not folder.is_dir():
        raise PhotonError(f"{printable(folder)}: no such folder; name the one that runs lie in")
    found = list_runs(folder)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(run) for run in found], indent=1))
    elif found:
        console = Console()
        console.print(_runs_table(found, narrow=console.width < _NARROW))
    else:
        typer.echo(f"{printable(folder)}: no runs in it; `photon train` makes one")


#: Columns of a terminal below which what is trained stands under a run's name.
_NARROW = 100
_STYLES = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red", "broken": "red"}


def _runs_table(found: "list[Listed]", *, narrow: bool) -> "Table":
    from datetime import datetime

    from rich import box
    from rich.table import Table
    from rich.text import Text

    from photon.telemetry.events import perplexity_text

    table = Table(box=box.SIMPLE_HEAD, padding=0 if narrow else (0, 1, 0, 0))
    for heading in ("run",) if narrow else ("run", "strategy", "model"):
        table.add_column(heading, overflow="fold")
    table.add_column("state", no_wrap=True)
    for heading in ("rounds", "loss", "ppl", "when"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in found:
        what = [printable(run.strategy or "–"), printable(run.model or "–")]
        name = printable(run.name) if run.state != "broken" else f"{printable(run.name)}\n{run.reason}"
        if narrow and run.strategy:
            name = f"{name}\n{' '.join(what)}"
        table.add_row(
            Text(name),
            *([] if narrow else map(Text, what)),
            Text(run.state, style=_STYLES[run.state]),
            "–" if run.rounds is None else f"{run.done}/{run.rounds}",
            "–" if run.loss is None else f"{run.loss:.3f}",
            perplexity_text(run.perplexity, loss=run.loss),
            datetime.fromtimestamp(run.time).strftime("%d %b %H:%M") if 0 < run.time < 1e11 else "–",
        )
    return table


def summary(run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Show how a finished run ended, with a sample of its text."""
    from photon.config.compose import load
    from photon.federation.results import show

    config = load(run_dir / "config.yaml").model_copy(update={"run_dir": str(run_dir.absolute())})
    if not (run_dir / "summary.json").is_file():
        if is_going_on(run_dir):
            raise PhotonError(f"{run_dir}: the run is going on; look at it with `photon watch {run_dir}`")
        raise PhotonError(f"{run_dir}: the run is not finished; go on with `photon resume {run_dir}`")
    show(config)


def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Folders of one or more runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")],
) -> None:
    """Write a report that opens in a browser; several runs are laid side by side."""
    from photon.report.write import write_report

    write_report(run_dirs, output)
    typer.echo(str(output))


def ranking(
    folder: Annotated[Path, typer.Argument(help="Folder of the sweep.")],
    metric: Annotated[
        str | None,
        typer.Option(help="Figure of summary.json to rank by, as in tokens_per_second; else the sweep's."),
    ] = None,
    maximize: Annotated[bool, typer.Option("--maximize", help="The largest figure is the best.")] = False,
) -> None:
    """Rank the runs of a sweep, the best first, also while it goes on."""
    from photon.commands.jobs import Plan
    from photon.commands.ranking import check_metric, print_ranking, ranked

    plan = Plan.read(folder)
    if metric is not None:
        check_metric(metric)
        plan = Plan(plan.overrides, plan.swept, metric, maximize, plan.configuration)
    elif maximize:
        raise PhotonError("--maximize: says how to rank by another figure; name it with --metric")
    print_ranking(ranked(folder, plan.metric, maximize=plan.maximize), plan)


def export(
    run_dir: RunFolder,
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    sparse: Annotated[
        bool,
        typer.Option(help="Write only weights that are not zero; photon opens it, transformers does not."),
    ] = False,
    adapter: Annotated[
        Literal["merge", "keep"],
        typer.Option(help="merge: into the model's own weights; keep: beside them, as peft does."),
    ] = "merge",
) -> None:
    """Export a run's newest model as a Hugging Face folder, with tokenizer and model card."""
    from photon.evaluation.export import export_run

    export_run(run_dir, output, sparse=sparse, keep_adapter=adapter == "keep")
    typer.echo(str(output))


def import_(
    source: Annotated[str, typer.Argument(metavar="gguf:PATH", help="Format and file of the model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
) -> None:
    """Make a Hugging Face folder, such as `photon export` writes, of a model in another format."""
    from photon.evaluation.gguf_file import import_gguf

    kind, _, path = source.partition(":")
    if kind != "gguf" or not path:
        raise PhotonError(f"{printable(source)}: expected gguf: and the path of a file, as gguf:model.gguf")
    import_gguf(Path(path), output)
    typer.echo(str(output))
