"""Replies that wait for others before they are folded: in memory while they are small, else on disk."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from photon.link.encoding import SparseTensor
from photon.state.tensors import load_groups, save_groups
from photon.strategy.base import Reply

#: Bytes of replies that wait in memory.
WAITING_BYTES = 64 * 2**20
#: Folder of a run in which replies wait.
REPLIES = "replies"

Tensors = Mapping[str, torch.Tensor | SparseTensor]


class Spool:
    """Keeps the replies of one round.

    Parameters
    ----------
    folder
        Where they lie; what a crash has left there is removed.
    limit
        Bytes of replies that are held in memory.
    """

    def __init__(self, folder: Path, limit: int = WAITING_BYTES) -> None:
        self._folder = folder
        self._limit = limit
        self._left = limit
        self._files = 0

    def emptied(self) -> "Spool":
        """Remove what lies on the disk, and return the spool, for replies of another round.

        Tensors that are mapped from there stay what they are.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._left = self._limit
        return self

    def keep(self, reply: Reply) -> Reply:
        """Return a reply with the same tensors, which take no memory once the limit is reached.

        Raises
        ------
        OSError
            If the disk takes no more.
        """
        groups: dict[str, Tensors] = dict(reply.groups)
        if reply.update is not None:
            groups[""] = reply.update
        size = sum(_nbytes(tensor) for tensors in groups.values() for tensor in tensors.values())
        if size <= self._left:
            self._left -= size
            return reply
        self._folder.mkdir(parents=True, exist_ok=True)
        # Never a name twice: what is mapped from a file must stay in it.
        self._files += 1
        kept = _mapped(groups, self._folder / f"{self._files}.safetensors")
        update = kept.pop("", None)
        dense = {
            group: {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
            for group, tensors in kept.items()
        }
        return replace(reply, groups=dense, update=update)


def _mapped(groups: Mapping[str, Tensors], path: Path) -> dict[str, Tensors]:
    """Write tensors to a file, and return them as private maps of it."""
    plain: dict[str, torch.Tensor] = {}
    for number, tensor in enumerate(t for tensors in groups.values() for t in tensors.values()):
        if isinstance(tensor, SparseTensor):
            plain |= {f"{number}.indices": tensor.indices, f"{number}.values": tensor.values}
        else:
            plain[f"{number}"] = tensor
    save_groups(path, {"tensors": plain})
    read = load_groups(path).get("tensors", {})
    kept: dict[str, Tensors] = {}
    number = 0
    for group, tensors in groups.items():
        own: dict[str, torch.Tensor | SparseTensor] = {}
        for name, tensor in tensors.items():
            own[name] = (
                SparseTensor(tensor.shape, read[f"{number}.indices"], read[f"{number}.values"])
                if isinstance(tensor, SparseTensor)
                else read[f"{number}"]
            )
            number += 1
        kept[group] = own
    return kept


def _nbytes(tensor: torch.Tensor | SparseTensor) -> int:
    if isinstance(tensor, SparseTensor):
        return tensor.indices.nbytes + tensor.values.nbytes
    return tensor.nbytes
