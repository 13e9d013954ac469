"""Tasks of in-context learning, through EleutherAI's lm-eval."""

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon import DISTRIBUTION
from photon.errors import PhotonError, printable
from photon.evaluation.iterations import iterating
from photon.evaluation.load import check_export
from photon.evaluation.suites import Asked
from photon.evaluation.task_files import LocalTask, find_files, read_task
from photon.files.atomic import write_text

if TYPE_CHECKING:
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

#: lm-eval's names of number formats.
_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: What an accuracy is called, by how the question is put.
ACCURACIES = ("acc", "exact_match")
#: Of the figures that lm-eval would resample a hundred thousand times, no error is given.
_WITH_ERROR = (*ACCURACIES, "acc_norm")


def evaluate_tasks(
    export: Path,
    asked: Sequence[Asked],
    *,
    task_data: Path | None,
    limit: int | None,
    batch_size: int,
    device: "torch.device",
    precision: str = "auto",
    chat: bool = False,
    iterations: int | None = None,
) -> dict[str, Any]:
    """Ask an exported model the questions of tasks.

    Parameters
    ----------
    export
        Folder of an exported model.
    asked
        The tasks.
    task_data
        Folder of task files; without it lm-eval fetches its own tasks from the Hugging Face hub.
    limit
        Questions of each task, the first ones; all without it.
    batch_size
        Sequences per forward pass. The padding of larger batches may move a figure's last digits.
    device, precision
        Where and in which number format the model runs; "auto" is the export's own.
    chat
        Whether questions are put as turns of a conversation, by the tokenizer's chat template.
    iterations
        Passes through the body of a model that iterates; None: as many as in training.

    Returns
    -------
    dict
        What `tasks.json` holds.

    Raises
    ------
    PhotonError
        If lm-eval is not installed, the folder is no export, a task is unknown or its file is not one, or
        lm-eval cannot go on, such as without the hub. A task of a suite that is not there is named in the
        results instead, under ``missing``.
    """
    check_export(export)
    specs, local, missing = _specs(asked, task_data)
    with _quiet():
        model = _model(export, batch_size=batch_size, device=device, precision=precision)
        if chat and not getattr(model.tokenizer, "chat_template", None):
            raise PhotonError(f"{export}: its tokenizer has no chat template; leave out --chat")
        for spec in specs:
            if most := spec.get("generation_kwargs"):
                # A model of few positions has to have room for the question, too.
                spec["generation_kwargs"] = {
                    **most,
                    "max_gen_toks": min(most["max_gen_toks"], model.max_length // 2),
                }
        with nullcontext() if iterations is None else iterating(model.model, iterations):
            found = _ask(model, specs, limit, with_registered=task_data is None, chat=chat)
    tasks = {
        task.name: _entry(task, local.get(task.name), task.registered, found)
        for task in asked
        if task.name not in missing
    }
    return {
        "model": export.resolve().name,
        "lm_eval": found["lm_eval_version"],
        "settings": {
            "device": str(device),
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "batch_size": batch_size,
            "limit": limit,
            "chat": chat,
            "iterations": iterations,
        },
        "tasks": tasks,
        "suites": _averages(asked, tasks),
        "missing": missing,
    }


def check_tasks(asked: Sequence[Asked], task_data: Path | None) -> None:
    """Check that tasks can be asked, without a model: lm-eval is there, and knows them or their files do.

    Raises
    ------
    PhotonError
        If not, as of `evaluate_tasks`.
    """
    if find_spec("lm_eval") is None:
        raise _no_lm_eval()
    registered, _, _ = _found(asked, task_data)
    if registered:
        from lm_eval.tasks import TaskManager

        with _quiet():
            _check_registered(TaskManager(), [name for name, _ in registered])


def _no_lm_eval() -> PhotonError:
    return PhotonError(f"--tasks needs lm-eval; run: pip install '{DISTRIBUTION}[eval]'")


def write_tasks(results: Mapping[str, Any], output: Path) -> None:
    """Write results to a file, which replaces an earlier one.

    Raises
    ------
    PhotonError
        If it cannot be written.
    """
    try:
        write_text(output, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise PhotonError(f"{output}: cannot write the results ({error.strerror}); set --output") from None


def _specs(
    asked: Sequence[Asked], task_data: Path | None
) -> tuple[list[dict[str, Any]], dict[str, LocalTask], list[str]]:
    """Return what lm-eval is given, the task files by task, and the tasks of suites that are not there."""
    registered, local, missing = _found(asked, task_data)
    specs = [{"task": name, "num_fewshot": shots} for name, shots in registered]
    specs += [_local_spec(task, local[task.name]) for task in asked if task.name in local]
    return specs, local, missing


def _found(
    asked: Sequence[Asked], task_data: Path | None
) -> tuple[list[tuple[str, int]], dict[str, LocalTask], list[str]]:
    """Return lm-eval's names of tasks with their examples, the task files read, and what is not there."""
    registered: list[tuple[str, int]] = []
    local: dict[str, LocalTask] = {}
    missing: list[str] = []
    files = None if task_data is None else find_files(task_data)
    for task in asked:
        if files is None:
            names = [] if task.registered is None else [task.registered]
        else:
            names = [str(file) for file in files.get(task.file, files.get(task.name, []))]
        if len(names) > 1:
            raise PhotonError(
                f"--tasks {printable(task.name)}: {len(names)} files have this name "
                f"({', '.join(names[:2])}); put the folder before it, such as small/triviaqa"
            )
        if not names and not task.suites:
            where = "lm-eval" if files is None else f"--task-data {task_data}"
            near = get_close_matches(task.name, files or (), 4) or sorted(files or ())[:6]
            known = f"; there are {printable(', '.join(near))}" if near else ""
            raise PhotonError(f"--tasks {printable(task.name)}: no such task in {where}{known}")
        if not names:
            missing.append(task.name)
        elif files is None:
            registered.append((names[0], task.shots))
        else:
            local[task.name] = read_task(Path(names[0]), task.shots)
    if not registered and not local:
        where = "lm-eval" if task_data is None else f"--task-data {task_data}"
        raise PhotonError(f"{where} has none of the tasks {', '.join(missing[:6])}")
    return registered, local, missing


def _local_spec(task: Asked, file: LocalTask) -> dict[str, Any]:
    from datasets import Dataset

    split = Dataset.from_list(file.questions)
    return {
        "task": task.name,
        "custom_dataset": lambda **_metadata: {"test": split},
        "test_split": "test",
        "fewshot_split": "test" if task.shots else None,
        "num_fewshot": task.shots,
        **file.config,
    }


def _model(export: Path, *, batch_size: int, device: "torch.device", precision: str) -> "HFLM":
    import torch

    from photon.evaluation.generate import load_tokenizer
    from photon.evaluation.load import open_trained
    from photon.evaluation.sparse_file import NAME as SPARSE

    if precision not in _DTYPES:
        raise PhotonError(f"--precision {precision} is unknown; use {', '.join(_DTYPES)}")
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise _no_lm_eval() from None
    load_tokenizer(export)
    arguments: dict[str, Any] = {"batch_size": batch_size, "device": str(device)}
    if (export / SPARSE).is_file():
        # transformers does not know this file: the model is opened here, in float32.
        model = open_trained(export).model
        if precision in {"bf16", "fp16"}:
            raise PhotonError(f"{export}: a sparse export runs in fp32; leave out --precision")
        return HFLM(torch.nn.Module.to(model, device), tokenizer=str(export), **arguments)
    try:
        return HFLM(str(export), dtype=_DTYPES[precision], **arguments)
    except Exception as error:  # what a broken folder raises depends on what is broken in it
        raise PhotonError(f"{export}: cannot load the model ({_first_line(error)})") from error


def _ask(
    model: "HFLM", specs: list[dict[str, Any]], limit: int | None, *, with_registered: bool, chat: bool
) -> dict[str, Any]:
    from lm_eval import __version__, simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ", ".join(str(spec["task"]) for spec in specs)
    try:
        manager = TaskManager(include_defaults=with_registered)
        if with_registered:
            _check_registered(manager, [spec["task"] for spec in specs])
        found = simple_evaluate(
            model,
            tasks=specs,
            task_manager=manager,
            limit=limit,
            # At least two for lm-eval to give any error; those that come of resampling are left out.
            bootstrap_iters=2,
            log_samples=False,
            apply_chat_template=chat,
        )
    except PhotonError:
        raise
    except Exception as error:  # lm-eval and the hub raise what they like
        hint = "; without the hub, give task files with --task-data" if with_registered else ""
        raise PhotonError(f"{names}: lm-eval cannot go on ({_first_line(error)}){hint}") from error
    return {**(found or {}), "lm_eval_version": __version__}


def _check_registered(manager: "TaskManager", names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise PhotonError(
            f"--tasks {printable(unknown[0])}: lm-eval has no such task; for a task file, set --task-data"
        )


def _entry(
    task: Asked, file: LocalTask | None, registered: str | None, found: Mapping[str, Any]
) -> dict[str, Any]:
    name = task.name if file is not None else str(registered)
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, chosen = key.partition(",")
        base = metric.removesuffix("_stderr")
        if isinstance(value, int | float) and chosen and (metric == base or base in _WITH_ERROR):
            metrics[metric if chosen == "none" else key] = float(value)
    questions = found.get("n-samples", {}).get(name, {})
    entry: dict[str, Any] = {"metrics": metrics, "shots": task.shots, "questions": questions.get("effective")}
    if file is None:
        return {**entry, "task": name}
    return {**entry, "file": file.file.name, "chance": file.chance}


def _averages(asked: Sequence[Asked], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return each suite's mean accuracy, and its mean part above chance, of what there is above chance."""
    averages: dict[str, Any] = {}
    for suite in dict.fromkeys(suite for task in asked for suite in task.suites):
        rated = [
            (accuracy_of(tasks[task.name]), tasks[task.name].get("chance"))
            for task in asked
            if suite in task.suites and task.name in tasks
        ]
        known = [(accuracy, chance) for accuracy, chance in rated if accuracy is not None]
        above = [(a - c) / (1 - c) for a, c in known if c is not None]
        averages[suite] = {
            "tasks": len(known),
            "accuracy": sum(accuracy for accuracy, _ in known) / len(known) if known else None,
            "above_chance": sum(above) / len(above) if above and len(above) == len(known) else None,
        }
    return averages


def accuracy_of(entry: Mapping[str, Any]) -> float | None:
    """Return the accuracy of a task's results, or None for one that has none, such as a text."""
    metrics = entry["metrics"]
    return next((metrics[name] for name in ACCURACIES if name in metrics), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's remarks off the terminal, and its resampling in this process."""
    from photon.models.pretrained import quiet_transformers

    logger = logging.getLogger("lm_eval")
    level, alone = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        # It prints that it resamples.
        with quiet_transformers(), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]


def _first_line(error: BaseException) -> str:
    from photon.models.pretrained import first_line

    return first_line(error)
