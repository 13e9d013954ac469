"""Photon with a silo of the aggregator's own that gives the others what they need, as FedAnchor's anchors.

In each round the aggregator's silo trains by itself, before the others or after them, as the objective says.
What it gives (`Objective.share`) goes to all others, and what it alone trains (`Objective.still`) stays as it
left it. A silo that has found nothing to train on takes no steps and is left out of the mean; if that is so
of all, the model stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, Literal

import torch

from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.objective.configured import objective_of
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Aggregate, Participant, Reply, StateGroups
from photon.strategy.contract import LOCAL, PARAMS, Contract, Leaving, Role
from photon.strategy.local import Finish, Groups, Kept, LocalMethod, Request, Start
from photon.strategy.outer import outer_step
from photon.strategy.photon import Photon
from photon.training.devices import GroupResult
from photon.training.hooks import NO_HOOKS, NamedParameterList, StepHooks

#: Parameters that stay as they are in a silo's steps.
_STILL = LOCAL + "still"


class Anchored(Photon):
    """Photon with what the aggregator's own silo gives.

    Parameters
    ----------
    config
        The run's configuration.
    weighting, fold
        As in `Photon`.
    local_state
        As in `Photon`, but for ``sync``.
    """

    folds_idle: ClassVar[bool] = True
    silos_only = (
        "which would not pass on what the aggregator's silo gives; let its silos take part themselves"
    )

    def __init__(
        self,
        config: RunConfig,
        *,
        weighting: Literal["tokens", "uniform"] = "uniform",
        local_state: Literal["keep", "reset"] = "keep",
        fold: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, weighting=weighting, local_state=local_state, fold=fold)
        self.objective = objective_of(config)
        if not self.objective.from_server_silo:
            name, fits = type(self.objective).__name__, "photon" if self.objective.trains else "sums"
            raise ValueError(f"objective: {name} needs nothing of an aggregator's silo; use strategy={fits}")
        if self.refreshes:
            raise ValueError(
                "this local optimizer needs all parameters synced at once; use another optimizer"
            )
        if config.privacy.on or config.privacy.secure_aggregation:
            raise ValueError(
                "privacy: what the aggregator's silo gives has neither noise nor masks, and silos that take "
                "no steps are told from others; use privacy=off"
            )
        if config.link.states:
            raise ValueError("link.states: labels of anchors travel exactly; set link.states=[]")
        if config.link.downlink_payload == "update":
            raise ValueError(
                "link.downlink_payload=update: the aggregator's silo starts a round from another model than "
                "the others; use parameters"
            )
        if config.federation.server_silo is None and self.objective.needs_server_silo:
            raise ValueError(
                "federation.server_silo: not set; name the silo of the aggregator's own, which has the "
                "labelled texts"
            )
        self.schedule = "sequential" if self.objective.server_order == "before" else "after"

    @cached_property
    def local(self) -> LocalMethod:
        """The silo's half."""
        return Given(self.config, self.local_state)

    def contract(self, server_round: int, params: Mapping[str, torch.Size], role: Role = "silo") -> Contract:
        """Return Photon's contract with what leaves the aggregator's silo, and arrives elsewhere."""
        whole = super().contract(server_round, params, role)
        given = self.objective.shares(params)
        own = role == "server_silo"
        still = self.objective.still(list(params), own=own)
        trained = {name: shape for name, shape in whole.leaving[PARAMS].shapes.items() if name not in still}
        leaving = {**whole.leaving, PARAMS: replace(whole.leaving[PARAMS], shapes=trained)}
        if own:
            leaving |= {group: Leaving("as_is", shapes) for group, shapes in given.items()}
            return replace(whole, leaving=leaving)
        return replace(whole, arriving={**whole.arriving, **given}, leaving=leaving)

    def after_server_silo(self, reply: Reply) -> StateGroups:
        """Return what the aggregator's silo gives, which the round's other requests bring."""
        return {group: tensors for group, tensors in reply.groups.items() if group != PARAMS}

    def configure_train(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> Mapping[str, StateGroups]:
        """Send the others what the aggregator's silo has given last."""
        sent_groups = super().configure_train(server_round, checkpoint, cohort)
        given = self._given(checkpoint)
        own = self.config.federation.server_silo
        # Those who are sent the same groups are handed the same object, which is encoded once.
        beside = {id(groups): {**groups, **given} for groups in sent_groups.values()}
        return {name: groups if name == own else beside[id(groups)] for name, groups in sent_groups.items()}

    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        """Fold the replies of those who have taken steps; without any the model stays as it is."""
        trained = (reply for reply in replies if reply.report.steps)
        first = next(trained, None)
        kept = self._given(checkpoint)
        if first is not None:
            folded = super().aggregate_train(server_round, checkpoint, chain([first], trained))
            return replace(folded, kept={**folded.kept, **kept})
        params, outer = checkpoint.load_params(), checkpoint.load_outer()
        return Aggregate(
            params=params,
            averaged={},
            outer=outer,
            outer_scalars=dict(checkpoint.state.outer_scalars),
            step=outer_step({}, self.trained(params), outer),
            weights={},
            fold_seconds=0.0,
            outer_seconds=0.0,
            kept=kept,
        )

    def _given(self, checkpoint: Checkpoint) -> StateGroups:
        """Return what the aggregator's silo has given last: in this round, or in an earlier one."""
        names = self.objective.shares({})
        before = {group: t for group, t in checkpoint.load_kept().items() if group in names}
        return {**before, **checkpoint.given}


class Given(LocalMethod):
    """The silo's half: what the aggregator's silo alone trains has no gradient elsewhere."""

    def start(self, received: Groups, kept: Kept | None, request: Request, data: SiloData) -> Start:
        """Note which parameters stay as they are."""
        start = super().start(received, kept, request, data)
        own = request.role == "server_silo"
        names = objective_of(self.config).still(list(start.params), own=own)
        return replace(start, context={**start.context, _STILL: {name: start.params[name] for name in names}})

    def hooks(self, context: Groups, collected: Groups) -> StepHooks:
        """Take the gradients of what stays away, so that no decay moves it either."""
        still = frozenset(context[_STILL])

        def correct(named: NamedParameterList) -> None:
            for name, parameter in named:
                if name in still:
                    parameter.grad = None

        return StepHooks(correct=correct) if still else NO_HOOKS

    def finish(self, start: Start, trained: GroupResult, request: Request) -> Finish:
        """Send what the aggregator's silo gives as well."""
        finish = super().finish(start, trained, request)
        return replace(finish, leaves={**finish.leaves, **trained.shared})
