"""What a silo starts from: what came with a request and what it has kept, joined by its method."""

from collections.abc import Mapping
from dataclasses import replace

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.silo_data import SiloData
from photon.link.messages import TrainOrder
from photon.link.update import REFERENCE
from photon.silo.kept import kept_of
from photon.state.checkpoint import weights_sha256
from photon.state.silo import SiloState
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS, Contract
from photon.strategy.local import LostStateError, Request, Start
from photon.training.groups import Tensors
from photon.training.switch import at_switch


def request_of(order: TrainOrder, contract: Contract, config: RunConfig, vocab_size: int) -> Request:
    """Return the part of an order that the silo's method may see."""
    return Request(
        silo=order.silo,
        round=order.round,
        global_step=order.global_step,
        steps=order.steps,
        role="server_silo" if order.silo == config.federation.own_silo else "silo",
        last_round=order.last_round,
        scalars=order.scalars,
        averaged_rounds=order.averaged_rounds,
        tags=order.residuals,
        contract=contract,
        vocab_size=vocab_size,
    )


def start_from(
    kept: SiloState | None,
    groups: Mapping[str, Tensors],
    order: TrainOrder,
    request: Request,
    data: PreparedData,
    config: RunConfig,
) -> tuple[Start, Tensors]:
    """Join the global state groups with what the silo has kept.

    Returns
    -------
    tuple
        What the round starts from; and the global parameters that came.

    Raises
    ------
    LostStateError
        If the order counts on something that the silo has lost.
    """
    if order.base is not None:
        groups = {**groups, PARAMS: _changed(kept, groups[PARAMS], order)}
    method = strategy_of(config).local
    start = method.start(
        groups, None if kept is None else kept_of(kept), request, SiloData(data, order.members)
    )
    return _over_the_switch(start, request, config), groups[PARAMS]


def _changed(kept: SiloState | None, change: Tensors, order: TrainOrder) -> Tensors:
    """Add a change to the parameters that the silo has decoded in its last accepted round.

    Raises
    ------
    LostStateError
        If it has lost them, or they are others.
    """
    reference = kept.link.get(REFERENCE, {}) if kept else {}
    if set(reference) != set(change) or weights_sha256(reference) != order.base:
        raise LostStateError(
            f"{order.silo} has lost the parameters of round {order.last_round}; its next order after this "
            "failure brings all"
        )
    return {name: reference[name] + tensor for name, tensor in change.items()}


def _over_the_switch(start: Start, request: Request, config: RunConfig) -> Start:
    """Do to the local optimizer's state what the switch does where it is crossed."""
    if config.switch is None or start.optimizer is None:
        return start
    optimizer, scalars = at_switch(
        config.switch,
        start.optimizer,
        start.scalars,
        global_step=request.global_step,
        kept_since=config.steps_after(request.last_round),
        averaged_since={
            group: config.steps_after(request.averaged_rounds[group]) for group in start.averaged
        },
        scalars_of_others=request.scalars,
    )
    return replace(start, optimizer=optimizer, scalars=scalars)
