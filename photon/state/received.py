"""The model that a silo has measured and is to train from next, kept by its hash so that it is sent once.

A request to measure it says the hash and that it is to be kept; the request to train from it brings the hash
alone. The file is the site's: its silos train from one model. What it holds is believed as little as what
comes: it is hashed before it is used. If it is gone, or another, the silo says so and is sent the model.
"""

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from photon.errors import PhotonError
from photon.files.hashing import hash_of, new_hasher
from photon.state.tensors import load_groups, save_groups

#: Folder among those of the silos; no silo has such a name.
FOLDER = ".received"
#: Models that are kept, the newest: one is trained from while the next is measured.
MOST_KEPT = 2

#: The group that it is, in its file.
PARAMS = "params"
Tensors = Mapping[str, torch.Tensor]


def tensors_hash(tensors: Tensors) -> str:
    """Return the BLAKE3 hash over names, types, shapes and bytes of tensors, in name order."""
    hasher = new_hasher()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        hasher.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


class ReceivedModels:
    """What the silos of a site have of the models that they were sent.

    Parameters
    ----------
    state
        Folder for what silos keep.
    run_id
        The run: a model of another one is none of this.
    """

    def __init__(self, state: Path, run_id: str) -> None:
        self._folder = state / FOLDER
        self._run_id = run_id

    def keep(self, params: Tensors, sha: str) -> bool:
        """Keep a model if it has a hash, and tell whether it is kept.

        It is not where a codec's arithmetic gives other bits here than at the server, or the disk is full.
        """
        if tensors_hash(params) != sha:
            return False
        path, own = self._path(sha), self._folder / f"{uuid.uuid4().hex}.part"
        try:
            if not path.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                save_groups(own, {PARAMS: params})
                own.replace(path)
                self._remove_old()
            os.utime(path)
        except OSError:
            with suppress(OSError):
                own.unlink(missing_ok=True)
            return False
        return True

    def load(self, sha: str) -> dict[str, torch.Tensor] | None:
        """Return the model with a hash, memory-mapped; None: it is not here, or has changed."""
        path = self._path(sha)
        try:
            params = load_groups(path).get(PARAMS, {})
        except PhotonError:
            return None
        if tensors_hash(params) != sha:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return params

    def _remove_old(self) -> None:
        files = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime)
        for old in [file for file in files if file.suffix == ".safetensors"][:-MOST_KEPT]:
            old.unlink(missing_ok=True)
        for left in [file for file in files if file.suffix == ".part"][:-MOST_KEPT]:
            left.unlink(missing_ok=True)

    def _path(self, sha: str) -> Path:
        return self._folder / f"{self._name(sha)}.safetensors"

    def _name(self, sha: str) -> str:
        return hash_of(f"{self._run_id}/{sha}".encode())
