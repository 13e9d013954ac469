"""Local optimizers with several first moments, mixed with the raw gradient: the MT-DAO paper's.

A first moment with decay β forgets half of what it knows in ln ½ / ln β steps. Between two syncs a fast one
forgets the average that it was given; a slow one keeps it but reacts late. So the step is a mix:

    u_j ← β_j u_j + (1 − β_j) g,   j = 1 … N
    n = (1 − Σ_j ω_j) g + Σ_j ω_j u_j

With N = 1 this is quasi-hyperbolic momentum, and with ω = 1 the ordinary optimizer. A momentum of weight 0 is
left out: it has no state.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from photon.optim.blocks import in_blocks

Columns = list[list[Tensor]]


class _MultiMomentum(torch.optim.Optimizer, ABC):
    """N first moments and one second moment, the elementwise update left open."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: Sequence[float],
        weights: Sequence[float],
        eps: float,
        weight_decay: float,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "weights": tuple(weights),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own where it states them.

        Raises
        ------
        ValueError
            When a setting is out of its range.
        """
        super().add_param_group(param_group)
        check_settings(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on the gradients that are there; return what ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            momenta = kept_momenta(group["betas"], group["weights"])
            names = state_names(len(momenta))
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for done, members in by_steps_done(self.state, parameters, names):
                rows = (
                    [parameter, parameter.grad, *(self.state[parameter][name] for name in names)]
                    for parameter in members
                )
                for block in in_blocks(rows):
                    self._update(block, momenta, group, done)
        return loss

    @abstractmethod
    def _update(
        self, block: Columns, momenta: list[tuple[float, float]], group: dict[str, Any], done: int
    ) -> None:
        """Step a block (parameters, gradients, first moments, second moments) after ``done`` steps."""


class QHAdamW(_MultiMomentum):
    """AdamW whose step mixes first moments with the gradient (MT-DAO-Adam).

    With every û_j = u_j / (1 − β_j^t) and v̂ = v / (1 − β2^t):

        θ ← (1 − η λ) θ − η [(1 − Σ_j ω_j) g + Σ_j ω_j û_j] / (√v̂ + ε)

    Parameters
    ----------
    params
        Parameters, named parameters or groups of them, as for every torch optimizer.
    lr
        Learning rate η.
    betas
        β_1, …, β_N of the first moments, then β2 of the second one.
    weights
        ω_1, …, ω_N: at least 0, with a sum of at most 1; the rest is the gradient's.
    eps
        ε, added to the denominator.
    weight_decay
        λ, decoupled as in `torch.optim.AdamW`.

    Raises
    ------
    ValueError
        When a setting is out of its range, or ``betas`` has not one entry more than ``weights``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.999, 0.999),
        weights: Sequence[float] = (0.95,),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, weights, eps, weight_decay)

    def _update(
        self, block: Columns, momenta: list[tuple[float, float]], group: dict[str, Any], done: int
    ) -> None:
        adamw_update(
            block,
            momenta,
            beta2=group["betas"][-1],
            lr=group["lr"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=done + 1,
        )


class QHADOPT(_MultiMomentum):
    """ADOPT whose step mixes first moments with the normalised gradient (MT-DAO-ADOPT).

    The gradient is divided by the second moment of earlier steps, and clipped, before it enters the first
    moments; nothing is bias-corrected. The first step only sets v = g². At step t = 1, 2, … after it:

        n = clip(g / max(√v, ε), ± t^¼)
        u_j ← β_j u_j + (1 − β_j) n
        θ ← (1 − η λ) θ − η [(1 − Σ_j ω_j) n + Σ_j ω_j u_j]
        v ← β2 v + (1 − β2) g²

    Parameters
    ----------
    params, lr, betas, weights, weight_decay
        As in `QHAdamW`.
    eps
        ε, the smallest denominator.

    Raises
    ------
    ValueError
        As in `QHAdamW`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.999, 0.9999),
        weights: Sequence[float] = (0.9,),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, weights, eps, weight_decay)

    def _update(
        self, block: Columns, momenta: list[tuple[float, float]], group: dict[str, Any], done: int
    ) -> None:
        params, grads, *first_moments, exp_avg_sqs = block
        if done == 0:
            torch._foreach_addcmul_(exp_avg_sqs, grads, grads)
            return
        lr, beta2 = group["lr"], group["betas"][-1]
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_clamp_min_(denominators, group["eps"])
        normalised = torch._foreach_div(grads, denominators)
        del denominators
        torch._foreach_clamp_max_(normalised, done**0.25)
        torch._foreach_clamp_min_(normalised, -(done**0.25))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        rest = 1.0
        for (beta, weight), moments in zip(momenta, first_moments, strict=True):
            torch._foreach_lerp_(moments, normalised, 1 - beta)
            torch._foreach_add_(params, moments, alpha=-lr * weight)
            rest -= weight
        if rest > _NOTHING:
            torch._foreach_add_(params, normalised, alpha=-lr * rest)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)


class ADOPT(QHADOPT):
    """ADOPT with its clipping: the step is the first moment of the normalised gradient alone.

    Parameters
    ----------
    params, lr, eps, weight_decay
        As in `QHADOPT`.
    betas
        β1 of the first moment and β2 of the second one.

    Raises
    ------
    ValueError
        As in `QHADOPT`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, (1.0,), eps, weight_decay)


