"""The tensors that a request brings, and the model that it leaves out because the node has it."""

import torch
from flwr.app import RecordDict

from photon.config.schema import RunConfig
from photon.errors import LostError, PhotonError
from photon.link.messages import EvaluateRequest, TrainRequest
from photon.link.records import Shapes, dense_groups
from photon.objective.configured import model_of
from photon.silo.shapes import evaluated_shapes
from photon.silo.site import SiloSite
from photon.state.received import ReceivedModels
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS, Contract
from photon.training.groups import read_params

Groups = dict[str, dict[str, torch.Tensor]]


def arrived(content: RecordDict, site: SiloSite, shapes: Shapes) -> Groups:
    """Return the tensors that came with a message, which have these shapes."""
    return dense_groups(site.link.receive(content, shapes))


def measured_model(
    content: RecordDict, request: EvaluateRequest, site: SiloSite, config: RunConfig, vocab_size: int
) -> tuple[Groups, bool]:
    """Return the model that is to be measured, and whether it is kept for the next request to train.

    Raises
    ------
    LostError
        If it did not come, and is not here.
    PhotonError
        If what came is no model of this run.
    """
    shapes = evaluated_shapes(config, vocab_size)
    came, sha = arrived(content, site, shapes), request.model_hash
    received = ReceivedModels(site.state, request.run_id)
    if PARAMS in came:
        return came, sha is not None and received.keep(came[PARAMS], sha)
    if sha is None:
        raise PhotonError("the request to evaluate brings no model, and names none")
    params = _of_shapes(received.load(sha), shapes)
    if params is None and request.from_seed:
        built = model_of(config, vocab_size)
        strategy_of(config).local.attach(built)
        params = read_params(built)
        if not received.keep(params, sha):
            params = None
    if params is None:
        raise _lost(request.silo)
    return {PARAMS: params}, True


def kept_params(request: TrainRequest, site: SiloSite, contract: Contract) -> Groups:
    """Return the parameters that a request leaves out, under the name of their group; nothing if they come.

    Raises
    ------
    LostError
        If they are not here.
    """
    if request.held is None:
        return {}
    received = ReceivedModels(site.state, request.run_id)
    params = _of_shapes(received.load(request.held), contract.arriving)
    if params is None:
        raise _lost(request.silo)
    return {PARAMS: params}


def _of_shapes(params: dict[str, torch.Tensor] | None, shapes: Shapes) -> dict[str, torch.Tensor] | None:
    """Return parameters if they are what may come."""
    if params is None or {name: t.shape for name, t in params.items()} != dict(shapes[PARAMS]):
        return None
    return params


def _lost(silo: str) -> LostError:
    return LostError(f"{silo} does not have the model that it was not sent")
