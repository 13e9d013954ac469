"""Federated training of the policy: silos keep their questions, and what leaves is the policy's parameters.

A policy is no causal language model, and its batches are no windows of tokens: an update draws graphs and
asks agents what comes of them. So `photon train` does not train it. But a round is the same: each silo takes
local updates from the global policy, the replies are folded by the same mean, and any outer optimizer steps
on the pseudo-gradient.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from photon.orchestration.method import TrainingSection
from photon.orchestration.policy import Policy
from photon.orchestration.reinforce import Reinforce, Update, World
from photon.strategy.fold import WeightedMean
from photon.strategy.outer import OuterOptimizer, OuterStep
from photon.training.groups import read_params, write_params

#: The plain mean of the silos: FedAvg, and the default of Photon.
AVERAGING = {"_target_": "torch.optim.SGD", "lr": 1.0}


@dataclass(frozen=True)
class Round:
    """Figures of a round.

    Attributes
    ----------
    number
        From 1.
    silos
        The last update of each silo.
    step
        What the outer step has moved.
    """

    number: int
    silos: Mapping[str, Update]
    step: OuterStep


class Federated:
    """Silos that train a policy together, in this process.

    Parameters
    ----------
    policy
        The global policy; it is changed.
    training
        Settings of the local updates.
    worlds
        Each silo's own questions and agents, by name.
    seed
        Of the draws; that of each silo is the seed plus its number.
    outer
        ``_target_`` and arguments of the outer optimizer.
    """

    def __init__(
        self,
        policy: Policy,
        training: TrainingSection,
        worlds: Mapping[str, World],
        *,
        seed: int,
        outer: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy = policy
        self._worlds = dict(worlds)
        # A silo keeps its local optimizer from round to round, as silos of a run do.
        self._local = {
            name: Reinforce(policy.twin(), training, seed=seed + number)
            for number, name in enumerate(self._worlds)
        }
        self._outer = OuterOptimizer(AVERAGING if outer is None else outer)
        self._state: dict[str, Any] = {}
        self._scalars: dict[str, float] = {}

    def rounds(self, number: int, local_updates: int) -> Iterator[Round]:
        """Do so many rounds.

        Raises
        ------
        RunError
            As of `Reinforce.steps`.
        """
        for current in range(1, number + 1):
            yield self._round(current, local_updates)

    def _round(self, number: int, local_updates: int) -> Round:
        params = {name: tensor.clone() for name, tensor in read_params(self.policy).items()}
        mean, last = WeightedMean(), dict[str, Update]()
        for name, world in self._worlds.items():
            local = self._local[name]
            write_params(local.policy, params)
            *_, last[name] = local.steps(world, local_updates)
            mean.add({"params": read_params(local.policy)}, len(world))
        step, self._state, self._scalars = self._outer.step(
            params, mean.result()["params"], self._state, self._scalars
        )
        write_params(self.policy, params)
        return Round(number, last, step)
