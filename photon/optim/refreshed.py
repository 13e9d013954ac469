"""AdamW that reads its first moment from what a sync changed, so that it need not be sent.

Averaged parameters say how all silos moved in the round, which is a mean of their first moments over its
steps. A moment that forgets within a round loses nothing by starting from there.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from photon.optim.quasi_hyperbolic import QHAdamW


class RefreshedAdamW(QHAdamW):
    """AdamW that starts every round with the velocity at which all silos together went through the last.

    With n the steps since the sync before, Δ what they and the averaging have changed, and η the learning
    rate of the first step after the sync, `refresh` leads to

        û ← Δ / (n η) · (√v̂ + ε)

    All steps are AdamW's. States are ``exp_avg``, ``exp_avg_sq``, ``step`` and, as ``refreshed``, the step of
    the last refresh.

    Parameters
    ----------
    params, lr, eps, weight_decay
        As in `QHAdamW`.
    betas
        β1 and β2.

    Raises
    ------
    ValueError
        When a setting is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, (1.0,), eps, weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on the gradients that are there; return what ``closure`` returns, if there is one."""
        for group in self.param_groups:
            if group.pop("refresh_due", False):
                lr = float(group["lr"])
                for parameter in group["params"]:
                    if state := self.state.get(parameter):
                        state["exp_avg"].mul_(1 / lr if lr > 0 else 0.0)
        return super().step(closure)

    @torch.no_grad()
    def refresh(self, pseudo_gradient: Mapping[Tensor, Tensor]) -> None:
        """Set the first moments at a sync, after averaging, but for 1 / η, which the next step knows.

        Parameters
        ----------
        pseudo_gradient
            Parameter → Δ, its value at the last sync minus its value now.
        """
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter, state in (
                (one, self.state[one]) for one in group["params"] if self.state.get(one)
            ):
                done = float(state["step"])
                steps = done - float(state.get("refreshed", 0.0))
                state["refreshed"] = torch.tensor(done)
                # None if the count starts anew: the moments have been zeroed then.
                if steps > 0:
                    denominator = (state["exp_avg_sq"] / (1 - beta2**done)).sqrt_().add_(group["eps"])
                    change = pseudo_gradient[parameter].to(parameter.device)
                    state["exp_avg"].copy_(denominator.mul_(change).mul_((1 - beta1**done) / steps))
            group["refresh_due"] = True
