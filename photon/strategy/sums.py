"""Sums: what an objective without steps has counted at each silo, added up.

    S = Σ_k S_k,   in float64, in cohort order, without weights

Outer optimizer and global step stay as they are, and so do the parameters but for those that the objective
says are to change. What it makes of the sums is kept in the checkpoint and travels with the next round's
requests.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.errors import PhotonError, RunError
from photon.objective.configured import model_of, objective_of
from photon.privacy.masking import SUM_RANGE
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import LOOKED_AHEAD, Aggregate, Participant, Reply, StateGroups, Strategy
from photon.strategy.contract import PARAMS, SHARED, Contract, Leaving, Role
from photon.strategy.local import LocalState
from photon.strategy.outer import outer_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        self.needs_all = self.objective.needs_all

    def contract(self, server_round: int, params: Mapping[str, torch.Size], role: Role = "silo") -> Contract:
        """Return a contract by which parameters and what was kept arrive, and the objective's sums leave.

        Raises
        ------
        PhotonError
            If the objective names a group otherwise than ``shared/…``.
        """
        model = self._model(params)
        brought = self.objective.brings(model, server_round)
        sums = self.objective.sums(model, server_round)
        for group in (*brought, *sums):
            if not group.startswith(SHARED):
                raise PhotonError(f"objective: its group {group} is to be called {SHARED}{group}")
        ranges = self.config.privacy.ranges or {}
        leaving = {
            group: Leaving(
                "sum",
                shapes,
                masked=frozenset(shapes),
                limit=ranges.get(group.removeprefix(SHARED), SUM_RANGE),
            )
            for group, shapes in sums.items()
        }
        return Contract({PARAMS: params, **brought}, leaving, needs_all=self.needs_all)

    def telling_rounds(self) -> Sequence[int]:
        """Return all rounds: each has sums of its own, and there are few."""
        return range(1, min(self.config.rounds, LOOKED_AHEAD) + 1)

    def _model(self, params: Mapping[str, torch.Size]) -> "PreTrainedModel":
        """Return the model of some parameters, of which there are shapes alone."""
        # Names do not depend on how many tokens there are, and the embedding has a row for each.
        small = _meta(self.config.text, 1)
        embedding = small.get_input_embeddings().weight
        names = [name for name, parameter in small.named_parameters() if parameter is embedding]
        return _meta(self.config.text, params[names[0]][0])

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
        model = self._model({name: tensor.shape for name, tensor in params.items()})
        due = {group: dict(of) for group, of in self.objective.brings(model, server_round).items()}
        if self.needs_all and server_round > 1:
            self._check_all(server_round, checkpoint, cohort)
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
        params, outer, kept = checkpoint.load_params(), checkpoint.load_outer(), checkpoint.load_kept()
        model = self._model({name: tensor.shape for name, tensor in params.items()})
        concluded = self.objective.concluded(model, params, sums, kept, server_round)
        self._check_alone(concluded.silos)
        params = {**params, **concluded.changed}
        return Aggregate(
            params=params,
            averaged={},
            outer=outer,
            outer_scalars=dict(checkpoint.state.outer_scalars),
            step=outer_step({}, self.trained(params), outer),
            weights={},
            fold_seconds=seconds,
            outer_seconds=0.0,
            figures=concluded.figures,
            kept=self.objective.keep(sums, kept, server_round),
            unlearned=concluded.unlearned,
        )

    def _check_alone(self, silos: Mapping[str, int]) -> None:
        """Check that no silo is alone in what the next rounds sum under masks, unless it is to be.

        Raises
        ------
        RunError
            If one is.
        """
        privacy = self.config.privacy
        alone = [what for what, count in silos.items() if count == 1 and what not in privacy.alone]
        if privacy.secure_aggregation and alone:
            raise RunError(
                f"one silo alone has rows of the set {alone[0]}, so masks would hide nothing of their sums; "
                "nothing but counts has left so far; let another silo have some, too, or, where that silo "
                f"agrees (alone: [{alone[0]}] in its policy), go on with privacy.alone=[{','.join(alone)}]"
            )

    @staticmethod
    def _check_all(server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]) -> None:
        """Check that those are asked who have answered the round before.

        Raises
        ------
        RunError
            If not: what was summed would be a sum over others.
        """
        before = checkpoint.state.round
        then = {name for name, entry in checkpoint.state.ledger.items() if entry.last_round == before}
        now = {participant.name for participant in cohort}
        if then != now:
            told = [f"{name} answered round {before} and is away" for name in sorted(then - now)]
            told += [f"{name} was not in round {before}" for name in sorted(now - then)]
            raise RunError(
                f"round {server_round}: {'; '.join(told)}; resume the run with the silos of round {before}, "
                "or begin a new one with those that are there"
            )


@lru_cache(maxsize=4)
def _meta(config_text: str, vocab_size: int) -> "PreTrainedModel":
    return model_of(parse(config_text), vocab_size, "meta")


def _add(sums: StateGroups, reply: StateGroups) -> None:
    """Add a reply in place; the first is copied."""
    for group, tensors in reply.items():
        of_group = sums.setdefault(group, {})
        for name, tensor in tensors.items():
            if name in of_group:
                of_group[name] += tensor
            else:
                of_group[name] = tensor.clone()
