"""What is known of a local optimizer without training with it: its state groups, and whether it refreshes."""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from photon.components import import_target
from photon.config.schema import Component
from photon.errors import PhotonError
from photon.training.groups import Refreshing, Tensors, named_parameters
from photon.training.loop import state_group_names, state_shapes


def optimizer_groups(optimizer: Component) -> list[str]:
    """Return the names of a local optimizer's state groups, sorted."""
    return list(_groups(optimizer.model_dump_json(by_alias=True)))


@lru_cache(maxsize=8)
def _groups(text: str) -> tuple[str, ...]:
    names = tuple(state_group_names(Component.model_validate_json(text).as_mapping()))
    if taken := [name for name in names if "/" in name or name == "params"]:
        raise PhotonError(
            f"optimizer: its state {taken[0]!r} has a name that Photon needs for groups of its own; rename it"
        )
    return names


def optimizer_shapes(
    optimizer: Component, params: Mapping[str, torch.Size]
) -> dict[str, dict[str, torch.Size]]:
    """Return the shapes of a local optimizer's state groups for parameters of some shapes."""
    key = tuple((name, tuple(shape)) for name, shape in params.items())
    return _shapes(optimizer.model_dump_json(by_alias=True), key)


@lru_cache(maxsize=4)
def _shapes(text: str, params: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, dict[str, torch.Size]]:
    section = Component.model_validate_json(text).as_mapping()
    return state_shapes(section, {name: torch.Size(shape) for name, shape in params})


def is_refreshing(optimizer: Component) -> bool:
    """Return whether a local optimizer looks at what a sync changed."""
    return issubclass(import_target(optimizer.target, "optimizer"), Refreshing)


def synced_together(optimizer: Component) -> tuple[str, ...]:
    """Return the state groups of a local optimizer that mean something together alone."""
    together: Collection[str] = getattr(import_target(optimizer.target, "optimizer"), "synced_together", ())
    return tuple(group for group in optimizer_groups(optimizer) if group in together)


def refresh(model: nn.Module, optimizer: torch.optim.Optimizer, received: Tensors) -> None:
    """Tell a `Refreshing` optimizer what a sync changed: the value before minus the value now.

    Parameters
    ----------
    received
        The parameters that the last round began with, by name.
    """
    change: dict[Tensor, Tensor] = {
        parameter: received[name].to(parameter.device) - parameter.detach()
        for name, parameter in named_parameters(model)
    }
    cast(Refreshing, optimizer).refresh(change)
