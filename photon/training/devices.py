"""Several devices of one silo that train together as if they were one.

Every process takes its rows of each batch, and gradients are averaged over the processes, so the result is
that of one process with the whole batch. The group is kept from one fit to the next, with model, compiled
graph and process group. It gets each job as the name of a folder on its standard input, and leaves the
trained state groups there. When that input is closed, for whatever reason, the processes end: they cannot
outlive the one that started them. A silo with one device pays nothing for all this.

The job folder::

    job.json                what to train
    params.safetensors      the parameters to start from
    optimizer.safetensors   the local optimizer's state groups; scalars.json: its scalars
    rank-N.log              what process N wrote
    trained/                params.safetensors, optimizer.safetensors, scalars.json, result.json
"""

import atexit
import contextlib
import dataclasses
import io
import json
import os
import queue
import selectors
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from photon.code import command, environment
from photon.config.schema import Component, MatmulPrecision, ModelSection, SwitchSection
from photon.data.loader import WindowStream
from photon.errors import PhotonError
from photon.files.atomic import atomic_directory, write_text
from photon.models.build import build_model
from photon.models.vocabulary import unpack_vocabulary
from photon.state.tensors import load_groups, save_groups
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
from photon.training.precision import Precision
from photon.training.schedule import build_schedule

_USER_ERROR, _DIVERGED = 2, 3
_LAST_LINES = 8
_GRACE_SECONDS = 5.0
#: One process's failure takes others with it; waited for, so that the one that says why is among them.
_SETTLE_SECONDS = 0.3
_DONE = b"done\n"


