"""A silo's key layers of its own: what it starts from, what it keeps, and what it shares."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.link.messages import TrainOrder
from photon.state.silo import SiloState
from photon.strategy.key_layers import INITIAL, PERSONAL, KeyLayers, key_layers, unpack_residuals
from photon.training.groups import StateGroups, Tensors


@dataclass(frozen=True)
class OwnLayers:
    """What a silo with key layers of its own starts from.

    Attributes
    ----------
    params
        All parameters.
    initial
        The key layers that it began with, if changes since then are compared.
    figures
        Figures of the attention.
    """

    params: dict[str, torch.Tensor]
    initial: Tensors | None
    figures: dict[str, float]


def own_layers(
    layers: KeyLayers, kept: SiloState | None, groups: Mapping[str, Tensors], order: TrainOrder
) -> OwnLayers:
    """Join the received backbone with the silo's key layers, which look at what came with it.

    Raises
    ------
    PhotonError
        If the silo has lost its key layers, and the order brings none to begin anew with.
    """
    received = groups["params"]
    own = kept.groups.get(PERSONAL) if kept and order.own_layers else None
    if own is None and not order.whole:
        raise PhotonError(
            f"{order.silo} has lost its key layers; its next order after this failure brings others"
        )
    if own is None:
        own = {name: received[name] for name in layers.split(received).key_names}
    whole = {**received, **own}
    initial = layers.initial(kept.groups.get(INITIAL) if kept else None, whole)
    residuals = unpack_residuals(groups, order.residuals, layers.split(whole))
    params, figures = layers.pull(own, received, residuals, initial)
    return OwnLayers(params, initial, figures)


def kept_layers(config: RunConfig, trained: Tensors, initial: Tensors | None) -> StateGroups:
    """Return what a silo keeps of its key layers, whatever becomes of its local optimizer's state."""
    layers = key_layers(config)
    if layers is None:
        return {}
    own = {name: trained[name] for name in layers.split(trained).key_names}
    return {PERSONAL: own} | ({INITIAL: dict(initial)} if initial else {})


def shared(due: Tensors, params: Tensors, config: RunConfig) -> Tensors:
    """Return those of the parameters that leave whose mean the server takes."""
    layers = key_layers(config)
    return due if layers is None else {name: due[name] for name in layers.split(params).backbone}
