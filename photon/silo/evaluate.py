"""What a silo does with an evaluate request: the loss on its own validation text."""

from collections.abc import Mapping

import torch

from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.link.bounded import as_loss
from photon.link.messages import EvaluateReport, EvaluateRequest, NodeLoss
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
    runtime = runtime_of(config, data.vocab_size)

    def evaluated(params: Tensors, rows: torch.Tensor | None = None) -> NodeLoss:
        write_params(runtime.model, params)
        # All rounds are measured on the same draws.
        with runtime.seeded(config.seed, 0, request.silo, "evaluate"):
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

    received = evaluated(groups[PARAMS])
    per_node = {}
    if request.own and request.last_round:
        method = strategy_of(config).local
        state = silo_store(request.silo, site, config).load(request.run_id, request.last_round)
        if (
            state is not None
            and (own := method.own_model(groups["params"], kept_of(state).local)) is not None
        ):
            rows = data.vocabulary_rows(runtime.model.config.vocab_size) if method.restricts_rows else None
            per_node[request.silo] = evaluated(own, rows)
    return EvaluateReport(round=request.round, silo=request.silo, **received, per_node=per_node)
