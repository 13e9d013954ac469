"""Photon: the mean of the silos' parameters, and an outer optimizer on the pseudo-gradient.

    θ̄ = Σ_k w_k θ_k,   Δ = θ − θ̄,   θ ← OuterOptimizer(θ, Δ)

With SGD of learning rate 1 this is FedAvg, the recipe of the Photon papers; with Nesterov momentum it is
DiLoCo; with Adam it is FedAdam. Under a sync plan states of the local optimizer are averaged too, each at
its own period: all in every round is Local Adam, and longer periods are DES-LOC.

A robust fold takes the place of the means where silos may lie.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch

from photon.config.schema import RunConfig
from photon.files.memory import LARGE_BYTES, release_freed
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import (
    LOOKED_AHEAD,
    Aggregate,
    Participant,
    Reply,
    StateGroups,
    Strategy,
    hint_of_plan,
    settings_of,
)
from photon.strategy.contract import PARAMS, RECEIVED, SHARED, Contract, Leaving, Role
from photon.strategy.fold import Folded, Groups, WeightedMean
from photon.strategy.local import LocalState
from photon.strategy.outer import OuterOptimizer, OuterStep, Tensors
from photon.strategy.robust import Fold, check_fold, fold_robustly
from photon.strategy.sync import OTHERS, SyncPlan
from photon.training.draws import draw_seed, seeded
from photon.training.states import (
    is_refreshing,
    optimizer_groups,
    optimizer_shapes,
    synced_together,
)

#: Parameters, norms of the step, and the outer optimizer's state groups and scalars after it.
OuterResult = tuple[Tensors, OuterStep, dict[str, Tensors], dict[str, float]]


class Photon(Strategy):
    """Average parameters and step any torch optimizer on the pseudo-gradient.

    Parameters
    ----------
    config
        The run's configuration.
    weighting
        ``"tokens"``: silos count by the tokens they trained; ``"uniform"``: alike.
    local_state
        ``"keep"``: moments of the local optimizer stay in the silo; ``"reset"``: every round starts anew;
        ``"sync"``: they are averaged over the silos as ``sync`` says.
    sync
        State group to sync period in local steps, or ``"never"`` (``local_state="sync"``); ``others`` is that
        of all that are not named. None: every group in every round.
    fold
        Keys of `photon.strategy.robust.Fold`: how replies are folded where some may lie; None: their mean.
    """

    folds_updates: ClassVar[bool] = True

    def __init__(
        self,
        config: RunConfig,
        *,
        weighting: Literal["tokens", "uniform"] = "tokens",
        local_state: LocalState = "keep",
        sync: dict[str, int | str] | None = None,
        fold: dict[str, Any] | None = None,
    ) -> None:
        if weighting not in ("tokens", "uniform"):
            raise ValueError(f"weighting={weighting!r}: expected tokens or uniform")
        if local_state not in get_args(LocalState):
            raise ValueError(f"local_state={local_state!r}: expected {', '.join(get_args(LocalState))}")
        if sync is not None and local_state != "sync":
            raise ValueError(
                f"local_state={local_state}: a sync plan needs local_state=sync; set strategy.sync=null to "
                "go without one"
            )
        super().__init__(config)
        self.weighting = weighting
        self.local_state = local_state
        self.fold = settings_of(Fold, fold, "fold")
        check_fold(self.fold, config, weighting, local_state)
        self.holds_replies, self.least_cohort = self.fold.is_robust, self.fold.least_cohort
        self.refreshes = is_refreshing(config.optimizer)
        self.sends_previous = self.refreshes and local_state != "reset"
        self.plan: SyncPlan | None = None
        if local_state == "sync":
            self.silos_only = (
                "which has no states of a local optimizer; set strategy.local_state=keep"
                f"{hint_of_plan(config)}"
            )
            groups = optimizer_groups(config.optimizer)
            periods = {OTHERS: config.local_steps} if sync is None else sync
            together = synced_together(config.optimizer)
            self.plan = SyncPlan(periods, config.local_steps, groups, together)

    @property
    def folds_mean(self) -> bool:
        """Whether the plain mean of the parameters' updates is all that it folds."""
        own = type(self)
        as_here = own.aggregate_train is Photon.aggregate_train and own.weight is Photon.weight
        dense = self.sparse is None and self.local_state != "sync"
        return as_here and dense and self.weighting == "uniform" and not self.fold.is_robust

    def contract(self, server_round: int, params: Mapping[str, torch.Size], role: Role = "silo") -> Contract:
        """Return a contract over all parameters, and the states of the local optimizer under a sync plan."""
        arriving: dict[str, Mapping[str, torch.Size]] = {PARAMS: params}
        trained = self.trained(params)
        masked = frozenset(trained if self.folds_mean else ())
        leaving = {PARAMS: Leaving("parameters", trained, masked=masked, bounded=True)}
        if self.plan is not None:
            states = optimizer_shapes(self.config.optimizer, trained)
            arriving |= states
            # Of some groups there may be none: of Muon's for all else, where matrices alone are trained.
            leaving |= {
                group: Leaving("mean", states[group])
                for group in self.due_groups(server_round)
                if group in states
            }
        if self.sends_previous:
            arriving[RECEIVED] = params
        return Contract(arriving, leaving)

    def telling_rounds(self) -> Sequence[int]:
        """Return the first round of each set of groups that the sync plan averages together."""
        if self.plan is None:
            return (1,)
        transition = self.config.transition
        before = 0 if transition is None else transition.step
        # After the longest period, counted from the transition, all of them have been due.
        longest = 1 + (before + max(self.plan.periods.values())) // min(
            self.config.local_steps, self.config.steps_of(1)
        )
        found: dict[tuple[str, ...], int] = {}
        for server_round in range(1, min(self.config.rounds, longest, LOOKED_AHEAD) + 1):
            found.setdefault(tuple(self.due_groups(server_round)), server_round)
        return tuple(found.values())

    def due_groups(self, server_round: int) -> list[str]:
        """Return the groups that the sync plan averages in this round.

        The periods count from the transition, if there is one; its round, which ends the warm-up, averages
        all.
        """
        if self.plan is None:
            return [PARAMS]
        steps, transition = self.config.steps_after(server_round), self.config.transition
        if transition is None or (steps < transition.step and transition.local_steps is None):
            return self.plan.due(steps)
        return self.plan.due(max(0, steps - transition.step))

    def configure_train(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> Mapping[str, StateGroups]:
        """Send everybody the global parameters, and the averaged states that it has not had yet.

        A participant whose last accepted round is after a group's last average has worked on from that
        average; it keeps its own. One that was absent since, or is new, receives the average. If the local
        optimizer wants to know what a sync changed (`Refreshing`), one that missed the last round also
        receives the parameters from which that started.
        """
        params = checkpoint.load_params()
        state = checkpoint.state
        sent: dict[frozenset[str], StateGroups] = {}
        sent_groups: dict[str, StateGroups] = {}
        for participant in cohort:
            last = checkpoint.last_round_of(participant.name)
            missing = {group for group, at in state.averaged_rounds.items() if last <= at}
            if self.sends_previous and last < state.round:
                missing.add(RECEIVED)
            groups = frozenset(missing)
            if groups not in sent:
                sent[groups] = {"params": params} | {g: self._load(checkpoint, g) for g in sorted(groups)}
            sent_groups[participant.name] = sent[groups]
        return sent_groups

    @staticmethod
    def _load(checkpoint: Checkpoint, group: str) -> dict[str, torch.Tensor]:
        if group == RECEIVED:
            return checkpoint.load_previous_params()
        return checkpoint.load_averaged(group)

    def step_outer(self, server_round: int, checkpoint: Checkpoint, mean: Tensors) -> OuterResult:
        """Step the outer optimizer; return parameters, norms, and the state groups and scalars to keep.

        Parameters
        ----------
        mean
            Mean of the silos' parameters, or of their updates under ``link.uplink_payload=update``; used up.
            A parameter that it lacks stays as it is.
        """
        params = checkpoint.load_params()
        due = {name: params[name] for name in params if name in mean}
        of = self.config.link.uplink_payload if self.folds_updates else "parameters"
        outer = OuterOptimizer(self.config.outer.as_mapping(), of)
        step, groups, scalars = outer.step(due, mean, checkpoint.load_outer(), checkpoint.state.outer_scalars)
        return params | due, step, groups, scalars

    def weight(self, reply: Reply) -> float:
        """Return the positive weight of a reply in the mean, up to a common factor."""
        return float(reply.tokens) if self.weighting == "tokens" else 1.0

    def rows(self, reply: Reply) -> Mapping[str, torch.Tensor]:
        """Return for which rows of a parameter a reply counts, bool of shape (rows,); of others for all."""
        return {}

    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        """Fold the replies and step the outer optimizer."""
        folded = self._robustly(checkpoint, replies) if self.fold.is_robust else self._averaged(replies)
        groups = folded.groups
        begin = time.perf_counter()
        # An outer optimizer may draw, as one of Langevin dynamics does.
        with seeded(draw_seed(self.config.seed, server_round, "server", "outer"), torch.device("cpu")):
            params, step, outer, scalars = self.step_outer(server_round, checkpoint, groups.pop(PARAMS))
        shared = {group: groups.pop(group) for group in list(groups) if group.startswith(SHARED)}
        return Aggregate(
            params=params,
            averaged=groups,
            outer=outer,
            outer_scalars=scalars,
            step=step,
            weights=folded.weights,
            fold_seconds=folded.seconds,
            outer_seconds=time.perf_counter() - begin,
            figures=folded.figures,
            kept=self.fold_shared(checkpoint, shared, folded.replies) if shared else {},
        )

    def _averaged(self, replies: Iterator[Reply]) -> Folded:
        """Take the weighted mean of replies, one at a time."""
        mean = WeightedMean(over_senders=self.config.link.mean_over == "senders")
        weights: dict[str, float] = {}
        fold_seconds = 0.0
        for reply in replies:
            begin = time.perf_counter()
            weight = self.weight(reply)
            groups = _trained(reply)
            mean.add(groups, weight, self.rows(reply))
            weights[reply.participant] = weight
            fold_seconds += time.perf_counter() - begin
            # Drop the reply before the next one is pulled: one reply in memory, not two.
            del reply, groups
        if mean.nbytes > LARGE_BYTES:
            release_freed()  # the replies
        shares = {name: weight / mean.total_weight for name, weight in weights.items()}
        return Folded(mean.result(), len(weights), shares, fold_seconds)

    def _robustly(self, checkpoint: Checkpoint, replies: Iterator[Reply]) -> Folded:
        """Fold replies by a robust rule, which looks at all of them together."""
        held = list(replies)
        begin = time.perf_counter()
        sends_update = held[0].update is not None
        sent = {} if sends_update else {PARAMS: checkpoint.load_params()}
        folded = fold_robustly({reply.participant: _trained(reply) for reply in held}, self.fold, sent)
        return replace(folded, seconds=time.perf_counter() - begin)

    def fold_shared(self, checkpoint: Checkpoint, means: StateGroups, replies: int) -> StateGroups:
        """Return what is kept of the method's groups that came with replies, for the next round.

        Parameters
        ----------
        checkpoint
            What the round started from.
        means
            Mean of each group ``shared/…`` of the contract over the replies, by weight.
        replies
            How many were folded.
        """
        return means


def _trained(reply: Reply) -> Groups:
    """Return what a reply brings to the fold: ``params`` may be an update."""
    return reply.groups if reply.update is None else {**reply.groups, PARAMS: reply.update}
