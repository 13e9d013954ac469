"""Photon: the mean of the clients' parameters, and an outer optimizer on the pseudo-gradient.

    θ̄ = Σ_k w_k θ_k,   Δ = θ − θ̄,   θ ← OuterOptimizer(θ, Δ)

With SGD of learning rate 1 this is FedAvg, the recipe of the Photon papers; with Nesterov momentum it is
DiLoCo; with Adam it is FedAdam.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from photon.config import RunConfig
from photon.state.checkpoint import Checkpoint
from photon.state.memory import release_freed
from photon.strategy.base import Aggregate, Participant, Reply, StateGroups, Strategy
from photon.strategy.fold import WeightedMean
from photon.strategy.outer import OuterOptimizer

#: From this size of the mean on, what the replies leave behind in the allocator is worth releasing.
LARGE_BYTES = 256 * 2**20


class Photon(Strategy):
    """Average parameters and step any torch optimizer on the pseudo-gradient.

    Parameters
    ----------
    config
        The run's configuration.
    weighting
        ``"tokens"``: clients count by the tokens they trained; ``"uniform"``: alike.
    local_state
        ``"keep"``: moments of the local optimizer stay in the silo; ``"reset"``: every round starts anew.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        weighting: Literal["tokens", "uniform"] = "tokens",
        local_state: Literal["keep", "reset"] = "keep",
    ) -> None:
        if weighting not in ("tokens", "uniform"):
            raise ValueError(f"weighting={weighting!r}: expected tokens or uniform")
        if local_state not in ("keep", "reset"):
            raise ValueError(f"local_state={local_state!r}: expected keep or reset")
        super().__init__(config)
        self.weighting = weighting
        self.local_state = local_state

    def configure_train(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> Mapping[str, StateGroups]:
        """Send the global parameters to everybody."""
        groups = {"params": checkpoint.load_params()}
        return {participant.name: groups for participant in cohort}

    def weight(self, reply: Reply) -> float:
        """Return the positive weight of a reply in the mean, up to a common factor."""
        return float(reply.report.tokens) if self.weighting == "tokens" else 1.0

    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        """Average the parameters and step the outer optimizer."""
        mean = WeightedMean()
        weights: dict[str, float] = {}
        fold_seconds = 0.0
        for reply in replies:
            begin = time.perf_counter()
            weight = self.weight(reply)
            mean.add(reply.groups, weight)
            weights[reply.participant] = weight
            fold_seconds += time.perf_counter() - begin
            # Drop the reply before the next one is pulled: one reply in memory, not two.
            del reply
        if mean.nbytes > LARGE_BYTES:
            release_freed()
        begin = time.perf_counter()
        params = checkpoint.load_params()
        outer = OuterOptimizer(self.config.outer.as_mapping())
        step, groups, scalars = outer.step(
            params, mean.result()["params"], checkpoint.load_outer(), checkpoint.state.outer_scalars
        )
        return Aggregate(
            params=params,
            outer=groups,
            outer_scalars=scalars,
            step=step,
            weights={name: weight / mean.total_weight for name, weight in weights.items()},
            fold_seconds=fold_seconds,
            outer_seconds=time.perf_counter() - begin,
        )
