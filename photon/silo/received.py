"""The tensors of a request: those that came, and those that are sent once and were kept here."""

from collections.abc import Mapping

import torch
from flwr.app import RecordDict

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.link.messages import EvaluateRequest, TrainRequest
from photon.link.records import Shapes, dense_groups
from photon.objective.configured import kept_of
from photon.silo.site import SiloSite
from photon.state.fixed import BASE, FIXED, with_base, without_base
from photon.strategy.contract import OF_MODEL, PARAMS


def received(
    content: RecordDict,
    site: SiloSite,
    request: TrainRequest | EvaluateRequest,
    shapes: Shapes,
    config: RunConfig,
) -> dict[str, Mapping[str, torch.Tensor]]:
    """Return the state groups of a request: those that came, and those kept here.

    Parameters
    ----------
    shapes
        Shapes of what the node works with; of ``params`` it has the whole model.

    Raises
    ------
    PhotonError
        If they are others than the configuration says, or something that is sent once was lost.
    """
    check_fixed(request, shapes, config)
    sent = _as_sent(shapes, kept_of(config))
    came = dense_groups(site.link.receive(content, sent))
    return with_base(site.fixed_groups(request.silo).complete(came, request.fixed, request.silo), OF_MODEL)


def check_fixed(request: TrainRequest | EvaluateRequest, shapes: Shapes, config: RunConfig) -> None:
    """Check that a request has a hash for each group that is sent once, and for no other.

    Parameters
    ----------
    shapes
        As of `received`.

    Raises
    ------
    PhotonError
        If not.
    """
    fixed = sorted(group for group in _as_sent(shapes, kept_of(config)) if group.startswith(FIXED))
    if sorted(request.fixed) != fixed:
        raise PhotonError(f"the request has the fixed groups {sorted(request.fixed)}, and this round {fixed}")


def _as_sent(shapes: Shapes, frozen: frozenset[str]) -> Shapes:
    """Return shapes as they travel: what no step moves of the model is a group of its own."""
    base = {name: shape for name, shape in shapes[PARAMS].items() if name in frozen}
    return {**without_base(shapes, frozen, OF_MODEL), **({BASE: base} if base else {})}
