"""Learning-rate schedules as pure functions of the step.

A schedule maps a local step to a factor in [0, 1] of the peak learning rate. It holds no state: a silo that
joins late, was absent or crashed gets the global step from the server and sits at the same point of one
schedule as everybody else. Steps are local steps, counted from 0 over the whole run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol

from photon.components import build
from photon.errors import PhotonError


class Schedule(Protocol):
    """A pure function from the local step (counted from 0) to a factor of the peak learning rate."""

    def __call__(self, step: int) -> float:
        """Return the factor in [0, 1] for ``step``."""
        ...


@dataclass(frozen=True)
class ConstantSchedule:
    """Linear warm-up, then the peak for ever.

    Parameters
    ----------
    warmup_steps
        Step i of the warm-up has factor (i + 1) / warmup_steps.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check(self.warmup_steps >= 0, f"schedule.warmup_steps is {self.warmup_steps}; it cannot be negative")

    def __call__(self, step: int) -> float:
        """Return the factor for ``step``."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine from the peak to ``final_fraction`` of it (the recipe of Photon).

    Parameters
    ----------
    steps
        Local steps of the whole run, warm-up included. Later steps keep the final factor.
    warmup_steps
        Steps of the linear warm-up.
    final_fraction
        Factor at the end.
    """

    steps: int
    warmup_steps: int
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        _check_lengths(self.steps, self.warmup_steps)
        _check_fraction("final_fraction", self.final_fraction)

    def __call__(self, step: int) -> float:
        """Return the factor for ``step``."""
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        progress = _progress(step, self.warmup_steps, self.steps)
        return self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class WsdSchedule:
    """Warm-up, stable, decay: the decay alone knows the end, so a run can be prolonged from its stable part.

    Parameters
    ----------
    steps
        Local steps of the whole run. Later steps keep the final factor.
    warmup_steps
        Steps of the linear warm-up.
    decay_fraction
        Part of ``steps`` that the decay takes at the end.
    final_fraction
        Factor at the end.
    decay
        ``"linear"``, or ``"sqrt"`` for 1 - sqrt(progress), which falls faster at first.
    """

    steps: int
    warmup_steps: int
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
    decay: Literal["linear", "sqrt"] = "sqrt"

    def __post_init__(self) -> None:
        _check_lengths(self.steps, self.warmup_steps)
        _check_fraction("decay_fraction", self.decay_fraction)
        _check_fraction("final_fraction", self.final_fraction)
        _check(
            self.warmup_steps <= self.steps - self.decay_steps,
            f"schedule: {self.warmup_steps} local steps of warm-up and {self.decay_steps} of decay do not "
            f"fit into {self.steps}; lower schedule.warmup_steps or schedule.decay_fraction, or train more",
        )
        _check(self.decay in ("linear", "sqrt"), f"schedule.decay is {self.decay!r}; use linear or sqrt")

    @property
    def decay_steps(self) -> int:
        """Steps of the decay."""
        return round(self.decay_fraction * self.steps)

    def __call__(self, step: int) -> float:
        """Return the factor for ``step``."""
        decay_start = self.steps - self.decay_steps
        if step < decay_start:
            return _warmup(step, self.warmup_steps)
        progress = _progress(step, decay_start, self.steps)
        fall = math.sqrt(progress) if self.decay == "sqrt" else progress
        return self.final_fraction + (1 - self.final_fraction) * (1 - fall)


