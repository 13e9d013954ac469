"""A whole run: its configuration and folder, and the federation that trains in it."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from photon.config.folders import photon_home
from photon.config.schema import RunConfig
from photon.data.source import check_path, check_steps, prepared_path
from photon.errors import PhotonError, RunError
from photon.federation.listeners import listening, open_others
from photon.federation.results import finish
from photon.federation.run_tasks import RunTasks, check_tasks
from photon.files.atomic import write_text
from photon.files.owner import LOCK, check_kinds, going_on
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import Notice


def new_run_name(config: RunConfig) -> str:
    """Return a name for a run that was given none."""
    strategy = config.strategy.target.rpartition(".")[2].lower()
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{strategy}-{config.model.name}"


def prepare_run(config: RunConfig) -> RunConfig:
    """Fill in what depends on this machine: the run's folder and the prepared data.

    A relative ``run_dir`` is taken from the current folder, and so are the files of the model, because the
    ServerApp may work in another one. Without a ``run_dir`` the run goes to ``runs/`` in Photon's home.
    Embedded and hub text is prepared on first use.

    Raises
    ------
    PhotonError
        If text cannot be prepared, or what an adapter leaves as it is would be random for ever.
    """
    if config.federation.parent is None:
        # A federation within another one begins with what that one gives it, and tells it what it has.
        _check_begin(config)
    run_dir = Path(config.run_dir or photon_home() / "runs" / new_run_name(config)).absolute()
    changes: dict[str, Any] = {"run_dir": str(run_dir)}
    # The ServerApp may work in another folder.
    folders = {"forgotten": config.evaluation.forgotten}
    if config.evaluation.tasks:
        folders["task_data"] = config.evaluation.task_data
    if named := {key: str(Path(folder).absolute()) for key, folder in folders.items() if folder is not None}:
        changes["evaluation"] = config.evaluation.model_copy(update=named)
    files = {"config_file": config.model.config_file, "warm_start": config.model.warm_start}
    found = {name: str(Path(file).absolute()) for name, file in files.items() if file}
    changes["model"] = config.model.model_copy(update=found)
    if config.federation.engine != "deployment":
        path = prepared_path(config.data, config.model.sequence_length, config.seed)
        changes["data"] = config.data.model_copy(update={"path": str(path)})
        # The silos are on this machine, and would each say so in the first round.
        check_steps(path, config.training, config.model)
    elif config.data.path is not None:
        # Where the aggregator has the tokenizer; the ServerApp may work in another folder.
        changes["data"] = config.data.model_copy(update={"path": str(Path(config.data.path).absolute())})
    return config.model_copy(update=changes)


def _check_begin(config: RunConfig) -> None:
    """Check what a run that somebody starts begins with, and what it tells at its end."""
    if config.adapter is not None and config.model.warm_start is None:
        raise PhotonError(
            "adapter: the model beside it stays as it is, and would be random; set model.warm_start to the "
            "folder of a trained model, or adapter=null to train all of it"
        )
    check_tasks(config)
    if config.federation.engine == "deployment":
        check_path(config.data, has_text=False)


def run_federation(config: RunConfig, grid: Grid, *, resume: bool, live: bool) -> dict[str, Any]:
    """Train, and write everything a run leaves behind.

    Parameters
    ----------
    config
        As :func:`prepare_run` returned it.
    grid
        Where the silos are.
    resume
        Go on from the newest checkpoint in the run's folder.
    live
        Whether the display may take over the terminal.

    Returns
    -------
    dict
        The content of ``summary.json``.

    Raises
    ------
    PhotonError
        For bad input.
    RunError
        If a round could not count; the run can be resumed.
    """
    # Here, because it brings transformers: who only starts a run on another engine does without.
    from photon.federation.federation import Federation
    from photon.federation.for_above import carry_out, reason_of
    from photon.federation.standing import standing

    run_dir = check_run_dir(config, resume)
    try:
        with _alone(run_dir), listening(config, run_dir, live=live) as (run, stream, cut):
            if not resume:
                write_text(run_dir / "config.yaml", config.text)
            open_others(run, stream)
            for notice in cut:
                stream.emit(notice)
            if resume and (changed := _changed(config, run_dir)):
                told = f"the run goes on with another configuration: {changed}"
                stream.emit(Notice(level="info", message=told))
            with standing(config, grid, stream) as reached:
                federation = Federation(config, reached, run_dir, stream)
                if config.federation.parent is not None:
                    carry_out(federation, resume=resume)
                    return {}
                tasks = RunTasks(config, run_dir, stream)
                checkpoint = federation.run(resume=resume, after=tasks.after)
            return finish(config, run_dir, checkpoint, stream)
    except OSError as error:
        # A full disk, or a folder that is gone: nothing of the run is at fault.
        raise RunError(f"{run_dir}: {reason_of(error)}") from error
    except (PhotonError, RunError):
        raise
    except Exception as error:
        # A fault of the code, perhaps of a strategy of one's own: below its traceback stands how to go on.
        if CheckpointStore(run_dir / "checkpoints").rounds():
            error.add_note(f"The rounds that were done are kept. Go on with: photon resume {run_dir}")
        raise


def check_run_dir(config: RunConfig, resume: bool, back_to: int | None = None) -> Path:
    """Return the run's folder if the run can start, or go on, there.

    Parameters
    ----------
    config
        As :func:`prepare_run` returned it.
    resume
        Whether it is to go on.
    back_to
        The round that it is to go on from; None: the newest one.

    Raises
    ------
    PhotonError
        If a new run would overwrite one, there is nothing to go on from, or the folder cannot be written.
    """
    assert config.run_dir is not None, "prepare_run fills it in"
    run_dir = Path(config.run_dir)
    has_run = bool(CheckpointStore(run_dir / "checkpoints").rounds())
    if has_run and not resume:
        raise PhotonError(
            f"{run_dir}: already holds a run; go on with `photon resume {run_dir}`, or choose another run_dir"
        )
    if resume and not has_run:
        raise PhotonError(f"{run_dir}: holds no checkpoint to resume from; start with `photon train`")
    check_kinds(run_dir)
    if resume:
        _changed(config, run_dir, back_to)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise PhotonError(
            f"{run_dir}: cannot be written ({error.strerror}); choose another run_dir"
        ) from error
    return run_dir


def _changed(config: RunConfig, run_dir: Path, back_to: int | None = None) -> str | None:
    """Return what was changed of the configuration since the checkpoint that a run goes on from, in words.

    That is the newest one that can be read, of none but those up to ``back_to``.

    Raises
    ------
    PhotonError
        If the run cannot go on like that.
    """
    # Here, because it brings transformers, which a new run on another engine does without.
    from photon.federation.resumed import compared

    store = CheckpointStore(run_dir / "checkpoints")
    for server_round in reversed([each for each in store.rounds() if back_to is None or each <= back_to]):
        try:
            checkpoint = store.load(server_round)
            checkpoint.load_params()
            checkpoint.load_outer()
        except PhotonError:
            # A damaged one is passed over, or named, where the run goes on from it.
            continue
        return compared(checkpoint, config)
    return None


def go_back(config: RunConfig, server_round: int, say: Callable[[str], None]) -> None:
    """Make a kept round the newest one of a run, so that it goes on from there.

    Nothing is removed: later checkpoints, and what the run left at its end, are moved to a folder.

    Parameters
    ----------
    config
        As :func:`prepare_run` returned it.
    server_round
        The round.
    say
        Told what is about to be moved.

    Raises
    ------
    PhotonError
        If the round is not kept or damaged, or the run is going on.
    """
    run_dir = Path(str(config.run_dir))
    store = CheckpointStore(run_dir / "checkpoints", **config.checkpoint.model_dump())
    with _alone(run_dir):
        rounds = store.rounds()
        if server_round not in rounds:
            kept = ", ".join(map(str, rounds))
            raise PhotonError(f"{run_dir}: round {server_round} is not kept; --round may be one of {kept}")
        store.verified(server_round)
        later = [each for each in rounds if each > server_round]
        if not later:
            return
        aside = store.aside_for(server_round)
        say(
            f"{run_dir} goes back to round {server_round}; later checkpoints (round "
            f"{', '.join(map(str, later))}) are moved to {aside}"
        )
        store.set_aside_after(server_round, aside)
        for name in ("summary.json", "report.html", "export"):
            if (run_dir / name).exists():
                os.rename(run_dir / name, aside / name)


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock: two processes that write one run would ruin it."""
    from filelock import FileLock, Timeout

    # Whoever asks whether the run is going on holds the lock for a moment.
    lock = FileLock(run_dir / LOCK, timeout=1.0)
    try:
        lock.acquire()
    except Timeout:
        raise going_on(run_dir) from None
    try:
        yield
    finally:
        lock.release()
