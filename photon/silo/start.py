"""What a silo starts an order from: what came with the order, joined with what the silo has kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.link.messages import TrainOrder
from photon.link.update import REFERENCE
from photon.silo.layers import own_layers
from photon.silo.masks import without_absent
from photon.silo.shapes import state_groups
from photon.state.checkpoint import weights_sha256
from photon.state.silo import SiloState
from photon.strategy.key_layers import INITIAL, PERSONAL, key_layers
from photon.training.groups import RECEIVED, OptimizerState, Tensors
from photon.training.switch import at_switch


@dataclass(frozen=True)
class Start:
    """What a silo starts an order from.

    Attributes
    ----------
    kept
        What it kept from its last accepted round; None: nothing, or it has lost that.
    received
        The global parameters that came.
    params
        The parameters to start from.
    known
        The last global value of each: what its update is measured from.
    state
        The local optimizer's state; None: a fresh one.
    initial, figures
        As in `OwnLayers`, where it has key layers of its own.
    """

    kept: SiloState | None
    received: Tensors
    params: Tensors
    known: Tensors
    state: OptimizerState | None
    initial: Tensors | None = None
    figures: dict[str, float] = field(default_factory=dict)


def with_change(
    groups: Mapping[str, Tensors], kept: SiloState | None, order: TrainOrder
) -> Mapping[str, Tensors]:
    """Return the global state groups: where a change of the parameters came, with what it leads to.

    Raises
    ------
    PhotonError
        If the silo has lost what has changed.
    """
    if order.base is None:
        return groups
    return {**groups, "params": _changed(kept, groups["params"], order)}


def start_from(
    kept: SiloState | None,
    groups: Mapping[str, Tensors],
    order: TrainOrder,
    data: PreparedData,
    config: RunConfig,
) -> Start:
    """Join the global state groups with what the silo has kept.

    Raises
    ------
    PhotonError
        If the order counts on something that the silo has lost.
    """
    before = None if order.local_state == "reset" else kept
    received = groups["params"]
    state = _state_to_start_from(before, groups, order, config)
    layers = key_layers(config)
    if layers is None:
        params, known = _params_to_start_from(before, received, order)
        return Start(kept, received, params, known, without_absent(state, params, data, config))
    own = own_layers(layers, kept, groups, order)
    state = without_absent(state, own.params, data, config)
    return Start(kept, received, own.params, received, state, own.initial, own.figures)


def _changed(kept: SiloState | None, change: Tensors, order: TrainOrder) -> Tensors:
    """Add a change to the parameters that the silo has decoded in its last accepted round.

    Raises
    ------
    PhotonError
        If it has lost them, or they are others.
    """
    reference = kept.link.get(REFERENCE, {}) if kept else {}
    if set(reference) != set(change) or weights_sha256(reference) != order.base:
        raise PhotonError(
            f"{order.silo} has lost the parameters of round {order.last_round}; its next order after this "
            "failure brings all"
        )
    return {name: reference[name] + tensor for name, tensor in change.items()}


def _params_to_start_from(
    before: SiloState | None, received: Tensors, order: TrainOrder
) -> tuple[Tensors, Tensors]:
    """Return the parameters to start from, and the last global value of each.

    Raises
    ------
    PhotonError
        If the order brings some of them alone, and the silo has lost the others.
    """
    if order.whole:
        return received, received
    if before is None:
        raise PhotonError(
            f"{order.silo} has lost the parameters that it kept; its next order after this failure brings all"
        )
    own = before.groups["params"]
    merged = {name: torch.lerp(own[name], tensor, order.mixing) for name, tensor in received.items()}
    return {**own, **merged}, {**before.groups[RECEIVED], **received}


def _state_to_start_from(
    before: SiloState | None,
    received: Mapping[str, Mapping[str, torch.Tensor]],
    order: TrainOrder,
    config: RunConfig,
) -> OptimizerState | None:
    """Join what the silo kept with the averages that it received; None: start with a fresh local optimizer.

    A silo that has kept nothing takes the averages only if they are its whole state: with one moment at zero
    and a step counter far from it, bias correction would blow up the first steps.
    """
    states = state_groups(config)
    averaged = {group: dict(tensors) for group, tensors in received.items() if group in (*states, RECEIVED)}
    if before is not None:
        # `RECEIVED` is for a `Refreshing` optimizer, unless it goes with parameters that the silo has kept.
        beside = {PERSONAL, INITIAL} | ({"params", RECEIVED} if "params" in before.groups else set())
        kept = {group: tensors for group, tensors in before.groups.items() if group not in beside}
        groups, scalars = {**kept, **averaged}, before.scalars
    elif averaged and set(averaged) - {RECEIVED} == set(states):
        groups, scalars = averaged, order.scalars
    else:
        return None
    if config.switch is None:
        return groups, scalars
    rounds = {group: order.averaged_rounds[group] for group in averaged if group != RECEIVED}
    return at_switch(
        config.switch,
        groups,
        scalars,
        global_step=order.global_step,
        kept_since=config.steps_after(order.last_round),
        averaged_since={group: config.steps_after(at) for group, at in rounds.items()},
        scalars_of_others=order.scalars,
    )
