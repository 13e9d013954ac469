"""What leaves a silo: state groups, bounded and noised where it has privacy, and encoded; and a report."""

import random

import torch

from photon.config.schema import PrivacySection, RunConfig
from photon.link.bounded import as_figure
from photon.link.encoding import PackedGroups
from photon.link.messages import PrivacyReport, TrainReport, TrainRequest
from photon.link.update import REFERENCE, encode_reply
from photon.models.vocabulary import pack_vocabulary
from photon.privacy.gaussian import privatise
from photon.silo.site import SiloSite
from photon.state.silo import SiloStore
from photon.strategy.local import Start
from photon.training.devices import GroupResult
from photon.training.groups import StateGroups, Tensors
from photon.training.hardware import decided_here


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


def report_of(
    request: TrainRequest,
    fitted: GroupResult,
    *,
    update_norm: float,
    seconds: float,
    state_lost: bool,
    text_changed: bool,
    privacy: PrivacyReport | None,
    diagnostics: dict[str, float],
    rows: torch.Tensor | None,
    config: RunConfig,
) -> TrainReport:
    """Return the report of a round that took ``seconds`` and is not saved yet.

    Parameters
    ----------
    fitted
        What local training left.
    rows
        Rows of the vocabulary that were trained; None: all.
    config
        The run's configuration as it was carried out here.
    """
    result = fitted.result
    return TrainReport(
        round=request.round,
        silo=request.silo,
        steps=result.steps,
        tokens=result.tokens,
        position=fitted.position,
        loss=as_figure(result.loss),
        loss_last=as_figure(result.loss_last),
        learning_rate=as_figure(result.learning_rate),
        gradient_norm=as_figure(result.gradient_norm),
        update_norm=as_figure(update_norm),
        seconds={
            "load": seconds - result.seconds,
            "training": result.seconds,
            "save": 0.0,
            "total": seconds,
        },
        state_lost=state_lost,
        text_changed=text_changed,
        privacy=privacy,
        scalars=fitted.scalars,
        diagnostics={name: value for name, value in diagnostics.items() if as_figure(value) is not None},
        vocabulary=None if rows is None else pack_vocabulary(rows),
        decided=decided_here(config.training, result.micro_batch_size),
    )
