"""What a silo does with a train order: from the global state groups to the reply and the report."""

import time
from collections.abc import Mapping

import torch

from photon.config.schema import RunConfig
from photon.link.coding import PackedGroups
from photon.link.messages import Release, TrainOrder, TrainReport
from photon.models.vocabulary import pack_vocabulary
from photon.silo.figures import diagnose, distance
from photon.silo.fit import fit
from photon.silo.kept import kept_reply, kept_state, save_round, silo_store
from photon.silo.layers import shared
from photon.silo.masks import own_vocabulary
from photon.silo.reply import due_params, encoded, released
from photon.silo.site import SiloSite
from photon.silo.start import start_from, with_change
from photon.training.devices import GroupResult


def train(
    order: TrainOrder, groups: Mapping[str, Mapping[str, torch.Tensor]], site: SiloSite, config: RunConfig
) -> tuple[PackedGroups, TrainReport]:
    """Carry out a train order.

    Parameters
    ----------
    order
        What to train, and from where.
    groups
        The global state groups; ``params`` at least.

    Returns
    -------
    tuple
        The trained state groups, encoded as they travel, and the report.

    Raises
    ------
    PhotonError
        If the silo's data, state or the groups do not fit the order.
    """
    begin = time.perf_counter()
    store = silo_store(order.silo, site, config)
    if (done := kept_reply(store, order)) is not None:
        return done

    data = site.prepared()
    kept, state_lost = kept_state(store, order)
    groups = with_change(groups, kept, order)
    start = start_from(kept, groups, order, data, config)
    vocabulary = own_vocabulary(order, start.params, data, config)
    fitted = fit(order, start.params, start.state, data, config, site, vocabulary)
    trained = time.perf_counter()

    due = due_params(fitted, order)
    diagnostics = start.figures
    if config.telemetry.diagnostics:
        diagnostics = diagnostics | diagnose(fitted, start.params, start.state, data, order, config)
    due, let_out, norm = released(due, start.known, order, site, store)
    if norm is not None and config.telemetry.diagnostics:
        diagnostics["update_norm_before_clip"] = norm
    report = _report(
        order,
        fitted,
        update_norm=distance(shared(due, fitted.params, config), start.known),
        seconds=trained - begin,
        state_lost=state_lost,
        release=let_out,
        diagnostics=diagnostics,
        vocabulary=vocabulary,
    )
    reply, memory = encoded(due, fitted, start, order, config)
    save_round(store, order, start, fitted, report, reply, memory, config)
    saved = time.perf_counter()
    seconds = {**report.seconds, "save": saved - trained, "total": saved - begin}
    return reply, report.model_copy(update={"seconds": seconds})


def _report(
    order: TrainOrder,
    fitted: GroupResult,
    *,
    update_norm: float,
    seconds: float,
    state_lost: bool,
    release: Release | None,
    diagnostics: dict[str, float],
    vocabulary: torch.Tensor | None,
) -> TrainReport:
    """Return the report of a round that took ``seconds`` and is not saved yet."""
    result = fitted.result
    return TrainReport(
        round=order.round,
        silo=order.silo,
        steps=result.steps,
        tokens=result.tokens,
        position=fitted.position,
        loss=result.loss,
        loss_last=result.loss_last,
        learning_rate=result.learning_rate,
        gradient_norm=result.gradient_norm,
        update_norm=update_norm,
        seconds={
            "load": seconds - result.seconds,
            "training": result.seconds,
            "save": 0.0,
            "total": seconds,
        },
        state_lost=state_lost,
        release=release,
        scalars=fitted.scalars,
        diagnostics=diagnostics,
        vocabulary=None if vocabulary is None else pack_vocabulary(vocabulary),
    )
