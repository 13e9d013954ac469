"""What leaves a silo: the state groups that are due, bounded and noised where it has privacy, and encoded."""

import random

import torch

from photon.config.schema import PrivacySection, RunConfig
from photon.link.encoding import PackedGroups
from photon.link.messages import PrivacyReport, TrainRequest
from photon.link.update import REFERENCE, encode_reply
from photon.privacy.gaussian import privatise
from photon.silo.site import SiloSite
from photon.state.silo import SiloStore
from photon.strategy.local import Start
from photon.training.groups import StateGroups, Tensors


def privatised(
    due: dict[str, torch.Tensor], reference: Tensors, request: TrainRequest, site: SiloSite, store: SiloStore
) -> tuple[dict[str, torch.Tensor], PrivacyReport | None, float | None]:
    """Count the release of an update, and make it private if the silo's update is bounded.

    Returns
    -------
    tuple
        What may leave; and where it was bounded, what the report says of that, and the norm of the update
        before.
    """
    # Before the round is saved: a crash between the two counts it twice, and never not at all.
    releases, smallest = store.count_release(request.run_id, site.privacy.noise_multiplier)
    if site.privacy.clip_norm is None:
        return due, None, None
    due, norm = _privatised(due, reference, request, site.privacy)
    privacy_report = PrivacyReport(
        clip_norm=site.privacy.clip_norm, noise_multiplier=smallest, releases=releases
    )
    return due, privacy_report, norm


def _privatised(
    due: Tensors, reference: Tensors, request: TrainRequest, privacy: PrivacySection
) -> tuple[dict[str, torch.Tensor], float]:
    """Clip what leaves and add noise, measured from the last global values, which the aggregator knows.

    What the silo has kept of earlier rounds may be part of the update, which is bounded as a whole.
    """
    generator = None
    if privacy.seed is not None:
        own = random.Random(f"{privacy.seed}/{request.round}/{request.silo}")
        generator = torch.Generator().manual_seed(own.getrandbits(63))
    return privatise(reference, due, privacy, generator)


def encoded(
    leaves: StateGroups,
    start: Start,
    received: Tensors,
    link_feedback: StateGroups,
    request: TrainRequest,
    config: RunConfig,
) -> tuple[PackedGroups, StateGroups]:
    """Encode the reply; return it, and what the link wants to see again with the next one.

    Parameters
    ----------
    received
        The global parameters that came.
    link_feedback
        What the link wanted to see again with this one.
    """
    reply, feedback = encode_reply(
        leaves,
        start.reference,
        config.link,
        link_feedback,
        seed=f"{config.seed}/{request.round}/{request.silo}",
    )
    if config.link.downlink_payload == "update":
        feedback[REFERENCE] = dict(received)
    return reply, feedback
