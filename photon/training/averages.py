"""What a silo trains from that takes others' averages in the place of some of its own optimizer's states.

An optimizer such as Adam divides a moment by 1 − β^t, because it began at zero t steps ago. An average has a
t of its own, that of the silos it was taken of. A silo that was away for some rounds counts fewer steps; with
its own count it would divide the average by too little, and take steps that are too large.
"""

from collections.abc import Mapping

import torch

from photon.components import build
from photon.config.schema import Component
from photon.optim import LoRDO, MuonAdamW, QHAdamW
from photon.training.groups import OptimizerState, StateGroups

#: Beyond so many times the root of its second moment a first moment is none that a silo could have had.
_STRANGE = 1000.0
#: Optimizers that divide a moment by 1 − β^t.
_CORRECTING = (torch.optim.Adam, torch.optim.AdamW, QHAdamW, LoRDO, MuonAdamW)


def corrected_decays(section: Component) -> dict[str, float]:
    """Return β of each state group whose bias a local optimizer corrects by its step count.

    ``exp_avg`` and further momenta, ``exp_avg_2`` and so on, have the first decays of ``betas``, and
    ``exp_avg_sq`` the last.
    """
    optimizer = build(section.as_mapping(), "optimizer", [torch.nn.Parameter(torch.zeros(2, 2))])
    if not isinstance(optimizer, _CORRECTING):
        return {}
    settings = next(group for group in optimizer.param_groups if "betas" in group)
    *momenta, last = map(float, settings["betas"])
    # A momentum of weight 0 has no state.
    weights = settings.get("weights", [settings.get("weight", 1.0)] * len(momenta))
    kept = [beta for beta, weight in zip(momenta, weights, strict=True) if weight > 0]
    names = ["exp_avg", *(f"exp_avg_{number}" for number in range(2, len(kept) + 1))]
    return {**dict(zip(names, kept, strict=False)), "exp_avg_sq": last, "max_exp_avg_sq": last}


def with_averages(
    kept: OptimizerState, averages: OptimizerState, decays: Mapping[str, float]
) -> OptimizerState:
    """Put averages in the place of what a silo has kept, and let all of it have the averages' step count.

    A moment m that the silo keeps, t steps old, becomes m (1 − β^t') / (1 − β^t) where t' is the count of the
    averages: corrected by that, it is what it was.

    Parameters
    ----------
    kept
        State groups and scalars that the silo has kept.
    averages
        Those that came; none at all leaves everything as it is.
    decays
        As `corrected_decays` returns them.
    """
    groups, scalars = kept
    averaged, counted = averages
    if not averaged:
        return groups, scalars
    own, new = scalars.get("step", 0.0), counted.get("step", 0.0)
    if own == new or own <= 0 or new <= 0:
        return {**groups, **averaged}, {**scalars, **counted}
    rescaled: StateGroups = {
        group: {name: tensor * ((1 - beta**new) / (1 - beta**own)) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
        if group not in averaged and (beta := decays.get(group)) is not None
    }
    return {**groups, **rescaled, **averaged}, {**scalars, **counted}


def without_strange(groups: StateGroups, decays: Mapping[str, float]) -> StateGroups:
    """Take first moments for zero where the second one knows of nothing like them.

    The average of first moments has those of words that a silo never reads. Its own second moment is zero
    there, as it is in an average over other silos, and a step is their quotient. Moments of the same steps
    are never apart like that: with β of 0.9 and 0.95 a first one is at most 1.2 times the root of the second.

    Parameters
    ----------
    groups
        State groups of a local optimizer, of which some were averaged without the others.
    decays
        As `corrected_decays` returns them; none: the optimizer divides by no root.
    """
    squares = groups.get("exp_avg_sq")
    if squares is None or "exp_avg_sq" not in decays:
        return groups
    found = dict(groups)
    for group in groups.keys() & (decays.keys() - {"exp_avg_sq", "max_exp_avg_sq"}):
        for name, moment in groups[group].items():
            if name in squares and bool((strange := moment.abs() > _STRANGE * squares[name].sqrt()).any()):
                found[group] = {**found[group], name: moment.masked_fill(strange, 0.0)}
    return found
