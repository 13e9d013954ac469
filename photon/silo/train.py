"""What a silo does with a train request: from the global state groups to the reply and the report."""

import time
from collections.abc import Mapping

import torch

from photon.config.schema import RunConfig
from photon.link.encoding import PackedGroups
from photon.link.messages import TrainReport, TrainRequest
from photon.silo.choice import as_decided
from photon.silo.evaluate import before_merge
from photon.silo.figures import diagnose, distance
from photon.silo.fit import fit
from photon.silo.kept import Stays, kept_reply, kept_state, save_round, silo_store
from photon.silo.reply import encoded, privatised, report_of
from photon.silo.site import SiloSite
from photon.silo.start import request_of, start_from
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS, Contract


def train(
    request: TrainRequest,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    contract: Contract,
    site: SiloSite,
    config: RunConfig,
) -> tuple[PackedGroups, TrainReport]:
    """Carry out a train request.

    Parameters
    ----------
    request
        What to train, and from where.
    groups
        The global state groups; ``params`` at least.
    contract
        What may leave.

    Returns
    -------
    tuple
        The trained state groups, encoded as they travel, and the report.

    Raises
    ------
    PhotonError
        If the silo's data, state or the groups do not fit the request.
    """
    begin = time.perf_counter()
    store = silo_store(request.silo, site, config)
    if (done := kept_reply(store, request)) is not None:
        return done

    data = site.prepared()
    config = as_decided(config, data.manifest.vocab_size)
    for_method = request_of(request, contract, config, data.manifest.vocab_size)
    kept, state_lost = kept_state(store, request)
    start, received = start_from(kept, groups, request, for_method, data, config)
    text = data.text_sha256(request.members)
    fitted = fit(request, start, groups, data, config, site)
    # Here, where the model holds these parameters: what the method makes of them may share their memory.
    brings = before_merge(request, fitted.params, start.rows, site, config)
    finish = strategy_of(config).local.finish(start, fitted, for_method)
    trained = time.perf_counter()

    leaves = dict(finish.leaves)
    diagnostics = {**start.figures, **finish.trained.result.figures}
    if config.telemetry.diagnostics:
        diagnostics |= diagnose(finish.trained, start, data, request, config)
    leaves[PARAMS], privacy_report, norm = privatised(leaves[PARAMS], start.reference, request, site, store)
    if norm is not None and config.telemetry.diagnostics:
        diagnostics["update_norm_before_clip"] = norm
    shared = {name: t for name, t in leaves[PARAMS].items() if name not in contract.own}
    report = report_of(
        request,
        finish.trained,
        update_norm=distance(shared, start.reference),
        seconds=trained - begin,
        state_lost=state_lost,
        text_changed=kept is not None and kept.text not in ("", text),
        privacy=privacy_report,
        diagnostics=diagnostics,
        rows=start.rows,
        config=config,
    ).model_copy(update={"before_merge": brings})
    reply, feedback = encoded(leaves, start, received, kept.link if kept else {}, request, config)
    stays = Stays(finish.trained.position, finish.stays, finish.scalars)
    save_round(store, request, stays, report, reply, feedback, text)
    saved = time.perf_counter()
    seconds = {**report.seconds, "save": saved - trained, "total": saved - begin}
    return reply, report.model_copy(update={"seconds": seconds})
