"""What a federation keeps of its own replies: what codecs have left over, and what has crossed a border.

A folder each for a round of the federation above, written as a whole and sealed: a crash leaves no part of
it, and a changed bit is noticed.
"""

from collections.abc import Mapping
from pathlib import Path

from photon.errors import PhotonError
from photon.files.atomic import atomic_directory, remove_directory, remove_leftovers
from photon.state.kept_files import Tensors
from photon.state.seal import broken, seal
from photon.state.tensors import StateGroups, load_groups, save_groups

_LEFT, _RELEASED = "left", "released"
_FILE = "groups.safetensors"
#: Rounds of which something is kept: a reply may be lost, and be asked for again.
MOST = 2


class KeptReplies:
    """State groups by round of the federation above.

    Parameters
    ----------
    run_dir
        Run folder of the federation.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def keep_left(self, server_round: int, left: StateGroups, last: int) -> None:
        """Keep what codecs have left over of a round's reply; of older ones, the newest and round ``last``.

        Raises
        ------
        OSError
            If the disk takes no more.
        """
        self._keep(_LEFT, server_round, left)
        for old in self._rounds(_LEFT)[:-MOST]:
            if old != last:
                remove_directory(self._path(_LEFT, old))

    def left(self, server_round: int) -> StateGroups | None:
        """Return what codecs have left over of a round's reply; None: it is lost."""
        try:
            return self._load(_LEFT, server_round)
        except (OSError, ValueError, RecursionError, PhotonError):
            return None

    def keep_released(self, server_round: int, params: Tensors) -> None:
        """Keep what crosses a border in a round.

        Raises
        ------
        OSError
            If the disk takes no more.
        """
        self._keep(_RELEASED, server_round, {"params": params})
        for old in self._rounds(_RELEASED)[:-MOST]:
            remove_directory(self._path(_RELEASED, old))

    def released(self, server_round: int) -> Tensors | None:
        """Return what has crossed a border in a round; None: nothing yet.

        Raises
        ------
        PhotonError
            If it is damaged: with noise that is drawn anew, the same text would be told of twice.
        """
        path = self._path(_RELEASED, server_round)
        if not path.is_dir():
            return None
        try:
            return self._load(_RELEASED, server_round).get("params", {})
        except (OSError, ValueError, RecursionError, PhotonError) as error:
            raise PhotonError(
                f"{path}: damaged ({error}); what crossed the border in round {server_round} is not sent "
                "again, and the next round goes on"
            ) from error

    def forget(self, begins: int) -> None:
        """Remove what there is of a round that begins anew, and of those after it."""
        for kind in (_LEFT, _RELEASED):
            for server_round in self._rounds(kind):
                if server_round >= begins:
                    remove_directory(self._path(kind, server_round))

    def _keep(self, kind: str, server_round: int, groups: Mapping[str, Tensors]) -> None:
        path = self._path(kind, server_round)
        remove_leftovers(self._run_dir, f"{kind}-*")
        with atomic_directory(path, flush=False) as folder:
            save_groups(folder / _FILE, groups)
            seal(folder)

    def _load(self, kind: str, server_round: int) -> StateGroups:
        path = self._path(kind, server_round)
        if broken(path, [_FILE]):
            raise PhotonError("it is not what was written")
        return load_groups(path / _FILE)

    def _path(self, kind: str, server_round: int) -> Path:
        return self._run_dir / f"{kind}-{server_round:06d}"

    def _rounds(self, kind: str) -> list[int]:
        return sorted(int(path.name.rpartition("-")[2]) for path in self._run_dir.glob(f"{kind}-[0-9]*"))
