"""What a silo does with an evaluate request: the loss on its own validation text."""

import math
from collections.abc import Mapping

import torch

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.data.silo_data import SiloData
from photon.errors import PhotonError, RefusedError
from photon.link.bounded import as_loss
from photon.link.messages import EvaluateReport, EvaluateRequest, ForgottenReport, NodeLoss, TrainRequest
from photon.objective import probe
from photon.objective.configured import objective_of
from photon.silo.choice import as_decided
from photon.silo.kept import kept_of, silo_store
from photon.silo.runtime import runtime_of
from photon.silo.site import SiloSite
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS
from photon.training.groups import Tensors, write_params


def evaluate(
    request: EvaluateRequest,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    site: SiloSite,
    config: RunConfig,
) -> EvaluateReport:
    """Evaluate the received model on a silo's validation windows, and the silo's own if it is asked to.

    The received model's softmax is over all tokens. With restricted vocabularies that of the silo's own is
    over the tokens that it was trained on.
    """
    data = SiloData(site.prepared(), [request.silo])
    config = as_decided(config, data.vocab_size)
    received = _loss_of(groups[PARAMS], request.silo, data, None, config)
    per_node = {}
    if request.own and request.last_round:
        method = strategy_of(config).local
        state = silo_store(request.silo, site, config).load(request.run_id, request.last_round)
        if (
            state is not None
            and (own := method.own_model(groups["params"], kept_of(state).local)) is not None
        ):
            rows = None
            if method.restricts_rows:
                rows = data.vocabulary_rows(runtime_of(config, data.vocab_size).model.config.vocab_size)
            per_node[request.silo] = _loss_of(own, request.silo, data, rows, config)
    forgotten = _forgotten(groups[PARAMS], request.silo, data, site, config)
    return EvaluateReport(
        round=request.round, silo=request.silo, **received, per_node=per_node, forgotten=forgotten
    )


def _forgotten(
    params: Tensors, silo: str, data: SiloData, site: SiloSite, config: RunConfig
) -> ForgottenReport | None:
    """Return what a model says to what the silo has had forgotten.

    None where the silo keeps no such questions, or fewer than its policy lets figures be of.
    """
    if site.forgotten is None:
        return None
    prepared = PreparedData.reopen(site.forgotten)
    if prepared.manifest.tokenizer_sha256 != site.prepared().manifest.tokenizer_sha256:
        raise PhotonError(
            f"{site.forgotten}: its questions were prepared with another tokenizer than {silo}'s text; "
            "prepare them with --tokenizer"
        )
    asked = probe.forgotten_of(prepared, silo)
    try:
        site.policy.check_evaluation(silo, len(asked))
    except RefusedError:
        return None
    if not asked:
        return None
    runtime = runtime_of(config, data.vocab_size)
    write_params(runtime.model, params)
    before = runtime.model.training
    runtime.model.eval()
    try:
        found = probe.answers_to(runtime.model, asked, data.tokenizer, probe.ANSWER_TOKENS)
    finally:
        runtime.model.train(before)
    return ForgottenReport(
        asked=len(found),
        rouge1=min(len(found), math.fsum(one.rouge1 for one in found)),
        refused=sum(one.refused for one in found),
    )


def before_merge(
    request: TrainRequest, trained: Tensors, rows: torch.Tensor | None, site: SiloSite, config: RunConfig
) -> dict[str, NodeLoss]:
    """Return the loss of the model that a silo ends a round with, on its own validation text, by its name.

    Empty where nobody asks; where the silo's policy keeps such figures, or updates leave noised: the model
    is without that noise; and for participants that are several silos.

    Parameters
    ----------
    trained
        Its parameters.
    rows
        Rows of the vocabulary that it was trained over, bool; None: all.
    """
    if not request.before_merge or request.members != [request.silo] or site.privacy.noise_multiplier > 0:
        return {}
    try:
        site.policy.check_evaluation(request.silo, config.evaluation.sequences)
    except RefusedError:
        return {}
    data = SiloData(site.prepared(), [request.silo])
    return {request.silo: _loss_of(trained, request.silo, data, rows, config)}


def _loss_of(
    params: Tensors, silo: str, data: SiloData, rows: torch.Tensor | None, config: RunConfig
) -> NodeLoss:
    """Measure some parameters; the model of this process then holds them."""
    runtime = runtime_of(config, data.vocab_size)
    write_params(runtime.model, params)
    # All rounds are measured on the same draws.
    with runtime.seeded(config.seed, 0, silo, "evaluate"):
        measured = objective_of(config).evaluate(
            runtime.model,
            data,
            rows,
            batch_size=config.evaluation.batch_size,
            device=runtime.device,
            precision=runtime.precision,
            limit=config.evaluation.sequences,
        )
    return NodeLoss(loss=as_loss(measured.loss), tokens=measured.count)
