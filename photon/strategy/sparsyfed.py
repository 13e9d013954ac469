"""SparsyFed (2504.05153): weights that cannot grow again, pruned activations, one global prune a round."""

from dataclasses import replace
from typing import Any, Literal

from photon.config.schema import RunConfig
from photon.models.sparse import Scope
from photon.strategy.base import LocalState
from photon.strategy.sparse import Sparse


class SparsyFed(Sparse):
    """Train v with W = sign(v)|v|^β, prune v to the target after local training, average.

    Parameters
    ----------
    config, sparsity, layers, scope, ramp_rounds, weighting, local_state, fold
        As in `Sparse`.
    beta
        β; above 1 a pruned weight gets no gradient. 1 is the plain layer.
    activation_pruning
        Use the largest inputs alone for a layer's weight gradient, as many as it has weights left.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        sparsity: float = 0.95,
        beta: float = 1.25,
        activation_pruning: bool = True,
        layers: list[str] | None = None,
        scope: Scope = "global",
        ramp_rounds: int = 0,
        weighting: Literal["tokens", "uniform"] = "tokens",
        local_state: LocalState = "keep",
        fold: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            config,
            sparsity=sparsity,
            layers=layers,
            scope=scope,
            ramp_rounds=ramp_rounds,
            weighting=weighting,
            local_state=local_state,
            fold=fold,
        )
        self.sparse = replace(self.sparse, beta=beta, activations="measured" if activation_pruning else "off")
