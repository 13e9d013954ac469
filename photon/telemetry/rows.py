"""The figures of a run in rows, for trackers: numbers with a name, and the round they are of.

Trackers may be with somebody else, so they get numbers alone: no reason that a silo gave, no notice, no text.
Silos are named, and of more than `MOST_SILOS` of them there are only the figures that sum them up.
"""

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from photon.telemetry.events import (
    Diagnostics,
    Evaluated,
    Event,
    RoundFinished,
    RunStarted,
    SiloFailed,
    SiloFinished,
    TasksEvaluated,
)

#: Events of which a row is made.
ROW_EVENTS = (RoundFinished, Diagnostics, Evaluated, TasksEvaluated)
#: Silos up to which each has figures of its own.
MOST_SILOS = 64


@dataclass(frozen=True)
class Row:
    """Figures of a round, by name; ``time`` is in unix seconds."""

    round: int
    time: float
    values: dict[str, float]


class Rows:
    """Makes rows of the events of a run, which it hears one by one."""

    def __init__(self) -> None:
        self._replies: list[SiloFinished] = []
        self._failures = 0

    def of(self, event: Event) -> Row | None:
        """Return what ``event`` tells in numbers; None: it is no event of which a row is made."""
        if isinstance(event, RunStarted):
            self._replies, self._failures = [], 0
        elif isinstance(event, SiloFinished):
            self._replies.append(event)
        elif isinstance(event, SiloFailed):
            self._failures += 1
        if not isinstance(event, ROW_EVENTS):
            return None
        if isinstance(event, RoundFinished):
            found = _round_metrics(event) | _silo_metrics(self._replies, self._failures)
            self._replies, self._failures = [], 0
        elif isinstance(event, Diagnostics):
            found = {f"diagnostics/{name}": value for name, value in event.values.items()}
        elif isinstance(event, Evaluated):
            found = _evaluation_metrics(event)
        else:
            found = _task_metrics(event)
        values = {name: float(value) for name, value in found.items() if value is not None}
        return Row(event.round, event.time, values)


def numbers_of(content: Any) -> dict[str, float]:
    """Return the finite numbers in nested mappings, under names such as ``perplexity/final``."""
    return {
        name: float(value)
        for name, value in leaves(content, "/")
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    }


def leaves(content: Any, separator: str, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what nested mappings hold, each with the keys that lead to it."""
    if not isinstance(content, dict):
        yield name, content
        return
    for key, value in content.items():
        yield from leaves(value, separator, f"{name}{separator}{key}" if name else str(key))


def _round_metrics(event: RoundFinished) -> dict[str, float | None]:
    return {
        "global_step": event.global_step,
        "tokens": event.tokens,
        "train/loss": event.train_loss,
        "server/pseudo_gradient_norm": event.pseudo_gradient_norm,
        "server/parameter_norm": event.parameter_norm,
        "server/silo_cosine": event.silo_cosine,
        "server/consensus": event.consensus,
        "link/bytes_up": event.bytes_up,
        "link/bytes_down": event.bytes_down,
        "seconds/round": event.seconds["round"],
        "seconds/training": event.seconds["training"],
        "seconds/fold": event.seconds["fold"],
        "seconds/outer": event.seconds["outer"],
        "seconds/evaluate": event.seconds["evaluate"],
        "seconds/checkpoint": event.seconds["checkpoint"],
        "seconds/overhead": event.seconds["overhead"],
        **{f"link/bytes_up/{group}": count for group, count in event.group_bytes_up.items()},
        **{f"link/bytes_down/{group}": count for group, count in event.group_bytes_down.items()},
    }


def _silo_metrics(replies: list[SiloFinished], failures: int) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {"silos/finished": len(replies), "silos/failed": failures}
    for event in replies if len(replies) <= MOST_SILOS else ():
        prefix = f"silo/{event.silo}"
        metrics |= {
            f"{prefix}/loss": event.loss,
            f"{prefix}/learning_rate": event.learning_rate,
            f"{prefix}/gradient_norm": event.gradient_norm,
            f"{prefix}/update_norm": event.update_norm,
            f"{prefix}/tokens_per_second": event.tokens_per_second,
            f"{prefix}/mfu": event.mfu,
            f"{prefix}/seconds": event.seconds["total"],
        }
    return metrics


def _evaluation_metrics(event: Evaluated) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {
        "tokens": event.tokens_trained,
        "validation/loss": event.loss,
        "validation/perplexity": event.perplexity,
    }
    metrics["validation/silos"] = len(event.per_silo)
    if event.error is not None:
        metrics["validation/error"] = event.error
    for name, silo in event.per_silo.items() if len(event.per_silo) <= MOST_SILOS else ():
        metrics[f"validation/{name}/loss"] = silo["loss"]
        metrics[f"validation/{name}/perplexity"] = silo["perplexity"]
    return metrics


def _task_metrics(event: TasksEvaluated) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {
        "tokens": event.tokens_trained,
        "tasks/failed": float(event.failure is not None),
    }
    for task, found in event.tasks.items():
        metrics |= {f"tasks/{task}/{name}": value for name, value in found["metrics"].items()}
    for suite, means in event.suites.items():
        metrics[f"tasks/{suite}/accuracy"] = means["accuracy"]
        metrics[f"tasks/{suite}/above_chance"] = means["above_chance"]
    return metrics
