"""Sums: what an objective without steps has counted at each silo, added up.

    S = Σ_k S_k,   in float64, in cohort order, without weights

Parameters, outer optimizer and global step stay as they are. What the objective makes of the sums is kept in
the checkpoint and travels with the next round's requests.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.objective.configured import objective_of
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Aggregate, Participant, Reply, StateGroups, Strategy
from photon.strategy.contract import PARAMS, SHARED, Contract, Leaving, Role
from photon.strategy.local import LocalState
from photon.strategy.outer import outer_step


class Sums(Strategy):
    """Add up the sums of an objective that takes no steps.

    Parameters
    ----------
    config
        The run's configuration.
    """

    folds_sums: ClassVar[bool] = True
    local_state: LocalState = "reset"
    silos_only = "which answers with parameters and not with sums; let its silos take part themselves"
    #: A silo of the aggregator's own is one summand as all others.
    schedule: Literal["sequential", "parallel"] = "parallel"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.objective = objective_of(config)

    def contract(self, server_round: int, params: Mapping[str, torch.Size], role: Role = "silo") -> Contract:
        """Return a contract by which parameters and what was kept arrive, and the objective's sums leave.

        Raises
        ------
        PhotonError
            If the objective names a group otherwise than ``shared/…``.
        """
        brought = self.objective.brings(params, server_round)
        sums = self.objective.sums(params, server_round)
        for group in (*brought, *sums):
            if not group.startswith(SHARED):
                raise PhotonError(f"objective: its group {group} is to be called {SHARED}{group}")
        leaving = {group: Leaving("sum", shapes) for group, shapes in sums.items()}
        return Contract({PARAMS: params, **brought}, leaving)

    def configure_train(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> Mapping[str, StateGroups]:
        """Send everybody the parameters, and what was made of the sums of the round before.

        Raises
        ------
        PhotonError
            If that is not what the objective says that requests bring.
        """
        params, kept = checkpoint.load_params(), checkpoint.load_kept()
        shapes = {name: tensor.shape for name, tensor in params.items()}
        due = {group: dict(of) for group, of in self.objective.brings(shapes, server_round).items()}
        if due != {group: {name: t.shape for name, t in of.items()} for group, of in kept.items()}:
            raise PhotonError(
                f"objective: round {server_round} is to bring {', '.join(due) or 'nothing'}, and kept is "
                f"{', '.join(kept) or 'nothing'}, or of another shape"
            )
        groups = {PARAMS: params, **kept}
        return {participant.name: groups for participant in cohort}

    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        """Add the replies, and keep what the objective makes of the sums."""
        sums: StateGroups = {}
        seconds = 0.0
        for reply in replies:
            begin = time.perf_counter()
            _add(sums, reply.groups)
            seconds += time.perf_counter() - begin
            del reply
        params, outer = checkpoint.load_params(), checkpoint.load_outer()
        return Aggregate(
            params=params,
            averaged={},
            outer=outer,
            outer_scalars=dict(checkpoint.state.outer_scalars),
            step=outer_step({}, self.trained(params), outer),
            weights={},
            fold_seconds=seconds,
            outer_seconds=0.0,
            kept=self.objective.keep(sums, checkpoint.load_kept(), server_round),
        )


def _add(sums: StateGroups, reply: StateGroups) -> None:
    """Add a reply in place; the first is copied."""
    for group, tensors in reply.items():
        of_group = sums.setdefault(group, {})
        for name, tensor in tensors.items():
            if name in of_group:
                of_group[name] += tensor
            else:
                of_group[name] = tensor.clone()
