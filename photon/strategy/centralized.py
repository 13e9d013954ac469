"""The centralised baseline: one participant that trains on the text of all silos."""

from collections.abc import Sequence
from typing import Literal

from photon.config.schema import RunConfig
from photon.link.messages import SiloInfo
from photon.strategy.base import Participant
from photon.strategy.photon import Photon


class Centralized(Photon):
    """Train the same model on the union of the silos' text, through the same loop.

    A local step takes ``cohort × training.batch_size`` sequences, so a round sees as many tokens as a
    round of the federation it is compared with. A model that is averaged with nobody needs no outer
    optimizer, so keep ``outer=fedavg``.

    Parameters
    ----------
    config
        The run's configuration.
    local_state
        ``"keep"`` makes rounds invisible; ``"reset"`` restarts the local optimizer every round.
    """

    silos_only = "whose text cannot be pooled"
    no_server_silo = "its text is among that of all silos; leave it out"

    def __init__(self, config: RunConfig, *, local_state: Literal["keep", "reset"] = "keep") -> None:
        super().__init__(config, local_state=local_state)

    def participants(self, silos: Sequence[SiloInfo]) -> list[Participant]:
        """Return one participant that holds all silos."""
        cohort = self.config.cohort or len(silos)
        members = tuple(silo.name for silo in silos)
        return [Participant("centralized", members, cohort * self.config.training.batch_size)]
