"""The local steps of a round, taken in this process or in a group of them."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.files.memory import LARGE_BYTES, release_freed
from photon.link.messages import TrainOrder
from photon.link.transport import MappedTensors
from photon.silo.group import fit_in_group
from photon.silo.runtime import trainer, workbench
from photon.silo.site import SiloSite
from photon.silo.work import batches, chooses
from photon.strategy.base import strategy_of
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
    order: TrainOrder,
    start: Start,
    groups: Mapping[str, Tensors],
    data: PreparedData,
    config: RunConfig,
    site: SiloSite,
) -> GroupResult:
    """Train from a start, here or in a group of processes; ``groups`` is what came with the order.

    Raises
    ------
    PhotonError
        If there is to be a group, and the strategy or the objective cannot train in one.
    """
    if config.training.processes == 1:
        return _fit_here(order, start, groups, SiloData(data, order.members), config)
    if chooses(config):
        raise PhotonError("training.processes: the objective chooses its windows in one process; set it to 1")
    if (reason := strategy_of(config).local.one_device_only) is not None:
        raise PhotonError(f"training.processes: {reason}; set it to 1")
    return fit_in_group(order, start, data, config, site)


def _fit_here(
    order: TrainOrder, start: Start, groups: Mapping[str, Tensors], data: SiloData, config: RunConfig
) -> GroupResult:
    """Train in this process, on the workbench that it keeps."""
    bench, method = workbench(config, data.vocab_size), strategy_of(config).local
    write_params(bench.model, start.params)
    if isinstance(start.params, MappedTensors):
        # What was received is needed again after training, and not beside the gradients.
        start.params.release()
    if start.optimizer is None:
        reset_optimizer(bench.optimizer)
    else:
        write_optimizer(bench.model, bench.optimizer, start.optimizer, start.scalars)
    context, collected = _placed(start.context, bench.device), _placed(start.collected, bench.device)
    method.begin(bench.model, bench.optimizer, context)
    stream, figures = batches(order, bench.model, groups, data, config)
    result = trainer(bench, config, order.batch_size).train(
        stream,
        global_step=order.global_step,
        steps=order.steps,
        rows=start.rows,
        hooks=method.hooks(context, collected),
    )
    result = replace(result, figures={**result.figures, **figures})
    states, scalars = read_optimizer(bench.model, bench.optimizer)
    trained = read_params(bench.model)
    if sum(tensor.nbytes for tensor in trained.values()) > LARGE_BYTES:
        release_freed()  # the gradients
    # Of windows that an objective chooses the place in the text counts as if they came in turn.
    position = order.position + order.steps * order.batch_size
    return GroupResult(trained, states, scalars, position, result, collected)


def _placed(groups: StateGroups, device: torch.device) -> StateGroups:
    return {group: {name: t.to(device) for name, t in tensors.items()} for group, tensors in groups.items()}
