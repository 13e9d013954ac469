"""SCAFFOLD (1910.06378): control variates take the silos' differences out of their local steps.

The server has c, silo k has c_k, both of the parameters' shapes and zero at first. In each local step

    g ← g + c − c_k

before the gradient is clipped, and after K steps

    c_k⁺ = (1 / K) Σ g,   c ← c + (|S| / N) · mean_{k∈S} (c_k⁺ − c_k),

g without the correction, S the silos whose replies count, N all of them. For plain SGD this c_k⁺ is the
paper's option II, c_k − c + (x − y_k) / (K η). That formula assumes that the step is η times the gradient,
so it is wrong under AdamW, clipping, weight decay or a schedule; the mean gradient is not.

c is the mean of all c_k as long as no silo loses its own. A silo that has lost it takes c in its place, so
its steps of that round are not corrected, and c keeps the part of the lost one. A silo that joins begins
with zero, as all did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch

from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Participant, StateGroups
from photon.strategy.contract import LOCAL, SHARED, Contract, Leaving, Role
from photon.strategy.local import Finish, Groups, Kept, LocalMethod, Request, Start
from photon.strategy.photon import Photon
from photon.training.devices import GroupResult
from photon.training.hooks import NamedParameterList, StepHooks

#: The server's control variate, and what a silo's own changed by.
CONTROL = SHARED + "control"
#: A silo's own control variate.
OWN_CONTROL = LOCAL + "control"
#: c − c_k, and the sum of the gradients.
_CORRECTION, _GRADIENTS = LOCAL + "correction", LOCAL + "gradients"


class Scaffold(Photon):
    """Photon with control variates.

    Parameters
    ----------
    config
        The run's configuration.
    local_state
        As in `Photon`, but for ``sync``.
    fold
        As in `Photon`, of parameters and control variates, each by themselves.
    """

    silos_only = "which has no control variate of its own; use strategy=photon"
    no_server_silo = (
        "control variates are of silos that train beside each other, and its own would be in no mean; use "
        "strategy=photon"
    )

    def __init__(
        self,
        config: RunConfig,
        *,
        local_state: Literal["keep", "reset"] = "keep",
        fold: dict[str, Any] | None = None,
    ) -> None:
        if config.privacy.on or config.privacy.secure_aggregation:
            raise ValueError(
                "privacy: control variates leave without noise or masks, and are mean gradients; use another "
                "strategy, or privacy=off"
            )
        if config.link.states:
            raise ValueError("link.states: what codecs lose of control variates adds up; set link.states=[]")
        super().__init__(config, weighting="uniform", local_state=local_state, fold=fold)

    @cached_property
    def local(self) -> LocalMethod:
        """The silo's half."""
        return Controlled(self.config, self.local_state)

    def contract(self, server_round: int, params: Mapping[str, torch.Size], role: Role = "silo") -> Contract:
        """Return Photon's contract with the control variate beside the parameters, both ways."""
        whole = super().contract(server_round, params, role)
        trained = self.trained(params)
        return replace(
            whole,
            arriving={**whole.arriving, CONTROL: trained},
            leaving={**whole.leaving, CONTROL: Leaving("mean", trained)},
        )

    def configure_train(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> Mapping[str, StateGroups]:
        """Send everybody the server's control variate as well."""
        sent_groups = super().configure_train(server_round, checkpoint, cohort)
        control = self._control(checkpoint)
        # Those who are sent the same groups are handed the same object, which is encoded once.
        beside = {id(groups): {**groups, CONTROL: control} for groups in sent_groups.values()}
        return {name: beside[id(groups)] for name, groups in sent_groups.items()}

    def fold_shared(self, checkpoint: Checkpoint, means: StateGroups, replies: int) -> StateGroups:
        """Move the server's control variate: c ← c + (|S| / N) · mean Δc."""
        share = replies / max(replies, checkpoint.participants)
        control = {
            name: torch.add(tensor, means[CONTROL][name], alpha=share)
            for name, tensor in self._control(checkpoint).items()
        }
        return {CONTROL: control}

    def _control(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Return the server's control variate."""
        kept = checkpoint.load_kept().get(CONTROL)
        params = self.trained(checkpoint.load_params())
        return kept or {name: torch.zeros(tensor.shape) for name, tensor in params.items()}


class Controlled(LocalMethod):
    """The silo's half: steps with c − c_k added to the gradient, and a new c_k from their mean gradient."""

    def start(self, received: Groups, kept: Kept | None, request: Request, data: SiloData) -> Start:
        """Work out the correction of this round's gradients."""
        start, control = super().start(received, kept, request, data), received[CONTROL]
        own = kept.local.get(OWN_CONTROL) if kept else None
        if own is None:
            lost = request.last_round > 0
            own = {name: t if lost else torch.zeros_like(t) for name, t in control.items()}
        correction = {name: tensor - own[name] for name, tensor in control.items()}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in control.items()}
        return replace(
            start,
            context={**start.context, _CORRECTION: correction},
            collected={_GRADIENTS: zeros},
            stays={OWN_CONTROL: dict(own)},
        )

    def hooks(self, context: Groups, collected: Groups) -> StepHooks:
        """Add up the gradients, and correct them."""
        correction, gradients = context[_CORRECTION], collected[_GRADIENTS]

        def correct(named: NamedParameterList) -> None:
            for name, parameter in named:
                if parameter.grad is not None:
                    # A step that the loss scaler of fp16 skips counts as a gradient of zero.
                    gradients[name].add_(parameter.grad.nan_to_num(0.0, 0.0, 0.0))
                    parameter.grad.add_(correction[name])

        return StepHooks(correct=correct)

    def finish(self, start: Start, trained: GroupResult, request: Request) -> Finish:
        """Send what the own control variate changed by, and keep the new one."""
        before, steps = start.stays[OWN_CONTROL], trained.result.steps
        own = {name: total / steps for name, total in trained.collected[_GRADIENTS].items()}
        change = {name: tensor - before[name] for name, tensor in own.items()}
        finish = super().finish(start, trained, request)
        return replace(
            finish,
            leaves={**finish.leaves, CONTROL: change},
            stays={**finish.stays, OWN_CONTROL: own},
        )
