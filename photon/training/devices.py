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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from photon.code import environment
from photon.config.compose import parse
from photon.config.training import TrainingSection
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
from photon.training.machines import Machines, Meeting, interface_to

_LAST_LINES = 8
_GRACE_SECONDS = 5.0
#: One process's failure takes others with it; waited for, so that the one that says why is among them.
_SETTLE_SECONDS = 0.3
#: Between two looks at how other machines are.
_LOOK_SECONDS = 1.0
#: Where gloo and NCCL look for the network interface to use.
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
#: Exit codes of processes whose last line says why.
_TOLD = (USER_ERROR, DIVERGED)


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


def train_in_group(job: GroupJob, state: GroupState, *, folder: Path, program: Sequence[str]) -> GroupResult:
    """Train in the processes of a silo and return the state as one process would have it.

    How many there are, and on which machines, is in the job's configuration; this machine is the first.

    Parameters
    ----------
    job
        What to train.
    state
        What it starts from.
    folder
        Job folder on a disk that all machines see; what an earlier job left in it is replaced. The returned
        tensors are memory maps of files in it.
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
    training = parse(job.config).training
    machines = Machines.of(training)
    _check(job, training, machines)
    shutil.rmtree(folder, ignore_errors=True)
    save_state(folder, state)
    write_text(folder / "job.json", job.model_dump_json(indent=1))
    try:
        _kept.work(job, machines, folder, program)
    except _DiedBeforeTheJobError:
        # A process that is just dying still counts as alive. A new group takes the job, which nobody began.
        _kept.work(job, machines, folder, program)
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


class _DiedBeforeTheJobError(PhotonError):
    """A process of a kept group had died before it could take the job."""

    def __init__(self) -> None:
        super().__init__("a process of the group died before it could take the job")


@contextlib.contextmanager
def machine_group(
    machines: Machines, machine: int, folder: Path, program: Sequence[str]
) -> Iterator[Callable[[Path], None]]:
    """Start the processes of a machine that is not the first; give what has them do the job of a folder.

    Parameters
    ----------
    machines, machine
        The machines of the silo, and which of them this is.
    folder
        Where the processes log until the first job names its folder.
    program
        The command of each process, as of `ProcessGroup`.
    """
    environments = _environments(machines, machine, machines.port)
    group = ProcessGroup(program, environments, folder, first_rank=machine * machines.each)
    try:
        yield group.work
    finally:
        group.stop()


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
    first_rank
        Rank of the first of them; the others follow.
    trouble
        Asked now and then while they work: why the job cannot be done elsewhere, or None.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        folder: Path,
        *,
        first_rank: int = 0,
        trouble: Callable[[], str | None] | None = None,
    ) -> None:
        self._first_rank = first_rank
        self._trouble = trouble
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, variables in enumerate(environments, first_rank):
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
                raise self._failure(folder)
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
        """Wait for all answers; return False as soon as a process has ended instead.

        Raises
        ------
        PhotonError
            When another machine is in trouble.
        """
        wait = None if self._trouble is None else _LOOK_SECONDS
        with selectors.DefaultSelector() as waiting:
            for process in self._processes:
                waiting.register(_pipe(process.stdout), selectors.EVENT_READ)
            while waiting.get_map():
                for key, _ in waiting.select(wait):
                    said = os.read(key.fd, 4096)
                    if not said:
                        return False
                    if DONE in said:
                        waiting.unregister(key.fileobj)
                if self._trouble is not None and (why := self._trouble()):
                    raise PhotonError(why)
        return True

    def _ended(self) -> list[int]:
        deadline = time.monotonic() + _GRACE_SECONDS
        while not any(process.poll() is not None for process in self._processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        time.sleep(_SETTLE_SECONDS)
        return [index for index, process in enumerate(self._processes) if process.poll() is not None]

    def _failure(self, folder: Path) -> PhotonError:
        ended = self._ended()
        logs = [log_file(folder, self._first_rank + index) for index in range(len(self._processes))]
        if not all(logs[index].exists() for index in ended):
            return _DiedBeforeTheJobError()
        # One that says why comes first: others may fail only because they lost it.
        first = min(ended, key=lambda one: (self._processes[one].returncode not in _TOLD, one))
        code = self._processes[first].returncode
        lines = logs[first].read_text(errors="replace").strip().splitlines()
        if code in _TOLD and lines:
            return TrainingDiverged(lines[-1]) if code == DIVERGED else PhotonError(lines[-1])
        if self._trouble is not None and (why := self._trouble()):
            return PhotonError(why)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = " | ".join(line.strip() for line in lines[-_LAST_LINES:]) or "nothing"
        # Counted on this machine; of another one the meeting place says which it is.
        return PhotonError(
            f"training process {first} of {len(self._processes)} {how}; see {logs[first]}; it said: {said}"
        )


def _pipe(stream: Any) -> io.RawIOBase:
    assert isinstance(stream, io.RawIOBase), "the processes have pipes"
    return stream


class _Kept:
    """The group that this process keeps from one fit to the next."""

    def __init__(self) -> None:
        self._group: ProcessGroup | None = None
        self._built_for: tuple[str, Machines, tuple[str, ...]] | None = None
        self._meeting: Meeting | None = None

    def work(self, job: GroupJob, machines: Machines, folder: Path, program: Sequence[str]) -> None:
        """Have a job done by the group that is there if it fits the job, else by a new one."""
        built_for = (job.fixed(), machines, tuple(program))
        if self._group is None or not self._group.alive or built_for != self._built_for:
            self.stop()
            # They meet at a store that lives here: its port is taken when they start, not only chosen.
            self._meeting = Meeting(machines)
            environments = _environments(machines, 0, self._meeting.port)
            trouble = self._meeting.trouble if machines.count > 1 else None
            self._group = ProcessGroup(program, environments, folder, trouble=trouble)
            self._built_for = built_for
        assert self._meeting is not None
        try:
            self._meeting.publish(folder)
            self._group.work(folder)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        if self._group is not None:
            self._group.stop()
        self._group = self._built_for = self._meeting = None


_kept = _Kept()
atexit.register(_kept.stop)


def _check(job: GroupJob, training: TrainingSection, machines: Machines) -> None:
    processes = machines.processes
    if job.batch_size % processes:
        raise PhotonError(
            f"training.processes={processes} does not divide batch_size={job.batch_size}; choose a divisor"
        )
    rows = job.batch_size // processes
    micro = training.micro_batch_size
    if isinstance(micro, int) and rows % micro:
        raise PhotonError(
            f"micro_batch_size={micro} does not divide the {rows} sequences that each of "
            f"{processes} processes has; choose a divisor"
        )
    if job.device == "cuda" and torch.cuda.device_count() < machines.each:
        raise PhotonError(
            f"training.processes={processes}, {machines.each} on each machine: this machine has "
            f"{torch.cuda.device_count()} GPUs; use as many"
        )
    if training.parallel == "fsdp" and job.precision == "fp16":
        raise PhotonError(
            "training.parallel=fsdp works in bf16 and fp32 alone; set training.precision or parallel=ddp"
        )


def _environments(machines: Machines, machine: int, port: int) -> list[dict[str, str]]:
    """Return the environment of each process of a machine."""
    if machines.count == 1:
        interface: str | None = "lo0" if sys.platform == "darwin" else "lo"
    else:
        interface = interface_to(machines.host, port)
    # Without a name, gloo and NCCL look for an interface by the machine's host name, which need not resolve.
    named = (
        {} if interface is None else dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface)
    )
    threads = str(max(1, torch.get_num_threads() // machines.each))
    return [
        named
        | environment()
        | {
            "RANK": str(machine * machines.each + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(machines.processes),
            "MASTER_ADDR": machines.host,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
        }
        for local in range(machines.each)
    ]
