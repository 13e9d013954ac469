"""Several devices of one silo that train together as if they were one.

Every process takes its rows of each batch, and gradients are averaged over the processes, so the result is
that of one process with the whole batch. The group is kept from one fit to the next, with model, compiled
graph and process group. It gets each job as the name of a folder on its standard input, and leaves the
trained state groups there. When that input is closed, for whatever reason, the processes end: they cannot
outlive the one that started them. A silo with one device pays nothing for all this.
"""

import atexit
import contextlib
import io
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from photon.code import environment
from photon.config.compose import parse
from photon.errors import PhotonError
from photon.files.atomic import write_text
from photon.training.device_job import (
    DIVERGED,
    DONE,
    USER_ERROR,
    GroupJob,
    GroupState,
    load_state,
    log_file,
    save_state,
)
from photon.training.groups import StateGroups
from photon.training.loop import TrainingDiverged, TrainResult

_LAST_LINES = 8
_GRACE_SECONDS = 5.0
#: One process's failure takes others with it; waited for, so that the one that says why is among them.
_SETTLE_SECONDS = 0.3


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
    collected : StateGroups
        What the strategy's hooks have changed.
    shared : StateGroups
        What the objective gives to other silos.
    """

    params: dict[str, Tensor]
    groups: StateGroups
    scalars: dict[str, float]
    position: int
    result: TrainResult
    collected: StateGroups = field(default_factory=dict)
    shared: StateGroups = field(default_factory=dict)


def train_in_group(
    job: GroupJob, state: GroupState, *, processes: int, folder: Path, program: Sequence[str]
) -> GroupResult:
    """Train in ``processes`` processes on this machine and return the state as one process would have it.

    Parameters
    ----------
    job
        What to train.
    state
        What it starts from.
    processes
        Number of processes, each with its own device.
    folder
        Job folder on a local disk; what an earlier job left in it is replaced. The returned tensors are
        memory maps of files in it.
    program
        The command of each process, as of `ProcessGroup`.

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
    save_state(folder, state)
    write_text(folder / "job.json", job.model_dump_json(indent=1))
    try:
        _kept.group(job, processes, folder, program).work(folder)
    except _DiedBeforeTheJobError:
        # A process that is just dying still counts as alive. A new group takes the job, which nobody began.
        _kept.group(job, processes, folder, program).work(folder)
    trained = load_state(folder / "trained")
    outcome = json.loads((folder / "trained" / "result.json").read_text())
    return GroupResult(
        dict(trained.params),
        {group: dict(tensors) for group, tensors in trained.groups.items()},
        dict(trained.scalars),
        outcome["position"],
        TrainResult(**outcome["result"]),
        {group: dict(tensors) for group, tensors in trained.collected.items()},
    )


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
                with open(log_file(folder, rank), "wb") as log:
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
                if not all(log_file(folder, rank).exists() for rank in ended):
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
                    if DONE in said:
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
        self._built_for: tuple[str, int, tuple[str, ...]] | None = None
        self._store: dist.TCPStore | None = None

    def group(self, job: GroupJob, processes: int, folder: Path, program: Sequence[str]) -> ProcessGroup:
        """Return the group that is there if it fits the job, else a new one."""
        built_for = (job.fixed(), processes, tuple(program))
        if self._group is None or not self._group.alive or built_for != self._built_for:
            self.stop()
            # They meet at a store that lives here: its port is taken when they start, not only chosen.
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environments = [_environment(rank, processes, self._store.port) for rank in range(processes)]
            self._group = ProcessGroup(program, environments, folder)
            self._built_for = built_for
        return self._group

    def stop(self) -> None:
        if self._group is not None:
            self._group.stop()
        self._group = self._built_for = self._store = None


_kept = _Kept()
atexit.register(_kept.stop)


def _check(job: GroupJob, processes: int) -> None:
    if job.batch_size % processes:
        raise PhotonError(
            f"training.processes={processes} does not divide batch_size={job.batch_size}; choose a divisor"
        )
    training, rows = parse(job.config).training, job.batch_size // processes
    micro = training.micro_batch_size
    if isinstance(micro, int) and rows % micro:
        raise PhotonError(
            f"micro_batch_size={micro} does not divide the {rows} sequences that each of "
            f"{processes} processes has; choose a divisor"
        )
    if job.device == "cuda" and torch.cuda.device_count() < processes:
        raise PhotonError(
            f"training.processes={processes}: this machine has {torch.cuda.device_count()} GPUs; use as many"
        )
    if training.parallel == "fsdp" and job.precision == "fp16":
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
    rank = min(failed, key=lambda one: (processes[one].returncode not in (USER_ERROR, DIVERGED), one))
    code, world = processes[rank].returncode, len(processes)
    lines = log_file(folder, rank).read_text(errors="replace").strip().splitlines()
    if code in (USER_ERROR, DIVERGED) and lines:
        return TrainingDiverged(lines[-1]) if code == DIVERGED else PhotonError(lines[-1])
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    said = " | ".join(line.strip() for line in lines[-_LAST_LINES:]) or "nothing"
    return PhotonError(
        f"training process {rank} of {world} {how}; see {log_file(folder, rank)}; it said: {said}"
    )
