"""The tensors of a request: those that came, those that are sent once, and a model that the node has."""

from collections.abc import Mapping

import torch
from flwr.app import RecordDict

from photon.config.schema import RunConfig
from photon.errors import LostError, PhotonError
from photon.link.messages import EvaluateRequest, TrainRequest
from photon.link.records import Shapes, dense_groups
from photon.objective.configured import kept_of, model_of
from photon.silo.shapes import evaluated_shapes
from photon.silo.site import SiloSite
from photon.state.fixed import BASE, FIXED, with_base, without_base
from photon.state.received import ReceivedModels
from photon.strategy.base import strategy_of
from photon.strategy.contract import OF_MODEL, PARAMS, Contract
from photon.training.groups import read_params

Groups = dict[str, Mapping[str, torch.Tensor]]


def trained_groups(
    content: RecordDict,
    request: TrainRequest,
    site: SiloSite,
    config: RunConfig,
    contract: Contract,
    held: Mapping[str, torch.Tensor] | None,
) -> Groups:
    """Return the state groups of a request to train.

    Parameters
    ----------
    held
        Of the parameters what the request left out (`kept_params`); None: it brings them.

    Raises
    ------
    PhotonError
        If they are others than the configuration says, or something that is sent once was lost.
    """
    shapes = contract.arriving
    check_fixed(request, shapes, config)
    came = _came(content, site, shapes, config)
    return _complete(came if held is None else {**came, PARAMS: held}, request, site)


def measured_model(
    content: RecordDict, request: EvaluateRequest, site: SiloSite, config: RunConfig, vocab_size: int
) -> tuple[Groups, bool]:
    """Return the model that is to be measured, and whether it is kept for the next request to train.

    Raises
    ------
    LostError
        If it did not come, and is not here.
    PhotonError
        If what came is no model of this run, or something that is sent once was lost.
    """
    shapes = evaluated_shapes(config, vocab_size)
    check_fixed(request, shapes, config)
    came, sha = _came(content, site, shapes, config), request.model_hash
    received = ReceivedModels(site.state, request.run_id)
    if PARAMS in came:
        return _complete(came, request, site), sha is not None and received.keep(came[PARAMS], sha)
    if sha is None:
        raise PhotonError("the request to evaluate brings no model, and names none")
    expected = _as_sent(shapes, kept_of(config))[PARAMS]
    params = _of_shapes(received.load(sha), expected)
    if params is None and request.from_seed:
        built = model_of(config, vocab_size)
        strategy_of(config).local.attach(built)
        params = {name: tensor for name, tensor in read_params(built).items() if name in expected}
        if not received.keep(params, sha):
            params = None
    if params is None:
        raise _lost(request.silo)
    return _complete({**came, PARAMS: params}, request, site), True


def kept_params(
    request: TrainRequest, site: SiloSite, config: RunConfig, contract: Contract
) -> Mapping[str, torch.Tensor] | None:
    """Return the parameters that a request leaves out, less those that are sent once; None: it brings them.

    Raises
    ------
    LostError
        If they are not here.
    """
    if request.held is None:
        return None
    kept = ReceivedModels(site.state, request.run_id).load(request.held)
    params = _of_shapes(kept, _as_sent(contract.arriving, kept_of(config))[PARAMS])
    if params is None:
        raise _lost(request.silo)
    return params


def check_fixed(request: TrainRequest | EvaluateRequest, shapes: Shapes, config: RunConfig) -> None:
    """Check that a request has a hash for each group that is sent once, and for no other.

    Parameters
    ----------
    shapes
        Shapes of what the node works with; of ``params`` it has the whole model.

    Raises
    ------
    PhotonError
        If not.
    """
    fixed = sorted(group for group in _as_sent(shapes, kept_of(config)) if group.startswith(FIXED))
    if sorted(request.fixed) != fixed:
        raise PhotonError(f"the request has the fixed groups {sorted(request.fixed)}, and this round {fixed}")


def _came(content: RecordDict, site: SiloSite, shapes: Shapes, config: RunConfig) -> Groups:
    """Return the tensors that came with a message, which have the shapes in which they travel."""
    return dict(dense_groups(site.link.receive(content, _as_sent(shapes, kept_of(config)))))


def _complete(groups: Groups, request: TrainRequest | EvaluateRequest, site: SiloSite) -> Groups:
    """Add what is sent once, as it came or was kept."""
    whole = site.fixed_groups(request.silo).complete(groups, request.fixed, request.silo)
    return with_base(whole, OF_MODEL)


def _as_sent(shapes: Shapes, frozen: frozenset[str]) -> Shapes:
    """Return shapes as they travel: what no step moves of the model is a group of its own."""
    base = {name: shape for name, shape in shapes[PARAMS].items() if name in frozen}
    return {**without_base(shapes, frozen, OF_MODEL), **({BASE: base} if base else {})}


def _of_shapes(
    params: Mapping[str, torch.Tensor] | None, shapes: Mapping[str, torch.Size]
) -> Mapping[str, torch.Tensor] | None:
    """Return parameters if they are what may come."""
    if params is None or {name: tensor.shape for name, tensor in params.items()} != dict(shapes):
        return None
    return params


def _lost(silo: str) -> LostError:
    return LostError(f"{silo} does not have the model that it was not sent")
