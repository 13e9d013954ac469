"""``photon train`` and ``photon resume``: start a run, a sweep, or go on with a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from photon.errors import PhotonError
from photon.files.owner import refuse_if_going_on

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from photon.link.answer import MessageType, NodeConfig


def train(
    context: typer.Context,
    base: Annotated[
        Path | None,
        typer.Option("--config", help="config.yaml of an earlier run to start from, instead of conf/."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the configuration and stop.")] = False,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of a sweep: the figure of summary.json by which runs are ranked, perplexity.final if none.",
        ),
    ] = None,
    maximize: Annotated[
        bool, typer.Option("--maximize", help="Of a sweep: the largest figure is the best.")
    ] = False,
) -> None:
    """Train a federation.

    Arguments are Hydra overrides of the configuration in `conf/`:

    * `photon train` — the default: four silos of the embedded corpus, Flower's simulation engine
    * `photon train federation=inprocess rounds=4 run_dir=runs/first` — no Flower processes
    * `photon train strategy=diloco model=photon-125m data=prepared data.path=DIR`
    * `photon train -m outer=fedavg,diloco seed=0,1` — a sweep; add `hydra/launcher=joblib` for parallel runs
    * `photon train -m hydra/sweeper=optuna 'optimizer.lr=interval(1e-4,1e-2)'` — a search by Optuna

    As in Hydra, `-m` is `--multirun`; `--cfg job`, `--info` and `--hydra-help` print and stop.
    """
    from photon.commands.hydra_line import print_and_stop, read_line

    line = read_line(context.args)
    arguments = line.overrides
    if line.multirun:
        from photon.commands.ranking import DEFAULT_METRIC
        from photon.commands.sweep import sweep

        for name, given in (("--config", base is not None), ("--show", show)):
            if given:
                raise PhotonError(f"{name}: is for one run, and -m makes a sweep; leave one of them out")
        sweep(arguments, train_one, metric=metric or DEFAULT_METRIC, maximize=maximize)
        return
    if metric is not None or maximize:
        raise PhotonError(f"{'--metric' if metric else '--maximize'}: ranks the runs of a sweep; add -m")
    if line.prints:
        if base is not None or show:
            raise PhotonError(
                f"{line.prints[0]}: Hydra prints what conf/ composes; leave out --config, --show"
            )
        print_and_stop(line)
        return
    # At once: what follows imports for seconds.
    for argument in arguments:
        if argument.startswith("run_dir="):
            refuse_if_going_on(Path(argument.removeprefix("run_dir=")))
    if base is None:
        from photon.config.compose import compose

        # A key that is misspelt is told at once, too.
        composed = compose(arguments)
        from photon.preflight import preflight

        config = preflight(composed)
    else:
        from photon.preflight import preflight_file

        config = preflight_file(base, arguments)
    if show:
        typer.echo(config.text, nl=False)
        return
    from photon.engine.start import start

    start(config, answer, resume=False)


def resume(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run.")],
    back_to: Annotated[
        int | None,
        typer.Option("--round", metavar="N", help="Go back to this round, which must be kept."),
    ] = None,
) -> None:
    """Go on with a run that was stopped, from its newest checkpoint or from an earlier one that is kept."""
    refuse_if_going_on(run_dir)
    from photon.config.compose import load

    load(run_dir / "config.yaml")  # What is wrong with it is told at once.
    from photon.engine.start import start
    from photon.preflight import preflight_file

    config = preflight_file(run_dir / "config.yaml")
    config = config.model_copy(update={"run_dir": str(run_dir.absolute())})
    start(config, answer, resume=True, back_to=back_to)


def train_one(composed: Any) -> float | None:
    """Train one combination of a sweep, and return the figure that it is ranked by; None: it has failed."""
    from photon.commands.jobs import train_job

    return train_job(composed, answer)


def answer(message_type: "MessageType", content: "RecordDict", node_config: "NodeConfig") -> "RecordDict":
    """Answer in this process; see `photon.node.answer`, which whoever starts another engine does without."""
    from photon.node import answer as answer_here

    return answer_here(message_type, content, node_config)
