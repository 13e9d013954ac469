"""The training state as named groups of tensors: what a round sends, averages and checkpoints.

A state group is one kind of tensor for all parameters: ``params`` itself, or a tensor state of the local
optimizer (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``, …). Inside a group tensors are keyed by parameter
name, so a group means the same on every silo, whatever order its optimizer holds the parameters in.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from photon.errors import PhotonError
from photon.models.sparse import parameter_name

StateGroups = dict[str, dict[str, Tensor]]
"""Group name → parameter name → tensor."""

OptimizerState = tuple[StateGroups, dict[str, float]]
"""State groups and scalars of a local optimizer."""

Tensors = Mapping[str, Tensor]
"""Parameter name → tensor, to be read."""


@runtime_checkable
class Refreshing(Protocol):
    """An optimizer that looks at what a sync changed, as `photon.optim.LoRDO` and `RefreshedAdamW` do."""

    def refresh(self, pseudo_gradient: Mapping[Tensor, Tensor]) -> None:
        """Take parameter → value at the last sync minus value now."""


def read_params(model: nn.Module) -> dict[str, Tensor]:
    """Return what ``model`` computes with: its parameters, and the buffers that are saved with them.

    Returns
    -------
    dict[str, Tensor]
        In name order, tied weights once. Detached views: they share memory with the model, so clone what has
        to outlive the next step.
    """
    tensors = {name: parameter.detach() for name, parameter in named_parameters(model)}
    if any(True for _ in model.buffers()):
        saved = model.state_dict(keep_vars=True)
        tensors |= {name: buffer.detach() for name, buffer in model.named_buffers() if name in saved}
    return dict(sorted(tensors.items()))


def kept_names(model: nn.Module) -> frozenset[str]:
    """Return the names of what `read_params` returns and no step moves: frozen parameters, and buffers."""
    trained = {name for name, parameter in named_parameters(model) if parameter.requires_grad}
    return frozenset(read_params(model)) - trained


def write_params(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Copy ``params`` into ``model`` in place, so that optimizers and compiled graphs keep their tensors.

    Raises
    ------
    PhotonError
        When a name is missing or unknown, or a shape differs. The model is unchanged then.
    """
    own = read_params(model)
    _check_names("params", params, own, complete=True)
    for name, parameter in own.items():
        if params[name].shape != parameter.shape:
            raise PhotonError(
                f"params: {name} has shape {tuple(params[name].shape)}, the model needs "
                f"{tuple(parameter.shape)}; use the architecture that these parameters came from"
            )
    for name, parameter in own.items():
        parameter.copy_(params[name])


def read_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[StateGroups, dict[str, float]]:
    """Split the state of ``optimizer`` in state groups and scalars.

    Returns
    -------
    groups : StateGroups
        The tensor states by their key in the optimizer, as detached views in name order. A parameter that
        has not had a step yet has no entry.
    scalars : dict[str, float]
        The states that are one number, such as ``step``; they are equal for all parameters.

    Raises
    ------
    PhotonError
        When a scalar state differs between parameters, or a state is neither a number nor a tensor.
    """
    per_parameter = {
        name: (parameter, optimizer.state[parameter])
        for name, parameter in named_parameters(model)
        if parameter in optimizer.state
    }
    return split_state(per_parameter)


def split_state(
    per_parameter: Mapping[str, tuple[Tensor, Mapping[str, Any]]],
) -> tuple[StateGroups, dict[str, float]]:
    """Split parameter name → (parameter, its optimizer state) as `read_optimizer` does."""
    groups: StateGroups = {}
    scalars: dict[str, float] = {}
    for name, (parameter, state) in per_parameter.items():
        for key, value in state.items():
            if value is None:
                continue
            if _belongs_to_group(key, value, parameter):
                groups.setdefault(key, {})[name] = value.detach()
                continue
            number = _as_number(key, value, name)
            if scalars.setdefault(key, number) != number:
                raise PhotonError(
                    f"optimizer state: {key} is {number} for {name} and {scalars[key]} for others; "
                    "Photon needs an optimizer that steps all parameters together"
                )
    return groups, scalars


