"""What a request may bring and what a reply may hold: a function of configuration, round and role.

Both sides compute it from the same configuration, each with its own code. So no request can ask a silo for
something that its gate has not judged, and no reply can hold something that nobody expects.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from photon.link.records import Shapes

#: What a participant is: a silo (or what stands in for one), or the server's own silo.
Role = Literal["silo", "server_silo"]
#: The group of the model's parameters.
PARAMS = "params"


@dataclass(frozen=True)
class Leaving:
    """A state group that may leave a silo.

    Attributes
    ----------
    kind
        ``"parameters"``: measured from `Start.reference`, the link may send their update; ``"mean"``: a
        state group that is averaged; ``"sum"``: added in float64, without a weight.
    shapes
        Tensor name to shape.
    required
        Whether every reply holds it, with all its tensors.
    masked
        Tensors of it that secure aggregation masks: those of whose updates the server needs the plain mean
        alone.
    bounded
        Whether privacy clips and noises it.
    """

    kind: Literal["parameters", "mean", "sum"]
    shapes: Mapping[str, torch.Size]
    required: bool = True
    masked: frozenset[str] = frozenset()
    bounded: bool = False


@dataclass(frozen=True)
class Contract:
    """What may arrive at a node and leave it in a round.

    Attributes
    ----------
    arriving
        Shapes of the state groups that a request may bring; of ``params`` it brings all or some.
    leaving
        State group to its description.
    own
        Parameters that are the node's own: the server takes no mean of them.
    tells_rows
        Whether the report says which rows of the embedding were trained.
    """

    arriving: Shapes
    leaving: Mapping[str, Leaving]
    own: frozenset[str] = frozenset()
    tells_rows: bool = False

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
