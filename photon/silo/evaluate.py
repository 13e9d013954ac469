"""What a silo does with an evaluate order: the loss on its own validation text."""

from collections.abc import Mapping

import torch

from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.link.messages import EvaluateOrder, EvaluateReport, NodeLoss
from photon.objective.configured import objective_of
from photon.silo.kept import kept_of, silo_store
from photon.silo.runtime import workbench
from photon.silo.site import SiloSite
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS
from photon.training.groups import Tensors, write_params


def evaluate(
    order: EvaluateOrder,
    groups: Mapping[str, Mapping[str, torch.Tensor]],
    site: SiloSite,
    config: RunConfig,
) -> EvaluateReport:
    """Evaluate the received model on a silo's validation windows, and the silo's own if it is asked to.

    The received model's softmax is over all tokens. With trimmed embeddings that of the silo's own is over
    the tokens that it was trained on.
    """
    data = SiloData(site.prepared(), [order.silo])
    bench = workbench(config, data.vocab_size)

    def evaluated(params: Tensors, rows: torch.Tensor | None = None) -> NodeLoss:
        write_params(bench.model, params)
        measured = objective_of(config).evaluate(
            bench.model,
            data,
            rows,
            batch_size=config.evaluation.batch_size,
            device=bench.device,
            precision=bench.precision,
            limit=config.evaluation.sequences,
        )
        return NodeLoss(loss=measured.loss, tokens=measured.count)

    received = evaluated(groups[PARAMS])
    per_node = {}
    if order.own and order.last_round:
        method = strategy_of(config).local
        state = silo_store(order.silo, site, config).load(order.run_id, order.last_round)
        if (
            state is not None
            and (own := method.own_model(groups["params"], kept_of(state).local)) is not None
        ):
            rows = data.vocabulary_rows(bench.model.config.vocab_size) if method.restricts_rows else None
            per_node[order.silo] = evaluated(own, rows)
    return EvaluateReport(round=order.round, silo=order.silo, **received, per_node=per_node)
