"""What a federation within another one is told by that: where to start from, and which rounds to train.

It lies in the folder of the inner federation's run, because its ServerApp may be another process than the one
that was asked::

    RUN_DIR/assignment/assignment.json      class Assignment
    RUN_DIR/assignment/groups.safetensors   state groups as they came
    RUN_DIR/start.safetensors               parameters that its first round starts from
    RUN_DIR/evaluation.json                 the answer, if a model was to be evaluated
    RUN_DIR/description.json                the silos together
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.config.renamed import renamed
from photon.config.tree import RoutedTag
from photon.errors import PhotonError
from photon.files.atomic import atomic_directory, remove_leftovers, write_text
from photon.state.checkpoint import Checkpoint, Received
from photon.state.tensors import save_groups

_FOLDER = "assignment"
#: What a federation within another one has found for that.
EVALUATION = "evaluation.json"
#: What its silos are together.
DESCRIPTION = "description.json"


class Assignment(BaseModel):
    """Rounds to train, or a model to evaluate, for the federation above.

    Attributes
    ----------
    kind
        ``"describe"``: describe the silos together; ``"evaluate"``: evaluate the model that came on every
        silo; ``"train"``: train.
    round, model_id
        Round of the federation above, and the model that it is from.
    begins, ends
        Own rounds: the one to go on from, and the last one to train. To evaluate, the one whose key layers
        are the federation's own.
    global_step
        Local steps at the start, by the count of the federation above.
    own
        Whether nodes also evaluate models of their own.
    routed
        What the key blocks of other federations are that came.
    before_merge
        As of `TrainRequest`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["describe", "train", "evaluate"]
    round: int = Field(ge=0)
    model_id: str
    begins: int = Field(ge=0)
    ends: int = Field(ge=0)
    global_step: int = Field(default=0, ge=0)
    own: bool = False
    routed: list[RoutedTag] = Field(default_factory=list)
    before_merge: bool = False

    @classmethod
    def read(cls, run_dir: Path) -> "Assignment":
        """Read what :meth:`write` wrote.

        Raises
        ------
        PhotonError
            If it is missing or damaged.
        """
        file = run_dir / _FOLDER / "assignment.json"
        try:
            return cls.model_validate(renamed().content(json.loads(file.read_text())))
        except (OSError, ValueError, RecursionError) as error:
            raise PhotonError(
                f"{file}: the federation above has left no readable assignment; its next request brings one"
            ) from error

    @property
    def key(self) -> str:
        """A digest of the assignment; the same request gives the same one."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]

    def write(self, run_dir: Path, groups: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Write the assignment and the groups that came with it; they take the place of the last ones."""
        # A process that was killed here has left a copy of the model.
        remove_leftovers(run_dir, _FOLDER)
        # Not flushed: after a power cut the federation above asks again.
        with atomic_directory(run_dir / _FOLDER, flush=False) as folder:
            save_groups(folder / "groups.safetensors", groups)
            (folder / "assignment.json").write_text(self.model_dump_json(indent=1))

    @staticmethod
    def groups_file(run_dir: Path) -> Path:
        """Return the file of the groups that came."""
        return run_dir / _FOLDER / "groups.safetensors"

    def adopt(self, run_dir: Path, checkpoint: Checkpoint, params: Mapping[str, torch.Tensor]) -> Checkpoint:
        """Return a checkpoint that starts from ``params``, which are written to the disk."""
        start = run_dir / "start.safetensors"
        save_groups(start, {"params": params})
        # What silos below have kept of an own round counts for the model that it began with, which may be
        # another one where the federation above went back.
        known = hashlib.sha256(f"{checkpoint.state.model_id}/{self.model_id}".encode()).hexdigest()[:32]
        state = checkpoint.state.model_copy(
            update={"global_step": self.global_step, "vocabulary": None, "model_id": known}
        )
        received = Received(start, self.groups_file(run_dir), self.routed)
        return replace(checkpoint, state=state, received=received)


class Outcome(BaseModel):
    """How an assignment ended, for a gateway that is not the process that carried it out.

    Attributes
    ----------
    assignment
        Its key.
    error
        Why it could not be carried out; None: it was.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    FILE: ClassVar[str] = "outcome.json"

    assignment: str
    error: str | None = None

    @classmethod
    def read(cls, run_dir: Path) -> "Outcome | None":
        """Return the last outcome, or None."""
        try:
            return cls.model_validate_json((run_dir / cls.FILE).read_text())
        except (OSError, ValidationError):
            return None

    def write(self, run_dir: Path) -> None:
        """Write the outcome in the place of the last one."""
        write_text(run_dir / self.FILE, self.model_dump_json() + "\n", flush=False)
