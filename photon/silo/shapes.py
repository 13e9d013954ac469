"""What may arrive at a node and leave it in a round, computed from the configuration that came."""

from collections.abc import Mapping
from functools import lru_cache

import torch

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.models.build import build_model
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS, Contract, Role


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
    role: Role = "federation" if federation else "silo"
    if silo == config.federation.own_silo:
        role = "server_silo"
    return strategy_of(config).contract(server_round, param_shapes(config, vocab_size), role)


def evaluated_shapes(config: RunConfig, vocab_size: int) -> Mapping[str, Mapping[str, torch.Size]]:
    """Return the shapes of what a request to evaluate brings: the model."""
    return {PARAMS: param_shapes(config, vocab_size)}


def param_shapes(config: RunConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Return the shape of every parameter of the run's model."""
    return _param_shapes(config.text, vocab_size)


@lru_cache(maxsize=2)
def _param_shapes(config_text: str, vocab_size: int) -> dict[str, torch.Size]:
    config = parse(config_text)
    model = build_model(config.model, vocab_size, seed=config.seed, device="meta")
    return {name: parameter.shape for name, parameter in model.named_parameters()}
