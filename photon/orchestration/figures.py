"""Figures of answered questions: what was right, what it cost, and what reading each other has changed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Line(BaseModel):
    """What is written of a question, in ``answers.jsonl``.

    Attributes
    ----------
    id
        Of the question.
    answer
        A choice's letter, or a text in its plain form; None: the response has none.
    right
        Whether it is right; None: that is not known.
    response
        The response that it is in.
    agent
        Whose response that is.
    parallel
        The answer that the drafts alone give.
    parallel_right
        Whether that is right.
    propagations
        Order, contributions, edges and who answered again; agents by number.
    drafts, responses
        Texts by agent, before and after; ``responses`` is empty if nobody answered again.
    calls, prompt_tokens, completion_tokens, unreported
        What it cost, whether it was asked for now or answered before.
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    answer: str | None
    right: bool | None
    response: str
    agent: str
    parallel: str | None
    parallel_right: bool | None
    propagations: list[dict[str, Any]]
    drafts: list[str]
    responses: list[str]
    calls: int = Field(ge=0)
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    unreported: int = Field(ge=0)

    @property
    def edges(self) -> int:
        """Edges of all propagations."""
        return sum(len(one["edges"]) for one in self.propagations)


def changes(right_before: Sequence[bool], right_after: Sequence[bool]) -> dict[str, Any]:
    """Return rescue, harm and preservation, with what they are shares of.

    Returns
    -------
    dict
        ``rescued``: wrong under the drafts alone, right in the end; ``harmed``: the reverse; ``rescue`` is a
        share of those that were wrong, ``harm`` of those that were right, and ``preservation`` 1 − ``harm``.
        A share of nothing is None. Accuracies differ by (rescued − harmed) / questions.
    """
    pairs = list(zip(right_before, right_after, strict=True))
    rescued = sum(after and not before for before, after in pairs)
    harmed = sum(before and not after for before, after in pairs)
    right = sum(right_before)
    wrong = len(pairs) - right
    harm = harmed / right if right else None
    return {
        "rescued": rescued,
        "harmed": harmed,
        "wrong_before": wrong,
        "right_before": right,
        "rescue": rescued / wrong if wrong else None,
        "harm": harm,
        "preservation": None if harm is None else 1 - harm,
    }


def average_ranks(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each method's place among all by score, 1 for the highest, as the mean over tasks.

    Parameters
    ----------
    scores
        Of each method, task by task; methods that tie share the mean of their places.
    """
    ranks = dict.fromkeys(scores, 0.0)
    tasks = list(zip(*scores.values(), strict=True))
    for task in tasks:
        for name, own in zip(scores, task, strict=True):
            above, equal = sum(one > own for one in task), sum(one == own for one in task)
            ranks[name] += (above + (equal + 1) / 2) / len(tasks)
    return ranks


def summary(lines: Sequence[Line], agents: int) -> dict[str, Any]:
    """Return the figures of a run.

    Parameters
    ----------
    lines
        Of the questions that have an answer.
    agents
        N.
    """
    judged = [line for line in lines if line.right is not None]
    pairs = agents * (agents - 1) // 2
    number = len(lines) or 1
    rounds = sum(len(line.propagations) for line in lines)
    edges = sum(line.edges for line in lines)
    found: dict[str, Any] = {
        "answered": len(lines),
        "judged": len(judged),
        "accuracy": None,
        "accuracy_error": None,
        "parallel_accuracy": None,
        "calls": sum(line.calls for line in lines) / number,
        "prompt_tokens": sum(line.prompt_tokens for line in lines),
        "completion_tokens": sum(line.completion_tokens for line in lines),
        "answers_without_token_counts": sum(line.unreported for line in lines),
        "edges": edges / number,
        "share_of_edges": edges / (rounds * pairs) if rounds * pairs else 0.0,
        "parallel_questions": sum(line.edges == 0 for line in lines),
    }
    if judged:
        after = [bool(line.right) for line in judged]
        before = [bool(line.parallel_right) for line in judged]
        accuracy = sum(after) / len(judged)
        found["accuracy"] = accuracy
        # Of a share of independent questions.
        found["accuracy_error"] = math.sqrt(accuracy * (1 - accuracy) / len(judged))
        found["parallel_accuracy"] = sum(before) / len(judged)
        found |= changes(before, after)
    return found


def told(name: str, figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures as rows of a table for people."""
    tokens = figures["prompt_tokens"] + figures["completion_tokens"]
    unreported = figures["answers_without_token_counts"]
    rows = [
        ("policy", name),
        ("questions answered", f"{figures['answered']:,}"),
        ("calls per question", f"{figures['calls']:.2f}"),
        (
            "tokens",
            f"{tokens:,} ({figures['prompt_tokens']:,} read, {figures['completion_tokens']:,} written)"
            + (f"; {unreported:,} answers came without counts" if unreported else ""),
        ),
        ("edges per question", f"{figures['edges']:.2f} ({figures['share_of_edges']:.0%} of those possible)"),
        ("questions without edges", f"{figures['parallel_questions']:,}"),
    ]
    if figures["accuracy"] is None:
        return rows
    share = lambda value: "–" if value is None else f"{value:.1%}"  # noqa: E731
    return [
        *rows,
        (
            "accuracy",
            f"{share(figures['accuracy'])} ±{figures['accuracy_error']:.1%} of {figures['judged']:,}; "
            f"drafts alone {share(figures['parallel_accuracy'])}",
        ),
        (
            "rescued",
            f"{figures['rescued']:,} of {figures['wrong_before']:,} wrong ({share(figures['rescue'])})",
        ),
        ("harmed", f"{figures['harmed']:,} of {figures['right_before']:,} right ({share(figures['harm'])})"),
    ]
