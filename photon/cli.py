"""The ``photon`` command."""

import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from photon.data.cli import app as data_app
from photon.deployment.cli import doctor, keys
from photon.errors import PhotonError, RunError
from photon.evaluation.cli import evaluate, generate
from photon.federation.cli import federation
from photon.walltime.cli import app as walltime_app

app = typer.Typer(
    name="photon",
    help="Federated pre-training of large language models on Flower.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.add_typer(data_app, name="data")
app.add_typer(keys, name="keys")
app.add_typer(federation, name="federation")
app.add_typer(walltime_app, name="walltime")
app.command()(evaluate)
app.command()(generate)

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command(context_settings=OVERRIDES)(doctor)


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    base: Annotated[
        Path | None,
        typer.Option("--config", help="config.yaml of an earlier run to start from, instead of conf/."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the configuration and stop.")] = False,
) -> None:
    """Train a federation.

    Arguments are Hydra overrides of the configuration in `conf/`:

    * `photon train` — the default: four silos of the embedded corpus, Flower's simulation engine
    * `photon train federation=inprocess rounds=4 run_dir=runs/first` — no Flower processes
    * `photon train strategy=diloco model=photon-125m data=prepared data.path=DIR`
    * `photon train -m outer=fedavg,diloco seed=0,1` — a sweep; add `hydra/launcher=joblib` for parallel runs
    """
    arguments = list(context.args)
    if "-m" in arguments or "--multirun" in arguments:
        from photon.sweep import sweep

        sweep(arguments)
        return
    from photon.config import compose, with_overrides

    config = compose(arguments) if base is None else with_overrides(base, arguments)
    if show:
        typer.echo(config.text, nl=False)
        return
    from photon.federation.start import start

    start(config, resume=False)


@app.command()
def resume(run_dir: Annotated[Path, typer.Argument(help="Folder of the run.")]) -> None:
    """Go on with a run that was stopped, from its newest checkpoint."""
    from photon.config import load
    from photon.federation.start import start

    config = load(run_dir / "config.yaml")
    start(config.model_copy(update={"run_dir": str(run_dir.absolute())}), resume=True)


@app.command()
def watch(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run, on this machine.")],
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for a run that has yet to start.")
    ] = 60.0,
) -> None:
    """Show a run that another process trains; exits with 0 when it finishes, with 1 when it stops."""
    from photon.federation.watch import watch as watch_run

    watch_run(run_dir, wait=wait)


@app.command()
def summary(run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Show how a finished run ended, with a sample of its text."""
    from photon.config import load
    from photon.federation.run import show

    config = load(run_dir / "config.yaml").model_copy(update={"run_dir": str(run_dir.absolute())})
    if not (run_dir / "summary.json").is_file():
        raise PhotonError(f"{run_dir}: the run is not finished; go on with `photon resume {run_dir}`")
    show(config)


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="Folders of one or more runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")],
) -> None:
    """Write a report that opens in a browser; several runs are laid side by side."""
    from photon.telemetry.report import write_report

    write_report(run_dirs, output)
    typer.echo(str(output))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    sparse: Annotated[
        bool,
        typer.Option(help="Write only weights that are not zero; photon opens it, transformers does not."),
    ] = False,
) -> None:
    """Export a run's newest model as a Hugging Face folder, with tokenizer and model card."""
    from photon.evaluation.export import export_run

    export_run(run_dir, output, sparse=sparse)
    typer.echo(str(output))


def main() -> None:
    """Run the command; bad input exits with 2, anything else that stops it with 1."""
    try:
        # Without standalone mode, typer returns the code that an interruption would exit with.
        interrupted = app(standalone_mode=False)
    except PhotonError as error:
        _say(str(error))
        sys.exit(2)
    except RunError as error:
        _say(str(error))
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(1)
    sys.exit(1 if interrupted else 0)


def _say(message: Any) -> None:
    print(f"photon: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
