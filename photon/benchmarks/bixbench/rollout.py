"""One answer of an agent: from the question to the notebook it leaves."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from photon.benchmarks.bixbench.settings import RunSettings
from photon.benchmarks.bixbench.solvers import Action, Cost, Worker
from photon.benchmarks.notebook.document import cut
from photon.benchmarks.notebook.environment import NotebookEnvironment, Observation
from photon.endpoints.faults import EndpointError, Fault

#: Characters of an observation, and of what was said, that a trajectory keeps.
_MOST_KEPT = 20_000


@dataclass
class Rollout:
    """What came of an agent's work on a question.

    Attributes
    ----------
    end
        ``answered``, or why there is no answer: ``steps``, ``time``, ``repeats itself``, ``refused by the
        endpoint``.
    steps
        Actions and what came of each, as JSON values.
    faults
        Actions that were none, by what was wrong with them.
    """

    end: str = "steps"
    answer: str | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0


class StoppedError(Exception):
    """The run is being stopped; nothing of what was begun is kept."""


def roll_out(
    worker: Worker,
    environment: NotebookEnvironment,
    settings: RunSettings,
    stopped: Callable[[], bool] = lambda: False,
) -> Rollout:
    """Let an agent act until it answers, or a bound is met.

    Parameters
    ----------
    stopped
        Asked before each action whether the run is being stopped.

    Raises
    ------
    StoppedError
        If it is.
    EndpointError
        If an endpoint gives no answer at all; where it refuses a conversation that it took before, the
        rollout ends instead: it has become too long.
    RunError
        If no kernel can be started.
    """
    rollout, began = Rollout(), time.monotonic()
    earlier: list[tuple[str | None, str]] = []
    while len(rollout.steps) < settings.max_steps:
        if stopped():
            raise StoppedError
        if time.monotonic() - began > settings.question_seconds:
            rollout.end = "time"
            break
        try:
            action = worker.act()
        except EndpointError as error:
            if error.fault != Fault.REFUSED or not rollout.steps:
                raise
            rollout.end = "refused by the endpoint"
            break
        rollout.cost.add(action.cost)
        observation = _done(action, environment)
        fault = action.fault or observation.fault
        if fault is not None:
            rollout.faults[fault] += 1
        rollout.steps.append(_kept(action, observation, fault))
        if observation.done:
            rollout.end, rollout.answer = "answered", environment.answer
            break
        worker.see(observation)
        earlier.append((action.tool, repr(action.arguments) if action.tool else action.said))
        most = settings.max_repeats
        if most and len(earlier) >= most and len(set(earlier[-most:])) == 1:
            rollout.end = "repeats itself"
            break
    rollout.seconds = time.monotonic() - began
    return rollout


def _done(action: Action, environment: NotebookEnvironment) -> Observation:
    if action.tool is None:
        return Observation("", fault=action.fault)
    return environment.call(action.tool, action.arguments)


def _kept(action: Action, observation: Observation, fault: str | None) -> dict[str, Any]:
    arguments = action.arguments
    if isinstance(arguments, dict):
        arguments = {
            key: cut(value, _MOST_KEPT) if isinstance(value, str) else value
            for key, value in arguments.items()
        }
    return {
        "tool": action.tool,
        "arguments": arguments,
        "said": cut(action.said, _MOST_KEPT),
        "observation": cut(observation.text, _MOST_KEPT),
        "images": len(observation.images),
        "fault": fault,
        "done": observation.done,
        "prompt_tokens": action.cost.prompt_tokens,
        "completion_tokens": action.cost.completion_tokens,
    }
