"""The ``photon`` command and what it consists of."""

import typer

from photon.commands.data import app as data_app
from photon.commands.deployment import doctor, keys
from photon.commands.evaluation import evaluate, generate
from photon.commands.federation import federation
from photon.commands.runs import export, import_, report, summary, watch
from photon.commands.serving import chat, serve
from photon.commands.silo import silo
from photon.commands.train import resume, train
from photon.commands.tune import tune
from photon.commands.unlearning import unlearn
from photon.commands.walltime import app as walltime_app

app = typer.Typer(
    name="photon",
    help="Federated pre-training of large language models on Flower.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

#: Arguments of these are Hydra overrides.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app.add_typer(data_app, name="data")
app.add_typer(keys, name="keys")
app.add_typer(federation, name="federation")
app.add_typer(silo, name="silo")
app.add_typer(walltime_app, name="walltime")
app.command()(evaluate)
app.command()(generate)
app.command()(unlearn)
app.command()(chat)
app.command()(serve)
app.command(context_settings=OVERRIDES)(doctor)
app.command(context_settings=OVERRIDES)(train)
app.command()(resume)
app.command(context_settings=OVERRIDES)(tune)
app.command()(watch)
app.command()(summary)
app.command()(report)
app.command()(export)
app.command("import")(import_)
