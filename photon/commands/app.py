"""The ``photon`` command and what it consists of."""

import platform
from importlib.metadata import version as version_of
from typing import Annotated

import typer

import photon
from photon.commands.aggregator import aggregator
from photon.commands.bench import app as bench_app
from photon.commands.data import app as data_app
from photon.commands.deployment import doctor, keys
from photon.commands.evaluation import evaluate, generate
from photon.commands.federation import federation
from photon.commands.hydra_line import HelpsWithGroups
from photon.commands.machine import silo
from photon.commands.orchestrate import orchestrate
from photon.commands.runs import export, import_, ranking, report, runs, summary, ui, watch
from photon.commands.serving import chat, serve
from photon.commands.train import resume, train
from photon.commands.tune import tune
from photon.commands.unlearning import unlearn
from photon.commands.walltime import app as walltime_app

app = typer.Typer(
    name="photon",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    # click does that, in the groups below, too.
    suggest_commands=False,
)


def _tell_version(asked: bool) -> None:
    if asked:
        needs = ", ".join(f"{name} {version_of(name)}" for name in ("flwr", "torch", "transformers"))
        typer.echo(f"photon {photon.__version__} ({needs}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback()
def command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Say which Photon this is."),
    ] = False,
) -> None:
    """Federated pre-training of large language models on Flower."""


#: Arguments of these are Hydra overrides.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(keys, name="keys")
app.add_typer(federation, name="federation")
app.add_typer(aggregator, name="aggregator")
app.add_typer(silo, name="silo")
app.add_typer(orchestrate, name="orchestrate")
app.add_typer(walltime_app, name="walltime")
app.command()(evaluate)
app.command()(generate)
app.command()(unlearn)
app.command()(chat)
app.command()(serve)
app.command(context_settings=OVERRIDES)(doctor)
app.command(cls=HelpsWithGroups, context_settings=OVERRIDES)(train)
app.command()(resume)
app.command(context_settings=OVERRIDES)(tune)
app.command()(watch)
app.command()(ui)
app.command()(runs)
app.command()(summary)
app.command()(report)
app.command()(ranking)
app.command()(export)
app.command("import")(import_)
