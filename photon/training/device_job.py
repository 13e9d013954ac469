"""What a group of processes trains, and the folder in which it gets that and leaves what it trained.

The job folder::

    job.json                what to train
    params.safetensors      the parameters to start from
    optimizer.safetensors   the local optimizer's state groups; scalars.json: its scalars
    rank-N.log              what process N wrote
    trained/                params.safetensors, optimizer.safetensors, scalars.json, result.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from photon.config.schema import Component, MatmulPrecision, ModelSection, SwitchSection
from photon.files.atomic import write_text
from photon.state.tensors import load_groups, save_groups
from photon.training.groups import StateGroups
from photon.training.precision import Precision

#: How a process ends whose last line says why: for the user, or that the training diverged.
USER_ERROR, DIVERGED = 2, 3
#: What a process writes to its standard output after each job.
DONE = b"done\n"


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


def log_file(folder: Path, rank: int) -> Path:
    """Return where a process writes what it has to say."""
    return folder / f"rank-{rank}.log"


def save_state(
    folder: Path,
    params: Mapping[str, Tensor],
    groups: Mapping[str, Mapping[str, Tensor]],
    scalars: Mapping[str, float],
) -> None:
    """Write parameters and the local optimizer's state to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_groups(folder / "params.safetensors", {"params": params})
    save_groups(folder / "optimizer.safetensors", groups)
    write_text(folder / "scalars.json", json.dumps(dict(scalars)))


def load_state(folder: Path) -> tuple[dict[str, Tensor], StateGroups, dict[str, float]]:
    """Return what `save_state` wrote; the tensors are memory maps."""
    params = load_groups(folder / "params.safetensors")["params"]
    groups = load_groups(folder / "optimizer.safetensors")
    scalars: dict[str, float] = json.loads((folder / "scalars.json").read_text())
    return params, groups, scalars
