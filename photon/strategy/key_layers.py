"""Key layers: the part of the model that is a node's own, and what a node does with those that it receives.

The same rule holds for a silo and for a federation that takes part in a larger one: the backbone is taken as
it comes, and the own key layers look at those of the node above and at routed layers of other federations.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from photon.config.schema import RunConfig
from photon.config.tree import RoutedTag
from photon.data.silo_data import SiloData
from photon.models.partition import Partition, partition
from photon.models.vocabulary import choose_rows, token_parameters
from photon.objective.configured import kept_of
from photon.strategy.attention import Attention, attend, entropy
from photon.strategy.contract import LOCAL, PARAMS, SHARED
from photon.strategy.local import (
    Finish,
    Groups,
    Kept,
    LocalMethod,
    LocalState,
    LostStateError,
    Request,
    Start,
)
from photon.training.devices import GroupResult
from photon.training.groups import StateGroups

Tensors = Mapping[str, torch.Tensor]
#: State group of the key layers that a node began with: what changes are measured against.
INITIAL = LOCAL + "initial"
#: State group of the key layers that a node has kept.
PERSONAL = LOCAL + "personal"

Down = Literal["attention", "overwrite", "none"]


@dataclass(frozen=True)
class RoutedBlock:
    """A key block of another federation.

    Attributes
    ----------
    block
        Which key block it is.
    origin
        Whose it is: names of nodes from the one that looks at it downwards, with slashes between.
    round
        Round of the origin's federation in which it was trained.
    tensors
        The block's parameters.
    """

    block: str
    origin: str
    round: int
    tensors: Tensors


@dataclass(frozen=True)
class KeyLayers:
    """Which layers are a node's own, and how it takes up what it receives.

    Attributes
    ----------
    config
        The run's configuration.
    key_fraction, key_blocks, embeddings
        As in `photon.models.partition.partition`.
    down
        ``"attention"``: own key layers attend to the received ones; ``"overwrite"``: they are replaced;
        ``"none"``: they stay.
    attention
        How they attend.
    """

    config: RunConfig
    key_fraction: float
    key_blocks: str | tuple[str, ...]
    embeddings: str
    down: Down
    attention: Attention

    def split(self, params: Collection[str]) -> Partition:
        """Divide the model's tensors of these names; what no step moves is of the backbone."""
        kept = kept_of(self.config) & set(params)
        parts = partition(
            set(params) - kept,
            key_fraction=self.key_fraction,
            key_blocks=self.key_blocks,
            embeddings=self.embeddings,
        )
        return replace(parts, backbone=tuple(sorted({*parts.backbone, *kept})))

    def initial(self, kept: Tensors | None, first: Tensors) -> dict[str, torch.Tensor] | None:
        """Return what changes are measured against; None: this similarity looks at no changes.

        That is what the node began with. For one that was there from the start these are the model's initial
        values; one that joined later, or has lost its own, measures from then on.

        Parameters
        ----------
        kept
            What the node has kept of them.
        first
            Parameters that it begins with, if it has kept nothing.
        """
        if self.attention.score not in ("delta_cosine", "projection"):
            return None
        names = self.split(first).key_names
        return dict(kept) if kept else {name: first[name] for name in names}

    def pull(
        self, own: Tensors, received: Tensors, routed: Sequence[RoutedBlock], initial: Tensors | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Return a node's parameters to go on from: K[j] ← AttnAgg(K[j]; {K_in[j]} ∪ {routed layers of j}).

        Parameters
        ----------
        own
            The node's key layers.
        received
            Backbone, and the key layers of the node above if they came.
        routed
            Key blocks of other federations.
        initial
            What changes are measured against.

        Returns
        -------
        tuple
            Parameters by name, and figures of the attention by name.
        """
        parts = self.split({*received, *own})
        params = {name: received[name] for name in parts.backbone}
        weights: list[list[float]] = []
        for block, names in parts.keys.items():
            came = names[0] in received
            if self.down == "none" or (not came and self.down == "overwrite"):
                params |= {name: own[name] for name in names}
                continue
            if self.down == "overwrite":
                params |= {name: received[name] for name in names}
                continue
            others = [received] if came else []
            others += [routed_block.tensors for routed_block in routed if routed_block.block == block]
            attended, shares = attend(
                own, others, names, initial, self.attention, include_self=self.attention.include_self_down
            )
            params |= attended
            weights.append(shares)
        if not weights:
            return params, {}
        return params, {
            "attention_self": sum(shares[0] for shares in weights) / len(weights),
            "attention_entropy": sum(entropy(shares) for shares in weights) / len(weights),
        }


class OwnKeyLayers(LocalMethod):
    """The silo's half: key layers of its own, and with restricted vocabularies rows of its own vocabulary.

    Parameters
    ----------
    config, local_state
        As in `LocalMethod`.
    layers
        Which layers are its own, and how it takes up what it receives.
    """

    def __init__(self, config: RunConfig, local_state: LocalState, layers: KeyLayers) -> None:
        super().__init__(config, local_state)
        self.layers = layers
        self.restricts_rows = layers.embeddings == "restricted"

    def start(self, received: Groups, kept: Kept | None, request: Request, data: SiloData) -> Start:
        """Take the backbone as it comes, and let the own key layers look at what came with it."""
        came = received[PARAMS]
        own = kept.local.get(PERSONAL) if kept and request.role != "server_silo" else None
        if own is None and len(came) < len(request.contract.arriving[PARAMS]):
            raise LostStateError(
                f"{request.silo} has lost its key layers; its next request after this failure brings others"
            )
        if own is None:
            own = {name: came[name] for name in self.layers.split(came).key_names}
        whole = {**came, **own}
        initial = self.layers.initial(kept.local.get(INITIAL) if kept else None, whole)
        routed = unpack_routed(received, request.tags, self.layers.split(whole))
        params, figures = self.layers.pull(own, came, routed, initial)
        return replace(
            self.joined(received, kept, request, params, came),
            stays={INITIAL: dict(initial)} if initial else {},
            rows=self._vocabulary(params, data) if self.restricts_rows else None,
            figures=figures,
        )

    def _vocabulary(self, params: Tensors, data: SiloData) -> torch.Tensor:
        return data.vocabulary_rows(len(params[token_parameters(self.config.model)[0]]))

    def finish(self, start: Start, trained: GroupResult, request: Request) -> Finish:
        """Put rows outside the vocabulary back, and keep the key layers whatever the local optimizer does."""
        if start.rows is not None:
            trained = replace(trained, params=trained.params | self._put_back(start, trained.params))
        finish = super().finish(start, trained, request)
        own = {name: trained.params[name] for name in self.layers.split(trained.params).key_names}
        return replace(finish, stays={**finish.stays, PERSONAL: own})

    def _put_back(self, start: Start, trained: Tensors) -> dict[str, torch.Tensor]:
        """Return the parameters of tokens: no gradient has reached absent rows, but weight decay has."""
        assert start.rows is not None, "asked by those that restrict rows"
        rows = {}
        for name in token_parameters(self.config.model):
            device = trained[name].device
            rows[name] = choose_rows(start.rows.to(device), trained[name], start.params[name].to(device))
        return rows

    def own_model(self, received: Tensors, local: Groups) -> Tensors | None:
        """Return the received backbone with the silo's key layers."""
        if PERSONAL not in local and not self.restricts_rows:
            return None
        return {**received, **local.get(PERSONAL, {})}

    def begins_with(self, params: Tensors) -> StateGroups:
        """Return what a federation's changes are measured against, if they are."""
        initial = self.layers.initial(None, params)
        return {} if initial is None else {INITIAL: initial}

    def adopt(
        self, own: Tensors, kept: Groups, received: Groups, tags: Sequence[RoutedTag]
    ) -> tuple[Tensors, Mapping[str, float]]:
        """Take the backbone from above, and let the federation's key layers look at what came with it."""
        parts = self.layers.split(own)
        return self.layers.pull(
            {name: own[name] for name in parts.key_names},
            received[PARAMS],
            unpack_routed(received, tags, parts),
            kept.get(INITIAL),
        )


def pack_routed(routed: Sequence[RoutedBlock]) -> tuple[StateGroups, list[RoutedTag]]:
    """Put routed layers into state groups: the n-th of each block into the group ``shared/routed-n``."""
    groups: StateGroups = {}
    tags: list[RoutedTag] = []
    count: dict[str, int] = {}
    for routed_block in routed:
        slot = count[routed_block.block] = count.get(routed_block.block, 0) + 1
        groups.setdefault(routed_group(slot), {}).update(routed_block.tensors)
        tags.append(
            RoutedTag(
                slot=slot, block=routed_block.block, origin=routed_block.origin, round=routed_block.round
            )
        )
    return groups, tags


def unpack_routed(
    groups: Mapping[str, Tensors], tags: Sequence[RoutedTag], parts: Partition
) -> list[RoutedBlock]:
    """Read what `pack_routed` has put; a tag without its tensors is left out."""
    routed = []
    for tag in tags:
        tensors = groups.get(routed_group(tag.slot), {})
        names = parts.keys.get(tag.block, ())
        if names and all(name in tensors for name in names):
            own = {name: tensors[name] for name in names}
            routed.append(RoutedBlock(tag.block, tag.origin, tag.round, own))
    return routed


def routed_group(slot: int) -> str:
    """Return the name of the state group of a slot, counted from 1."""
    return f"{SHARED}routed-{slot}"
