"""Which state groups there are in a run, and the shapes of those that an order may bring."""

from collections.abc import Mapping
from functools import lru_cache

import torch

from photon.components import build, import_target
from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.link.records import Shapes
from photon.models.build import build_model
from photon.silo.site import SiloSite
from photon.strategy.base import LocalState, Strategy
from photon.training.groups import RECEIVED, Refreshing
from photon.training.loop import state_group_names, state_shapes


def expected_shapes(site: SiloSite, config: RunConfig, local_state: LocalState = "reset") -> Shapes:
    """Return the shapes of what an order may bring: parameters, and what the local optimizer needs.

    Its states come where ``local_state`` is ``"sync"``, and unless it is ``"reset"`` the parameters that the
    last round began with, if the optimizer is `Refreshing`.
    """
    return _expected_shapes(config.text, site.prepared().manifest.vocab_size, local_state)


def shapes_for(config: RunConfig, vocab_size: int) -> Shapes:
    """Return the shapes of the parameters that an order may bring, for a node without text of its own."""
    return _expected_shapes(config.text, vocab_size, "reset")


@lru_cache(maxsize=2)
def _expected_shapes(config_text: str, vocab_size: int, local_state: LocalState) -> Shapes:
    config = parse(config_text)
    model = build_model(config.model, vocab_size, seed=config.seed, device="meta")
    params = {name: parameter.shape for name, parameter in model.named_parameters()}
    expected: dict[str, Mapping[str, torch.Size]] = {"params": params}
    if local_state == "sync":
        expected |= state_shapes(config.optimizer.as_mapping(), params)
    if local_state != "reset" and refreshes(config):
        expected[RECEIVED] = params
    strategy: Strategy = build(config.strategy.as_mapping(), "strategy", config)
    return {**expected, **strategy.optional_groups(params)}


def state_groups(config: RunConfig) -> list[str]:
    """Return the names of the local optimizer's state groups."""
    return _state_groups(config.text)


@lru_cache(maxsize=2)
def _state_groups(config_text: str) -> list[str]:
    return state_group_names(parse(config_text).optimizer.as_mapping())


def refreshes(config: RunConfig) -> bool:
    """Return whether the local optimizer is `Refreshing`."""
    return issubclass(import_target(config.optimizer.target, "optimizer"), Refreshing)
