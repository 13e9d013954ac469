"""What an objective decides: the arrays of a batch, the loss, and how the result is measured.

An objective knows models and data. It knows nothing of rounds, strategies, the link and privacy: those do not
ask which objective it is either.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from photon.data.silo_data import SiloData
from photon.state.unlearned import Unlearned
from photon.training.groups import StateGroups, Tensors
from photon.training.hooks import Batch, Loss
from photon.training.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Name of a state group to name of a tensor to its shape.
Shapes = Mapping[str, Mapping[str, torch.Size]]


@dataclass(frozen=True)
class Work:
    """What a silo trains on in a round: chosen once, before the first step.

    Attributes
    ----------
    windows
        Indices of the windows to train on, int64 of shape (n,), into those of all members one after the
        other. Their order is drawn anew for each round. None: the silo takes no steps in this round.
    arrays
        Arrays that were made for this round, such as labels that a model gave: name to tensor of shape
        (n, …), row by row for ``windows``.
    figures
        Figures of the choice, to report.
    """

    windows: Tensor
    arrays: Batch = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """A measurement as sums, so that those of several silos add up to that of all their text.

    Attributes
    ----------
    sums
        Figure to its sum over the counted items. The first is the one that models are compared by.
    count
        Items that were counted.
    """

    sums: Mapping[str, float]
    count: int

    @property
    def loss(self) -> float:
        """The first figure, for each item."""
        return self.of(next(iter(self.sums)))

    def of(self, figure: str) -> float:
        """Return a figure for each item."""
        return self.sums[figure] / self.count


@dataclass(frozen=True)
class Behind:
    """What is behind the sums that a silo is about to send.

    Attributes
    ----------
    rows
        What the sums are over, to how many of the silo's own rows (prompts, windows) that are; where it has
        none, it has no part in them.
    silos
        What the sums are over, to how many silos of the round have some, where that is known.
    all_silos
        How many silos the round is over; None: that is not known.
    """

    rows: Mapping[str, int]
    silos: Mapping[str, int] = field(default_factory=dict)
    all_silos: int | None = None


@dataclass(frozen=True)
class Conclusion:
    """What a round of sums comes to.

    Attributes
    ----------
    changed
        Tensors of the model that have other values from now on.
    figures
        Figures of the round, under ``figure/of what`` names.
    unlearned
        What was taken out of the model, if something was.
    silos
        What later sums are over, to how many silos have some.
    """

    changed: Tensors = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    unlearned: Unlearned | None = None
    silos: Mapping[str, int] = field(default_factory=dict)


class Objective(ABC):
    """Base of all objectives. It has settings, and keeps nothing from call to call.

    Attributes
    ----------
    arrays
        Names of the arrays that a batch has.
    trains
        False: there are no local steps, and a silo answers with `statistics`.
    shards
        False: the model cannot be sharded over the devices of a silo.
    groups
        Without steps: the groups of sums of all rounds, ``shared/…``.
    rounds
        Without steps: how many rounds it takes; None: as many as the run has.
    needs_all
        Without steps: whether a round counts only if all silos of the run answer, the same in each round.
    from_server_silo
        Whether the aggregator's own silo has a part of its own, for which there is ``strategy=anchor``.
    needs_server_silo
        Whether there must be one.
    server_order
        Whether it trains before the others of a round, or after them.
    """

    arrays: ClassVar[tuple[str, ...]] = ("tokens",)
    trains: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    groups: ClassVar[tuple[str, ...]] = ()
    rounds: ClassVar[int | None] = None
    needs_all: ClassVar[bool] = False
    from_server_silo: ClassVar[bool] = False
    needs_server_silo: bool = False
    server_order: Literal["before", "after"] = "before"

    def build(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return a new model with what this objective changes: heads, adapters, parameters that are frozen.

        A meta model, which has shapes alone, is changed in the same way.
        """
        return model

    def plain(self, params: Tensors) -> Tensors:
        """Return the tensors of a model without what `build` has added: what is exported."""
        return params

    def still(self, params: Collection[str], *, own: bool) -> frozenset[str]:
        """Return those parameters that a silo neither trains nor sends.

        Parameters
        ----------
        own
            Whether it is the aggregator's own silo.
        """
        return frozenset()

    def check_silo(self, data: SiloData, *, own: bool) -> None:  # noqa: B027 - most need nothing
        """Check that a silo's data is what the objective needs, beside its arrays, before the run starts.

        Raises
        ------
        PhotonError
            If it is not.
        """

    def shares(self, params: Mapping[str, torch.Size]) -> Shapes:
        """Return the names and shapes of what `share` gives: groups ``shared/…``."""
        return {}

    def share(self, model: nn.Module, data: SiloData) -> StateGroups:
        """Return what the aggregator's own silo gives to the others, in floating point.

        Parameters
        ----------
        model
            The model that it has trained, in evaluation mode and without gradients.
        """
        return {}

    @property
    def chooses(self) -> bool:
        """Whether it chooses what a silo trains on."""
        return type(self).prepare is not Objective.prepare

    def prepare(
        self,
        model: nn.Module,
        data: SiloData,
        received: StateGroups,
        *,
        server_round: int,
        seed: int,
        own: bool,
    ) -> Work | None:
        """Choose what a silo trains on in a round, before its first step; None: all of its text in turn.

        An objective that chooses trains in one process.

        Parameters
        ----------
        model
            The model with the parameters that the round starts from, in evaluation mode, without gradients.
        data
            The silo's text.
        received
            State groups beside the parameters that came with the request.
        seed
            The only source of random draws.
        own
            Whether it is the aggregator's own silo.
        """
        return None

    def count(self, batch: Batch) -> Tensor | None:
        """Return how many items of a batch the loss is a mean over; None: equal for batches of equal size.

        Parts of a batch, on one device or several, count by their share of its items.
        """
        return None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        """Return the loss of a batch.

        Parameters
        ----------
        model
            The model, or a wrapper of it that returns what it returns.
        batch
            Array name to rows.
        rows
            Rows of the vocabulary that the softmax runs over, bool; None: all.
        """

    @abstractmethod
    def evaluate(
        self,
        model: "PreTrainedModel",
        data: SiloData,
        rows: Tensor | None,
        *,
        batch_size: int,
        device: torch.device,
        precision: Precision,
        limit: int | None,
    ) -> Evaluation:
        """Measure a model on a silo's validation split.

        Parameters
        ----------
        model
            The model, on ``device``; it is left in the mode that it was in.
        data
            The silo's text.
        rows
            Rows of the vocabulary that the model was trained over, bool; None: all.
        batch_size
            Most windows per forward pass.
        precision
            Format of the forward pass.
        limit
            Most windows to read, evenly spaced; None: all.
        """

    @abstractmethod
    def sample(self, size: int, sequence_length: int) -> Batch:
        """Return a batch of so many rows that takes the most memory, for probes."""

    # --- of an objective without steps ----------------------------------------------------------------

    def sums(self, model: "PreTrainedModel", server_round: int) -> Shapes:
        """Return the names and shapes of what `statistics` gives in a round: groups ``shared/…``.

        Parameters
        ----------
        model
            The model, of which there are shapes alone.
        """
        return {}

    def behind(self, data: SiloData, received: StateGroups, server_round: int) -> "Behind":
        """Return what is behind the sums of a silo in a round, for its policy.

        The arguments are those of `statistics`.
        """
        return Behind({"text": sum(len(windows) for windows in data.windows("train"))})

    def statistics(
        self, model: nn.Module, data: SiloData, received: StateGroups, *, server_round: int, seed: int
    ) -> StateGroups:
        """Return sums over a silo's training text in float64, where ``trains`` is False.

        The sums of all silos add up to those of all text: nothing in them is divided by a silo's own count.

        Parameters
        ----------
        model
            The model, on its device, in evaluation mode and without gradients.
        data
            The silo's text, of which each training window may be read once.
        received
            What `keep` made of earlier sums, on the model's device.
        seed
            The only source of random draws.
        """
        raise NotImplementedError(f"{type(self).__name__} takes local steps")

    def keep(self, sums: StateGroups, kept: StateGroups, server_round: int) -> StateGroups:
        """Return what the server keeps after a round, and the next round's requests bring.

        Parameters
        ----------
        sums
            What the round's silos have summed, added up.
        kept
            What the round's requests brought.
        """
        return sums

    def brings(self, model: "PreTrainedModel", server_round: int) -> Shapes:
        """Return the names and shapes of what a round's requests bring: what `keep` made in the one before.

        Parameters
        ----------
        model
            The model, of which there are shapes alone.
        """
        return self.sums(model, server_round - 1) if server_round > 1 else {}

    def concluded(
        self,
        model: "PreTrainedModel",
        params: Tensors,
        sums: StateGroups,
        kept: StateGroups,
        server_round: int,
    ) -> "Conclusion":
        """Return what a round comes to beside what is kept: by default the model stays as it is.

        Parameters
        ----------
        model
            The model, of which there are shapes alone.
        params
            The model's tensors.
        sums, kept
            As of `keep`.
        """
        return Conclusion()
