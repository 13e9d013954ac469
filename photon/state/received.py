"""The model that a silo has measured and is to train from next, kept by its hash so that it is sent once.

A request to measure it says the hash and that it is to be kept; the request to train from it brings the hash
alone. The file is the site's: its silos train from one model. What it holds is believed as little as what
comes: it is hashed before it is used. If it is gone, or another, the silo says so and is sent the model.
"""

from pathlib import Path

import torch

from photon.files.hashing import hash_of, new_hasher
from photon.state.kept_files import KeptFiles, Tensors, hashed

#: Folder among those of the silos; no silo has such a name.
FOLDER = ".received"
#: Models that are kept, the newest: one is trained from while the next is measured.
MOST_KEPT = 2


def tensors_hash(tensors: Tensors) -> str:
    """Return the BLAKE3 hash over names, types, shapes and bytes of tensors, in name order."""
    return hashed(tensors, new_hasher()).hexdigest()


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
        self._files = KeptFiles(state / FOLDER, MOST_KEPT)
        self._run_id = run_id

    def keep(self, params: Tensors, sha: str) -> bool:
        """Keep a model if it has a hash, and tell whether it is kept.

        It is not where a codec's arithmetic gives other bits here than at the server, or the disk is full.
        """
        if tensors_hash(params) != sha:
            return False
        try:
            self._files.keep(self._name(sha), params)
        except OSError:
            return False
        return True

    def load(self, sha: str) -> dict[str, torch.Tensor] | None:
        """Return the model with a hash, memory-mapped; None: it is not here, or has changed."""
        params = self._files.load(self._name(sha))
        if params is not None and tensors_hash(params) == sha:
            return params
        self._files.remove(self._name(sha))
        return None

    def _name(self, sha: str) -> str:
        return hash_of(f"{self._run_id}/{sha}".encode())
