"""What the processes of a group share while they train: batches, gradients, and perhaps the state itself."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from photon.config.training import TrainingSection, TransitionSection
from photon.data.loader import BatchStream
from photon.errors import PhotonError
from photon.training.groups import StateGroups, read_params
from photon.training.hooks import NO_HOOKS, Batch, CountFunction, LossFunction, StepHooks
from photon.training.loop import LocalTrainer, TrainResult
from photon.training.precision import Precision
from photon.training.schedule import Schedule


def join_group(device: torch.device) -> None:
    """Meet the other processes, as the environment says where; ``device`` is this one's."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


class GroupTrainer(LocalTrainer):
    """One process's part of the local loop: its rows of each batch, and gradients that all of them share.

    Parameters
    ----------
    model, optimizer, schedule, loss, count
        As of `LocalTrainer`; the model is placed by `place_model`.
    training
        Micro-batch size, clipping and compilation.
    batch_size
        Sequences per local step, over all processes.
    precision, device, transition
        As of `LocalTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        loss: LossFunction,
        count: CountFunction,
        training: TrainingSection,
        batch_size: int,
        precision: Precision,
        device: torch.device,
        transition: TransitionSection | None,
    ) -> None:
        self._world = dist.get_world_size()
        self._own_rows = batch_size // self._world
        assert training.micro_batch_size != "auto", "the configuration refuses it"
        super().__init__(
            model,
            optimizer,
            schedule,
            loss=loss,
            count=count,
            batch_size=batch_size,
            micro_batch_size=training.micro_batch_size or self._own_rows,
            clip_norm=training.clip_norm,
            precision=precision,
            device=device,
            transition=transition,
        )
        self._first_row = dist.get_rank() * self._own_rows
        self._replicas = None if isinstance(model, FSDPModule) else _replicate(model, device)
        self._forward = self._replicas or model
        # Shards are compiled where they are placed, block by block.
        if training.compile and self._replicas is not None:
            self._forward = torch.compile(self._forward, mode=training.compile_mode)  # type: ignore[assignment]

    def train(
        self,
        stream: BatchStream,
        *,
        global_step: int,
        steps: int,
        on_step: Callable[[int, float], None] | None = None,
        rows: Tensor | None = None,
        hooks: StepHooks = NO_HOOKS,
    ) -> TrainResult:
        """Take the steps together; the result is that of one process with all rows. See `LocalTrainer.train`.

        Raises
        ------
        PhotonError
            When the loss gets a term, and the parameters that it is of are sharded.
        """
        if hooks.term is not None and isinstance(self.model, FSDPModule):
            raise PhotonError(
                "training.parallel=fsdp: the strategy adds a term to the loss, which needs whole parameters; "
                "set training.parallel=ddp"
            )
        result = super().train(
            stream, global_step=global_step, steps=steps, on_step=on_step, rows=rows, hooks=hooks
        )
        return _mean_over_ranks(result, self.device)

    def _next_batch(self, stream: BatchStream) -> Batch:
        rows = slice(self._first_row, self._first_row + self._own_rows)
        batch = stream.next_batch(self.batch_size)
        return {name: self._to_device(array[rows]) for name, array in batch.items()}

    def _items(self, count: Tensor) -> Tensor:
        dist.all_reduce(count)
        # Gradients are averaged over the processes, and are to be added up.
        return super()._items(count) / self._world

    def _before_pass(self, *, last: bool) -> None:
        if self._replicas is not None:
            self._replicas.require_backward_grad_sync = last
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)

    def _gradient_norm(self) -> Tensor:
        return _whole(super()._gradient_norm())


def place_model(
    model: PreTrainedModel, training: TrainingSection, precision: Precision, device: torch.device
) -> PreTrainedModel:
    """Move a model to this process's device: all of it, or with ``parallel="fsdp"`` this process's shard.

    Parameters
    ----------
    model
        The whole model, on the CPU.
    training
        How it is shared, and whether its blocks are compiled.
    precision
        Format of the forward and backward pass.
    device
        This process's.
    """
    if training.parallel != "fsdp":
        nn.Module.to(model, device)
        return model
    # Gradients are added up in float32 whatever the blocks work in.
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if training.narrows(precision)
        else MixedPrecisionPolicy()
    )
    # Every block by itself, so that only one of them is whole at a time, and then the rest.
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    kinds = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    for block in blocks:
        if training.compile:
            # One graph serves all blocks, and what gathers a block stays outside of it.
            block.compile(mode=training.compile_mode)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for block, following in itertools.pairwise(blocks):
        # Gathered while the block before is at work, also where the host is late.
        cast(FSDPModule, block).set_modules_to_forward_prefetch([cast(FSDPModule, following)])
    return model


def placed_like(model: nn.Module, groups: Mapping[str, Mapping[str, Tensor]]) -> StateGroups:
    """Return the tensors of ``groups`` where the parameters of ``model`` are, sharded if those are."""
    params = read_params(model)
    return {
        group: {name: _place(tensor, params.get(name), name, group) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }


def gather(groups: Mapping[str, Mapping[str, Tensor]]) -> StateGroups:
    """Return the tensors of ``groups``, whole and on the CPU, in the first process, and none in the others.

    All processes must take part.
    """
    return {group: _gather(tensors) for group, tensors in groups.items()}


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor)
        if dist.get_rank() == 0:
            kept[name] = whole.cpu()
    return kept


def _place(tensor: Tensor, parameter: Tensor | None, name: str, group: str) -> Tensor:
    if parameter is None:
        return tensor
    local = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return local
    if tensor.shape != parameter.shape:
        raise PhotonError(
            f"{group} of {name} has not its parameter's shape and cannot be sharded; "
            "use training.parallel=ddp"
        )
    # Every process has the whole tensor already, so there is nothing to send.
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    devices = [device] if device.type == "cuda" else None
    # An architecture may have parameters that its loss does not depend on, and experts that no token took.
    return DistributedDataParallel(
        model,
        device_ids=devices,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )


def _mean_over_ranks(result: TrainResult, device: torch.device) -> TrainResult:
    told = [result.loss, result.loss_last, *result.figures.values()]
    means = torch.tensor(told, dtype=torch.float64, device=device)
    dist.all_reduce(means)
    loss, loss_last, *figures = (means / dist.get_world_size()).tolist()
    return dataclasses.replace(
        result, loss=loss, loss_last=loss_last, figures=dict(zip(result.figures, figures, strict=True))
    )
