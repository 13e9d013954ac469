"""What a silo does with a train request where the objective takes no steps: sums over its text."""

import random
import time
from collections.abc import Mapping

import torch

from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.link.encoding import PackedGroups
from photon.link.messages import TrainReport, TrainRequest
from photon.link.update import encode_reply
from photon.objective.configured import objective_of
from photon.silo.choice import as_decided
from photon.silo.kept import Stays, kept_reply, save_round, silo_store
from photon.silo.policy import SiloPolicy
from photon.silo.runtime import runtime_of
from photon.silo.site import SiloSite
from photon.strategy.contract import PARAMS, Contract
from photon.training.groups import StateGroups, write_params
from photon.training.hardware import decided_here


def sum_up(
    request: TrainRequest,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    contract: Contract,
    site: SiloSite,
    config: RunConfig,
) -> tuple[PackedGroups, TrainReport]:
    """Carry out a request of no steps, in this process, whatever number of them train together.

    Nothing is kept for the next round but the reply, and the silo's place in its text stays.

    Parameters
    ----------
    request
        Whose text, and in which round.
    groups
        The global parameters, and what the server made of earlier sums.
    contract
        What has arrived and may leave.

    Returns
    -------
    tuple
        The sums, encoded as they travel, and the report.

    Raises
    ------
    PhotonError
        If the silo's data or the groups do not fit the request, or the sums not the contract.
    """
    begin = time.perf_counter()
    store = silo_store(request.silo, site, config)
    if (done := kept_reply(store, request)) is not None:
        return done
    if missing := sorted(set(contract.arriving) - set(groups)):
        raise PhotonError(f"{request.silo}: the request does not bring {missing[0]}")
    prepared = site.prepared()
    config = as_decided(config, prepared.manifest.vocab_size)
    seed = f"{config.seed}/{request.round}/{request.silo}"
    loaded = time.perf_counter()
    data = SiloData(prepared, request.members)
    sums = _checked(_summed(groups, data, request, seed, config, site.policy), contract)
    summed = time.perf_counter()
    report = TrainReport(
        round=request.round,
        silo=request.silo,
        steps=0,
        tokens=sum(prepared.manifest.silos[member].train.tokens for member in request.members),
        position=request.position,
        update_norm=0.0,
        seconds={
            "load": loaded - begin,
            "training": max(1e-6, summed - loaded),
            "save": 0.0,
            "total": max(1e-6, summed - begin),
        },
        state_lost=False,
        decided=decided_here(config.training),
    )
    reply, _ = encode_reply(sums, {}, config.link, {}, seed=seed)
    text = prepared.text_sha256(request.members)
    save_round(store, request, Stays(request.position), report, reply, {}, text)
    saved = time.perf_counter()
    seconds = {**report.seconds, "save": saved - summed, "total": saved - begin}
    return reply, report.model_copy(update={"seconds": seconds})


def _summed(
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    data: SiloData,
    request: TrainRequest,
    seed: str,
    config: RunConfig,
    policy: SiloPolicy,
) -> StateGroups:
    """Let the objective read the text, with the model that came.

    Raises
    ------
    RefusedError
        If the policy forbids it, by what is behind the sums.
    PhotonError
        If masks would hide less than was counted.
    """
    objective = objective_of(config)
    brought = {group: dict(tensors) for group, tensors in groups.items() if group != PARAMS}
    behind = objective.behind(data, brought, request.round)
    policy.check_sums(request.silo, behind, masked=request.masking is not None)
    if request.masking is not None and behind.all_silos not in (None, len(request.masking.silos)):
        raise PhotonError(
            f"secure aggregation: {behind.all_silos} silos were counted, and the sum would be over "
            f"{len(request.masking.silos)}"
        )
    runtime = runtime_of(config, data.vocab_size)
    write_params(runtime.model, groups[PARAMS])
    received = {
        group: {name: tensor.to(runtime.device) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
        if group != PARAMS
    }
    before = runtime.model.training
    runtime.model.eval()
    try:
        with torch.no_grad():
            return objective.statistics(
                runtime.model,
                data,
                received,
                server_round=request.round,
                seed=random.Random(seed).getrandbits(63),
            )
    finally:
        runtime.model.train(before)


def _checked(sums: StateGroups, contract: Contract) -> StateGroups:
    """Return sums on the CPU.

    Raises
    ------
    PhotonError
        If they are not in float64, not finite, or of other shapes than the contract says.
    """
    found = {group: {name: tensor.cpu() for name, tensor in of.items()} for group, of in sums.items()}
    if {group: {name: t.shape for name, t in of.items()} for group, of in found.items()} != contract.due:
        raise PhotonError("objective: its statistics are not of the names and shapes that it says")
    for group, tensors in found.items():
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64:
                raise PhotonError(f"objective: {group}/{name} is a sum in {tensor.dtype}; use float64")
            if not torch.isfinite(tensor).all():
                raise PhotonError(f"objective: {group}/{name} holds a value that is not finite")
    return found
