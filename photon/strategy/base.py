"""What a strategy decides. The rounds themselves are the same for all strategies.

The methods keep the shape of Flower's ``Strategy`` (``configure_train``, ``aggregate_train``), with state
groups in place of one ``ArrayRecord``, and replies that stream in place of a list.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import ValidationError

from photon.components import build
from photon.config.compose import parse
from photon.config.explain import explain_validation
from photon.config.schema import RunConfig
from photon.config.section import Section
from photon.config.tree import RoutedTag
from photon.errors import PhotonError
from photon.link.encoding import SparseTensor
from photon.link.messages import SiloInfo, TrainReport
from photon.models.sparse import SparseTraining
from photon.objective.configured import kept_of, objective_of
from photon.state.checkpoint import Checkpoint, Unlearned
from photon.strategy.contract import PARAMS, Contract, Leaving, Role
from photon.strategy.local import LocalMethod, LocalState
from photon.strategy.outer import OuterStep, rates

StateGroups = dict[str, dict[str, torch.Tensor]]
Settings = TypeVar("Settings", bound=Section)
T = TypeVar("T")
#: Rounds that a node judges before the first one, at most: an aggregator may name any number.
LOOKED_AHEAD = 1_000


@dataclass(frozen=True)
class Participant:
    """Who trains: usually one silo.

    Attributes
    ----------
    name
        Name in cohorts, events and ledger.
    members
        Silos whose text it trains on; their node must host all of them.
    batch_size
        Sequences per local step.
    """

    name: str
    members: tuple[str, ...]
    batch_size: int


@dataclass(frozen=True)
class Limits:
    """The most that a participant counts for, whatever it has done: tokens, and silos below it."""

    tokens: int
    leaves: int


@dataclass(frozen=True)
class Reply:
    """A checked reply of a participant.

    Attributes
    ----------
    groups
        The trained state groups.
    bytes_up, group_bytes_up
        Its bytes on the link: all, and those of each state group's tensors.
    update
        θ_received − θ_trained, perhaps sparse, in place of the group ``params``: for strategies that fold
        updates, where the link sends them.
    limits
        What it may count for in a mean; None: for all that it has done.
    """

    participant: str
    report: TrainReport
    groups: StateGroups
    bytes_up: int
    group_bytes_up: dict[str, int]
    update: Mapping[str, torch.Tensor | SparseTensor] | None = None
    limits: Limits | None = None

    @property
    def tokens(self) -> int:
        """Tokens that it counts for in a mean."""
        return self.report.tokens if self.limits is None else min(self.report.tokens, self.limits.tokens)

    @property
    def leaves(self) -> int:
        """Silos that it counts for in a mean."""
        return self.report.leaves if self.limits is None else min(self.report.leaves, self.limits.leaves)


@dataclass(frozen=True)
class Aggregate:
    """What folding a round's replies and stepping the outer optimizer gave.

    Attributes
    ----------
    params
        The global parameters.
    averaged
        State groups of the local optimizer that were averaged in this round.
    outer, outer_scalars
        State of the outer optimizer.
    weights
        Share of each folded participant in the mean; they sum to 1. Empty where no weighted mean was taken:
        of sums, and by robust folds that go by coordinates or norms.
    figures
        Further figures of the round, under ``figure/of what`` names.
    kept
        Further state groups that the strategy finds in the next round's checkpoint.
    routed
        What those of them are that travel to other federations.
    unlearned
        What was taken out of the model, if something was.
    """

    params: dict[str, torch.Tensor]
    averaged: StateGroups
    outer: StateGroups
    outer_scalars: dict[str, float]
    step: OuterStep
    weights: dict[str, float]
    fold_seconds: float
    outer_seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    kept: StateGroups = field(default_factory=dict)
    routed: Sequence[RoutedTag] = ()
    unlearned: Unlearned | None = None


class Strategy(ABC):
    """Base of all strategies.

    Parameters
    ----------
    config
        The run's configuration.
    """

    #: What the silos do with their local optimizer between rounds.
    local_state: LocalState
    #: Whether it takes replies with an update in place of parameters.
    folds_updates: ClassVar[bool] = False
    #: Whether it adds up sums of an objective without steps, in place of folding what was trained.
    folds_sums: ClassVar[bool] = False
    #: Whether a round counts only with the replies of all who are asked.
    needs_all: bool = False
    #: Whether it takes replies of silos that have found nothing to train on.
    folds_idle: ClassVar[bool] = False
    #: Whether it looks at all replies of a round together; they then lie on the server's disk, mapped.
    holds_replies: bool = False
    #: Whether participants that missed a round are also sent the parameters that it started from.
    sends_previous: bool = False
    #: Whether participants may be sent some of the parameters alone.
    sends_parts: bool = False
    #: Fewest participants of a cohort with which its fold keeps what it promises.
    least_cohort: int = 1
    #: How silos train a sparse model; None: a dense one.
    sparse: SparseTraining | None = None

    #: Why a participant must be a silo; None: it may be a federation.
    silos_only: str | None = None
    #: Why the federation itself has no text to train on; None: it may have some.
    no_server_silo: ClassVar[str | None] = None

    #: Whether a federation with text of its own trains before its silos, beside them, or after them.
    schedule: Literal["sequential", "parallel", "after"] = "sequential"

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @cached_property
    def local(self) -> LocalMethod:
        """The silo's half."""
        return LocalMethod(self.config, self.local_state)

    def trained(self, params: Mapping[str, T]) -> dict[str, T]:
        """Return those of the model's tensors that training moves: the others arrive, and never leave.

        The others are frozen parameters and the buffers that are saved with a model.
        """
        kept = kept_of(self.config)
        return {name: tensor for name, tensor in params.items() if name not in kept}

    def contract(self, server_round: int, params: Mapping[str, torch.Size], role: Role = "silo") -> Contract:
        """Return what requests of a round may bring, and what replies hold: by default all parameters.

        Parameters
        ----------
        params
            Name and shape of every tensor of the model.
        role
            What the participant is.
        """
        trained = self.trained(params)
        leaving = Leaving("parameters", trained, masked=frozenset(trained), bounded=True)
        return Contract({PARAMS: params}, {PARAMS: leaving})

    def telling_rounds(self) -> Sequence[int]:
        """Return rounds of the run in whose contracts all that ever leaves can be seen: by default one.

        None is beyond `LOOKED_AHEAD`.
        """
        return (1,)

    def participants(self, silos: Sequence[SiloInfo]) -> list[Participant]:
        """Return who can be sampled, in name order: by default every silo on its own."""
        return [Participant(silo.name, (silo.name,), self.config.training.batch_size) for silo in silos]

    def routed_tags(self, checkpoint: Checkpoint, participant: str) -> list[RoutedTag]:
        """Return what the routed layers are that `configure_train` sends to a participant."""
        return []

    def after_server_silo(self, reply: Reply) -> StateGroups:
        """Return what the reply of the federation's own silo has for the others; see `Checkpoint.given`."""
        return {}

    def problem_within(self, above: "Strategy") -> str | None:
        """Return why a federation with these settings cannot take part in another one, or None.

        Parameters
        ----------
        above
            The strategy, of the same class, of the other one.
        """
        return None

    def problem_after(self, before: "Strategy", checkpoint: Checkpoint) -> str | None:
        """Return why a run cannot go on from a checkpoint with these settings, or None.

        Parameters
        ----------
        before
            The strategy, of the same class, with the settings that the checkpoint was written under.
        """
        return None

    def exported(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Return a checkpoint's parameters as the plain model has them."""
        return checkpoint.load_params()

    @abstractmethod
    def configure_train(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> Mapping[str, StateGroups]:
        """Return the state groups to send to each participant; equal ones may be the same object."""

    @abstractmethod
    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        """Fold the replies, which come one at a time in cohort order, and step the global state.

        There is at least one reply. Nothing that was sent is still in memory.
        """


def strategy_of(config: RunConfig) -> Strategy:
    """Return the run's strategy, for those who ask about its rules."""
    return _strategy(config.text)


@lru_cache(maxsize=8)
def _strategy(config_text: str) -> Strategy:
    # Every message asks, and a strategy may look at the local optimizer to be built.
    config = parse(config_text)
    strategy: Strategy = build(config.strategy.as_mapping(), "strategy", config)
    return strategy


def strategy_before(checkpoint: Checkpoint) -> Strategy | None:
    """Return the strategy that a checkpoint was written under; None: nobody can tell."""
    if not checkpoint.state.config:
        return None
    try:
        return _strategy(checkpoint.state.config)
    except PhotonError:
        # An earlier version has written it, and knew other settings.
        return None


def check_group(config: RunConfig) -> None:
    """Check that a silo may train in a group of processes, if that is what is set.

    Raises
    ------
    PhotonError
        If windows are chosen, or the strategy works on one device.
    """
    if config.training.processes == 1:
        return
    if config.data.filter or config.data.mixture:
        reason: str | None = "data.filter and data.mixture choose windows in one process"
    elif objective_of(config).chooses:
        reason = "the objective chooses its windows in one process"
    else:
        reason = strategy_of(config).local.one_device_only
    if reason is not None:
        raise PhotonError(f"training.processes: {reason}; set it to 1")


def settings_of(kind: type[Settings], values: dict[str, Any] | None, where: str) -> Settings:
    """Return an argument of a strategy that is a mapping, checked.

    Parameters
    ----------
    where
        Its name.

    Raises
    ------
    PhotonError
        For an unknown key or a value that does not fit.
    """
    try:
        return kind.model_validate(values or {})
    except ValidationError as error:
        problem = explain_validation(error, kind.model_fields)
        raise PhotonError(f"strategy.{where}.{problem}") from error


def sparse_training(config: RunConfig) -> SparseTraining | None:
    """Return how the run's strategy has silos train a sparse model; None: it does not."""
    return strategy_of(config).sparse


def hint_of_plan(config: RunConfig) -> str:
    """Return the hint to leave out a sync plan, which only ``local_state=sync`` takes, where there is one."""
    return ", and strategy.sync=null" if config.strategy.as_mapping().get("sync") is not None else ""


def hint_of_rates(config: RunConfig) -> str:
    """Return the hint to lower the learning rates that a run has."""
    return f"lower {rates(config.outer.as_mapping())} in config.yaml"
