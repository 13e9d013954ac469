"""Streaming DiLoCo: the parameters are synced in fragments, one of them in every round.

Each of P fragments is averaged in every P-th round, and stepped by an outer optimizer of its own; meanwhile
its values stay in the silos. So a round sends a P-th of the model, and so does the busiest one.
Nothing overlaps with local steps (the paper's τ = 0): the next round begins when the fragment is back.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Participant, StateGroups, Strategy, strategy_before
from photon.strategy.contract import LOCAL, PARAMS, Contract, Role
from photon.strategy.local import (
    BEGAN_WITH,
    Finish,
    Groups,
    Kept,
    LocalMethod,
    LocalState,
    LostStateError,
    Request,
    Start,
)
from photon.strategy.outer import OuterOptimizer, Tensors, outer_step
from photon.strategy.photon import OuterResult, Photon
from photon.training.devices import GroupResult

#: A silo's own values of all parameters.
OWN_PARAMS = LOCAL + "params"

Pattern = Literal["strided", "sequential"]


class StreamingDiLoCo(Photon):
    """Sync one fragment of the parameters a round, as Streaming DiLoCo does.

    In round r fragment p = (r − 1) mod P is due. With its last global value θ_p and the silos' values θ_k,p

        Δ_p = θ_p − Σ_k w_k θ_k,p,   θ_p ← OuterOptimizer_p(θ_p, Δ_p),   θ_k,p ← α θ_p + (1 − α) θ_k,p

    and the other fragments of a silo go on from where they are. A participant that was not in the last
    round starts from the whole global model. The last round syncs all fragments.

    Parameters
    ----------
    config
        The run's configuration.
    fragments
        P. With 1 it is DiLoCo.
    mixing
        α, the share of the global fragment in what a silo goes on from (the paper's 1 − α).
    pattern
        Which numbered blocks are in a fragment: ``"strided"``: every P-th; ``"sequential"``: neighbours.
    weighting, fold
        As in `Photon`.
    """

    silos_only = "which keeps no fragments of its own between rounds"
    no_server_silo = (
        "silos are sent the fragments of the last round, and not what another silo has trained since; use "
        "strategy=diloco"
    )

    def __init__(
        self,
        config: RunConfig,
        *,
        fragments: int = 4,
        mixing: float = 1.0,
        pattern: Pattern = "strided",
        weighting: Literal["tokens", "uniform"] = "uniform",
        fold: dict[str, Any] | None = None,
    ) -> None:
        if pattern not in get_args(Pattern):
            raise ValueError(f"pattern={pattern!r}: expected {', '.join(get_args(Pattern))}")
        if fragments < 1:
            raise ValueError(f"fragments={fragments}: expected at least 1")
        if not 0 < mixing <= 1:
            raise ValueError(f"mixing={mixing}: expected above 0 and at most 1")
        if fragments == 1 and mixing != 1:
            raise ValueError(f"mixing={mixing}: a silo that receives all parameters starts from them; set 1")
        super().__init__(config, weighting=weighting, fold=fold)
        if self.refreshes:
            raise ValueError("this local optimizer needs all parameters synced at once; use strategy=photon")
        self.fragments = fragments
        self.sends_parts = fragments > 1
        self.mixing = mixing
        self.pattern = pattern

    @cached_property
    def local(self) -> LocalMethod:
        """The silo's half."""
        return KeptFragments(self.config, self.local_state, self.mixing)

    def contract(self, server_round: int, params: Mapping[str, torch.Size], role: Role = "silo") -> Contract:
        """Return a contract in which the parameters of the fragments that are due leave."""
        whole = super().contract(server_round, params, role)
        due = {name: params[name] for name in self.synced_params(server_round, self.trained(params))}
        leaving = whole.leaving[PARAMS]
        fragments = replace(leaving, shapes=due, masked=leaving.masked & set(due))
        return replace(whole, leaving={PARAMS: fragments})

    def synced_params(self, server_round: int, params: Mapping[str, torch.Size]) -> list[str]:
        """Return the parameters of the fragments that are due."""
        fragments = self._split(params)
        return sorted(name for number in self._due(server_round) for name in fragments[number])

    def configure_train(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> Mapping[str, StateGroups]:
        """Send what the last round synced to those who were in it, and everything to the others."""
        params, state = checkpoint.load_params(), checkpoint.state
        everything: StateGroups = {"params": params}
        # The round's fragments may have been others, or all as in a last one: a run may have been changed.
        before = strategy_before(checkpoint)
        split = before if isinstance(before, StreamingDiLoCo) else self
        synced: StateGroups = {
            "params": {name: params[name] for name in split.synced_params(state.round, self._shapes(params))}
        }

        def was_there(participant: Participant) -> bool:
            return 0 < state.round == checkpoint.last_round_of(participant.name)

        return {one.name: synced if was_there(one) else everything for one in cohort}

    def problem_after(self, before: Strategy, checkpoint: Checkpoint) -> str | None:
        """Refuse other fragments where the outer optimizer counts the steps of each."""
        assert isinstance(before, StreamingDiLoCo), "of the same class"
        split = (before.fragments, before.pattern)
        if not checkpoint.state.outer_scalars or split == (self.fragments, self.pattern):
            return None
        return f"strategy: the outer optimizer has counted the steps of {split[0]} {split[1]} fragments"

    def step_outer(self, server_round: int, checkpoint: Checkpoint, mean: Tensors) -> OuterResult:
        """Step the outer optimizer of each fragment that is due."""
        outer = OuterOptimizer(self.config.outer.as_mapping(), self.config.link.uplink_payload)
        params, state = checkpoint.load_params(), checkpoint.load_outer()
        scalars = dict(checkpoint.state.outer_scalars)
        fragments = self._split(self._shapes(params))
        gradient_norms: dict[str, float] = {}
        for number in self._due(server_round):
            names, prefix = fragments[number], f"fragment-{number}/"
            own = {name: params[name] for name in names}
            step, own_state, own_scalars = outer.step(
                own,
                {name: mean.pop(name) for name in names},
                _part_of(state, names),
                {key.removeprefix(prefix): value for key, value in scalars.items() if key.startswith(prefix)},
            )
            params |= own
            gradient_norms |= step.pseudo_gradient_norms
            for group, tensors in own_state.items():
                state.setdefault(group, {}).update(tensors)
            scalars |= {prefix + key: value for key, value in own_scalars.items()}
        return params, outer_step(gradient_norms, self.trained(params), state), state, scalars

    def _shapes(self, params: Tensors) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.trained(params).items()}

    def _due(self, server_round: int) -> list[int]:
        if server_round == self.config.rounds:
            return list(range(self.fragments))
        return [(server_round - 1) % self.fragments]

    def _split(self, params: Mapping[str, torch.Size]) -> list[list[str]]:
        return split_parameters(params, self.fragments, self.pattern)


class KeptFragments(LocalMethod):
    """The silo's half: fragments that do not come go on from where they are.

    Parameters
    ----------
    config, local_state
        As in `LocalMethod`.
    mixing
        α, the share of what comes in what the silo goes on from.
    """

    def __init__(self, config: RunConfig, local_state: LocalState, mixing: float) -> None:
        super().__init__(config, local_state)
        self.mixing = mixing

    def start(self, received: Groups, kept: Kept | None, request: Request, data: SiloData) -> Start:
        """Mix the fragments that came into the silo's own; all parameters at once take their place."""
        came = received[PARAMS]
        if len(came) == len(request.contract.arriving[PARAMS]):
            return self.joined(received, kept, request, came, came)
        if kept is None:
            raise LostStateError(
                f"{request.silo} has lost the parameters that it kept; its next request after this failure "
                "brings all"
            )
        own = kept.local[OWN_PARAMS]
        merged = {name: torch.lerp(own[name], tensor, self.mixing) for name, tensor in came.items()}
        known = {**kept.local[BEGAN_WITH], **came}
        return self.joined(received, kept, request, {**own, **merged}, known)

    def finish(self, start: Start, trained: GroupResult, request: Request) -> Finish:
        """Keep all parameters, and the last global value of each."""
        finish = super().finish(start, trained, request)
        beside = {OWN_PARAMS: dict(trained.params), BEGAN_WITH: dict(start.reference)}
        return replace(finish, stays={**finish.stays, **beside})


def split_parameters(params: Mapping[str, torch.Size], fragments: int, pattern: Pattern) -> list[list[str]]:
    """Split parameters into fragments: whole numbered blocks, and the rest where there is least.

    Parameters
    ----------
    params
        Name and shape of every parameter; ``h.3.mlp.weight`` is of block 3.
    fragments
        How many.
    pattern
        ``"strided"``: block b is in fragment b mod P; ``"sequential"``: neighbours are together.

    Returns
    -------
    list[list[str]]
        The names of each fragment, sorted. A function of names and shapes alone.

    Raises
    ------
    PhotonError
        If a fragment would be empty.
    """
    too_many = PhotonError(
        f"strategy.fragments={fragments}: the model has too few blocks and embeddings; lower it"
    )
    if fragments > len(params):
        raise too_many  # before there is a list of so many
    blocks = {name: int(found[1]) for name in params if (found := re.search(r"\.(\d+)\.", name))}
    count = max(blocks.values(), default=-1) + 1
    parts: list[list[str]] = [[] for _ in range(fragments)]
    sizes = [0] * fragments

    def put(name: str, fragment: int) -> None:
        parts[fragment].append(name)
        sizes[fragment] += params[name].numel()

    for name, block in blocks.items():
        put(name, block % fragments if pattern == "strided" else block * fragments // count)
    rest = (name for name in params if name not in blocks)
    for name in sorted(rest, key=lambda one: (-params[one].numel(), one)):
        put(name, sizes.index(min(sizes)))
    if not all(parts):
        raise too_many
    return [sorted(part) for part in parts]


def _part_of(state: Mapping[str, Tensors], names: Sequence[str]) -> dict[str, Tensors]:
    """Return what the outer optimizer holds for some parameters; before their first step there is nothing."""
    parts = {group: {name: t[name] for name in names if name in t} for group, t in state.items()}
    return {group: tensors for group, tensors in parts.items() if tensors}
