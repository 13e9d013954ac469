"""What a group of processes trains, and how it gets that and leaves what it trained.

Processes take one job after the other, each as the name of a folder on their standard input::

    job.json                what to train
    params.safetensors      the parameters to start from
    optimizer.safetensors   the local optimizer's state groups; scalars.json: its scalars
    context.safetensors     what the strategy's hooks read; collected.safetensors: what they change
    rank-N.log              what process N wrote
    trained/                result.json, and the same files of tensors
"""

import io
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from photon.errors import PhotonError
from photon.files.atomic import write_text
from photon.state.tensors import load_groups, save_groups
from photon.training.loop import TrainingDiverged
from photon.training.precision import Precision

#: How a process ends whose last line says why: for the user, or that the training diverged.
USER_ERROR, DIVERGED = 2, 3
#: What a process writes to its standard output after each job.
DONE = b"done\n"


class GroupJob(BaseModel):
    """What a group of processes trains.

    Attributes
    ----------
    config
        Text of the configuration, from which each process builds what one process would.
    vocab_size
        Number of entries of the tokenizer.
    batch_size
        Sequences per local step, over all processes.
    precision
        Format of the forward and backward pass.
    device
        ``"cpu"``, or ``"cuda"`` for one GPU per process.
    arrays
        Name of an array of a batch to the ``.npy`` files that its stream concatenates.
    sequence_length
        Tokens that a window counts for.
    stream_seed, position
        Order of the windows, and how many were taken already.
    global_step, steps
        First step of the run to take, and how many.
    rows
        Rows of the vocabulary that the softmax runs over, as `pack_vocabulary` writes them; None: all.
    draw_seed
        Of the round's draws, from which each process makes one of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    vocab_size: int
    batch_size: int
    precision: Precision
    device: Literal["cpu", "cuda"]
    arrays: dict[str, list[Path]]
    sequence_length: int
    stream_seed: int
    position: int
    global_step: int
    steps: int
    rows: str | None = None
    draw_seed: int

    #: What the same processes can be given anew.
    PER_FIT: ClassVar = frozenset(
        {"arrays", "sequence_length", "stream_seed", "position", "global_step", "steps", "rows", "draw_seed"}
    )

    def fixed(self) -> str:
        """Return, as text, the part of the job that the processes are built for."""
        return self.model_dump_json(exclude=set(self.PER_FIT))


@dataclass(frozen=True)
class GroupState:
    """The tensors of a job.

    Attributes
    ----------
    params
        The parameters.
    groups, scalars
        The local optimizer's state as `read_optimizer` returns it; empty for a new one.
    context, collected
        State groups that the strategy's hooks read, and that they change: each tensor has the name and the
        shape of a parameter.
    """

    params: Mapping[str, Tensor]
    groups: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    context: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    collected: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def load_job(folder: Path) -> GroupJob:
    """Read what to train.

    Raises
    ------
    PhotonError
        When it is not a job.
    """
    try:
        return GroupJob.model_validate_json((folder / "job.json").read_text())
    except (OSError, ValidationError) as error:
        raise PhotonError(f"{folder / 'job.json'}: not a job ({' '.join(str(error).split())})") from error


def save_state(folder: Path, state: GroupState) -> None:
    """Write the tensors of a job to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_groups(folder / "params.safetensors", {"params": state.params})
    save_groups(folder / "optimizer.safetensors", state.groups)
    save_groups(folder / "context.safetensors", state.context)
    save_groups(folder / "collected.safetensors", state.collected)
    write_text(folder / "scalars.json", json.dumps(dict(state.scalars)))


def load_state(folder: Path) -> GroupState:
    """Return what `save_state` wrote; the tensors are memory maps."""
    return GroupState(
        load_groups(folder / "params.safetensors")["params"],
        load_groups(folder / "optimizer.safetensors"),
        json.loads((folder / "scalars.json").read_text()),
        load_groups(folder / "context.safetensors"),
        load_groups(folder / "collected.safetensors"),
    )


def log_file(folder: Path, rank: int) -> Path:
    """Return where a process writes what it has to say."""
    return folder / f"rank-{rank}.log"


def serve(work: Callable[[Path], None]) -> int:
    """Be a process of a group: do one job after the other, and return the exit code.

    Parameters
    ----------
    work
        Does the job in a folder.
    """
    # Libraries may print; what they print goes to the log, like everything else.
    answers = os.dup(1)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[Path] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    try:
        while True:
            folder = jobs.get()
            _log_to(log_file(folder, int(os.environ["RANK"])))
            work(folder)
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
