"""Top-K: plain layers, one global prune a round; SparsyFed's baseline without its re-parameterisation."""

from typing import Literal

from photon.config import RunConfig
from photon.models.sparse import Scope, SparseTraining
from photon.strategy.base import LocalState
from photon.strategy.sparse import Sparse


class TopK(Sparse):
    """Train the weights themselves and prune them to the target after local training.

    Parameters
    ----------
    config
        The run's configuration.
    sparsity, layers, scope, ramp_rounds, weighting, local_state
        As in `SparsyFed`.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        sparsity: float = 0.95,
        layers: list[str] | None = None,
        scope: Scope = "global",
        ramp_rounds: int = 0,
        weighting: Literal["tokens", "uniform"] = "tokens",
        local_state: LocalState = "keep",
    ) -> None:
        sparse = SparseTraining(sparsity, layers=tuple(layers or ()), scope=scope, ramp_rounds=ramp_rounds)
        super().__init__(config, sparse, weighting=weighting, local_state=local_state)
