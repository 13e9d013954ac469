"""What leaves a silo: the state groups that are due, bounded and noised where it has privacy, and encoded."""

import random

import torch

from photon.config.schema import PrivacySection, RunConfig
from photon.errors import PhotonError
from photon.link.coding import PackedGroups
from photon.link.messages import Release, TrainOrder
from photon.link.update import REFERENCE, encode_reply
from photon.privacy.gaussian import release
from photon.silo.site import SiloSite
from photon.silo.start import Start
from photon.state.silo import SiloStore
from photon.training.devices import GroupResult
from photon.training.groups import StateGroups, Tensors


def due_params(fitted: GroupResult, order: TrainOrder) -> dict[str, torch.Tensor]:
    """Return the trained parameters that the order wants back."""
    names = fitted.params if order.due_params is None else order.due_params
    return {name: fitted.params[name] for name in names}


def released(
    due: dict[str, torch.Tensor], known: Tensors, order: TrainOrder, site: SiloSite, store: SiloStore
) -> tuple[dict[str, torch.Tensor], Release | None, float | None]:
    """Count the release of an update, and make it private if the silo's update is bounded.

    Returns
    -------
    tuple
        What may leave; and where it was bounded, what the report says of that, and the norm of the update
        before.
    """
    # Before the round is saved: a crash between the two counts it twice, and never not at all.
    releases, smallest = store.count_release(order.run_id, site.privacy.noise_multiplier)
    if site.privacy.clip_norm is None:
        return due, None, None
    due, norm = _released(due, known, order, site.privacy)
    let_out = Release(clip_norm=site.privacy.clip_norm, noise_multiplier=smallest, releases=releases)
    return due, let_out, norm


def _released(
    due: Tensors, known: Tensors, order: TrainOrder, privacy: PrivacySection
) -> tuple[dict[str, torch.Tensor], float]:
    """Clip what leaves and add noise, measured from the last global values, which the aggregator knows.

    What the silo has kept of earlier rounds may be part of the update, which is bounded as a whole.
    """
    generator = None
    if privacy.seed is not None:
        own = random.Random(f"{privacy.seed}/{order.round}/{order.silo}")
        generator = torch.Generator().manual_seed(own.getrandbits(63))
    return release(known, due, privacy, generator)


def encoded(
    due: dict[str, torch.Tensor], fitted: GroupResult, start: Start, order: TrainOrder, config: RunConfig
) -> tuple[PackedGroups, StateGroups]:
    """Encode the reply; return it, and what the link wants to see again with the next one."""
    reply, memory = encode_reply(
        _reply(due, fitted, order),
        start.known,
        config.link,
        start.kept.link if start.kept else {},
        seed=f"{config.seed}/{order.round}/{order.silo}",
    )
    if config.link.down_of == "update":
        memory[REFERENCE] = dict(start.received)
    return reply, memory


def _reply(due: dict[str, torch.Tensor], fitted: GroupResult, order: TrainOrder) -> StateGroups:
    available = {"params": due, **fitted.groups}
    if missing := [group for group in order.due if group not in available]:
        raise PhotonError(
            f"the order asks for the state group {missing[0]}, which the local optimizer lacks; there "
            f"are {', '.join(sorted(available))}"
        )
    return {group: available[group] for group in order.due}
