"""Run a federation in a process that is killed: by itself at a chosen moment, or from outside at any."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.federation import federation
from photon.federation.run import prepare_run
from photon.node import answer
from photon.state import checkpoint, silo
from photon.telemetry.events import Event, RoundStarted
from photon.training.loop import LocalTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def between_rounds() -> None:
    """Round 2 is finished, round 3 has only drawn its cohort."""
    emit = federation.EventStream.emit

    def wrapped(self: Any, event: Event) -> None:
        emit(self, event)
        if isinstance(event, RoundStarted) and event.round == 3:
            die()

    federation.EventStream.emit = wrapped  # type: ignore[method-assign]


def within_a_round() -> None:
    """In round 2 one silo has trained and saved; the second is about to train."""
    train, calls = LocalTrainer.train, [0]

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            die()
        return train(self, *args, **kwargs)

    LocalTrainer.train = wrapped  # type: ignore[method-assign]


def at_the_end_of_a_round() -> None:
    """Round 2 is told as finished, its checkpoint is written but does not count yet."""
    sync, calls = checkpoint.atomic_directory, [0]

    def wrapped(path: Any) -> Any:
        context = sync(path)

        class Dying:
            def __enter__(self) -> Any:
                return context.__enter__()

            def __exit__(self, *error: Any) -> Any:
                calls[0] += 1
                if calls[0] == 3:
                    die()
                return context.__exit__(*error)

        return Dying()

    checkpoint.atomic_directory = wrapped


def while_a_silo_saves() -> None:
    """In round 2 a silo has written half of its state."""
    save, calls = silo.save_groups, [0]

    def wrapped(path: Any, groups: Any) -> None:
        calls[0] += 1
        if calls[0] == 8:
            die()
        save(path, groups)

    silo.save_groups = wrapped


POINTS = {f.__name__: f for f in (between_rounds, within_a_round, at_the_end_of_a_round, while_a_silo_saves)}


def forking() -> Any:
    """Return what starts processes from one that has imported what they need: that takes longer than runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.federation.crash", "photon.client_app", "photon.silo.service"])
    return context


def carry_on(config: RunConfig) -> None:
    """Begin the run, or go on with it; for a process of its own that somebody else kills."""
    prepared = prepare_run(config)
    resume = bool(checkpoint.CheckpointStore(Path(str(prepared.run_dir)) / "checkpoints").rounds())
    run_inprocess(prepared, answer, resume=resume)


def train_until(point: str, config: RunConfig) -> None:
    """Begin the run, and die at the point; for a process of its own."""
    POINTS[point]()
    run_inprocess(prepare_run(config), answer, resume=False)
