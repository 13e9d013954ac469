"""``photon train`` and ``photon resume``: start a run, a sweep, or go on with a run."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from photon.errors import PhotonError, RunError
from photon.files.owner import refuse_if_going_on
from photon.files.processes import end_with_parent

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
        from photon.commands.sweep import sweep

        sweep(arguments, train_one)
        return
    # At once: what follows imports for seconds.
    for argument in arguments:
        if argument.startswith("run_dir="):
            refuse_if_going_on(Path(argument.removeprefix("run_dir=")))
    from photon.config.compose import compose
    from photon.preflight import preflight, preflight_file

    config = preflight(compose(arguments)) if base is None else preflight_file(base, arguments)
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
    from photon.engine.start import start
    from photon.preflight import preflight_file

    config = preflight_file(run_dir / "config.yaml")
    config = config.model_copy(update={"run_dir": str(run_dir.absolute())})
    start(config, answer, resume=True, back_to=back_to)


def train_one(composed: Any) -> None:
    """Train one combination of a sweep in the folder that Hydra chose for it; one that fails says why."""
    from hydra.core.hydra_config import HydraConfig

    from photon.commands.sweep import JOB, SWEEPER
    from photon.config.compose import resolved, validate
    from photon.engine.start import start
    from photon.preflight import preflight

    folder = HydraConfig.get().runtime.output_dir
    Path(folder, JOB).write_text("")
    if os.environ.get(SWEEPER) != str(os.getpid()):
        # A job of joblib's goes on otherwise when the sweep is killed.
        end_with_parent()
    try:
        config = preflight(validate(resolved(composed)))
        if config.run_dir is None:
            config = config.model_copy(update={"run_dir": folder})
        start(config, answer, resume=False)
    except (PhotonError, RunError) as error:
        said = f"photon: {folder}: {str(error).removeprefix(f'{folder}: ')}"
        Console(stderr=True).print(said, soft_wrap=True, markup=False, highlight=False)


def answer(message_type: "MessageType", content: "RecordDict", node_config: "NodeConfig") -> "RecordDict":
    """Answer in this process; see `photon.node.answer`, which whoever starts another engine does without."""
    from photon.node import answer as answer_here

    return answer_here(message_type, content, node_config)
