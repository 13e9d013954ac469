"""SparsyFed (2504.05153): weights that cannot grow again, pruned activations, one global prune a round."""

from typing import Literal

from photon.config import RunConfig
from photon.models.sparse import Scope, SparseTraining
from photon.strategy.base import LocalState
from photon.strategy.sparse import Sparse


class SparsyFed(Sparse):
    """Train v with W = sign(v)|v|^β, prune v to the target after local training, average.

    Parameters
    ----------
    config
        The run's configuration.
    sparsity
        Share of the prunable weights that a client sets to zero, ŝ.
    beta
        β; above 1 a pruned weight gets no gradient. 1 is the plain layer.
    activation_pruning
        Use the largest inputs alone for a layer's weight gradient, as many as it has weights left.
    layers, scope, ramp_rounds
        As in `SparseTraining`; ``layers=null`` is every linear layer but the output head.
    weighting, local_state
        As in `Photon`.
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
    ) -> None:
        sparse = SparseTraining(
            sparsity,
            beta=beta,
            activations="measured" if activation_pruning else "off",
            layers=tuple(layers or ()),
            scope=scope,
            ramp_rounds=ramp_rounds,
        )
        super().__init__(config, sparse, weighting=weighting, local_state=local_state)
