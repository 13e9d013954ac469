"""The outer optimizer: any torch optimizer, stepping on the pseudo-gradient."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from photon.components import build
from photon.training.groups import NamedParameters, read_optimizer, write_optimizer

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OuterStep:
    """What an outer step moved.

    Attributes
    ----------
    pseudo_gradient_norms
        ‖Δ‖ with Δ = θ − mean_k θ_k, for each parameter.
    parameter_norms
        ‖θ‖ after the step, for each parameter.
    state_norms
        Norm of each state group of the outer optimizer after the step.
    """

    pseudo_gradient_norms: dict[str, float]
    parameter_norms: dict[str, float]
    state_norms: dict[str, float]

    @property
    def pseudo_gradient_norm(self) -> float:
        """‖Δ‖ over all parameters."""
        return math.hypot(*self.pseudo_gradient_norms.values())

    @property
    def parameter_norm(self) -> float:
        """‖θ‖ over all parameters."""
        return math.hypot(*self.parameter_norms.values())


class OuterOptimizer:
    """Step the global parameters with Δ = θ − mean_k θ_k as their gradient.

    Parameters
    ----------
    section
        ``_target_`` and arguments of a ``torch.optim.Optimizer``.
    of
        What the silos' mean is the mean of. A mean of updates, θ − θ_k, is Δ itself.
    """

    def __init__(
        self, section: Mapping[str, Any], of: Literal["parameters", "update"] = "parameters"
    ) -> None:
        self._section = dict(section)
        self._of = of

    def step(
        self,
        params: Tensors,
        mean: Tensors,
        state: dict[str, Tensors],
        scalars: dict[str, float],
    ) -> tuple[OuterStep, dict[str, Tensors], dict[str, float]]:
        """Replace the tensors in ``params`` by stepped ones; those that were given are only read.

        ``mean`` is used up. SGD with learning rate 1 and nothing else is plain averaging and takes the mean
        itself, because θ − (θ − mean) rounds. Any other optimizer steps one tensor after another, so it must
        treat tensors alike whether they come together or alone, as torch's own do (L-BFGS excepted).

        Parameters
        ----------
        params
            Global parameters by name.
        mean
            Mean of the silos' parameters, or of their updates, by name.
        state, scalars
            The optimizer's state groups and scalar states after the last step; empty before the first.

        Returns
        -------
        tuple
            Norms of the step, and the state groups and scalars to keep.
        """
        if not params:
            return outer_step({}, {}, state), state, scalars
        parameters = {name: torch.nn.Parameter(tensor) for name, tensor in params.items()}
        optimizer = build(self._section, "outer", list(parameters.values()))
        if state or scalars:
            write_optimizer(NamedParameters(parameters), optimizer, state, scalars, adopt=True)
        averaging = self._of == "parameters" and _is_plain_averaging(optimizer)
        gradient_norms: dict[str, float] = {}
        # One tensor at a time: its pseudo-gradient is gone before the next one's parameters leave the disk.
        for name, parameter in parameters.items():
            of_silos = mean.pop(name)
            if averaging:
                gradient_norms[name] = _norm(parameter.detach() - of_silos)
                params[name] = of_silos
                continue
            _take_from_file(parameter, optimizer)
            parameter.grad = of_silos if self._of == "update" else of_silos.neg_().add_(parameter.detach())
            gradient_norms[name] = _norm(parameter.grad)
            optimizer.step()
            parameter.grad = None
            params[name] = parameter.detach()
            del of_silos
        groups, numbers = read_optimizer(NamedParameters(parameters), optimizer)
        return outer_step(gradient_norms, params, groups), groups, numbers


def outer_step(
    pseudo_gradient_norms: dict[str, float], params: Tensors, state: Mapping[str, Tensors]
) -> OuterStep:
    """Measure parameters and state groups after a step."""
    return OuterStep(
        pseudo_gradient_norms,
        {name: _norm(tensor) for name, tensor in params.items()},
        {group: math.hypot(*map(_norm, tensors.values())) for group, tensors in state.items()},
    )


def rates(section: Mapping[str, Any]) -> str:
    """Say which learning rates a run has; plain averaging takes no step of its own."""
    optimizer = build(section, "outer", [torch.nn.Parameter(torch.zeros(2, 2))])
    return "optimizer.lr" if _is_plain_averaging(optimizer) else "outer.lr or optimizer.lr"


def _take_from_file(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Copy a parameter and its state, which may be maps of a checkpoint's files, into memory.

    The copies go where replies, and means that are used up, have been. To write to the maps would take a new
    page of the system for every 4 KiB, which costs more than the whole step.
    """
    parameter.data = parameter.data.clone()
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            state[key] = value.clone()


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _is_plain_averaging(optimizer: torch.optim.Optimizer) -> bool:
    if type(optimizer) is not torch.optim.SGD:
        return False
    group = optimizer.param_groups[0]
    return (
        group["lr"] == 1.0
        and group["momentum"] == 0.0
        and group["weight_decay"] == 0.0
        and not group["maximize"]
    )
