"""One process of those that train together on several devices of a silo, as `devices.py` starts it."""

import dataclasses
import io
import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from photon.data.loader import WindowStream
from photon.errors import PhotonError
from photon.files.atomic import atomic_directory, write_text
from photon.models.build import build_model
from photon.models.vocabulary import unpack_vocabulary
from photon.training.device_job import (
    DIVERGED,
    DONE,
    USER_ERROR,
    GroupJob,
    load_state,
    log_file,
    save_state,
)
from photon.training.groups import (
    StateGroups,
    read_optimizer,
    read_params,
    reset_optimizer,
    restore_optimizer,
    write_params,
)
from photon.training.loop import (
    LocalTrainer,
    TrainingDiverged,
    TrainResult,
    build_optimizer,
    enable_activation_checkpointing,
)
from photon.training.schedule import build_schedule


def main() -> int:
    """Be one process of the group; the environment says which. Returns the exit code."""
    # Libraries may print; what they print goes to the log, like everything else.
    answers = os.dup(1)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[Path] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    member: _Member | None = None
    try:
        while True:
            folder = jobs.get()
            _log_to(log_file(folder, int(os.environ["RANK"])))
            job = _load_job(folder)
            member = member or _Member(job, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
            member.train(job, folder)
            os.write(answers, DONE)
    except PhotonError as error:
        sys.stderr.write(f"{error}\n")
        return DIVERGED if isinstance(error, TrainingDiverged) else USER_ERROR


def _listen(jobs: "queue.SimpleQueue[Path]") -> None:
    """Pass on jobs until the process that sends them is gone, and then end this one, whatever it is doing."""
    # Unbuffered: a buffered reader must not be held by a thread when the interpreter ends.
    with io.FileIO(0, closefd=False) as lines:
        for line in lines:
            jobs.put(Path(json.loads(line)))
    os._exit(0)


def _log_to(path: Path) -> None:
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


class _GroupTrainer(LocalTrainer):
    """One process's part of the local loop."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        job: GroupJob,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self._rows = job.batch_size // world
        super().__init__(
            model,
            optimizer,
            build_schedule(job.schedule.as_mapping(), job.total_steps, job.batch_size),
            batch_size=job.batch_size,
            micro_batch_size=job.micro_batch_size or self._rows,
            clip_norm=job.clip_norm,
            precision=job.precision,
            device=device,
            switch=job.switch,
        )
        self._first_row = rank * self._rows
        self._replicas = None if isinstance(model, FSDPModule) else _replicate(model, device)
        self._forward = self._replicas or model
        if job.compile:
            self._forward = torch.compile(self._forward)  # type: ignore[assignment]

    def _next_batch(self, stream: WindowStream) -> Tensor:
        batch = stream.next_batch(self.batch_size)[self._first_row : self._first_row + self._rows]
        return self._to_device(batch)

    def _before_pass(self, *, last: bool) -> None:
        if self._replicas is not None:
            self._replicas.require_backward_grad_sync = last
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)

    def _gradient_norm(self) -> Tensor:
        return _whole(super()._gradient_norm())


class _Member:
    """One process of a group: what it keeps from one job to the next.

    Parameters
    ----------
    job
        The first job; its fixed part holds for all.
    """

    def __init__(self, job: GroupJob, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        torch.set_float32_matmul_precision(job.matmul_precision)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        self._model = _build(job, self._device)
        self._optimizer = build_optimizer(job.optimizer.as_mapping(), self._model)
        self._trainer = _GroupTrainer(self._model, self._optimizer, job, rank, world, self._device)

    def train(self, job: GroupJob, folder: Path) -> None:
        """Train from the state in ``folder`` and leave the trained state there."""
        self._load(folder)
        # Dropout must not draw the same mask for the rows of different processes.
        torch.manual_seed(job.global_step * self._world + self._rank)
        stream = WindowStream(
            [np.load(path, mmap_mode="r", allow_pickle=False) for path in job.windows],
            job.stream_seed,
            job.position,
        )
        vocabulary = None
        if job.vocabulary is not None:
            vocabulary = unpack_vocabulary(job.vocabulary, self._model.config.vocab_size)
        result = self._trainer.train(
            stream, global_step=job.global_step, steps=job.steps, vocabulary=vocabulary
        )
        result = _mean_over_ranks(result, self._device)
        _save_result(folder, self._model, self._optimizer, result, stream.position)
        if self._device.type == "cuda":
            # Until the next job the device may serve the process that evaluates.
            torch.cuda.empty_cache()

    def _load(self, folder: Path) -> None:
        params, groups, scalars = load_state(folder)
        write_params(self._model, _placed_like(self._model, {"params": params})["params"])
        if groups:
            restore_optimizer(self._model, self._optimizer, _placed_like(self._model, groups), scalars)
        else:
            reset_optimizer(self._optimizer)


def _load_job(folder: Path) -> GroupJob:
    try:
        return GroupJob.model_validate_json((folder / "job.json").read_text())
    except (OSError, ValidationError) as error:
        raise PhotonError(f"{folder / 'job.json'}: not a job ({' '.join(str(error).split())})") from error


def _build(job: GroupJob, device: torch.device) -> PreTrainedModel:
    model = build_model(job.model, job.vocab_size, seed=0)
    if job.activation_checkpointing:
        enable_activation_checkpointing(model)
    if job.parallel == "fsdp":
        return _shard(model, device)
    nn.Module.to(model, device)
    return model


def _shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shard every block by itself, so that only one of them is whole at a time, and then the rest."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def _placed_like(model: nn.Module, groups: StateGroups) -> StateGroups:
    """Shard the tensors of ``groups`` as the parameters of ``model`` are."""
    params = read_params(model)
    return {
        group: {name: _place(tensor, params.get(name), name, group) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }


def _place(tensor: Tensor, parameter: Tensor | None, name: str, group: str) -> Tensor:
    if not isinstance(parameter, DTensor):
        return tensor
    if tensor.shape != parameter.shape:
        raise PhotonError(
            f"{group} of {name} has not its parameter's shape and cannot be sharded; "
            "use training.parallel=ddp"
        )
    local = tensor.to(parameter.device)
    # Every process has the whole tensor already, so there is nothing to send.
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _mean_over_ranks(result: TrainResult, device: torch.device) -> TrainResult:
    losses = torch.tensor([result.loss, result.loss_last], dtype=torch.float64, device=device)
    dist.all_reduce(losses)
    loss, loss_last = (losses / dist.get_world_size()).tolist()
    return dataclasses.replace(result, loss=loss, loss_last=loss_last)


def _save_result(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, result: TrainResult, position: int
) -> None:
    groups, scalars = read_optimizer(model, optimizer)
    # Gathering takes all processes; only the first keeps what it gets.
    params = _gather(read_params(model))
    groups = {group: _gather(tensors) for group, tensors in groups.items()}
    if dist.get_rank() != 0:
        return
    with atomic_directory(folder / "trained") as trained:
        save_state(trained, params, groups, scalars)
        outcome: dict[str, Any] = {"position": position, "result": dataclasses.asdict(result)}
        write_text(trained / "result.json", json.dumps(outcome))


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor)
        if dist.get_rank() == 0:
            kept[name] = whole.cpu()
    return kept


if __name__ == "__main__":
    sys.exit(main())
