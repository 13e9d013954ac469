"""Tasks as a step of a run: every so many rounds the aggregator asks the global model their questions.

It is done after the round's checkpoint is there, from that checkpoint and in a process of its own. So nothing
of the round depends on it, and a run that goes on knows from its events what is still to be done.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from photon.code import command, environment
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.evaluation.task_process import FAILURE, TaskJob, check_settings
from photon.link.bounded import one_line
from photon.state.checkpoint import Checkpoint
from photon.telemetry.events import Event, EventStream, TasksEvaluated
from photon.telemetry.log import EVENTS, current_history, read_events

#: The newest results, in the run's folder.
RESULTS = "tasks.json"
#: What is there while tasks are asked.
_FOLDER = ".tasks"


def check_tasks(config: RunConfig) -> None:
    """Check that the tasks of a run can be asked, before it starts.

    Raises
    ------
    PhotonError
        If lm-eval is not installed, a task is unknown, a task file is none, or the tokenizer is elsewhere.
    """
    if not config.evaluation.tasks:
        return
    if config.federation.engine == "deployment" and config.data.path is None:
        raise PhotonError(
            "evaluation.tasks: the tokenizer stays with the silos; set data.path to prepared data here that "
            "has it"
        )
    check_settings(config.evaluation)


def is_due(config: RunConfig, server_round: int) -> bool:
    """Return whether tasks are asked after a round."""
    settings = config.evaluation
    if not settings.tasks or config.federation.parent is not None or server_round == 0:
        return False
    every = settings.tasks_every
    return server_round == config.rounds or (every is not None and server_round % every == 0)


class RunTasks:
    """Asks the questions of a run's tasks.

    Parameters
    ----------
    config
        The run's configuration.
    run_dir
        The run's folder.
    stream
        Where the figures are told.
    """

    def __init__(self, config: RunConfig, run_dir: Path, stream: EventStream) -> None:
        self._config = config
        self._run_dir = run_dir
        self._stream = stream

    def after(self, checkpoint: Checkpoint) -> None:
        """Ask a checkpoint's model what is due after its round, unless its figures are there.

        What goes wrong is told in the event; it never ends the run. A run that goes on from there asks again:
        who stops a run may end the process that asks first.
        """
        server_round = checkpoint.state.round
        if not is_due(self._config, server_round):
            return
        if _is_done(read_events(self._run_dir / EVENTS), server_round):
            return
        began = time.perf_counter()
        results, failure = _asked(self._config, self._run_dir, checkpoint)
        told = _told(results)
        self._stream.emit(
            TasksEvaluated(
                round=server_round,
                tokens_trained=checkpoint.state.tokens,
                seconds=time.perf_counter() - began,
                failure=failure,
                **told,
            )
        )


def _told(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an event tells of results."""
    figures = ("metrics", "questions", "shots", "chance")
    tasks = {
        name: {key: entry.get(key) for key in figures} for name, entry in results.get("tasks", {}).items()
    }
    return {"tasks": tasks, "suites": results.get("suites", {}), "missing": results.get("missing", [])}


def _is_done(events: Iterable[Event], server_round: int) -> bool:
    return any(
        isinstance(event, TasksEvaluated) and event.round == server_round and event.failure is None
        for event in current_history(events)
    )


def _asked(config: RunConfig, run_dir: Path, checkpoint: Checkpoint) -> tuple[dict[str, Any], str | None]:
    """Return what `tasks.json` holds; or nothing, and why."""
    folder, output = run_dir / _FOLDER, run_dir / RESULTS
    try:
        # A process that was killed has left a copy of the model.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        found = folder / RESULTS
        job = TaskJob(
            checkpoint=checkpoint.path,
            folder=folder,
            output=found,
            settings=config.evaluation,
            device=config.training.device,
        )
        failure = _carried_out(job, config.training.threads)
        if failure is not None:
            return {}, failure
        os.replace(found, output)
        return json.loads(output.read_text()), None
    except (OSError, ValueError) as error:
        return {}, one_line(f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _carried_out(job: TaskJob, threads: int | None) -> str | None:
    """Let a process do a job; return why it did not."""
    own = environment()
    if threads is not None:
        own["OMP_NUM_THREADS"] = str(threads)
    ended = subprocess.run(
        command("photon.evaluation.task_process"),
        input=job.model_dump_json(),
        capture_output=True,
        text=True,
        errors="replace",
        env=own,
        check=False,
    )
    if ended.returncode == 0:
        return None
    if ended.returncode < 0:
        why = "; memory may be short" if ended.returncode == -signal.SIGKILL else ""
        return f"the process that asks was ended by signal {-ended.returncode}{why}"
    if (job.folder / FAILURE).is_file():
        return one_line((job.folder / FAILURE).read_text(encoding="utf-8"))
    return one_line((ended.stderr.strip().splitlines() or ["the process that asks ended without a word"])[-1])
