"""FedProx (1812.06127): local steps that are held near the model that came.

A silo minimises its own loss plus (μ / 2) · ‖θ − θ_received‖², so each step's gradient is

    g + μ (θ − θ_received)

before it is clipped. With μ = 0 the term is absent, and a run is Photon's bit for bit.
"""

import math
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.strategy.contract import LOCAL
from photon.strategy.local import Groups, Kept, LocalMethod, LocalState, Request, Start
from photon.strategy.photon import Photon
from photon.training.hooks import NO_HOOKS, NamedParameterList, StepHooks

#: The parameters that the local steps are held near.
_NEAR = LOCAL + "near"


class FedProx(Photon):
    """Photon with a proximal term in the silos' loss.

    Parameters
    ----------
    config
        The run's configuration.
    mu
        μ, the weight of the term.
    weighting, local_state, sync, fold
        As in `Photon`.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        mu: float = 0.01,
        weighting: Literal["tokens", "uniform"] = "tokens",
        local_state: LocalState = "keep",
        sync: dict[str, int | str] | None = None,
        fold: dict[str, Any] | None = None,
    ) -> None:
        if not 0 <= mu < math.inf:
            raise ValueError(f"mu={mu}: expected 0 or more")
        super().__init__(config, weighting=weighting, local_state=local_state, sync=sync, fold=fold)
        self.mu = mu

    @cached_property
    def local(self) -> LocalMethod:
        """The silo's half."""
        return Proximal(self.config, self.local_state, self.mu)


class Proximal(LocalMethod):
    """The silo's half: a gradient that points back to the parameters that came."""

    def __init__(self, config: RunConfig, local_state: LocalState, mu: float) -> None:
        super().__init__(config, local_state)
        self.mu = mu

    def start(self, received: Groups, kept: Kept | None, request: Request, data: SiloData) -> Start:
        """Hand the received parameters to the hooks, unless the term is absent."""
        start = super().start(received, kept, request, data)
        if self.mu == 0:
            return start
        return replace(start, context={**start.context, _NEAR: dict(start.reference)})

    def hooks(self, context: Groups, collected: Groups) -> StepHooks:
        """Add μ (θ − θ_received) to each gradient."""
        if self.mu == 0:
            return NO_HOOKS
        near = context[_NEAR]

        def correct(named: NamedParameterList) -> None:
            for name, parameter in named:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - near[name], alpha=self.mu)

        return StepHooks(correct=correct)
