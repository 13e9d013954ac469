"""What a silo trains on in a round: its windows in turn, or those that its objective chooses."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from photon.config.schema import RunConfig
from photon.data.loader import BatchStream, stream_seed
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.link.messages import TrainRequest
from photon.objective.base import Objective, Work
from photon.objective.configured import objective_of
from photon.strategy.contract import PARAMS
from photon.training.groups import StateGroups, Tensors


def chooses(config: RunConfig) -> bool:
    """Return whether a run's objective chooses what a silo trains on."""
    return type(objective_of(config)).prepare is not Objective.prepare


def batches(
    request: TrainRequest, model: nn.Module, groups: Mapping[str, Tensors], data: SiloData, config: RunConfig
) -> tuple[BatchStream, Mapping[str, float]]:
    """Return the batches of a round, and figures of how they were chosen.

    Parameters
    ----------
    model
        The model with the parameters that the round starts from.
    groups
        What came with the request.

    Raises
    ------
    PhotonError
        If what the objective has chosen does not fit the text.
    """
    windows = data.windows("train")
    seed = stream_seed(config.seed, request.members)
    work = _chosen(request, model, groups, data, config) if chooses(config) else None
    if work is None:
        return BatchStream({"tokens": windows}, seed, request.position), {}
    total = sum(map(len, windows))
    chosen = work.windows.cpu().numpy()
    if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= total:
        raise PhotonError(f"objective: what it has chosen is not one or more of {total} windows")
    arrays = {name: [array.cpu().numpy()] for name, array in work.arrays.items()}
    try:
        return BatchStream(
            {"tokens": [np.concatenate(windows)[chosen]], **arrays}, seed + request.round
        ), work.figures
    except ValueError as error:
        raise PhotonError(f"objective: what it made for its windows does not fit them ({error})") from error


def _chosen(
    request: TrainRequest, model: nn.Module, groups: Mapping[str, Tensors], data: SiloData, config: RunConfig
) -> Work | None:
    received: StateGroups = {group: dict(tensors) for group, tensors in groups.items() if group != PARAMS}
    seed = random.Random(f"{config.seed}/{request.round}/{request.silo}/prepare").getrandbits(63)
    model.eval()
    with torch.no_grad():
        return objective_of(config).prepare(model, data, received, server_round=request.round, seed=seed)
