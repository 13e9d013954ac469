"""Start a run on the engine that its configuration names, and show how it ended."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import RunError
from photon.federation.results import show
from photon.federation.run import check_run_dir, go_back, new_run_name, prepare_run
from photon.files.owner import owned
from photon.link.answer import Answer
from photon.state.checkpoint import CheckpointStore


def start(config: RunConfig, answer: Answer, *, resume: bool, back_to: int | None = None) -> dict[str, Any]:
    """Run the federation and print the final summary.

    Parameters
    ----------
    config
        What to train.
    answer
        Does what a message asks a node of the in-process engine for.
    resume
        Go on from the newest checkpoint in the run's folder.
    back_to
        Go on from the checkpoint of this round, and set newer ones aside.

    Raises
    ------
    PhotonError
        For bad input.
    RunError
        If the run stopped; it can be resumed.
    KeyboardInterrupt
        If the user stopped it.
    """
    run_dir = Path(config.run_dir or Path("runs") / new_run_name(config)).absolute()
    # First: what names no data leaves no folder behind.
    config = prepare_run(config.model_copy(update={"run_dir": str(run_dir)}))
    with owned(run_dir) as lock:
        return _start(config, answer, lock, resume=resume, back_to=back_to)


def _start(
    config: RunConfig, answer: Answer, lock: int, *, resume: bool, back_to: int | None
) -> dict[str, Any]:
    run_dir = check_run_dir(config, resume, back_to)
    if back_to is not None:
        # Here, where the folder is on every engine: what is started then goes on from its newest checkpoint.
        go_back(config, back_to, Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print)
    engine = config.federation.engine
    try:
        if engine == "inprocess":
            run_inprocess(config, answer, resume=resume)
        elif engine == "simulation":
            from photon.engine.simulation import Simulation

            Simulation(config, resume=resume, lock=lock).run()
        else:
            _run_deployed(config, resume=resume)
    except KeyboardInterrupt:
        if engine == "simulation":
            from photon.engine.interruption import note_interruption

            note_interruption(run_dir, "stopped by the user")
        if engine != "deployment":
            say_stopped(run_dir)
        raise
    except RunError as error:
        if not CheckpointStore(run_dir / "checkpoints").rounds():
            raise
        raise RunError(f"{error}; go on with `photon resume {run_dir}`") from error
    return show(config)


def say_stopped(run_dir: Path) -> None:
    """Say how to go on with a run that was stopped; nobody may be there any more to read it."""
    if CheckpointStore(run_dir / "checkpoints").rounds():
        told = f"stopped; go on with: photon resume {run_dir}"
    else:
        told = "stopped before the first round was kept; start it again with the same command"
    with suppress(OSError):
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(told)


def _run_deployed(config: RunConfig, *, resume: bool) -> None:
    """Give the run to a SuperLink whose ServerApps run on this machine, and follow it."""
    from photon.engine.deployment import COMPLETED, deployed_connection, earlier_events

    connection = deployed_connection(config.federation.connection)
    run_dir = Path(str(config.run_dir))
    earlier = earlier_events(run_dir)
    run_id = connection.submit(config, resume=resume, settings=run_dir / "run-config.toml")
    say = Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print
    say(f"run {run_id}; stop it with: flwr stop {run_id} {connection.name}")
    try:
        end = connection.follow(config, run_id, lambda: True, earlier)
    except KeyboardInterrupt:
        with suppress(OSError):
            say(f"the run goes on without you; look with: photon watch {run_dir}")
        raise
    if end != COMPLETED:
        raise RunError(f"{end}; see `flwr log {run_id} {connection.name} --show`")
