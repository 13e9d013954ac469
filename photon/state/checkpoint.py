"""Server checkpoints: one folder per finished round, complete or absent.

Between the phases of a round the server keeps no model in memory: it reads the last checkpoint, and the
round's result is the next checkpoint. Resuming is therefore the ordinary path, not a special one.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.config.decided import Decided
from photon.config.renamed import renamed
from photon.config.tree import RoutedTag
from photon.errors import PhotonError, RunError
from photon.files.atomic import atomic_directory, remove_directory, remove_leftovers, sync_file, sync_files
from photon.files.hashing import hash_of_file
from photon.state.noise_scale import NoiseScale
from photon.state.progress import Progress
from photon.state.seal import SEAL, broken, is_sealed, seal
from photon.state.tensors import StateGroups, averaged_file, load_groups, save_groups
from photon.state.unlearned import Unlearned as Unlearned  # noqa: PLC0414 - those who fold name it, too
from photon.state.unlearned import write_unlearned

FORMAT = "photon-checkpoint/2"
#: The form of earlier versions, which differs in names alone.
EARLIER = "photon-checkpoint/1"
_PARAMS = "params.safetensors"
#: The parameters of the round before, for strategies that send them.
_PREVIOUS = "previous.safetensors"
#: Marks a checkpoint that a run went back to from further than silos keep their rounds.
_ANEW = "anew"


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
    decided
        Silo or participant to what its machine trains with in this run.
    config
        Text of the configuration that the run had by then; empty in those of earlier versions.
    validation_loss
        Of the global parameters, over the silos that were asked; None: they were not evaluated.
    estimated
        Whether some of the silos alone were asked.
    progress
        What the silos have told of the models until now.
    vocabulary
        With restricted vocabularies the rows that were trained since the federation above gave its last
        request, as `photon.models.vocabulary.pack_vocabulary` writes them.
    unlearned
        What was taken out of the model, before this run or in it, the oldest first.
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
    decided: dict[str, Decided] = Field(default_factory=dict)
    config: str = ""
    validation_loss: float | None = None
    estimated: bool = False
    progress: Progress = Field(default_factory=Progress)
    vocabulary: str | None = None
    unlearned: list[Unlearned] = Field(default_factory=list)
    vocab_size: int = Field(ge=1)
    sequence_length: int = Field(ge=2)
    tokenizer_sha256: str

    def tell_beside(self, folder: Path) -> None:
        """Write beside an exported model what was taken out of it."""
        write_unlearned(folder, self.unlearned)

    def decided_by(self, participant: str, members: Sequence[str]) -> Decided:
        """Return what the machine of a participant has decided: as such, and for the silos that it is."""
        found = self.decided.get(participant, Decided())
        for member in members:
            found = found.completed(self.decided.get(member))
        return found


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
    given
        What the federation's own silo has for the others of the round.
    """

    path: Path
    state: ServerState
    received: Received | None = None
    participants: int = 0
    given: StateGroups = field(default_factory=dict)

    def load_params(self) -> dict[str, torch.Tensor]:
        """Return the global parameters by name, memory-mapped."""
        groups = load_groups(self.received.params if self.received else self.path / _PARAMS)
        if set(groups) != {"params"}:
            raise PhotonError(f"{self.path / _PARAMS}: expected the group params alone")
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
            If they are not kept.
        """
        path, before = self.path / _PREVIOUS, self.path.with_name(checkpoint_name(self.state.round - 1))
        # Checkpoints of earlier versions lack it.
        path = path if path.exists() else before / _PARAMS
        if not path.exists():
            raise PhotonError(
                f"{self.path}: the strategy needs the parameters of round {self.state.round - 1}, which are "
                "not kept; go back to another round with `photon resume --round`"
            )
        return load_groups(path)["params"]

    def last_round_of(self, participant: str) -> int:
        """Return the last round that a participant can be counted on to know; 0: none.

        After a run has gone back further than silos keep their rounds, nobody is counted on.
        """
        entry = self.state.ledger.get(participant)
        return 0 if entry is None or (self.path / _ANEW).exists() else entry.last_round

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


class CheckpointStore:
    """The checkpoints of a run.

    Parameters
    ----------
    folder
        ``RUN_DIR/checkpoints``.
    keep
        Newest checkpoints to keep.
    permanent_every
        Rounds from one checkpoint that stays for ever to the next; None: none does.
    keep_best
        Whether the one with the lowest validation loss stays, too. Losses of some of the silos do not count:
        which silos were drawn would decide.
    """

    def __init__(
        self, folder: Path, keep: int = 2, *, permanent_every: int | None = None, keep_best: bool = False
    ) -> None:
        self.folder = folder
        self._keep = keep
        self._permanent_every = permanent_every
        self._keep_best = keep_best
        #: What is known of checkpoints on the disk, so that each is read once.
        self._losses: dict[int, tuple[float | None, bool]] = {}

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("round-")) for path in self.folder.glob("round-[0-9]*"))

    def save(self, state: ServerState, params: dict[str, torch.Tensor], outer: StateGroups) -> Checkpoint:
        """Write a checkpoint and remove the ones that need not stay."""
        with self.writing(state, params, outer, {}):
            pass
        return self.load(state.round)

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
        *,
        with_previous: bool = False,
    ) -> Iterator[Checkpoint]:
        """Write a checkpoint that counts when the block ends well.

        The block works on the written tensors while they are read back and flushed to the disk. The numbers
        are written when it ends: the loss that it found is among them.

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
        with_previous
            Whether the next round may need the parameters of the round before.

        Yields
        ------
        Checkpoint
            The written checkpoint, at its place for the time of the block.

        Raises
        ------
        RunError
            If it is not what was to be written when it is read back: it does not count.
        """
        state = state.model_copy(update={"format": FORMAT, "validation_loss": None, "estimated": False})
        with atomic_directory(self._path(state.round)) as folder, ThreadPoolExecutor(1) as background:
            save_groups(folder / _PARAMS, {"params": params})
            params.clear()
            if outer:
                save_groups(folder / "outer.safetensors", outer)
                outer.clear()
            if reference:
                save_groups(folder / "reference.safetensors", {"reference": reference})
            if kept:
                save_groups(folder / "kept.safetensors", kept)
            self._write_averaged(folder, state, averaged)
            if with_previous and state.round > 0:
                _link(self._path(state.round - 1) / _PARAMS, folder / _PREVIOUS)
            flushed = background.submit(_read_back, folder, state.round)
            yield Checkpoint(folder, state)
            _seal(folder, state, flushed.result())
            before_commit()
        self._losses.pop(state.round, None)
        self._remove_old()

    def repeat(self, good: Checkpoint, state: ServerState) -> Checkpoint:
        """Write a checkpoint with the tensors of an earlier one and other numbers.

        Raises
        ------
        RunError
            If it is not what was to be written when it is read back.
        """
        with atomic_directory(self._path(state.round)) as folder:
            for file in sorted(good.path.glob("*.safetensors")):
                _link(file, folder / file.name)
            sums = {file.name: hash_of_file(file) for file in sorted(folder.iterdir())}
            _seal(folder, state.model_copy(update={"format": FORMAT}), sums)
        self._losses.pop(state.round, None)
        self._remove_old()
        return self.load(state.round)

    def evaluated(self) -> Checkpoint | None:
        """Return the newest checkpoint whose model was evaluated, and is kept."""
        newest = next((each for each in reversed(self.rounds()) if self._loss(each)[0] is not None), None)
        return None if newest is None else self.load(newest)

    def _remove_old(self) -> None:
        rounds = self.rounds()
        stay = set(rounds[-self._keep :])
        # What a run can go back to if a later evaluation shows that the model has become worse.
        stay |= set([each for each in rounds if self._loss(each)[0] is not None][-1:])
        if self._permanent_every is not None:
            stay |= {each for each in rounds if each > 0 and each % self._permanent_every == 0}
        if self._keep_best:
            found = [(*self._loss(each), each) for each in rounds]
            losses = [(loss, each) for loss, estimated, each in found if loss is not None and not estimated]
            stay |= {each for _, each in sorted(losses)[:1]}
        for old in set(rounds) - stay:
            remove_directory(self._path(old))

    def _loss(self, server_round: int) -> tuple[float | None, bool]:
        """Return the validation loss of a round's model, and whether it is one of some silos alone."""
        if server_round not in self._losses:
            try:
                state = self.load(server_round).state
                self._losses[server_round] = state.validation_loss, state.estimated
            except PhotonError:
                # A damaged one is not the best.
                self._losses[server_round] = None, False
        return self._losses[server_round]

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

    def verified(self, server_round: int) -> Checkpoint:
        """Open the checkpoint of a round, all of which must be what was written.

        Raises
        ------
        PhotonError
            If it is missing, damaged or of another format.
        """
        checkpoint = self.load(server_round)
        check_seal(checkpoint)
        checkpoint.load_params()
        checkpoint.load_outer()
        checkpoint.load_reference()
        checkpoint.load_kept()
        for group in checkpoint.state.averaged_rounds:
            checkpoint.load_averaged(group)
        return checkpoint

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
                return self.verified(server_round), passed_over
            except PhotonError as error:
                passed_over.append(str(error))
        damaged = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise PhotonError(f"{self.folder}: no readable checkpoint{damaged}; start the run anew")

    def discard_after(self, server_round: int) -> None:
        """Remove checkpoints newer than ``server_round``."""
        for newer in reversed(self.rounds()):
            if newer > server_round:
                remove_directory(self._path(newer))

    def aside_for(self, server_round: int) -> Path:
        """Return a new name for the folder that takes the checkpoints after a round."""
        name = f"after-{checkpoint_name(server_round)}-{time.strftime('%Y%m%d-%H%M%S')}"
        taken = len(list(self.folder.glob(f"{name}*")))
        return self.folder / (f"{name}-{taken + 1}" if taken else name)

    def set_aside_after(self, server_round: int, aside: Path) -> None:
        """Move checkpoints newer than ``server_round`` to a folder, so that going back loses nothing.

        The newest goes first, so that the run can go on from what is left at any moment.
        """
        newer = [each for each in self.rounds() if each > server_round]
        if not newer:
            return
        aside.mkdir(exist_ok=True)
        if newer[-1] - server_round >= self._keep:
            # Silos have rounds of their own for the newest checkpoints alone.
            (self._path(server_round) / _ANEW).touch()
        for each in reversed(newer):
            os.rename(self._path(each), aside / checkpoint_name(each))

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
    except (OSError, ValueError, RecursionError) as error:
        raise PhotonError(
            f"{file}: damaged ({str(error).splitlines()[0]}); use an older checkpoint"
        ) from error