def stretch(steps: int, warmup_steps: int, tuned_batch_size: int, batch_size: int) -> tuple[int, int]:
    """Stretch a centralised schedule to the small local batch: the recipe of Photon.

    The peak learning rate stays the one tuned for the centralised batch; steps and warm-up are multiplied by
    B_central / B_local, not by B_central / (K · B_local) for a cohort of K.

    Parameters
    ----------
    steps, warmup_steps
        Lengths tuned for ``tuned_batch_size``, in steps.
    tuned_batch_size, batch_size
        Centralised and local batch, in sequences.

    Returns
    -------
    tuple[int, int]
        Steps and warm-up steps in local steps, rounded to the nearest.
    """
    _check(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1")
    _check(tuned_batch_size >= 1, f"the recipe's batch_size is {tuned_batch_size}; it must be at least 1")
    ratio = Fraction(tuned_batch_size, batch_size)
    return round(steps * ratio), round(warmup_steps * ratio)


def resolve_schedule(section: Mapping[str, Any], total_steps: int, batch_size: int) -> dict[str, Any]:
    """Return a configuration section with its lengths in local steps.

    Parameters
    ----------
    section
        ``_target_``, its arguments, and ``tuned_batch_size``: the batch that ``steps`` and
        ``warmup_steps`` count. With ``steps: null`` the schedule spans the whole run, unstretched.
    total_steps
        Local steps of the whole run.
    batch_size
        Sequences per local step.
    """
    arguments = dict(section)
    tuned = arguments.pop("tuned_batch_size", None) or batch_size
    if "steps" in arguments and arguments["steps"] is None:
        return arguments | {"steps": total_steps}
    steps, warmup_steps = stretch(
        arguments.get("steps", 0), arguments.get("warmup_steps", 0), tuned, batch_size
    )
    lengths = {"steps": steps, "warmup_steps": warmup_steps}
    return arguments | {name: lengths[name] for name in lengths.keys() & arguments.keys()}


def build_schedule(section: Mapping[str, Any], total_steps: int, batch_size: int) -> Schedule:
    """Build the schedule that a configuration section names (see `resolve_schedule`).

    Raises
    ------
    PhotonError
        When the target refuses its arguments.
    """
    arguments = resolve_schedule(section, total_steps, batch_size)
    _check_warmup(section, arguments)
    schedule: Schedule = build(arguments, "schedule")
    return schedule


def never_at_peak(section: Mapping[str, Any], total_steps: int, batch_size: int) -> str | None:
    """Return, in words, that a run ends before its learning rate has warmed up; None: it does not.

    Parameters
    ----------
    section, total_steps, batch_size
        As of `resolve_schedule`.
    """
    warmup_steps = resolve_schedule(section, total_steps, batch_size).get("warmup_steps")
    if not isinstance(warmup_steps, int) or warmup_steps <= total_steps:
        return None
    given, tuned = section["warmup_steps"], section.get("tuned_batch_size")
    told = (
        f"the run ends within its warm-up, at {100 * total_steps / warmup_steps:.2g} % of the peak learning "
        f"rate: it has {total_steps:,} local steps, and the warm-up {warmup_steps:,}"
    )
    if warmup_steps == given or tuned is None:
        return f"{told}; train longer, or lower schedule.warmup_steps={given}"
    return (
        f"{told}, because schedule.warmup_steps={given} counts batches of {tuned:,} sequences; train longer, "
        "or set schedule.tuned_batch_size=null, so that local steps are counted"
    )


def _check_warmup(section: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Check that the warm-up ends within the schedule, in the numbers and by the keys that a user has set."""
    steps, warmup_steps = arguments.get("steps"), arguments.get("warmup_steps")
    if not (isinstance(steps, int) and isinstance(warmup_steps, int) and warmup_steps > max(steps, 0)):
        return
    given = section["warmup_steps"]
    if section["steps"] is None:
        whole, more = f"the {steps} of the run (rounds × local_steps)", "train more rounds"
    else:
        whole, more = f"the {steps} of schedule.steps={section['steps']}", "raise schedule.steps"
    most = steps * given // warmup_steps
    raise PhotonError(
        f"schedule.warmup_steps={given}: a warm-up of {warmup_steps} local steps does not fit into {whole}; "
        f"set schedule.warmup_steps={most} or less, or {more}"
    )


def _warmup(step: int, warmup_steps: int) -> float:
    return (step + 1) / warmup_steps if step < warmup_steps else 1.0


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0


def _check_lengths(steps: int, warmup_steps: int) -> None:
    _check(steps >= 1, f"schedule.steps is {steps}; it must be at least 1")
    _check(
        0 <= warmup_steps <= steps,
        f"schedule.warmup_steps is {warmup_steps}; it must lie between 0 and schedule.steps={steps}",
    )


def _check_fraction(name: str, value: float) -> None:
    _check(0.0 <= value <= 1.0, f"schedule.{name} is {value}; it must lie between 0 and 1")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise PhotonError(message)
