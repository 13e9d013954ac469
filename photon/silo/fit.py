"""The fit of an order: the local steps, taken in this process or in a group of them."""

from collections.abc import Mapping

import torch

from photon.config.schema import RunConfig
from photon.data.loader import BatchStream, stream_seed
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.files.memory import LARGE_BYTES, release_freed
from photon.link.messages import TrainOrder
from photon.link.transport import MappedTensors
from photon.silo.group import fit_in_group
from photon.silo.masks import masked
from photon.silo.runtime import method_of, trainer, workbench
from photon.silo.site import SiloSite
from photon.strategy.base import sparse_training
from photon.training.devices import GroupResult
from photon.training.groups import (
    OptimizerState,
    Tensors,
    read_optimizer,
    read_params,
    reset_optimizer,
    restore_optimizer,
    write_params,
)


def fit(
    order: TrainOrder,
    params: Tensors,
    state: OptimizerState | None,
    data: PreparedData,
    config: RunConfig,
    site: SiloSite,
    vocabulary: torch.Tensor | None,
) -> GroupResult:
    """Train, here or in a group of processes; undo what the strategy does not want trained."""
    if config.training.processes > 1:
        if sparse_training(config) is not None:
            raise PhotonError("training.processes: a sparse strategy trains in one process; set it to 1")
        fitted = fit_in_group(order, params, state, data, config, site, vocabulary)
    else:
        fitted = _fit_here(order, params, state, data, config, vocabulary)
    return masked(fitted, order, params, data, config, vocabulary)


def _fit_here(
    order: TrainOrder,
    params: Mapping[str, torch.Tensor],
    state: OptimizerState | None,
    data: PreparedData,
    config: RunConfig,
    vocabulary: torch.Tensor | None,
) -> GroupResult:
    """Train in this process, on the workbench that it keeps."""
    bench = workbench(config, data.manifest.vocab_size)
    write_params(bench.model, params)
    if isinstance(params, MappedTensors):
        # What was received is needed again after training, and not beside the gradients.
        params.release()
    if state is None:
        reset_optimizer(bench.optimizer)
    else:
        restore_optimizer(bench.model, bench.optimizer, *state)
    method = method_of(config)
    method.begin(bench.model, bench.optimizer, {})
    windows = [data.windows(member, "train") for member in order.members]
    stream = BatchStream({"tokens": windows}, stream_seed(config.seed, order.members), order.position)
    result = trainer(bench, config, order.batch_size).train(
        stream,
        global_step=order.global_step,
        steps=order.steps,
        rows=vocabulary,
        hooks=method.hooks({}, {}),
    )
    groups, scalars = read_optimizer(bench.model, bench.optimizer)
    trained = read_params(bench.model)
    if sum(tensor.nbytes for tensor in trained.values()) > LARGE_BYTES:
        release_freed()  # the gradients
    return GroupResult(trained, groups, scalars, stream.position, result)
