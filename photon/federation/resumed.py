"""What a run goes on with: whether its checkpoint fits a changed configuration, and what was changed.

What a checkpoint and silos hold was made by a model, optimizers and a strategy. Under others it would be read
as what it is not, so a run that was given others does not go on. All else may change, and is told.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from photon.config.decided import agreed
from photon.config.schema import Component, RunConfig
from photon.config.tree import TreeNode
from photon.errors import PhotonError
from photon.federation.ledger import config_before
from photon.federation.origin import sent_config
from photon.objective.configured import objective_of
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Strategy, strategy_of
from photon.strategy.local import hint_of_reset
from photon.training.loop import probe_state_shapes

_BACK = "change it back, or start anew"
#: What belongs to the place where a run is, and not to the run.
_NOT_TOLD = ("run_dir", "data.path", "telemetry.", "federation.connection")


def compared(checkpoint: Checkpoint, config: RunConfig) -> str | None:
    """Compare a configuration that may have been changed with the one that a checkpoint was written under.

    Parameters
    ----------
    config
        The configuration as it is now.

    Returns
    -------
    str or None
        What was changed, in words; None: nothing, or nobody can tell.

    Raises
    ------
    PhotonError
        If the run cannot go on: what the checkpoint, or the silos, hold was made by another model, optimizer
        or strategy.
    """
    before = config_before(checkpoint.state)
    if before is None or config.federation.parent is not None:
        return None
    now = sent_config(config, checkpoint.state.vocab_size)
    if problem := _problem(before, now, checkpoint):
        raise PhotonError(f"{checkpoint.path.parent.parent / 'config.yaml'}: {problem}")
    if (decided := agreed(checkpoint.state.decided.values())) is not None:
        before, now = (
            one.model_copy(update={"training": decided.applied_to(one.training)}) for one in (before, now)
        )
    told = _differences(before.model_dump(by_alias=True), now.model_dump(by_alias=True))
    return "; ".join(one for one in told if not one.startswith(_NOT_TOLD)) or None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys that differ, with what they were and are."""
    old, new = dict(_flat(before)), dict(_flat(now))
    told = {key: (old.get(key, "not there"), new.get(key, "not there")) for key in sorted({*old, *new})}
    return [f"{key}: {_short(was)} → {_short(now)}" for key, (was, now) in told.items() if was != now]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:198]} …"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _problem(before: RunConfig, now: RunConfig, checkpoint: Checkpoint) -> str | None:
    """Return why a run cannot go on, or None."""
    if before.seed != now.seed:
        return f"seed={now.seed}: the run began with {before.seed}, by which silos read their text; {_BACK}"
    parts = {"sequence_length", "vocab_size", "architecture", "abbie"}
    if told := _differences(before.model.model_dump(include=parts), now.model.model_dump(include=parts)):
        return f"model: it is not the one of the checkpoint ({'; '.join(told)}); {_BACK}"
    if told := _differences({"adapter": _shape_of(before)}, {"adapter": _shape_of(now)}):
        return f"adapter: it is not the one of the checkpoint ({'; '.join(told)}); {_BACK}"
    if (kind := type(objective_of(before))) is not type(objective_of(now)):
        return f"objective: the run began with {kind.__name__}; {_BACK}"
    if checkpoint.state.round == 0:
        # Nothing was made by anything but the seed and the model.
        return None
    return (
        _problem_with_strategy(strategy_of(before), strategy_of(now), checkpoint)
        or _problem_with_local_optimizer(before, now)
        or _problem_with_outer_optimizer(before.outer, now.outer, checkpoint)
        or _problem_with_transition(before, now)
        or _problem_with_tree(before.federation.root, now.federation.root)
    )


def _shape_of(config: RunConfig) -> dict[str, Any] | None:
    """Return what an adapter's matrices, and what they stand for, depend on."""
    return None if config.adapter is None else config.adapter.model_dump(exclude={"dropout"})


def _problem_with_strategy(before: Strategy, now: Strategy, checkpoint: Checkpoint) -> str | None:
    if type(before) is not type(now):
        return f"strategy._target_: the run began with {type(before).__name__}; {_BACK}"
    old, new = (getattr(one, "plan", None) for one in (before, now))
    groups = [sorted(plan.periods) if plan is not None else [] for plan in (old, new)]
    if groups[0] != groups[1]:
        return (
            f"strategy.sync: the run has averaged {', '.join(groups[0]) or 'no states'}, and would now "
            f"average {', '.join(groups[1]) or 'none'}; {_BACK}"
        )
    shapes = {name: tensor.shape for name, tensor in checkpoint.load_params().items()}
    if before.contract(1, shapes).own != now.contract(1, shapes).own:
        return f"strategy: other layers would be the silos' own than those that they have kept; {_BACK}"
    problem = now.problem_after(before, checkpoint)
    return None if problem is None else f"{problem}; {_BACK}"


def _problem_with_local_optimizer(before: RunConfig, now: RunConfig) -> str | None:
    if "reset" in (strategy_of(before).local_state, strategy_of(now).local_state):
        # Silos have kept nothing of it, or do not look at that.
        return None
    if not _is_another(before.optimizer, now.optimizer):
        return None
    return (
        f"optimizer: the state that silos have kept is that of {_named(before.optimizer)}, and not of "
        f"{_named(now.optimizer)}; change it back{hint_of_reset(now)}, or start anew"
    )


def _problem_with_outer_optimizer(before: Component, now: Component, checkpoint: Checkpoint) -> str | None:
    kept = checkpoint.load_outer()
    if not (kept or checkpoint.state.outer_scalars) or not _is_another(before, now):
        return None
    return (
        f"outer: the state in the checkpoint ({', '.join(kept) or 'scalars'}) is that of {_named(before)}, "
        f"and not of {_named(now)}; {_BACK}"
    )


def _problem_with_transition(before: RunConfig, now: RunConfig) -> str | None:
    if before.transition is None and now.transition is None:
        return None
    if (before.transition, before.local_steps) == (now.transition, now.local_steps):
        return None
    return f"transition: states are older or younger than it by the steps of rounds that are done; {_BACK}"


def _problem_with_tree(before: TreeNode | None, now: TreeNode | None) -> str | None:
    """Return which federation would have done more rounds of its own than the run has for it."""
    if before is None or now is None:
        return None
    done = {node.name: node.rounds or 1 for node in before.walk() if not node.is_silo}
    for node in now.walk():
        if not node.is_silo and (rounds := node.rounds or 1) < done.get(node.name, 1):
            return (
                f"federation.tree: {node.name} has done {done[node.name]} rounds of its own in each round, "
                f"and would now do {rounds}; {_BACK}"
            )
    return None


def _is_another(before: Component, now: Component) -> bool:
    """Tell whether an optimizer's state means something else, or has other tensors."""
    if before.target != now.target:
        return True
    return before != now and probe_state_shapes(before.as_mapping()) != probe_state_shapes(now.as_mapping())


def _named(optimizer: Component) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in (optimizer.model_extra or {}).items())
    return f"{optimizer.target.rpartition('.')[2]}({arguments})"
