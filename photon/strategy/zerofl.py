"""ZeroFL (2208.02507), as SparsyFed's authors run it: each layer is pruned at every local step."""

from typing import Literal

from photon.config import RunConfig
from photon.models.sparse import SparseTraining
from photon.strategy.base import LocalState
from photon.strategy.sparse import Sparse


class ZeroFL(Sparse):
    """Prune each layer and its inputs at every step; gradients of weights are dense, so masks move.

    Parameters
    ----------
    config
        The run's configuration.
    sparsity, layers, weighting, local_state
        As in `SparsyFed`; the prune after local training is global.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        sparsity: float = 0.95,
        layers: list[str] | None = None,
        weighting: Literal["tokens", "uniform"] = "tokens",
        local_state: LocalState = "keep",
    ) -> None:
        sparse = SparseTraining(
            sparsity, method="layer-topk", activations="constant", layers=tuple(layers or ())
        )
        super().__init__(config, sparse, weighting=weighting, local_state=local_state)
