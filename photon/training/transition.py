"""The transition of the low-communication papers: a warm-up with other settings, and what its end changes.

From one global step on the local optimizer has other settings and another factor of the learning rate, which
`photon.training.loop.LocalTrainer` sets at every step. State groups may be zeroed there. That happens to a
value when it is first used after the transition: so it happens once, whenever its owner comes back.
"""

from collections.abc import Mapping
from typing import Any

import torch

from photon.components import build, nearest
from photon.config.training import TransitionSection
from photon.errors import PhotonError
from photon.training.groups import StateGroups
from photon.training.loop import probe_state_shapes

#: Not a moment: LoRDO cannot step in a subspace of no direction.
BASIS = "basis"


def at_transition(
    transition: TransitionSection,
    groups: StateGroups,
    scalars: Mapping[str, float],
    *,
    global_step: int,
    kept_since: int,
    averaged_since: Mapping[str, int],
    scalars_of_others: Mapping[str, float],
) -> tuple[StateGroups, dict[str, float]]:
    """Return the state of a local optimizer to train from, with what the transition does to it.

    Parameters
    ----------
    transition
        The transition.
    groups, scalars
        The state that a silo has kept, with the averages that it has received put in their places.
    global_step
        Step from which it is to train.
    kept_since
        Step at which it was left.
    averaged_since
        State group that was received to the step at which it was averaged.
    scalars_of_others
        The scalars that go with averages from after the transition: with ``reset_step`` the silo's own do
        not.
    """

    def crossed(since: int) -> bool:
        return since <= transition.step <= global_step

    def zeroed(group: str) -> bool:
        return group in transition.zero and crossed(averaged_since.get(group, kept_since))

    groups = {
        group: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        if zeroed(group)
        else tensors
        for group, tensors in groups.items()
    }
    numbers = dict(scalars)
    if transition.reset_step and "step" in numbers and crossed(kept_since):
        counted = any(not crossed(since) for since in averaged_since.values())
        numbers["step"] = scalars_of_others["step"] if counted else 0.0
    return groups, numbers


def check_transition(transition: TransitionSection, optimizer: Mapping[str, Any]) -> None:
    """Check that a local optimizer can go over the transition.

    Raises
    ------
    PhotonError
        If it does not take the new settings, they change its state groups, or there is none to zero.
    """
    if "lr" in transition.optimizer:
        raise PhotonError(
            "transition.optimizer.lr: the learning rate is the schedule's; set transition.lr_scale"
        )
    after = {**optimizer, **transition.optimizer}
    built = build(after, "transition.optimizer", [torch.nn.Parameter(torch.zeros(2, 2))])
    for name in transition.optimizer:
        if not any(name in group for group in built.param_groups):
            raise PhotonError(
                f"transition.optimizer.{name}: this optimizer cannot change it once it is built"
            )
    shapes = probe_state_shapes(optimizer)
    if probe_state_shapes(after) != shapes:
        raise PhotonError(
            "transition.optimizer: the local optimizer would have other state groups after the transition; "
            "keep their number and sizes (a momentum of weight 0 has no state)"
        )
    moments = sorted(set(shapes) - {BASIS})
    for group in transition.zero:
        if group not in moments:
            raise PhotonError(
                f"transition.zero: {group} is no moment of the local optimizer{nearest(group, moments)}; "
                f"there are {', '.join(moments) or 'none'}"
            )
    corrected = {group for group in moments if group.startswith("exp_avg")}
    if transition.reset_step and (missing := sorted(corrected - set(transition.zero))):
        raise PhotonError(
            "transition.reset_step=true: bias correction from step 0 is wrong for moments that are kept; "
            f"add {', '.join(missing)} to transition.zero"
        )