def _link(file: Path, place: Path) -> None:
    """Give a file of an earlier checkpoint a place in this one: it stays on the disk until both are gone."""
    try:
        os.link(file, place)
    except OSError:
        # Not every file system has links.
        shutil.copy(file, place)


def _read_back(folder: Path, server_round: int) -> dict[str, str]:
    """Flush a checkpoint's tensors to the disk, and return what their files hash to.

    Whoever goes on from them reads the headers of the files, and can do nothing with a number that is not
    finite; an error of the disk is told by the flush.

    Raises
    ------
    RunError
        If they cannot be read, or have such a number.
    """
    sums = {}
    for file in sorted(folder.iterdir()):
        try:
            groups = load_groups(file)
        except PhotonError as error:
            raise _unreadable(server_round, f"{file.name} ({error.__cause__})") from error
        for group, tensors in groups.items():
            bad = next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)
            if bad is not None:
                problem = f"{group}/{bad} is not finite; lower the learning rates in config.yaml"
                raise _unreadable(server_round, problem)
        sums[file.name] = hash_of_file(file)
    sync_files(folder)
    return sums


def _unreadable(server_round: int, problem: str) -> RunError:
    return RunError(f"round {server_round} does not count, its checkpoint cannot be read back: {problem}")


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # By far the fastest way to look at all values; but the square of a large one may be none.
    if bool(torch.linalg.vector_norm(tensor).isfinite()):
        return True
    return all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _seal(folder: Path, state: ServerState, sums: Mapping[str, str]) -> None:
    """Write a checkpoint's numbers, and what all its files hash to, and flush both.

    Raises
    ------
    RunError
        If the numbers are others when they are read back: JSON has no NaN and no infinity.
    """
    (file := folder / "checkpoint.json").write_text(text := state.model_dump_json(indent=1))
    try:
        read = ServerState.model_validate(renamed().content(json.loads(file.read_text())))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise _unreadable(state.round, f"{where}: {problem['msg']}") from error
    if read.model_dump_json(indent=1) != text:
        raise _unreadable(state.round, f"{file.name} holds other numbers than it was given")
    seal(folder, sums)
    for each in (file, folder / SEAL):
        sync_file(each)


def check_seal(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint is what was written; one of an earlier Photon may have no seal to check.

    Raises
    ------
    PhotonError
        If a file of it is gone or holds something else.
    """
    folder = checkpoint.path
    if checkpoint.state.format == EARLIER and not is_sealed(folder):
        return
    try:
        wrong = broken(folder, ("checkpoint.json", _PARAMS))
    except (OSError, ValueError, RecursionError) as error:
        raise PhotonError(f"{folder}: damaged ({error}); use an older checkpoint") from error
    if wrong:
        told = f"{', '.join(wrong)} is not what was written"
        raise PhotonError(f"{folder}: damaged ({told}); use an older checkpoint")


def weights_sha256(params: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over the bytes of all parameters in name order."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(params[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