class NamedParameters(nn.Module):
    """Parameters under names that a module may not register itself, because they contain dots."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = dict(parameters)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters."""
        return iter(self._named.items())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the parameters."""
        return iter(self._named.values())


def write_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Mapping[str, Mapping[str, Tensor]],
    scalars: Mapping[str, float],
    *,
    adopt: bool = False,
) -> None:
    """Replace the whole state of ``optimizer`` by what `read_optimizer` returned.

    The optimizer then goes on bit for bit like the one that was read. The scalars go to every parameter
    that has a tensor in some group. A scalar that the optimizer does not hold yet becomes a zero-dimensional
    float32 tensor, as torch's own optimizers keep it.

    Parameters
    ----------
    model, optimizer
        Whose state to replace.
    groups, scalars
        The state groups and scalars.
    adopt
        Let the optimizer work on the tensors of ``groups`` themselves instead of on copies.

    Raises
    ------
    PhotonError
        When a group names a parameter that the model does not have.
    """
    own = dict(named_parameters(model))
    for group, tensors in groups.items():
        _check_names(group, tensors, own, complete=False)
    on_device = _parameters_with_scalars_on_device(optimizer)
    for name, parameter in own.items():
        old: Mapping[str, Any] = optimizer.state.pop(parameter, {})
        new: dict[str, Any] = {
            group: tensors[name] if adopt else _restore_tensor(tensors[name], old.get(group), parameter)
            for group, tensors in groups.items()
            if name in tensors
        }
        if not new:
            continue
        device = parameter.device if parameter in on_device else torch.device("cpu")
        numbers = {key: _restore_scalar(value, old.get(key), device) for key, value in scalars.items()}
        optimizer.state[parameter] = numbers | new


def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Forget the state of ``optimizer``, as if it had not stepped yet; its settings stay."""
    optimizer.state.clear()
    if isinstance(optimizer, torch.optim.Adagrad):
        # The one torch optimizer that fills its state in the constructor and cannot step without it.
        fresh = torch.optim.Adagrad(
            optimizer.param_groups,
            initial_accumulator_value=optimizer.defaults["initial_accumulator_value"],
        )
        optimizer.state.update(fresh.state)


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a model in name order, as state groups call them; tied weights once."""
    # A weight that is a function of another tensor keeps its name.
    named = ((parameter_name(name), parameter) for name, parameter in model.named_parameters())
    return sorted(named, key=lambda item: item[0])


def _check_names(group: str, given: Iterable[str], own: Iterable[str], *, complete: bool) -> None:
    unknown = sorted(set(given) - set(own))
    if unknown:
        raise PhotonError(f"{group}: the model has no parameter {unknown[0]} ({len(unknown)} unknown names)")
    missing = sorted(set(own) - set(given))
    if complete and missing:
        raise PhotonError(f"{group}: parameter {missing[0]} is missing ({len(missing)} missing names)")


def _belongs_to_group(key: str, value: object, parameter: Tensor) -> bool:
    # A parameter may itself be a single number; torch's step counter is never one value per element.
    if not isinstance(value, Tensor) or key == "step":
        return False
    return value.numel() > 1 or value.shape == parameter.shape


def _as_number(key: str, value: object, name: str) -> float:
    if isinstance(value, Tensor):
        return float(value.item())
    if isinstance(value, int | float):
        return float(value)
    raise PhotonError(
        f"optimizer state: {key} of {name} is a {type(value).__name__}; Photon keeps tensors and numbers only"
    )


def _restore_tensor(value: Tensor, old: object, parameter: Tensor) -> Tensor:
    if isinstance(old, Tensor) and old.shape == value.shape and old.dtype == value.dtype:
        return old.copy_(value)
    if value.shape == parameter.shape:
        # The parameter's memory layout, which fused kernels expect of its states.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.detach().to(parameter.device, copy=True)


def _restore_scalar(value: float, old: object, device: torch.device) -> Any:
    if isinstance(old, Tensor):
        return old.fill_(value)
    if isinstance(old, int | float):
        return type(old)(value)
    return torch.tensor(value, dtype=torch.float32, device=device)


def _parameters_with_scalars_on_device(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    return {
        parameter
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
