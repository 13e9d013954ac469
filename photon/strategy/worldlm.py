"""WorldLM (2405.14446): a shared backbone, key layers of each federation's own, routed layers across.

In a round every node sends its children the backbone, its key layers, and at most ``n_res`` blocks of other
federations for each key block. What comes back is folded:

    B ← OuterOptimizer(B, Σ_c w_c ΔB_c),   K[j] ← AttnAgg(K[j]; {K_c[j]}),

and the blocks least like the new K[j] travel on as routed layers, to the child that they are most like. The
same class with other arguments is FedPer, hierarchical FedAvg and local training; see ``conf/strategy``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import Field

from photon.config.schema import RunConfig
from photon.config.section import Section
from photon.config.tree import MAX_ROUTED, RoutedTag
from photon.models.partition import Partition
from photon.models.vocabulary import choose_rows, token_parameters, unpack_vocabulary
from photon.state.checkpoint import Checkpoint
from photon.strategy.attention import Attention, attend, entropy, similarities
from photon.strategy.base import Aggregate, Participant, Reply, StateGroups, Strategy, settings_of
from photon.strategy.contract import LOCAL, PARAMS, Contract, Leaving, Role
from photon.strategy.key_layers import (
    INITIAL,
    Down,
    KeyLayers,
    OwnKeyLayers,
    RoutedBlock,
    Tensors,
    pack_routed,
    routed_group,
    unpack_routed,
)
from photon.strategy.local import LocalMethod, LocalState
from photon.strategy.photon import Photon

Up = Literal["attention", "mean", "none"]
#: Prefix of the state groups that hold the children's last key layers.
_CHILD = LOCAL + "child:"


class Routed(Section):
    """Key blocks that travel to other federations."""

    n_res: int = Field(
        1, ge=0, le=MAX_ROUTED, description="Most blocks per key block on an edge and in a round; 0: none."
    )
    select: Literal["least_similar", "least_attention"] = Field(
        "least_similar", description="Which blocks travel: by similarity, or by their weight in attention."
    )


@dataclass(frozen=True)
class _Route:
    """A routed block, the child that it goes to, and how much they are alike."""

    child: str
    routed_block: RoutedBlock
    similarity: float


class WorldLM(Photon):
    """Average the backbone, aggregate key layers by attention, and pass routed layers on.

    Parameters
    ----------
    config
        The run's configuration.
    key_fraction
        Share of the transformer blocks that are key blocks, rounded up; 1: the whole model.
    key_blocks
        ``"last"``: those nearest to the output; ``"spread"``: evenly over the depth; or regular expressions
        for names of key parameters.
    embeddings
        ``"backbone"``: embeddings and final norm are shared; ``"key"``: they are key layers, too;
        ``"restricted"``: shared, and a silo trains the rows of its own vocabulary alone (DEPT). A row is
        averaged over the children that have it, and one that none has stays as it is.
    attention
        Keys of `photon.strategy.attention.Attention`.
    down
        What a node does with the key layers of the node above: ``"attention"``, ``"overwrite"`` its own,
        ``"none"``.
    up
        What a node does with its children's: ``"attention"``; ``"mean"``: it takes their plain mean in place
        of its own; ``"none"``: they do not leave the children.
    routed
        Keys of `Routed layers`.
    schedule
        A federation with text of its own trains before its children (``"sequential"``) or beside them
        (``"parallel"``).
    backbone_weights
        What a child counts by: ``"uniform"``, the ``"leaves"`` below it, or its ``"samples"`` of the round.
    local_state
        As in `Photon`.
    fold
        As in `Photon`, of the backbone; key layers are aggregated as ``up`` says.
    """

    folds_updates: ClassVar[bool] = False

    def __init__(
        self,
        config: RunConfig,
        *,
        key_fraction: float = 0.3,
        key_blocks: Literal["last", "spread"] | list[str] = "last",
        embeddings: Literal["backbone", "key", "restricted"] = "backbone",
        attention: dict[str, Any] | None = None,
        down: Down = "attention",
        up: Up = "attention",
        routed: dict[str, Any] | None = None,
        schedule: Literal["sequential", "parallel"] = "sequential",
        backbone_weights: Literal["uniform", "leaves", "samples"] = "uniform",
        local_state: LocalState = "keep",
        fold: dict[str, Any] | None = None,
    ) -> None:
        if not 0 <= key_fraction <= 1:
            raise ValueError(f"key_fraction={key_fraction}: expected 0 to 1")
        if embeddings == "restricted" and key_fraction == 1:
            raise ValueError(
                "embeddings=restricted with key_fraction=1: nothing is shared; set embeddings=key"
            )
        if local_state == "sync":
            raise ValueError("local_state=sync: key layers are a node's own; set keep or reset")
        if down not in get_args(Down):
            raise ValueError(f"down={down!r}: expected {', '.join(get_args(Down))}")
        if up not in get_args(Up):
            raise ValueError(f"up={up!r}: expected {', '.join(get_args(Up))}")
        super().__init__(config, weighting="uniform", local_state=local_state, fold=fold)
        if self.fold.is_robust and backbone_weights != "uniform":
            raise ValueError(
                f"backbone_weights={backbone_weights}: fold.rule={self.fold.rule} counts children alike; set "
                "uniform"
            )
        if self.fold.is_robust and embeddings == "restricted":
            raise ValueError(
                f"embeddings=restricted: fold.rule={self.fold.rule} compares whole replies, and children "
                "train rows of their own; set embeddings=backbone or fold.rule=mean"
            )
        if self.refreshes:
            raise ValueError("this local optimizer needs all parameters synced at once; use strategy=photon")
        self.schedule = schedule
        self.backbone_weights = backbone_weights
        self.up = up
        has_own = key_fraction > 0 or not isinstance(key_blocks, str) or embeddings == "key"
        self.sends_parts = up == "none" and has_own
        self.restricts = embeddings == "restricted"
        self.attention = settings_of(Attention, attention, "attention")
        self.upward = self.attention
        if up == "mean":
            self.upward = self.attention.model_copy(update={"tau": math.inf, "include_self_up": False})
        self.routed = settings_of(Routed, routed, "routed")
        self.layers = KeyLayers(
            config,
            key_fraction,
            key_blocks if isinstance(key_blocks, str) else tuple(key_blocks),
            embeddings,
            down,
            self.attention,
        )
        if up == "none" and down != "none":
            raise ValueError(f"down={down} with up=none: no node above has key layers; set down=none")

    # --- what travels -------------------------------------------------------------------------------

    @cached_property
    def local(self) -> LocalMethod:
        """The silo's half."""
        return OwnKeyLayers(self.config, self.local_state, self.layers)

    @property
    def folds_mean(self) -> bool:
        """Whether the plain mean of the backbone's updates is all that it needs: children count the same.

        With restricted vocabularies they do not: the mean of a row that one child alone has is that child's.
        """
        return self.backbone_weights == "uniform" and not self.restricts and not self.fold.is_robust

    def contract(self, server_round: int, params: Mapping[str, torch.Size], role: Role = "silo") -> Contract:
        """Return a contract in which key layers are looked at one by one, or stay with the children.

        A federation may send key blocks for others beside them.
        """
        whole = super().contract(server_round, params, role)
        trained = self.trained(params)
        parts = self.layers.split(trained)
        # What the federation's own silo trains is the federation's own model, and goes nowhere else.
        all_leave = self.up != "none" or role == "server_silo"
        due = trained if all_leave else {name: params[name] for name in parts.backbone}
        masked = frozenset(parts.backbone if self.folds_mean else ())
        leaving = {PARAMS: Leaving("parameters", due, masked=masked, bounded=True)}
        arriving = dict(whole.arriving)
        if self.up != "none":
            keys = {name: params[name] for name in parts.key_names}
            routed = [routed_group(slot) for slot in range(1, self.routed.n_res + 1)]
            arriving |= dict.fromkeys(routed, keys)
            if role == "federation":
                # Blocks of its children: where updates are bounded, they were before they left these.
                leaving |= {group: Leaving("as_is", keys, required=False, bounded=True) for group in routed}
        return Contract(arriving, leaving, own=frozenset(parts.key_names), tells_rows=self.restricts)

    def problem_within(self, above: Strategy) -> str | None:
        """Refuse other key layers than the federation above has."""
        assert isinstance(above, WorldLM), "of the same class"
        for name in ("key_fraction", "key_blocks", "embeddings"):
            wanted, own = getattr(above.layers, name), getattr(self.layers, name)
            if own != wanted:
                return f"strategy.{name}={own}: the federation above has {wanted}; set it alike at every node"
        return None

    def configure_train(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> Mapping[str, StateGroups]:
        """Send the backbone and the node's key layers, or with ``up="none"`` the backbone alone.

        Where children's key layers come up, the node's own go down even if nobody takes them up: an update is
        told as the difference to what was received.
        A participant that was not in the last round may be new or have lost its own, so it is sent both. The
        federation's own silo has no others than the node's.
        """
        params, state = checkpoint.load_params(), checkpoint.state
        parts = self.layers.split(params)
        everything: StateGroups = {"params": params}
        usual: StateGroups = everything
        if self.up == "none":
            usual = {"params": _only(params, parts.backbone)}
        sent_groups: dict[str, StateGroups] = {}
        routes = self._routes(checkpoint, parts)
        for participant in cohort:
            stayed = 0 < state.round == checkpoint.last_round_of(participant.name)
            stayed = stayed and participant.name != self.config.federation.server_silo
            routed, _ = pack_routed(_routed_to(participant.name, routes))
            groups = usual if stayed else everything
            sent_groups[participant.name] = {**groups, **routed} if routed else groups
        return sent_groups

    def routed_tags(self, checkpoint: Checkpoint, participant: str) -> list[RoutedTag]:
        """Return what the routed layers sent to a participant are."""
        parts = self.layers.split(checkpoint.load_params())
        return pack_routed(_routed_to(participant, self._routes(checkpoint, parts)))[1]

    # --- folding ------------------------------------------------------------------------------------

    def weight(self, reply: Reply) -> float:
        """Return what a child counts by."""
        if self.backbone_weights == "leaves":
            return float(reply.leaves)
        return float(reply.tokens) if self.backbone_weights == "samples" else 1.0

    def rows(self, reply: Reply) -> Mapping[str, torch.Tensor]:
        """Return the rows of a child's vocabulary, of every parameter that has a row for each token."""
        if not self.restricts:
            return {}
        names = token_parameters(self.config.model)
        told = unpack_vocabulary(reply.report.vocabulary or "", len(reply.groups["params"][names[0]]))
        return dict.fromkeys(names, told)

    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        """Average the backbone; then attend to the children's key layers and choose routed layers."""
        params = checkpoint.load_params()
        parts = self.layers.split(self.trained(params))
        children: dict[str, Tensors] = {}
        counts: dict[str, float] = {}
        candidates: list[RoutedBlock] = []
        trained: dict[str, torch.Tensor] = {}
        sizes: dict[str, float] = {}
        aggregate = super().aggregate_train(
            server_round,
            checkpoint,
            self._restricted(
                self._apart(replies, parts, children, counts, candidates), params, trained, sizes
            ),
        )
        for name, rows in trained.items():
            # Momentum and decay of the outer optimizer would move them.
            aggregate.params[name] = choose_rows(rows, aggregate.params[name], params[name])
        if self.up == "none":
            # They are those of the federation's own silo, if it has trained beside the others.
            aggregate.params.update(children.get(str(self.config.federation.server_silo), {}))
        if not parts.keys or self.up == "none":
            return replace(aggregate, figures={**aggregate.figures, **sizes})
        initial = self.layers.initial(checkpoint.load_kept().get(INITIAL), params)
        figures = {
            f"routed/{route.routed_block.block}/{route.routed_block.origin}>{route.child}": route.similarity
            for route in self._routes(checkpoint, parts)
            if route.child in children
        }
        chosen: list[RoutedBlock] = []
        for block, names in parts.keys.items():
            names_of_children = list(children)
            attended, weights = attend(
                params,
                [children[name] for name in names_of_children],
                names,
                initial,
                self.upward,
                include_self=self.upward.include_self_up,
                counts=[counts[name] for name in names_of_children],
            )
            who = [*(["self"] if len(weights) > len(children) else []), *names_of_children]
            figures |= {f"attention/{block}/{name}": w for name, w in zip(who, weights, strict=True)}
            figures[f"attention_entropy/{block}"] = entropy(weights)
            own = [RoutedBlock(block, name, server_round, _only(children[name], names)) for name in children]
            travelling = [routed_block for routed_block in candidates if routed_block.block == block]
            chosen += self._choose(
                attended, own, travelling, names, initial, dict(zip(who, weights, strict=True))
            )
            aggregate.params.update(attended)
        kept = {f"{_CHILD}{name}": dict(keys) for name, keys in children.items()}
        earlier = {g: t for g, t in checkpoint.load_kept().items() if g.startswith(_CHILD)}
        packed, tags = pack_routed(chosen)
        beside = {INITIAL: initial} if initial else {}
        return replace(
            aggregate,
            kept={**earlier, **kept, **packed, **beside},
            routed=tags,
            figures={**aggregate.figures, **sizes, **figures},
        )

    def _apart(
        self,
        replies: Iterator[Reply],
        parts: Partition,
        children: dict[str, Tensors],
        counts: dict[str, float],
        candidates: list[RoutedBlock],
    ) -> Iterator[Reply]:
        """Pass the backbone on, and gather key layers and routed layers."""
        for reply in replies:
            params = reply.groups["params"]
            brings = self.up != "none" or reply.participant == self.config.federation.server_silo
            if brings and parts.keys:
                # Copies: a view would keep the whole message in memory.
                children[reply.participant] = {name: params[name].clone() for name in parts.key_names}
                counts[reply.participant] = self.weight(reply)
                candidates += [
                    replace(routed_block, origin=f"{reply.participant}/{routed_block.origin}")
                    for routed_block in unpack_routed(reply.groups, reply.report.routed, parts)
                ]
            yield replace(reply, groups={"params": _only(params, parts.backbone)})
            del reply, params

    def _restricted(
        self,
        replies: Iterator[Reply],
        params: Tensors,
        trained: dict[str, torch.Tensor],
        sizes: dict[str, float],
    ) -> Iterator[Reply]:
        """Put the rows that a child does not have back to what it was sent, and note which are trained.

        The link may have rounded them, and a row that no child has is to have a pseudo-gradient of zero.
        """
        for reply in replies:
            shared = dict(reply.groups["params"])
            for name, rows in self.rows(reply).items():
                shared[name] = choose_rows(rows, shared[name], params[name])
                trained[name] = trained[name] | rows if name in trained else rows
                sizes[f"vocabulary/{reply.participant}"] = float(rows.sum())
            yield replace(reply, groups={"params": shared})
            del reply, shared

    def _choose(
        self,
        attended: Tensors,
        own: Sequence[RoutedBlock],
        travelling: Sequence[RoutedBlock],
        names: Sequence[str],
        initial: Tensors | None,
        weights: Mapping[str, float],
    ) -> list[RoutedBlock]:
        """Return the blocks that travel on: those least like the node's new one."""
        candidates = [*own, *travelling]
        if not self.routed.n_res or not candidates:
            return []
        if self.routed.select == "least_attention":
            # What came from below had no part in the attention, so it counts as least.
            order = [weights.get(routed_block.origin, 0.0) for routed_block in candidates]
        else:
            blocks = [routed_block.tensors for routed_block in candidates]
            order = similarities(attended, blocks, names, initial, self.attention)
        ranked = sorted(range(len(candidates)), key=lambda index: (order[index], candidates[index].origin))
        return [candidates[index] for index in ranked[: self.routed.n_res]]

    def _routes(self, checkpoint: Checkpoint, parts: Partition) -> list[_Route]:
        """Return which routed layers go to which child: the one that they are most like, not their own."""
        came = checkpoint.received is not None and checkpoint.received.groups is not None
        if not came and self.config.federation.parent is not None:
            return []  # Between rounds of its own a federation hears nothing from others.
        groups, tags = checkpoint.load_inbox()
        inbox = unpack_routed(groups, tags, parts)
        if not inbox or self.up == "none":
            return []
        kept = checkpoint.load_kept()
        children = {g.removeprefix(_CHILD): tensors for g, tensors in kept.items() if g.startswith(_CHILD)}
        routes: list[_Route] = []
        for routed_block in inbox:
            others = sorted(name for name in children if name != routed_block.origin.partition("/")[0])
            if not others:
                continue
            alike = similarities(
                routed_block.tensors,
                [children[name] for name in others],
                parts.keys[routed_block.block],
                kept.get(INITIAL),
                self.attention,
            )
            closest = alike.index(max(alike))
            route = _Route(others[closest], routed_block, alike[closest])
            # More may have come than are passed on: the node above, or an earlier round, had another n_res.
            if sum(_is_beside(route, other) for other in routes) < self.routed.n_res:
                routes.append(route)
        return routes


def _is_beside(route: _Route, other: _Route) -> bool:
    return (route.child, route.routed_block.block) == (other.child, other.routed_block.block)


def _routed_to(child: str, routes: Sequence[_Route]) -> list[RoutedBlock]:
    return [route.routed_block for route in routes if route.child == child]


def _only(tensors: Tensors, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in names}
