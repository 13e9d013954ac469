"""What may arrive at a node and leave it in a round, computed from the configuration that came."""

from functools import lru_cache

import torch

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.files.memory import memory_bytes
from photon.link.messages import TrainRequest
from photon.link.records import Shapes
from photon.models.bounded import bounded_model
from photon.objective.configured import model_of, steps_of
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS, Contract, role_of
from photon.training.groups import read_params


def contract_of(
    config: RunConfig, vocab_size: int, server_round: int, silo: str, *, federation: bool = False
) -> Contract:
    """Return the contract of a round for a participant.

    Parameters
    ----------
    vocab_size
        Tokens of the silo's tokenizer.
    silo
        The participant's name.
    federation
        Whether a federation acts as the silo.
    """
    role = role_of(silo, config.federation.server_silo, federation=federation)
    return strategy_of(config).contract(server_round, param_shapes(config, vocab_size), role)


def check_request(request: TrainRequest, config: RunConfig) -> None:
    """Check that a request asks for what its configuration says.

    How many steps it asks for is left to the policy: a silo may be given fewer than the configuration says.

    Raises
    ------
    PhotonError
        If they differ.
    """
    if (request.masking is not None) != config.privacy.secure_aggregation:
        raise PhotonError("secure aggregation: the request and the run's configuration do not agree on it")
    if request.round > config.rounds:
        raise PhotonError(f"the request is of round {request.round}, and the run has {config.rounds}")
    if (request.steps > 0) != ((most := steps_of(config, request.round)) > 0):
        raise PhotonError(f"the request asks for {request.steps} steps, and a round of this run has {most}")
    # One participant on the text of several silos has a larger one, by how many there are.
    if len(request.members) == 1 and request.batch_size != config.training.batch_size:
        raise PhotonError(
            f"the request asks for batches of {request.batch_size}, and those of this run have "
            f"{config.training.batch_size}"
        )


def evaluated_shapes(config: RunConfig, vocab_size: int) -> Shapes:
    """Return the shapes of what a request to evaluate brings: the model."""
    return {PARAMS: param_shapes(config, vocab_size)}


def param_shapes(config: RunConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Return the shape of every parameter of the run's model, and of the buffers that are saved with it.

    Raises
    ------
    PhotonError
        If it has more parts than any model, or its parameters do not fit this machine's memory.
    """
    return _param_shapes(config.text, vocab_size)


# In a tree every federation has a text of its own.
@lru_cache(maxsize=8)
def _param_shapes(config_text: str, vocab_size: int) -> dict[str, torch.Size]:
    config = parse(config_text)
    with bounded_model(memory_bytes() // 4):
        model = model_of(config, vocab_size, "meta")
    return {name: tensor.shape for name, tensor in read_params(model).items()}
