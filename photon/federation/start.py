"""Start a run on the engine that its configuration names, and show how it ended."""

from pathlib import Path
from typing import Any

from rich.console import Console

from photon.config import RunConfig
from photon.errors import PhotonError
from photon.federation.run import check_run_dir, new_run_name, prepare_run, run_inprocess, show
from photon.state.checkpoint import CheckpointStore


def start(config: RunConfig, *, resume: bool) -> dict[str, Any]:
    """Run the federation and print the final summary.

    Raises
    ------
    PhotonError
        For bad input.
    RunError
        If the run stopped; it can be resumed.
    KeyboardInterrupt
        If the user stopped it.
    """
    if config.run_dir is None:
        config = config.model_copy(update={"run_dir": str(Path("runs") / new_run_name(config))})
    config = prepare_run(config)
    run_dir = check_run_dir(config, resume)
    engine = config.federation.engine
    if engine == "deployment":
        raise PhotonError(
            "federation=deployment: start it with `flwr run . CONNECTION --run-config \"overrides='…'\"`, "
            "where the SuperLink is"
        )
    try:
        if engine == "inprocess":
            run_inprocess(config, resume=resume)
        else:
            from photon.federation.launch import Simulation

            Simulation(config, resume=resume).run()
    except KeyboardInterrupt:
        if engine == "simulation":
            from photon.federation.launch import note_interruption

            note_interruption(run_dir, "stopped by the user")
        if CheckpointStore(run_dir / "checkpoints").rounds():
            Console(stderr=True).print(f"stopped; go on with: photon resume {run_dir}", soft_wrap=True)
        raise
    return show(config)
