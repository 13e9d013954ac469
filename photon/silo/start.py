"""What a silo starts from: what came with a request and what it has kept, joined by its method."""

from collections.abc import Mapping
from dataclasses import replace

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.silo_data import SiloData
from photon.link.messages import TrainRequest
from photon.link.update import REFERENCE
from photon.objective.configured import kept_of as frozen_of
from photon.silo.kept import kept_of
from photon.state.checkpoint import weights_sha256
from photon.state.silo import SiloState
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS, Contract, role_of
from photon.strategy.local import LostStateError, Request, Start
from photon.training.groups import Tensors
from photon.training.transition import at_transition


def request_of(request: TrainRequest, contract: Contract, config: RunConfig, vocab_size: int) -> Request:
    """Return the part of a request that the silo's method may see."""
    return Request(
        silo=request.silo,
        round=request.round,
        global_step=request.global_step,
        steps=request.steps,
        role=role_of(request.silo, config.federation.server_silo, federation=False),
        last_round=request.last_round,
        scalars=request.scalars,
        averaged_rounds=request.averaged_rounds,
        tags=request.routed,
        contract=contract,
        vocab_size=vocab_size,
    )


def start_from(
    kept: SiloState | None,
    groups: Mapping[str, Tensors],
    request: TrainRequest,
    for_method: Request,
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
        If the request counts on something that the silo has lost.
    """
    if request.base_hash is not None:
        frozen = frozen_of(config)
        groups = {**groups, PARAMS: _changed(kept, groups[PARAMS], request, frozen)}
    method = strategy_of(config).local
    start = method.start(
        groups, None if kept is None else kept_of(kept), for_method, SiloData(data, request.members)
    )
    return _over_the_transition(start, for_method, config), groups[PARAMS]


def _changed(
    kept: SiloState | None, change: Tensors, request: TrainRequest, frozen: frozenset[str]
) -> Tensors:
    """Add a change to the parameters that the silo has decoded in its last accepted round.

    What no step moves is beside it as it is.

    Raises
    ------
    LostStateError
        If it has lost them, or they are others.
    """
    reference = kept.link.get(REFERENCE, {}) if kept else {}
    if set(reference) != set(change) or weights_sha256(reference) != request.base_hash:
        raise LostStateError(
            f"{request.silo} has lost the parameters of round {request.last_round}; its next request after "
            "this failure brings all"
        )
    return {name: t if name in frozen else reference[name] + t for name, t in change.items()}


def _over_the_transition(start: Start, for_method: Request, config: RunConfig) -> Start:
    """Do to the local optimizer's state what the transition does where it is crossed."""
    if config.transition is None or start.optimizer is None:
        return start
    optimizer, scalars = at_transition(
        config.transition,
        start.optimizer,
        start.scalars,
        global_step=for_method.global_step,
        kept_since=config.steps_after(for_method.last_round),
        averaged_since={
            group: config.steps_after(for_method.averaged_rounds[group]) for group in start.averaged
        },
        scalars_of_others=for_method.scalars,
    )
    return replace(start, optimizer=optimizer, scalars=scalars)
