"""Server checkpoints: one folder per finished round, complete or absent.

Between the phases of a round the server keeps no model in memory: it reads the last checkpoint, and the
round's result is the next checkpoint. Resuming is therefore the ordinary path, not a special one.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from photon.config.renamed import renamed
from photon.config.tree import RoutedTag
from photon.errors import PhotonError
from photon.files.atomic import atomic_directory, remove_leftovers, sync_files
from photon.files.hashing import hash_of_file
from photon.state.noise_scale import NoiseScale
from photon.state.tensors import StateGroups, load_groups, save_groups

FORMAT = "photon-checkpoint/2"
#: The form of earlier versions, which differs in names alone.
EARLIER = "photon-checkpoint/1"
#: The file with the hashes of a checkpoint's other files.
_SEAL = "blake3.json"


class LedgerEntry(BaseModel):
    """What the server has accepted from one participant.

    Attributes
    ----------
    last_round
        Last round whose reply was folded; 0 before the first.
    position
        Windows of its text that the participant had taken by then.
    tokens
        Tokens it has trained in accepted rounds.
    steps_per_second
        Its local steps per second of training in the last of them.
    arrival_seconds
        Seconds from the round's first message to its reply in the last of them.
    sizes
        State group to the size of what came of it in the last of them, as `photon.federation.sizes` has it.
    rejected
        Replies in a row that were rejected since then.
    quarantined_until
        Last round in which it is not drawn, because too many were; 0: it is.
    """

    model_config = ConfigDict(extra="forbid")
    last_round: int = Field(default=0, ge=0)
    position: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)
    steps_per_second: float | None = Field(default=None, gt=0)
    arrival_seconds: float | None = Field(default=None, gt=0)
    sizes: dict[str, float] = Field(default_factory=dict)
    rejected: int = Field(default=0, ge=0)
    quarantined_until: int = Field(default=0, ge=0)


class ServerState(BaseModel):
    """The numbers of a checkpoint; the tensors lie beside it.

    Attributes
    ----------
    averaged_rounds
        State group of the local optimizers to the round at whose end it was last averaged.
    local_scalars
        Scalar states of the local optimizers, such as ``step``, after the last round.
    routed
        What the key blocks are that travel to other federations.
    vocabulary
        With restricted vocabularies the rows that were trained since the federation above gave its last
        request, as `photon.models.vocabulary.pack_vocabulary` writes them.
    """

    model_config = ConfigDict(extra="forbid")
    format: str = FORMAT
    run_id: str
    round: int = Field(ge=0)
    global_step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    model_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    ledger: dict[str, LedgerEntry] = Field(default_factory=dict)
    outer_scalars: dict[str, float] = Field(default_factory=dict)
    averaged_rounds: dict[str, int] = Field(default_factory=dict)
    local_scalars: dict[str, float] = Field(default_factory=dict)
    noise: NoiseScale = Field(default_factory=NoiseScale)
    routed: list[RoutedTag] = Field(default_factory=list)
    vocabulary: str | None = None
    vocab_size: int = Field(ge=1)
    sequence_length: int = Field(ge=2)
    tokenizer_sha256: str


@dataclass(frozen=True)
class Received:
    """Where a round starts, if not from the checkpoint's own parameters.

    Attributes
    ----------
    params
        File with the parameters to start from.
    groups
        File with the groups as they came from the federation above; None: nothing did.
    routed
        What those of them are that come from other federations.
    """

    params: Path
    groups: Path | None = None
    routed: Sequence[RoutedTag] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; with ``received``, a round starts from that instead.

    Attributes
    ----------
    participants
        How many can take part in the round that starts from it, in the cohort or not; 0: none is known.
    """

    path: Path
    state: ServerState
    received: Received | None = None
    participants: int = 0

    def load_params(self) -> dict[str, torch.Tensor]:
        """Return the global parameters by name, memory-mapped."""
        groups = load_groups(self.received.params if self.received else self.path / "params.safetensors")
        if set(groups) != {"params"}:
            raise PhotonError(f"{self.path}/params.safetensors: expected the group params alone")
        return groups["params"]

    def load_outer(self) -> StateGroups:
        """Return the outer optimizer's state groups, memory-mapped; empty if it has none."""
        path = self.path / "outer.safetensors"
        return load_groups(path) if path.exists() else {}

    def load_kept(self) -> StateGroups:
        """Return further state groups of the strategy, memory-mapped; empty if it has none."""
        path = self.path / "kept.safetensors"
        return self._named(load_groups(path)) if path.exists() else {}

    def load_inbox(self) -> tuple[StateGroups, Sequence[RoutedTag]]:
        """Return what came from other federations: what the one above sent, or what the last round chose."""
        if self.received is not None and self.received.groups is not None:
            return self._named(load_groups(self.received.groups)), self.received.routed
        return self.load_kept(), self.state.routed

    def _named(self, groups: StateGroups) -> StateGroups:
        return renamed().grouped(groups) if self.state.format == EARLIER else groups

    def load_previous_params(self) -> dict[str, torch.Tensor]:
        """Return the global parameters of the round before, memory-mapped.

        Raises
        ------
        PhotonError
            If that checkpoint is not kept.
        """
        return open_checkpoint(self.path.with_name(checkpoint_name(self.state.round - 1))).load_params()

    def load_reference(self) -> dict[str, torch.Tensor]:
        """Return what the silos of this round had decoded of the parameters; empty if that is not kept."""
        path = self.path / "reference.safetensors"
        return load_groups(path)["reference"] if path.exists() else {}

    def load_averaged(self, group: str) -> dict[str, torch.Tensor]:
        """Return the last average of a state group of the local optimizers, memory-mapped."""
        path = self.path / averaged_file(group)
        groups = load_groups(path)
        if set(groups) != {group}:
            raise PhotonError(f"{path}: expected the group {group} alone")
        return groups[group]