class GroupJob(BaseModel):
    """What a group of processes trains: the sections of the configuration with everything resolved.

    Attributes
    ----------
    model, vocab_size
        What `build_model` takes. The parameters come from the caller.
    optimizer, schedule, total_steps
        The local optimizer, the learning-rate schedule and the length of the run that it may span.
    batch_size
        Sequences per local step, over all processes.
    micro_batch_size
        Sequences per forward pass and process; None: all that the process has.
    clip_norm, precision, compile, activation_checkpointing, switch
        As in `LocalTrainer`.
    matmul_precision
        As `torch.set_float32_matmul_precision` takes it.
    parallel
        ``"ddp"``: every process holds the whole state; ``"fsdp"``: parameters, gradients and optimizer state
        are sharded over the processes.
    device
        ``"cpu"``, or ``"cuda"`` for one GPU per process.
    windows
        The ``.npy`` files that the window stream concatenates.
    stream_seed, position
        Order of the windows, and how many were taken already.
    global_step, steps
        First step of the run to take, and how many.
    vocabulary
        Tokens that the softmax runs over, as `pack_vocabulary` writes them; None: all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSection
    vocab_size: int
    optimizer: Component
    schedule: Component
    total_steps: int
    batch_size: int
    micro_batch_size: int | None
    clip_norm: float | None
    precision: Precision
    matmul_precision: MatmulPrecision = "highest"
    compile: bool = False
    activation_checkpointing: bool = False
    switch: SwitchSection | None = None
    parallel: Literal["ddp", "fsdp"]
    device: Literal["cpu", "cuda"]
    windows: list[Path]
    stream_seed: int
    position: int
    global_step: int
    steps: int
    vocabulary: str | None = None

    #: What the same processes can be given anew.
    PER_FIT: ClassVar = frozenset(
        {"windows", "stream_seed", "position", "global_step", "steps", "vocabulary"}
    )

    def fixed(self) -> str:
        """Return, as text, the part of the job that the processes are built for."""
        return self.model_dump_json(by_alias=True, exclude=set(self.PER_FIT))


@dataclass(frozen=True)
class GroupResult:
    """What a group of processes trained.

    Attributes
    ----------
    params : dict[str, Tensor]
        The trained parameters, whole, on the CPU.
    groups : StateGroups
        The local optimizer's state groups, whole, on the CPU.
    scalars : dict[str, float]
        The local optimizer's scalars.
    position : int
        Windows taken so far.
    result : TrainResult
        As one process would have reported it.
    """

    params: dict[str, Tensor]
    groups: StateGroups
    scalars: dict[str, float]
    position: int
    result: TrainResult


def train_in_group(
    job: GroupJob,
    params: Mapping[str, Tensor],
    groups: Mapping[str, Mapping[str, Tensor]],
    scalars: Mapping[str, float],
    *,
    processes: int,
    folder: Path,
) -> GroupResult:
    """Train in ``processes`` processes on this machine and return the state as one process would have it.

    Parameters
    ----------
    job
        What to train.
    params
        The parameters to start from.
    groups, scalars
        The local optimizer's state as `read_optimizer` returns it; empty for a new one.
    processes
        Number of processes, each with its own device.
    folder
        Job folder on a local disk; what an earlier job left in it is replaced. The returned tensors are
        memory maps of files in it.

    Raises
    ------
    TrainingDiverged
        When the loss or the gradient norm is not finite.
    PhotonError
        When the job cannot be shared by so many processes, or a process fails; the message ends with the
        last lines that it wrote.
    """
    _check(job, processes)
    shutil.rmtree(folder, ignore_errors=True)
    _save_state(folder, params, groups, scalars)
    write_text(folder / "job.json", job.model_dump_json(by_alias=True, indent=1))
    try:
        _kept.group(job, processes, folder).work(folder)
    except _DiedBeforeTheJobError:
        # A process that is just dying still counts as alive. A new group takes the job, which nobody began.
        _kept.group(job, processes, folder).work(folder)
    trained = folder / "trained"
    outcome = json.loads((trained / "result.json").read_text())
    return GroupResult(*_load_state(trained), outcome["position"], TrainResult(**outcome["result"]))


def stop_group() -> None:
    """End the processes that were kept for the next fit, if there are any."""
    _kept.stop()


class _DiedBeforeTheJobError(Exception):
    """A process of a kept group had died before it could take the job."""


class ProcessGroup:
    """Processes that take one job after the other, all of them together.

    Parameters
    ----------
    command
        What each process runs. It reads lines from its standard input, each the JSON text of a folder, writes
        ``done`` to its standard output after each job, and ends when its standard input is closed.
    environments
        One per process.
    folder
        Where the processes log until the first job names its folder.
    """

    def __init__(
        self, command: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path
    ) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, variables in enumerate(environments):
                with open(_log(folder, rank), "wb") as log:
                    process = subprocess.Popen(
                        command,
                        env=variables,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        bufsize=0,
                    )
                self._processes.append(process)
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        """Whether all processes are there for another job."""
        return bool(self._processes) and all(process.poll() is None for process in self._processes)

    def work(self, folder: Path) -> None:
        """Have the processes do the job in ``folder``; when one fails, stop the others.

        Raises
        ------
        TrainingDiverged, PhotonError
            When a process fails, with what it wrote last to ``folder/rank-N.log``.
        """
        try:
            for process in self._processes:
                # One that is gone already is found below.
                with contextlib.suppress(BrokenPipeError):
                    _pipe(process.stdin).write(f"{json.dumps(str(folder))}\n".encode())
            if not self._all_done():
                ended = self._ended()
                if not all(_log(folder, rank).exists() for rank in ended):
                    raise _DiedBeforeTheJobError
                raise _failure(self._processes, ended, folder)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            _pipe(process.stdin).close()
            # One that is still importing does not listen yet.
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _pipe(process.stdout).close()
        self._processes = []

    def _all_done(self) -> bool:
        """Wait for all answers; return False as soon as a process has ended instead."""
        with selectors.DefaultSelector() as waiting:
            for process in self._processes:
                waiting.register(_pipe(process.stdout), selectors.EVENT_READ)
            while waiting.get_map():
                for key, _ in waiting.select():
                    said = os.read(key.fd, 4096)
                    if not said:
                        return False
                    if _DONE in said:
                        waiting.unregister(key.fileobj)
        return True

    def _ended(self) -> list[int]:
        deadline = time.monotonic() + _GRACE_SECONDS
        while not any(process.poll() is not None for process in self._processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        time.sleep(_SETTLE_SECONDS)
        return [rank for rank, process in enumerate(self._processes) if process.poll() is not None]


def _pipe(stream: Any) -> io.RawIOBase:
    assert isinstance(stream, io.RawIOBase), "the processes have pipes"
    return stream


class _Kept:
    """The group that this process keeps from one fit to the next."""

    def __init__(self) -> None:
        self._group: ProcessGroup | None = None
        self._built_for: tuple[str, int] | None = None
        self._store: dist.TCPStore | None = None

    def group(self, job: GroupJob, processes: int, folder: Path) -> ProcessGroup:
        """Return the group that is there if it fits the job, else a new one."""
        built_for = (job.fixed(), processes)
        if self._group is None or not self._group.alive or built_for != self._built_for:
            self.stop()
            # They meet at a store that lives here: its port is taken when they start, not only chosen.
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environments = [_environment(rank, processes, self._store.port) for rank in range(processes)]
            self._group = ProcessGroup(command("photon.training.devices"), environments, folder)
            self._built_for = built_for
        return self._group

    def stop(self) -> None:
        if self._group is not None:
            self._group.stop()
        self._group = self._built_for = self._store = None


_kept = _Kept()
atexit.register(_kept.stop)


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
            _log_to(_log(folder, int(os.environ["RANK"])))
            job = _load_job(folder)
            member = member or _Member(job, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
            member.train(job, folder)
            os.write(answers, _DONE)
    except PhotonError as error:
        sys.stderr.write(f"{error}\n")
        return _DIVERGED if isinstance(error, TrainingDiverged) else _USER_ERROR


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


def _check(job: GroupJob, processes: int) -> None:
    if job.batch_size % processes:
        raise PhotonError(
            f"training.processes={processes} does not divide batch_size={job.batch_size}; choose a divisor"
        )
    rows = job.batch_size // processes
    if job.micro_batch_size is not None and rows % job.micro_batch_size:
        raise PhotonError(
            f"micro_batch_size={job.micro_batch_size} does not divide the {rows} sequences that each of "
            f"{processes} processes has; choose a divisor"
        )
    if job.device == "cuda" and torch.cuda.device_count() < processes:
        raise PhotonError(
            f"training.processes={processes}: this machine has {torch.cuda.device_count()} GPUs; use as many"
        )
    if job.parallel == "fsdp" and job.precision == "fp16":
        raise PhotonError(
            "training.parallel=fsdp works in bf16 and fp32 alone; set training.precision or parallel=ddp"
        )


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    here = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // world)),
    }
    # Without a name, gloo and NCCL look for an interface by the machine's host name, which need not resolve.
    return {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback} | environment() | here


def _failure(
    processes: Sequence[subprocess.Popen[bytes]], failed: Sequence[int], folder: Path
) -> PhotonError:
    # One that says why comes first: others may fail only because they lost it.
    rank = min(failed, key=lambda one: (processes[one].returncode not in (_USER_ERROR, _DIVERGED), one))
    code, world = processes[rank].returncode, len(processes)
    lines = _log(folder, rank).read_text(errors="replace").strip().splitlines()
    if code in (_USER_ERROR, _DIVERGED) and lines:
        return TrainingDiverged(lines[-1]) if code == _DIVERGED else PhotonError(lines[-1])
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    said = " | ".join(line.strip() for line in lines[-_LAST_LINES:]) or "nothing"
    return PhotonError(f"training process {rank} of {world} {how}; see {_log(folder, rank)}; it said: {said}")


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


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
        params, groups, scalars = _load_state(folder)
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
        _save_state(trained, params, groups, scalars)
        outcome: dict[str, Any] = {"position": position, "result": dataclasses.asdict(result)}
        write_text(trained / "result.json", json.dumps(outcome))


def _gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor)
        if dist.get_rank() == 0:
            kept[name] = whole.cpu()
    return kept


def _save_state(
    folder: Path,
    params: Mapping[str, Tensor],
    groups: Mapping[str, Mapping[str, Tensor]],
    scalars: Mapping[str, float],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_groups(folder / "params.safetensors", {"params": params})
    save_groups(folder / "optimizer.safetensors", groups)
    write_text(folder / "scalars.json", json.dumps(dict(scalars)))


def _load_state(folder: Path) -> tuple[dict[str, Tensor], StateGroups, dict[str, float]]:
    params = load_groups(folder / "params.safetensors")["params"]
    groups = load_groups(folder / "optimizer.safetensors")
    scalars: dict[str, float] = json.loads((folder / "scalars.json").read_text())
    return params, groups, scalars


if __name__ == "__main__":
    sys.exit(main())