#: What is left of 1 after subtracting weights that add up to 1 in decimals.
_NOTHING = 1e-12


def check_settings(group: dict[str, Any]) -> None:
    """Check learning rate, decays, weights and ε of a parameter group.

    Raises
    ------
    ValueError
        For the first that is out of its range.
    """
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} is {group[name]}; it cannot be negative")
    betas, weights = group["betas"], group["weights"]
    if len(betas) != len(weights) + 1:
        raise ValueError(
            f"{len(betas)} betas and {len(weights)} weights; give one beta for each weight, and beta2 last"
        )
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {list(betas)}; each must be at least 0 and below 1")
    if not all(weight >= 0 for weight in weights) or sum(weights) > 1 + _NOTHING:
        raise ValueError(f"weights are {list(weights)}; each must be at least 0, their sum at most 1")


def kept_momenta(betas: Sequence[float], weights: Sequence[float]) -> list[tuple[float, float]]:
    """Return decay and weight of each first moment that has a weight."""
    return [(beta, weight) for beta, weight in zip(betas[:-1], weights, strict=True) if weight > 0]


def state_names(momenta: int) -> list[str]:
    """Return the keys of the tensor states: ``exp_avg``, ``exp_avg_2``, …, ``exp_avg_sq``."""
    return [f"exp_avg_{number}" if number > 1 else "exp_avg" for number in range(1, momenta + 1)] + [
        "exp_avg_sq"
    ]


def by_steps_done(
    states: dict[Tensor, dict[str, Any]], parameters: Sequence[Tensor], names: Sequence[str]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Count a step for ``parameters``, and yield them by the steps that they had done before.

    States that are missing are made: zeros in the parameter's memory layout. ``step`` is a float32 tensor on
    the CPU, as torch's own optimizers keep it.
    """
    members: defaultdict[int, list[Tensor]] = defaultdict(list)
    counters = []
    for parameter in parameters:
        state = states[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        members[int(state["step"])].append(parameter)
        counters.append(state["step"])
    if counters:
        torch._foreach_add_(counters, 1)
    yield from members.items()


def adamw_update(
    block: Columns,
    momenta: Sequence[tuple[float, float]],
    *,
    beta2: float,
    lr: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Step ``block`` in place as `QHAdamW` does; ``step`` counts from 1.

    √v̂ + ε is (√v + ε√c) / √c with c = 1 − β2^t, so the correction of v goes into the step sizes and spares
    a pass over the denominators.
    """
    params, grads, *first_moments, exp_avg_sqs = block
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    for (beta, _), moments in zip(momenta, first_moments, strict=True):
        torch._foreach_lerp_(moments, grads, 1 - beta)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    correction: float = (1 - beta2**step) ** 0.5
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, eps * correction)
    rest = 1.0
    for (beta, weight), moments in zip(momenta, first_moments, strict=True):
        size = -lr * weight * correction / (1 - beta**step)
        torch._foreach_addcdiv_(params, moments, denominators, size)
        rest -= weight
    if rest > _NOTHING:
        torch._foreach_addcdiv_(params, grads, denominators, -lr * rest * correction)
