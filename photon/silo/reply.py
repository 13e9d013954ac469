"""What leaves a silo: the state groups that are due, bounded and noised where it has privacy, and encoded."""

import random

import torch

from photon.config.schema import PrivacySection, RunConfig
from photon.link.coding import PackedGroups
from photon.link.messages import Release, TrainOrder
from photon.link.update import REFERENCE, encode_reply
from photon.privacy.gaussian import release
from photon.silo.site import SiloSite
from photon.state.silo import SiloStore
from photon.strategy.local import Start
from photon.training.groups import StateGroups, Tensors


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
    leaves: StateGroups,
    start: Start,
    received: Tensors,
    link_memory: StateGroups,
    order: TrainOrder,
    config: RunConfig,
) -> tuple[PackedGroups, StateGroups]:
    """Encode the reply; return it, and what the link wants to see again with the next one.

    Parameters
    ----------
    received
        The global parameters that came.
    link_memory
        What the link wanted to see again with this one.
    """
    reply, memory = encode_reply(
        leaves,
        start.reference,
        config.link,
        link_memory,
        seed=f"{config.seed}/{order.round}/{order.silo}",
    )
    if config.link.down_of == "update":
        memory[REFERENCE] = dict(received)
    return reply, memory
