"""What a silo keeps on its own disk between rounds.

One folder per trained round: the local optimizer's state, the position in the text, and the reply itself.
The server says which round it accepted last; the silo goes on from exactly that one. So a reply that was
lost is trained again from the same windows, and a round that is asked for twice is answered without training.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError

from photon.config.renamed import renamed
from photon.errors import PhotonError
from photon.files.atomic import atomic_directory, remove_directory, remove_leftovers, write_text
from photon.state.places import MAX_PLACES, Place
from photon.state.seal import broken, is_sealed, seal, sealed_text, unsealed
from photon.state.tensors import StateGroups, load_groups, save_groups

#: What is counted for a run.
Counted = TypeVar("Counted")

#: Name of the file that holds a round's reply.
REPLY = "reply.safetensors"
#: Those of its numbers, of the local optimizer's state, and of what the link wants to see again.
_STATE, _OPTIMIZER, _LINK = "state.json", "optimizer.safetensors", "link.safetensors"

#: Name of the file that holds what the text of a silo was used for.
COUNTS = "counts.json"

#: Run to the tokens that the silo has trained; and to the updates that have left it, with the smallest noise.
TOKENS = TypeAdapter(dict[str, int])
RELEASES = TypeAdapter(dict[str, tuple[int, float]])


@dataclass(frozen=True)
class Use:
    """What a silo's text was used for in a run, accepted by the server or not.

    Attributes
    ----------
    tokens
        Tokens that were trained.
    releases
        Updates that were trained on it.
    places
        Where in it, the newest last.
    """

    tokens: int = 0
    releases: int = 0
    places: tuple[Place, ...] = ()


USES = TypeAdapter(dict[str, Use])

#: Runs that are told apart, the newest; those before are counted together, under a name that no run has.
MAX_RUNS, EARLIER = 1000, ""


@dataclass(frozen=True)
class SiloState:
    """A silo's state after a round.

    Attributes
    ----------
    position
        Windows taken from the text so far.
    scalars
        Scalar states of the local optimizer, such as ``step``.
    report
        The round's report as JSON text.
    encodings
        How the reply's payloads become tensors again, as JSON text.
    groups
        State groups of the local optimizer.
    accepted
        The round that this one went on from: the last one that the server had accepted; 0: none.
    text
        Hash of the text that was trained on; empty in those of earlier versions.
    link
        What the link wants to see again with the next update, such as what codecs have lost.
    """

    run_id: str
    model_id: str
    round: int
    position: int
    scalars: dict[str, float]
    report: str
    encodings: str
    accepted: int = 0
    text: str = ""
    groups: StateGroups = field(default_factory=dict, compare=False)
    link: StateGroups = field(default_factory=dict, compare=False)


class SiloStore:
    """The rounds that one silo has trained in one run.

    Parameters
    ----------
    folder
        The silo's own folder for this run.
    keep
        Rounds to keep, those that were written last: at least two, so that a lost reply can be trained again.
        The last accepted one stays, too, however many are rejected after it.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def save(self, state: SiloState, reply: StateGroups) -> None:
        """Write the state after a round and the reply that goes with it, encoded as it travels.

        Raises
        ------
        PhotonError
            If the disk does not take it; the rounds before are as they were.
        """
        numbers = asdict(replace(state, groups={}, link={}))
        del numbers["groups"], numbers["link"]
        # Not flushed: a power cut costs the silo its moments, which it then says, and never a finished round.
        with _written(self.folder), atomic_directory(self._path(state.round), flush=False) as folder:
            save_groups(folder / _OPTIMIZER, state.groups)
            save_groups(folder / _LINK, state.link)
            save_groups(folder / REPLY, reply)
            (folder / _STATE).write_text(json.dumps(numbers))
            seal(folder)
        self._remove_old(state)

    def load(self, run_id: str, server_round: int) -> SiloState | None:
        """Return the state after ``server_round`` of this run, or None if it is not there, or damaged."""
        remove_leftovers(self.folder)
        path = self._path(server_round)
        try:
            written = json.loads((path / _STATE).read_text())
            if not self._is_whole(path, (_STATE, _OPTIMIZER, _LINK), sealed="text" in written):
                return None
            numbers, groups = renamed().content(written), load_groups(path / _OPTIMIZER)
            if numbers != written:
                groups = renamed().kept_by_silo(groups)
            state = SiloState(**numbers, groups=groups, link=load_groups(path / _LINK))
        except (OSError, ValueError, TypeError, RecursionError, PhotonError):
            return None
        return state if state.run_id == run_id else None

    @staticmethod
    def _is_whole(path: Path, files: Sequence[str], *, sealed: bool) -> bool:
        """Tell whether files of a round are what was written; of earlier versions there is no seal."""
        return not broken(path, files, files) if sealed or is_sealed(path) else True

    def reply(self, run_id: str, model_id: str, server_round: int) -> tuple[SiloState, StateGroups] | None:
        """Return the reply already trained for this round of this model, or None."""
        state = self.load(run_id, server_round)
        if state is None or state.model_id != model_id:
            return None
        try:
            if not self._is_whole(self._path(server_round), (REPLY,), sealed=bool(state.text)):
                return None
            return state, load_groups(self.reply_file(server_round))
        except (OSError, ValueError, RecursionError, PhotonError):
            return None

    def reply_file(self, server_round: int) -> Path:
        """Return the file of a round's reply."""
        return self._path(server_round) / REPLY

    def count_release(self, run_id: str, noise_multiplier: float) -> tuple[int, float]:
        """Count an update that leaves the silo.

        Parameters
        ----------
        noise_multiplier
            Of its noise; 0: it leaves as it is.

        Returns
        -------
        tuple
            How many have left in this run, and the smallest of their noise multipliers.

        Raises
        ------
        PhotonError
            If the count cannot be read or written.
        """
        counts = self._count("releases.json", RELEASES)
        before, smallest = counts.get(run_id, (0, noise_multiplier))
        counts[run_id] = before + 1, min(smallest, noise_multiplier)
        self._write_count("releases.json", counts)
        return counts[run_id]

    def _count(self, name: str, kind: TypeAdapter[dict[str, Counted]]) -> dict[str, Counted]:
        return _counted(self.folder / name, kind) or {}

    def _write_count(self, name: str, counts: Mapping[str, object]) -> None:
        with _written(self.folder):
            # As little flushed as the rest of a silo's state: what a power cut takes is trained again.
            write_text(self.folder / name, sealed_text(counts), flush=False)

    def _remove_old(self, written: SiloState) -> None:
        """Remove rounds beyond ``keep``, but for those that the server may still have accepted last.

        Those of larger numbers are of an earlier run, or of rounds that were undone: they are older, and yet
        stay for a while, because whoever went back may have done so by mistake.
        """
        rounds = self._rounds()
        # Whatever the clock says: the one just written, and the one before it.
        stay = [each for each in rounds if each <= written.round][-2:]
        others = [each for each in rounds if each not in stay]
        others.sort(key=lambda each: (self._path(each).stat().st_mtime_ns, each), reverse=True)
        kept = max(0, self._keep - len(stay))
        # The server keeps a checkpoint less than there are rounds here, and may go back to any of them.
        newest = [*reversed(stay), *others][: max(1, self._keep - 2)]
        needed = set(map(self._accepted, newest))
        for old in others[kept:]:
            if old not in needed:
                remove_directory(self._path(old))

    def _accepted(self, server_round: int) -> int:
        """Return the round that one went on from; 0 where nobody can tell."""
        try:
            return int(json.loads((self._path(server_round) / _STATE).read_text())["accepted"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return 0

    def _rounds(self) -> list[int]:
        return sorted(int(path.name.removeprefix("round-")) for path in self.folder.glob("round-[0-9]*"))

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:06d}"


class SiloCounts:
    """What the text of one silo was used for, run by run: ``counts.json`` in the silo's folder.

    It belongs to the silo whose text it is, whatever a request calls the participant.

    Parameters
    ----------
    state
        The node's state folder.
    silo
        The silo whose text it is.
    """

    def __init__(self, state: Path, silo: str) -> None:
        self._folder = state / silo

    def used(self) -> dict[str, Use]:
        """Return what was counted: run to use.

        Raises
        ------
        PhotonError
            If the count cannot be read.
        """
        uses = _counted(self._folder / COUNTS, USES)
        if uses is None:
            # What an earlier Photon has counted goes on to count.
            tokens = _counted(self._folder / "tokens.json", TOKENS) or {}
            uses = {run: Use(tokens=count) for run, count in tokens.items()}
        return uses

    def add(
        self,
        run_id: str,
        tokens: int,
        releases: int,
        place: Place | None = None,
        *,
        flush: bool = True,
    ) -> None:
        """Count what a silo's text is about to be used for.

        Parameters
        ----------
        place
            Where in it; None: that is not remembered.
        flush
            Wait until a power cut could not take it. Nobody needs that whose updates leave no machine.

        Raises
        ------
        PhotonError
            If the count cannot be read or written.
        """
        uses = self.used()
        before = uses.pop(run_id, Use())
        places = before.places
        if place is not None:
            number = sum(use.releases for use in uses.values()) + before.releases + releases
            kept = [one for one in places if not one.is_again(place)]
            places = (*kept, replace(place, updates=number))[-MAX_PLACES:]
        uses[run_id] = Use(before.tokens + tokens, before.releases + releases, places)
        uses = _with_earlier(uses)
        with _written(self._folder):
            # Flushed: the update may have left before a power cut takes what was written here.
            text = sealed_text(USES.dump_python(uses, mode="json"))
            write_text(self._folder / COUNTS, text, flush=flush)


def _with_earlier(uses: dict[str, Use]) -> dict[str, Use]:
    """Count the oldest runs together where there are very many; a run was used last if it comes last."""
    runs = [run for run in uses if run != EARLIER]
    old = [uses[run] for run in (EARLIER, *runs[:-MAX_RUNS]) if run in uses]
    if len(runs) <= MAX_RUNS:
        return uses
    together = Use(sum(use.tokens for use in old), sum(use.releases for use in old))
    return {EARLIER: together, **{run: uses[run] for run in runs[-MAX_RUNS:]}}


def uses_of_silos(state: Path) -> dict[str, dict[str, Use]]:
    """Return what was counted at a node: silo to run to use.

    Parameters
    ----------
    state
        The node's state folder.

    Raises
    ------
    PhotonError
        If a count cannot be read.
    """
    files = (file for name in (COUNTS, "tokens.json") for file in state.glob(f"*/{name}"))
    return {silo: SiloCounts(state, silo).used() for silo in sorted({file.parent.name for file in files})}


@contextmanager
def counting(state: Path) -> Iterator[None]:
    """Let no other process of the node look at counts and add to them meanwhile."""
    from filelock import FileLock

    with _written(state):
        state.mkdir(parents=True, exist_ok=True)
        lock = FileLock(state / "counts.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _counted(path: Path, kind: TypeAdapter[dict[str, Counted]]) -> dict[str, Counted] | None:
    try:
        # In JSON's own terms: a list is a tuple there.
        return kind.validate_json(json.dumps(unsealed(path.read_text("utf-8"))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise PhotonError(
            f"{path}: the silo's count cannot be read; put it back, or remove the file to count anew"
        ) from error


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Say in one line where there is no room; whoever reads it at the aggregator is not at the disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PhotonError(
            f"{folder}: what was trained cannot be written ({error}); make room on the silo's disk"
        ) from error
