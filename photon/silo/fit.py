"""The local steps of a round, taken in this process or in a group of them."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.files.memory import LARGE_BYTES, check_batch, release_freed
from photon.link.messages import TrainRequest
from photon.link.transport import MappedTensors
from photon.silo.group import fit_in_group
from photon.silo.runtime import runtime_of, trainer
from photon.silo.site import SiloSite
from photon.silo.work import batches, shared, told_steps
from photon.strategy.base import check_group, strategy_of
from photon.strategy.local import Start
from photon.training.devices import GroupResult
from photon.training.groups import (
    StateGroups,
    Tensors,
    read_optimizer,
    read_params,
    reset_optimizer,
    write_optimizer,
    write_params,
)


def fit(
    request: TrainRequest,
    start: Start,
    groups: Mapping[str, Tensors],
    data: PreparedData,
    config: RunConfig,
    site: SiloSite,
) -> GroupResult:
    """Train from a start, here or in a group of processes; ``groups`` is what came with the request.

    Raises
    ------
    PhotonError
        If there is to be a group, and the strategy or the objective cannot train in one.
    """
    if config.training.processes == 1:
        return _fit_here(request, start, groups, SiloData(data, request.members), config, site)
    # A silo may have set how many by itself.
    check_group(config)
    return fit_in_group(request, start, data, config, site)


def _fit_here(
    request: TrainRequest,
    start: Start,
    groups: Mapping[str, Tensors],
    data: SiloData,
    config: RunConfig,
    site: SiloSite,
) -> GroupResult:
    """Train in this process, on the runtime that it keeps."""
    check_batch(
        request.batch_size,
        config.training.micro_batch_size,
        length=data.windows("train")[0].shape[1],
        vocabulary=config.model.vocab_size or data.vocab_size,
    )
    runtime, method = runtime_of(config, data.vocab_size), strategy_of(config).local
    write_params(runtime.model, start.params)
    if isinstance(start.params, MappedTensors):
        # What was received is needed again after training, and not beside the gradients.
        start.params.release()
    if start.optimizer is None:
        reset_optimizer(runtime.optimizer)
    else:
        write_optimizer(runtime.model, runtime.optimizer, start.optimizer, start.scalars)
    context, collected = _placed(start.context, runtime.device), _placed(start.collected, runtime.device)
    loop = trainer(runtime, config, request.batch_size)
    with runtime.seeded(config.seed, request.round, request.silo, "train"):
        method.begin(runtime.model, runtime.optimizer, context)
        stream, figures = batches(request, runtime.model, groups, data, config, site.policy)
        result = loop.no_steps()
        if stream is None and not strategy_of(config).folds_idle:
            raise PhotonError(
                "objective: it has chosen nothing to train on; use strategy=anchor, which goes on"
            )
        if stream is not None:
            result = loop.train(
                stream,
                global_step=request.global_step,
                steps=request.steps,
                on_step=told_steps(request, site.state),
                rows=start.rows,
                hooks=method.hooks(context, collected),
            )
    result = replace(result, figures={**result.figures, **figures})
    given = shared(request, runtime.model, data, config)
    states, scalars = read_optimizer(runtime.model, runtime.optimizer)
    trained = read_params(runtime.model)
    if sum(tensor.nbytes for tensor in trained.values()) > LARGE_BYTES:
        release_freed()  # the gradients
    # Of windows that an objective chooses the place in the text counts as if they came in turn.
    position = request.position + request.steps * request.batch_size
    return GroupResult(trained, states, scalars, position, result, collected, given)


def _placed(groups: StateGroups, device: torch.device) -> StateGroups:
    return {group: {name: t.to(device) for name, t in tensors.items()} for group, tensors in groups.items()}
