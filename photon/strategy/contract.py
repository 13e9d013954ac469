"""What a request may bring and what a reply may hold: a function of configuration, round and role.

Both sides compute it from the same configuration, each with its own code. So no request can ask a silo for
something that its gate has not judged, and no reply can hold something that nobody expects.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from photon.config.schema import PrivacySection
from photon.errors import PhotonError
from photon.link.records import Shapes
from photon.privacy.masking import SUM_RANGE, FixedPoint, Quantizer

T = TypeVar("T")

#: What a participant is: a silo, a federation that acts as one, or the silo that a federation itself has.
Role = Literal["silo", "federation", "server_silo"]
#: The group of the model's parameters. A name without a slash beside it is one of the local optimizer's.
PARAMS = "params"
#: What the groups of a method begin with that stay in a silo, and of those that travel.
LOCAL, SHARED = "local/", "shared/"
#: The parameters that the last round began with, for a silo that was not in it.
RECEIVED = SHARED + "received"
#: Groups of a request that have the model's parameters, or some of them.
OF_MODEL = frozenset({PARAMS, RECEIVED})


def role_of(participant: str, server_silo: str | None, *, federation: bool) -> Role:
    """Return what a participant is.

    Parameters
    ----------
    server_silo
        The silo that the federation itself has, ``federation.server_silo``.
    federation
        Whether the participant is a federation.
    """
    if participant == server_silo:
        return "server_silo"
    return "federation" if federation else "silo"


@dataclass(frozen=True)
class Leaving:
    """A state group that may leave a silo.

    Attributes
    ----------
    kind
        ``"parameters"``: measured from `Start.reference`, the link may send their update; ``"mean"``: a
        state group that is averaged; ``"sum"``: added in float64, without a weight; ``"as_is"``: looked at
        one by one.
    shapes
        Tensor name to shape.
    required
        Whether every reply holds it, with all its tensors.
    masked
        Tensors of it that secure aggregation masks: those of whose updates the server needs the plain mean
        alone.
    bounded
        Whether privacy clips and noises it.
    limit
        Of a sum that is masked: the largest magnitude of a value that one silo may have in it.
    """

    kind: Literal["parameters", "mean", "sum", "as_is"]
    shapes: Mapping[str, torch.Size]
    required: bool = True
    masked: frozenset[str] = frozenset()
    bounded: bool = False
    limit: float = SUM_RANGE


@dataclass(frozen=True)
class Contract:
    """What may arrive at a node and leave it in a round.

    Attributes
    ----------
    arriving
        Shapes of the state groups that a request may bring; of ``params`` it brings all or some. Those whose
        names begin with ``fixed/`` are sent once.
    leaving
        State group to its description.
    own
        Parameters that are the node's own: the server takes no mean of them.
    tells_rows
        Whether the report says which rows of the embedding were trained.
    needs_all
        Whether a round counts only with the replies of all who are asked.
    """

    arriving: Shapes
    leaving: Mapping[str, Leaving]
    own: frozenset[str] = frozenset()
    tells_rows: bool = False
    needs_all: bool = False

    @property
    def due(self) -> dict[str, Mapping[str, torch.Size]]:
        """Shapes of the state groups that every reply holds."""
        return {group: leaving.shapes for group, leaving in self.leaving.items() if leaving.required}

    @property
    def optional(self) -> dict[str, Mapping[str, torch.Size]]:
        """Shapes of the state groups that a reply may hold as well, or parts of them."""
        return {group: leaving.shapes for group, leaving in self.leaving.items() if not leaving.required}

    @property
    def masked(self) -> frozenset[str]:
        """Parameters that secure aggregation masks."""
        return self.leaving[PARAMS].masked if PARAMS in self.leaving else frozenset()

    @property
    def masks_sums(self) -> bool:
        """Whether what secure aggregation masks are sums; else it is updates of parameters."""
        return any(leaving.kind == "sum" and leaving.masked for leaving in self.leaving.values())

    def masked_of(self, groups: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
        """Return what is masked of some state groups: a parameter by its name, a sum as ``group/name``."""
        return {
            name if group == PARAMS else f"{group}/{name}": value
            for group, of in groups.items()
            for name, value in of.items()
            if group in self.leaving and name in self.leaving[group].masked
        }

    def with_masked(
        self, groups: Mapping[str, Mapping[str, T]], masked: Mapping[str, T]
    ) -> dict[str, dict[str, T]]:
        """Return state groups with other values in the place of what is masked, named as by `masked_of`."""
        return {
            group: {
                name: masked.get(name if group == PARAMS else f"{group}/{name}", value)
                for name, value in of.items()
            }
            for group, of in groups.items()
        }

    def quantizer(self, privacy: PrivacySection, cohort: int) -> Quantizer | FixedPoint:
        """Return what makes integers of what is masked, for a cohort of so many.

        Raises
        ------
        PhotonError
            If the cohort is too large for the ring.
        """
        if not self.masks_sums:
            return Quantizer(privacy.range, cohort)
        shapes = {group: leaving.shapes for group, leaving in self.leaving.items()}
        names = self.masked_of(shapes)
        return FixedPoint({name: self.leaving[name.rpartition("/")[0]].limit for name in names}, cohort)

    def check_reply(self, groups: Mapping[str, Collection[str]]) -> None:
        """Check that a reply holds what it may, and all that is due.

        Parameters
        ----------
        groups
            State group to the names of its tensors.

        Raises
        ------
        PhotonError
            If something is not in the contract, or missing. Nothing was sent then.
        """
        for group, names in groups.items():
            allowed = self.leaving[group].shapes if group in self.leaving else {}
            if unknown := sorted(set(names) - set(allowed)):
                raise PhotonError(f"{group}/{unknown[0]}: no part of this round's contract; nothing was sent")
        for group, shapes in self.due.items():
            if missing := sorted(set(shapes) - set(groups.get(group, ()))):
                raise PhotonError(f"{group}/{missing[0]}: due in this round, and training left none")

    def open_tensors(self) -> list[str]:
        """Return what leaves without a mask when secure aggregation is on, as ``group/name``, sorted."""
        return sorted(
            f"{group}/{name}"
            for group, leaving in self.leaving.items()
            for name in set(leaving.shapes) - leaving.masked
        )

    def unbounded_groups(self) -> list[str]:
        """Return the groups that privacy neither clips nor noises."""
        return sorted(group for group, leaving in self.leaving.items() if not leaving.bounded)


def check_promises(contract: Contract, privacy: PrivacySection) -> None:
    """Check that all that leaves has the noise and the masks that a run promises.

    Raises
    ------
    PhotonError
        If a group would leave unbounded where updates are bounded, or a tensor without a mask.
    """
    if privacy.on and (groups := contract.unbounded_groups()):
        raise PhotonError(
            f"privacy.clip_norm: the strategy lets {', '.join(groups)} leave, which nothing bounds; use one "
            "that shares parameters alone, or remove privacy.clip_norm"
        )
    if privacy.secure_aggregation and not privacy.allow_unmasked and (tensors := contract.open_tensors()):
        raise PhotonError(
            f"privacy.secure_aggregation: {tensors[0]} would leave without a mask ({len(tensors)} tensors), "
            "because the strategy looks at it by itself; use one that needs the mean alone, or set "
            "privacy.allow_unmasked=true"
        )
