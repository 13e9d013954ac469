"""Tensors that a silo keeps so that they need not come again: a file each, the newest few, by their hash."""

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from typing_extensions import Buffer

from photon.errors import PhotonError
from photon.state.tensors import load_groups, save_groups

Tensors = Mapping[str, torch.Tensor]
#: The group that they are, in their file.
_GROUP = "tensors"


class Hasher(Protocol):
    """What a hash is made with, such as ``hashlib.sha256()``."""

    def update(self, data: Buffer, /) -> object:
        """Add bytes."""


H = TypeVar("H", bound=Hasher)


def hashed(tensors: Tensors, hasher: H) -> H:
    """Add names, types, shapes and bytes of tensors to a hash, in name order, and return it."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        hasher.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher


class KeptFiles:
    """The files. What they hold is for the caller to hash before it is believed.

    Parameters
    ----------
    folder
        Folder for them alone.
    most
        Files that are kept, the newest.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder
        self._most = most

    def keep(self, name: str, tensors: Tensors) -> None:
        """Write tensors under a name, if nothing is there, and count them as new.

        Raises
        ------
        OSError
            If the disk takes no more.
        """
        path, own = self._path(name), self._folder / f"{uuid.uuid4().hex}.part"
        try:
            if not path.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                save_groups(own, {_GROUP: tensors})
                own.replace(path)
                self._remove_old()
            os.utime(path)
        except OSError:
            with suppress(OSError):
                own.unlink(missing_ok=True)
            raise

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return the tensors of a name, memory-mapped; None: they are not here, or are damaged."""
        try:
            return load_groups(self._path(name)).get(_GROUP)
        except PhotonError:
            return None

    def remove(self, name: str) -> None:
        """Remove the tensors of a name, if they are there."""
        with suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def _remove_old(self) -> None:
        files = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime)
        # Others may be writing at the same time; what a crash left is older.
        for suffix in (".safetensors", ".part"):
            for old in [file for file in files if file.suffix == suffix][: -self._most]:
                old.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
