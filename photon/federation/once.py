"""What is sent once: which participant has which of the groups ``fixed/…``, and what is left to send."""

from collections.abc import Collection, Mapping

import torch

from photon.config.schema import RunConfig
from photon.objective.configured import kept_of
from photon.state.fixed import BASE, FIXED, group_sha256, without_base
from photon.strategy.contract import OF_MODEL

Groups = Mapping[str, Mapping[str, torch.Tensor]]


class SentOnce:
    """What the participants of a run have, as far as this process knows.

    Requests to train and to evaluate share it: what the first brings, the others need not.

    What no step moves of the model is such a group, ``fixed/base``.

    Parameters
    ----------
    config
        The run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._frozen = kept_of(config)
        self._has: dict[str, frozenset[str]] = {}
        self._sent: dict[str, frozenset[str]] = {}
        self._hashes: dict[int, tuple[str, Mapping[str, torch.Tensor]]] = {}
        #: Hash of ``fixed/base``, which is the same in all rounds.
        self._base: str | None = None

    def split(self, groups: Groups, params: Mapping[str, torch.Tensor]) -> Groups:
        """Return groups as they travel: what no step moves of the model is a group of its own.

        Parameters
        ----------
        params
            All tensors of the model; the groups may have a part of them.
        """
        if not self._frozen:
            return groups
        base = {name: tensor for name, tensor in params.items() if name in self._frozen}
        return {**without_base(groups, self._frozen, OF_MODEL), BASE: base}

    def moving(self, params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of the model that steps move."""
        return {name: tensor for name, tensor in params.items() if name not in self._frozen}

    def left(self, participant: str, groups: Groups) -> tuple[Groups, dict[str, str]]:
        """Return what a participant is sent of its groups, and the hashes of those that are sent once.

        One that it has is left out. If it has lost that, its failure says so, and the next request brings it.
        """
        fixed = {
            group: self._hash(group, tensors) for group, tensors in groups.items() if group.startswith(FIXED)
        }
        has = self._has.get(participant, frozenset())
        sent = {group: tensors for group, tensors in groups.items() if fixed.get(group) not in has}
        self._sent[participant] = frozenset(fixed.values())
        return sent, fixed

    def settle(self, accepted: Collection[str]) -> None:
        """Take note of who has answered: they have what they were sent."""
        for participant, hashes in self._sent.items():
            has = self._has.get(participant, frozenset())
            self._has[participant] = has | hashes if participant in accepted else has - hashes
        self._sent.clear()
        self._hashes.clear()

    def _hash(self, group: str, tensors: Mapping[str, torch.Tensor]) -> str:
        if group == BASE:
            self._base = self._base or group_sha256(tensors)
            return self._base
        # One object for the whole cohort, which is kept, so that its id stays its own.
        if id(tensors) not in self._hashes:
            self._hashes[id(tensors)] = group_sha256(tensors), tensors
        return self._hashes[id(tensors)][0]
