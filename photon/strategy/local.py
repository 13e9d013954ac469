"""The silo's half of a strategy: what happens around the local steps, and in them.

A round at a silo is

    start → the objective's local steps, with the method's hooks → finish

and all that a method knows are state groups, a small typed request, and counts of the silo's text. It holds
configuration and no state: what it wants to see again stays in the silo as a group ``local/…``, and what it
shares travels as a group ``shared/…``. `LocalMethod` itself is Photon's half; other strategies change a part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from photon.config.schema import Component, RunConfig
from photon.config.tree import RoutedTag
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.strategy.contract import LOCAL, PARAMS, RECEIVED, Contract, Role
from photon.training.averages import corrected_decays, with_averages, without_strange
from photon.training.devices import GroupResult
from photon.training.groups import StateGroups, Tensors
from photon.training.hooks import NO_HOOKS, StepHooks
from photon.training.states import is_refreshing, optimizer_groups, refresh

Groups = Mapping[str, Tensors]
#: keep: its state stays in the silo; reset: every round starts anew; sync: averaged as the sync plan says.
LocalState = Literal["keep", "reset", "sync"]
#: The parameters that the last round began with, as a silo keeps them.
BEGAN_WITH = LOCAL + "received"


class LostStateError(PhotonError):
    """The silo lacks what it should have kept; its next request after this failure brings all."""


@dataclass(frozen=True)
class Request:
    """The part of a request that a method may see.

    Attributes
    ----------
    silo
        The participant's name, for error messages.
    round, global_step, steps
        The round, the step of the run that its first local step is, and how many there are.
    role
        What the participant is.
    last_round
        The last round whose reply the server accepted from it; 0: none.
    scalars
        Scalar states of the local optimizers, such as ``step``, that go with averaged states.
    averaged_rounds
        State group of the local optimizer to the round at whose end it was last averaged.
    tags
        What the blocks of other federations are that came.
    contract
        What may arrive and leave.
    vocab_size
        Tokens of the tokenizer.
    """

    silo: str
    round: int
    global_step: int
    steps: int
    role: Role
    last_round: int
    scalars: Mapping[str, float]
    averaged_rounds: Mapping[str, int]
    tags: Sequence[RoutedTag]
    contract: Contract
    vocab_size: int


@dataclass(frozen=True)
class Kept:
    """What a silo has kept from its last accepted round.

    Attributes
    ----------
    optimizer, scalars
        State groups and scalars of the local optimizer.
    local
        The method's own groups, ``local/…``.
    """

    optimizer: StateGroups
    scalars: Mapping[str, float]
    local: StateGroups


@dataclass(frozen=True)
class Start:
    """What a round starts from.

    Attributes
    ----------
    params
        The parameters to start from.
    reference
        The last value of each parameter that the server knows: what privacy and the link measure from.
    optimizer
        State groups of the local optimizer; None: a fresh one.
    scalars
        Its scalars.
    averaged
        Groups of ``optimizer`` that came with the request: the others are those that the silo has kept.
    context
        What the hooks and `LocalMethod.begin` need, by group: tensors of the parameters' names and shapes,
        which are placed, or sharded, as the parameters are.
    collected
        As ``context``; the hooks add to these, and `LocalMethod.finish` gets them back.
    stays
        Groups that the silo keeps as they are, whatever is trained.
    rows
        Rows of the vocabulary that the softmax runs over, bool of shape (rows,); None: all.
    figures
        Figures for the report.
    """

    params: Tensors
    reference: Tensors
    optimizer: StateGroups | None
    scalars: Mapping[str, float]
    averaged: frozenset[str] = frozenset()
    context: StateGroups = field(default_factory=dict)
    collected: StateGroups = field(default_factory=dict)
    stays: StateGroups = field(default_factory=dict)
    rows: torch.Tensor | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finish:
    """What a round ends with.

    Attributes
    ----------
    trained
        What training left, after the method undid what it does not want.
    leaves
        Groups that leave the silo, as the contract says.
    stays
        Groups that the silo keeps until its next request, those of the local optimizer among them.
    scalars
        Scalars that stay with them.
    """

    trained: GroupResult
    leaves: StateGroups
    stays: StateGroups
    scalars: Mapping[str, float]


def hint_of_reset(config: RunConfig) -> str:
    """Return the hint to leave out what silos have kept, where the strategy has that choice."""
    has_choice = "local_state" in config.strategy.as_mapping()
    return ", set strategy.local_state=reset" if has_choice else ""


class LocalMethod:
    """Photon's half at a silo, and the base of the others.

    Parameters
    ----------
    config
        The run's configuration.
    local_state
        What becomes of the local optimizer's state between rounds, as in `Strategy`.
    """

    #: Why it trains on one device alone; None: a group of them trains as one does.
    one_device_only: str | None = None
    #: Whether the softmax of a silo runs over some rows alone, as `Start.rows` then says.
    restricts_rows: bool = False

    def __init__(self, config: RunConfig, local_state: LocalState) -> None:
        self.config = config
        self.local_state = local_state

    # --- once per process -----------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Change the model, before the optimizer is built: on silos, on the server, and without memory."""

    # --- before the local steps -----------------------------------------------------------------------

    def start(self, received: Groups, kept: Kept | None, request: Request, data: SiloData) -> Start:
        """Join what came with what the silo has kept.

        Raises
        ------
        LostStateError
            If the silo lacks what the request counts on.
        """
        if len(received[PARAMS]) < len(request.contract.arriving[PARAMS]):
            raise LostStateError(f"{request.silo}: this strategy starts from all parameters")
        return self.joined(received, kept, request, received[PARAMS], received[PARAMS])

    def joined(
        self, received: Groups, kept: Kept | None, request: Request, params: Tensors, reference: Tensors
    ) -> Start:
        """Return a start from some parameters, with the local optimizer's state as kept and received.

        A silo that has kept nothing takes averages only if they are the whole state: with one moment at zero
        and a step counter far from it, bias correction would blow up the first steps.

        Raises
        ------
        PhotonError
            If what the silo has kept is of another optimizer.
        """
        states = optimizer_groups(self.config.optimizer)
        averaged: StateGroups = {group: dict(received[group]) for group in states if group in received}
        came = received.get(RECEIVED)
        before = None if self.local_state == "reset" else kept
        if before is not None and (strange := sorted(set(before.optimizer) - set(states))):
            raise PhotonError(
                f"optimizer: {request.silo} has kept the state of another one ({', '.join(strange)}); change "
                f"it back{hint_of_reset(self.config)}, or start anew"
            )
        optimizer: StateGroups | None = None
        scalars: Mapping[str, float] = {}
        decays = corrected_decays(self._optimizer_at(request.global_step)) if averaged else {}
        if before is not None:
            optimizer, scalars = with_averages(
                (before.optimizer, dict(before.scalars)), (averaged, dict(request.scalars)), decays
            )
            came = came or before.local.get(BEGAN_WITH)
        elif averaged and set(averaged) == set(states) & set(request.contract.arriving):
            optimizer, scalars = averaged, request.scalars
        # Whose steps each group is of: an average's silos, or this one's own.
        origins = {
            request.averaged_rounds.get(group) if group in averaged else 0 for group in optimizer or ()
        }
        if optimizer is not None and len(origins) > 1:
            optimizer = without_strange(optimizer, decays)
        context: StateGroups = {}
        if optimizer is not None and came is not None and is_refreshing(self.config.optimizer):
            context[RECEIVED] = dict(came)
        return Start(params, reference, optimizer, scalars, averaged=frozenset(averaged), context=context)

    def _optimizer_at(self, global_step: int) -> Component:
        """Return the local optimizer with the settings that are in force at a step of the run."""
        section, transition = self.config.optimizer, self.config.transition
        if transition is None or global_step < transition.step:
            return section
        return Component.model_validate({**section.as_mapping(), **transition.optimizer})

    # --- in the local steps ---------------------------------------------------------------------------

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, context: Groups) -> None:
        """Act on the model after its state is written, before the first step; ``context`` is placed."""
        if (received := context.get(RECEIVED)) is not None:
            refresh(model, optimizer, received)

    def hooks(self, context: Groups, collected: Groups) -> StepHooks:
        """Return what is added to the local steps; both arguments are placed as the parameters are."""
        return NO_HOOKS

    # --- after the local steps ------------------------------------------------------------------------

    def finish(self, start: Start, trained: GroupResult, request: Request) -> Finish:
        """Say what leaves and what stays."""
        leaving = request.contract.leaving
        due = leaving[PARAMS].shapes
        leaves: StateGroups = {PARAMS: {name: t for name, t in trained.params.items() if name in due}}
        leaves |= {group: trained.groups[group] for group in leaving if group in trained.groups}
        if self.local_state == "reset":
            return Finish(trained, leaves, start.stays, {})
        stays = {**trained.groups, **start.stays}
        if is_refreshing(self.config.optimizer):
            stays[BEGAN_WITH] = dict(start.reference)
        return Finish(trained, leaves, stays, trained.scalars)

    # --- a model of the silo's own ----------------------------------------------------------------------

    def own_model(self, received: Tensors, local: Groups) -> Tensors | None:
        """Return the parameters of the silo's own model, for evaluation; None: it has none.

        Parameters
        ----------
        local
            The method's own groups that the silo has kept.
        """
        return None

    # --- for a federation in the place of a silo --------------------------------------------------------

    def begins_with(self, params: Tensors) -> StateGroups:
        """Return what a federation keeps from its first parameters on, beside them."""
        return {}

    def adopt(
        self, own: Tensors, kept: Groups, received: Groups, tags: Sequence[RoutedTag]
    ) -> tuple[Tensors, Mapping[str, float]]:
        """Return the parameters that a federation goes on from, and figures.

        Parameters
        ----------
        own, kept
            The parameters that it ended with, and what it keeps beside them.
        received, tags
            What came from above.
        """
        return received[PARAMS], {}
