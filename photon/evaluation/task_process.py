"""The process in which a run's aggregator asks a checkpoint's model the questions of tasks.

It is one of its own, so that what lm-eval takes of memory, on the device and off it, is given back, and what
ends it costs the figures alone. It reads a `TaskJob` from its input, and writes what `tasks.json` holds.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from photon.config.evaluation import FurtherEvaluation
from photon.errors import PhotonError
from photon.files.processes import end_with_parent

#: File in the job's folder that says why it was not done.
FAILURE = "failure.txt"


class TaskJob(BaseModel):
    """What is to be asked.

    Attributes
    ----------
    checkpoint
        Folder of the checkpoint.
    folder
        Empty folder for what is needed meanwhile: the export.
    output
        File of the results.
    settings
        The run's ``evaluation.task…``.
    device
        As of ``training.device``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: Path
    folder: Path
    output: Path
    settings: FurtherEvaluation
    device: str


def check_settings(settings: FurtherEvaluation) -> None:
    """Check that a run's tasks can be asked, before there is a model.

    Raises
    ------
    PhotonError
        If lm-eval is not installed, a task is unknown, or a task file is none.
    """
    from photon.evaluation.suites import asked_tasks
    from photon.evaluation.tasks import check_tasks

    with _in_words_of_a_run():
        asked = asked_tasks(",".join(settings.tasks), settings.task_shots)
        check_tasks(asked, None if settings.task_data is None else Path(settings.task_data))


def carry_out(job: TaskJob) -> None:
    """Export the checkpoint, ask, and write the results.

    Raises
    ------
    PhotonError
        As of `photon.evaluation.export.export_run` and `photon.evaluation.tasks.evaluate_tasks`.
    """
    from photon.evaluation.export import export_run
    from photon.evaluation.suites import asked_tasks
    from photon.evaluation.tasks import evaluate_tasks, write_tasks
    from photon.training.hardware import resolve_device

    settings = job.settings
    with _in_words_of_a_run():
        export = job.folder / job.checkpoint.name
        export_run(job.checkpoint, export)
        results = evaluate_tasks(
            export,
            asked_tasks(",".join(settings.tasks), settings.task_shots),
            task_data=None if settings.task_data is None else Path(settings.task_data),
            limit=settings.task_limit,
            batch_size=settings.task_batch_size,
            device=resolve_device(job.device),
            chat=settings.task_chat,
        )
        write_tasks(results, job.output)


@contextmanager
def _in_words_of_a_run() -> Iterator[None]:
    """Name keys of the configuration in the place of options of ``photon evaluate``."""
    try:
        yield
    except PhotonError as error:
        told = str(error)
        for option, key in (
            ("--tasks", "evaluation.tasks"),
            ("--task-data", "evaluation.task_data"),
            ("--shots", "evaluation.task_shots"),
            ("--chat", "evaluation.task_chat"),
        ):
            told = told.replace(f"{option} ", f"{key} ").replace(option, key)
        raise PhotonError(told) from error


def main() -> int:
    """Do the job on standard input; return 2 for what a person can mend, and leave a file that says it."""
    end_with_parent()
    job = TaskJob.model_validate_json(sys.stdin.read())
    try:
        carry_out(job)
    except PhotonError as error:
        (job.folder / FAILURE).write_text(str(error), encoding="utf-8")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
