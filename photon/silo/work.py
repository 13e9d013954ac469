"""What a silo trains on in a round: its windows in turn, or those that its objective chooses."""

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from photon.config.schema import RunConfig
from photon.data.loader import BatchStream, stream_seed
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.link.messages import TrainRequest
from photon.objective.base import Work
from photon.objective.configured import objective_of
from photon.silo.policy import SiloPolicy
from photon.strategy.contract import PARAMS, role_of
from photon.telemetry.steps import TellSteps
from photon.training.groups import StateGroups, Tensors
from photon.training.schedule import build_schedule

#: Steps whose learning rates are looked at, and the share of the highest from which one counts.
MOST_STEPS, LEAST_RATE = 4096, 0.01


def idle_steps(config: RunConfig, first: int, steps: int) -> int:
    """Return in how many steps the learning rate is next to nothing, compared with the others of a round.

    A schedule of the run's could leave one step of many, and so a gradient of few windows.

    Parameters
    ----------
    first
        Global step of the first.
    """
    schedule = build_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    transition = config.transition

    def rate(step: int) -> float:
        after = transition is not None and step >= transition.step
        return schedule(step) * (transition.lr_scale if transition is not None and after else 1.0)

    # Where there are very many, the first tell enough of them.
    rates = [rate(first + index) for index in range(min(steps, MOST_STEPS))]
    highest = max(rates, default=0.0)
    learning = sum(one >= LEAST_RATE * highest for one in rates)
    return steps - learning


def told_steps(request: TrainRequest, state: Path) -> TellSteps:
    """Return what tells of each step of a request in the node's state folder."""
    return TellSteps(state / request.silo, request.round, request.global_step, request.steps)


def batches(
    request: TrainRequest,
    model: nn.Module,
    groups: Mapping[str, Tensors],
    data: SiloData,
    config: RunConfig,
    policy: SiloPolicy,
) -> tuple[BatchStream | None, Mapping[str, float]]:
    """Return the batches of a round, and figures of how they were chosen; None: there is nothing to train on.

    Parameters
    ----------
    model
        The model with the parameters that the round starts from.
    groups
        What came with the request.
    policy
        What the silo accepts.

    Raises
    ------
    RefusedError
        If the objective has chosen fewer windows than the policy asks for.
    PhotonError
        If what it has chosen does not fit the text.
    """
    texts = data.arrays("train")
    windows = {name: [arrays[name] for arrays in texts] for name in texts[0]}
    seed = stream_seed(config.seed, request.members)
    work = _chosen(request, model, groups, data, config) if objective_of(config).chooses else None
    if work is None:
        return BatchStream(windows, seed, request.position, tokens=data.sequence_length), {}
    total = sum(map(len, windows["tokens"]))
    chosen = work.windows.cpu().numpy()
    if chosen.ndim == 1 and not len(chosen):
        return None, work.figures
    if chosen.ndim != 1 or chosen.min() < 0 or chosen.max() >= total:
        raise PhotonError(f"objective: what it has chosen is not among the {total} windows")
    for silo in request.members:
        policy.check_chosen(silo, len(np.unique(chosen)))
    arrays = {name: [np.concatenate(parts)[chosen]] for name, parts in windows.items()}
    arrays |= {name: [array.cpu().numpy()] for name, array in work.arrays.items()}
    try:
        return BatchStream(arrays, seed + request.round, tokens=data.sequence_length), work.figures
    except ValueError as error:
        raise PhotonError(f"objective: what it made for its windows does not fit them ({error})") from error


def _chosen(
    request: TrainRequest, model: nn.Module, groups: Mapping[str, Tensors], data: SiloData, config: RunConfig
) -> Work | None:
    received: StateGroups = {group: dict(tensors) for group, tensors in groups.items() if group != PARAMS}
    seed = random.Random(f"{config.seed}/{request.round}/{request.silo}/prepare").getrandbits(63)
    model.eval()
    with torch.no_grad():
        return objective_of(config).prepare(
            model,
            data,
            received,
            server_round=request.round,
            seed=seed,
            own=is_own(request.silo, config),
        )


def is_own(silo: str, config: RunConfig) -> bool:
    """Return whether a silo is the aggregator's own."""
    return role_of(silo, config.federation.server_silo, federation=False) == "server_silo"


def shared(request: TrainRequest, model: nn.Module, data: SiloData, config: RunConfig) -> StateGroups:
    """Return what the aggregator's own silo gives to the others; of another silo it is nothing."""
    objective = objective_of(config)
    if not objective.from_server_silo or not is_own(request.silo, config):
        return {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return objective.share(model, data)
    finally:
        model.train(training)
