"""State groups that are sent once: a silo keeps them by their hash, and later requests bring the hash alone.

Such are the base model under adapters, a reference model, anchors. Their names begin with ``fixed/``. A
request says the SHA-256 of each; the tensors come with it only if the server does not know that the silo has
them. A silo believes neither: what came must have the hash, and so must what it has kept.
"""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from photon.errors import PhotonError
from photon.state.kept_files import KeptFiles, hashed

#: What the names of such groups begin with.
FIXED = "fixed/"
#: The group of what no step moves of a model: frozen parameters, and buffers.
BASE = FIXED + "base"
#: Groups that a silo keeps, the newest: several runs may take turns at one.
MOST_KEPT = 8

Groups = Mapping[str, Mapping[str, torch.Tensor]]
T = TypeVar("T")


def group_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of tensors, in name order."""
    return hashed(tensors, hashlib.sha256()).hexdigest()


def without_base(
    groups: Mapping[str, Mapping[str, T]], frozen: frozenset[str], of_model: Collection[str]
) -> dict[str, Mapping[str, T]]:
    """Return groups as they travel: of those that have the whole model, what no step moves is one group.

    Parameters
    ----------
    groups
        State groups, or their shapes.
    frozen
        Names of what no step moves.
    of_model
        The groups that have the model's parameters, or some of them.
    """
    if not frozen:
        return dict(groups)
    moving = {
        group: {name: one for name, one in named.items() if name not in frozen}
        for group, named in groups.items()
        if group in of_model
    }
    return {**groups, **moving}


def with_base(groups: Groups, of_model: Collection[str]) -> dict[str, Mapping[str, torch.Tensor]]:
    """Undo `without_base` where what no step moves came with them, as ``fixed/base``, or was kept here."""
    if BASE not in groups:
        return dict(groups)
    return {
        group: dict(sorted({**groups[BASE], **tensors}.items())) if group in of_model else tensors
        for group, tensors in groups.items()
        if group != BASE
    }


class FixedGroups:
    """What a silo has of such groups.

    Parameters
    ----------
    folder
        Folder for them, each in a file of the name of its hash.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = KeptFiles(folder, MOST_KEPT)

    def complete(
        self, groups: Groups, hashes: Mapping[str, str], silo: str
    ) -> dict[str, Mapping[str, torch.Tensor]]:
        """Return state groups with those that did not come; keep those that came.

        Parameters
        ----------
        groups
            What came with a request.
        hashes
            Each group ``fixed/…`` of the request to its SHA-256 in hexadecimal digits.
        silo
            Its name, for error messages.

        Raises
        ------
        PhotonError
            If one neither came nor is here, or one that came has another hash.
        """
        if stray := sorted(group for group in groups if group.startswith(FIXED) and group not in hashes):
            raise PhotonError(f"{stray[0]} came without its hash; server and silos must run the same photon")
        whole = dict(groups)
        for group, sha256 in hashes.items():
            if group not in groups:
                whole[group] = self._load(group, sha256, silo)
            elif group_sha256(groups[group]) != sha256:
                raise PhotonError(f"{group} that came is not what its hash says")
            else:
                self._save(groups[group], sha256)
        return whole

    def _save(self, tensors: Mapping[str, torch.Tensor], sha256: str) -> None:
        try:
            self._files.keep(sha256, tensors)
        except OSError as error:
            raise PhotonError(
                f"{self._folder}: what came cannot be kept ({error}); make room on the silo's disk"
            ) from error

    def _load(self, group: str, sha256: str, silo: str) -> Mapping[str, torch.Tensor]:
        tensors = self._files.load(sha256)
        if not tensors or group_sha256(tensors) != sha256:
            self._files.remove(sha256)
            raise PhotonError(
                f"{silo} has lost {group}, which is sent once; its next request after this failure brings it"
            )
        self._files.keep(sha256, tensors)  # as one of the newest
        return tensors