def checkpoint_name(server_round: int) -> str:
    """Return the name of a round's checkpoint folder."""
    return f"round-{server_round:06d}"


def averaged_file(group: str) -> str:
    """Return the name of the file that holds a state group's average."""
    return f"averaged-{group}.safetensors"


class CheckpointStore:
    """The checkpoints of a run.

    Parameters
    ----------
    folder
        ``RUN_DIR/checkpoints``.
    keep
        Newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self._keep = keep

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("round-")) for path in self.folder.glob("round-[0-9]*"))

    def save(self, state: ServerState, params: dict[str, torch.Tensor], outer: StateGroups) -> Checkpoint:
        """Write a checkpoint and remove the ones beyond ``keep``."""
        with self.writing(state, params, outer, {}):
            pass
        return Checkpoint(self._path(state.round), state)

    @contextmanager
    def writing(
        self,
        state: ServerState,
        params: dict[str, torch.Tensor],
        outer: StateGroups,
        averaged: StateGroups,
        before_commit: Callable[[], None] = lambda: None,
        reference: Mapping[str, torch.Tensor] | None = None,
        kept: StateGroups | None = None,
    ) -> Iterator[Checkpoint]:
        """Write a checkpoint that counts when the block ends well.

        The block works on the written files while they are flushed to the disk.

        Parameters
        ----------
        state, params, outer, averaged
            What to write. It is used up: the groups are empty within the block, so that the server holds no
            model that is on its disk. An average that is older stays as it is in the last checkpoint.
        before_commit
            Called when all bytes are on the disk and before the checkpoint counts, so that what it records is
            never behind the checkpoint.
        reference
            What the silos of this round have decoded of the parameters, if the next round needs it.
        kept
            Further state groups of the strategy.

        Yields
        ------
        Checkpoint
            The written checkpoint, at its place for the time of the block.
        """
        state = state.model_copy(update={"format": FORMAT})
        with atomic_directory(self._path(state.round)) as folder, ThreadPoolExecutor(1) as background:
            save_groups(folder / "params.safetensors", {"params": params})
            params.clear()
            if outer:
                save_groups(folder / "outer.safetensors", outer)
                outer.clear()
            if reference:
                save_groups(folder / "reference.safetensors", {"reference": reference})
            if kept:
                save_groups(folder / "kept.safetensors", kept)
            self._write_averaged(folder, state, averaged)
            (folder / "checkpoint.json").write_text(state.model_dump_json(indent=1))
            flushed = background.submit(_seal, folder)
            yield Checkpoint(folder, state)
            flushed.result()
            before_commit()
        for old in self.rounds()[: -self._keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def _write_averaged(self, folder: Path, state: ServerState, averaged: StateGroups) -> None:
        for group in state.averaged_rounds:
            if group in averaged:
                save_groups(folder / averaged_file(group), {group: averaged.pop(group)})
            else:
                shutil.copy(self._path(state.round - 1) / averaged_file(group), folder)

    def load(self, server_round: int) -> Checkpoint:
        """Open the checkpoint of a round.

        Raises
        ------
        PhotonError
            If it is missing, damaged or of another format.
        """
        return open_checkpoint(self._path(server_round))

    def latest(self) -> tuple[Checkpoint, list[str]]:
        """Return the newest readable checkpoint, and why newer ones were passed over.

        Raises
        ------
        PhotonError
            If there is none.
        """
        remove_leftovers(self.folder)
        passed_over: list[str] = []
        for server_round in reversed(self.rounds()):
            try:
                checkpoint = self.load(server_round)
                _check_seal(self._path(server_round))
                checkpoint.load_params()
                checkpoint.load_outer()
                checkpoint.load_reference()
                checkpoint.load_kept()
                for group in checkpoint.state.averaged_rounds:
                    checkpoint.load_averaged(group)
            except PhotonError as error:
                passed_over.append(str(error))
                continue
            return checkpoint, passed_over
        damaged = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise PhotonError(f"{self.folder}: no readable checkpoint{damaged}; start the run anew")

    def discard_after(self, server_round: int) -> None:
        """Remove checkpoints newer than ``server_round`` (damaged ones that a resume passed over)."""
        for newer in self.rounds():
            if newer > server_round:
                shutil.rmtree(self._path(newer))

    def _path(self, server_round: int) -> Path:
        return self.folder / checkpoint_name(server_round)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open one checkpoint folder.

    Raises
    ------
    PhotonError
        If it is missing, damaged or of another format.
    """
    file = path / "checkpoint.json"
    if not file.is_file():
        raise PhotonError(f"{path}: not a checkpoint (no checkpoint.json)")
    try:
        content = renamed().content(json.loads(file.read_text()))
        if isinstance(content, dict) and content.get("format", FORMAT) not in (FORMAT, EARLIER):
            raise PhotonError(f"{file}: format {content['format']}, this photon reads {FORMAT}")
        return Checkpoint(path, ServerState.model_validate(content))
    except ValueError as error:
        raise PhotonError(
            f"{file}: damaged ({str(error).splitlines()[0]}); use an older checkpoint"
        ) from error


def _seal(folder: Path) -> None:
    """Write beside a checkpoint's files what they hash to, and flush all of it to the disk."""
    sums = {file.name: hash_of_file(file) for file in sorted(folder.iterdir())}
    (folder / _SEAL).write_text(json.dumps(sums, indent=1))
    sync_files(folder)


def _check_seal(folder: Path) -> None:
    """Check that a checkpoint is what was written; one of an earlier Photon has no seal to check.

    Raises
    ------
    PhotonError
        If a file of it is gone or holds something else.
    """
    seal = folder / _SEAL
    if not seal.is_file():
        return
    try:
        sums: dict[str, str] = json.loads(seal.read_text())
        wrong = [name for name, digest in sums.items() if hash_of_file(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise PhotonError(f"{folder}: damaged ({error}); use an older checkpoint") from error
    if wrong:
        raise PhotonError(
            f"{folder}: damaged ({', '.join(wrong)} is not what was written); use an older checkpoint"
        )


def weights_sha256(params: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over the bytes of all parameters in name order."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(params[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
