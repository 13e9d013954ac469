"""What is evaluated beside the loss of the global model: tasks, and the silos' own models."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from photon.config.section import Section

#: Tasks and suites of `evaluation.tasks`.
MAX_TASKS = 1000


def _listed(value: Any) -> Any:
    """Return a text with commas as a list, as the command line of ``photon evaluate`` has it."""
    return [part for part in map(str.strip, value.split(",")) if part] if isinstance(value, str) else value


class FurtherEvaluation(Section):
    """Keys of the section ``evaluation`` that are not of the loss on the silos' text."""

    before_merge: bool = Field(
        True,
        description="Let each silo also measure the model of its own that it ends its last round with, "
        "before models are averaged. Not where updates are noised.",
    )
    forgotten: str | None = Field(
        None,
        description="Folder of prepared questions whose forget set is asked of each model that is evaluated, "
        "so that what was forgotten does not come back unnoticed; null: none. Deployed silos name their own, "
        "`forgotten-dir`.",
    )
    tasks: Annotated[list[str], BeforeValidator(_listed)] = Field(
        [],
        max_length=MAX_TASKS,
        description="Tasks and suites (photon, desloc, abbie) that the aggregator asks the global model, "
        "through lm-eval; []: none.",
    )
    task_data: str | None = Field(
        None,
        description="Folder of task files, where the aggregator is; null: lm-eval fetches its own tasks.",
    )
    tasks_every: int | None = Field(
        None,
        ge=1,
        description="Rounds between two evaluations on tasks; the last round always has one; null: it alone.",
    )
    task_shots: int | None = Field(
        None, ge=0, description="Examples before each question; null: the suite's number, or none."
    )
    task_limit: int | None = Field(
        None, ge=1, description="Questions of each task, the first ones; null: all of them."
    )
    task_batch_size: int = Field(
        1, ge=1, description="Sequences per forward pass of tasks; more pad, which may move last digits."
    )
    task_chat: bool = Field(False, description="Put questions of tasks by the tokenizer's chat template.")
