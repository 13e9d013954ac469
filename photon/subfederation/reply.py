"""What leaves a federation for the one above: state groups as they travel, and a report of its rounds."""

import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from photon.config.schema import RunConfig
from photon.config.tree import ResidualTag, TreeNode
from photon.errors import PhotonError
from photon.link.messages import Release, TrainOrder, TrainReport
from photon.link.update import encode_reply
from photon.privacy.gaussian import release
from photon.state.checkpoint import Checkpoint
from photon.state.tensors import StateGroups, load_groups, save_groups
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS, Contract
from photon.subfederation.config import border_privacy
from photon.subfederation.spans import Span, Spans
from photon.telemetry.events import ClientFinished, RoundFinished
from photon.telemetry.log import current_history, read_events

Tensors = Mapping[str, torch.Tensor]


class Replies:
    """Makes the replies of a federation to the orders that it has followed.

    Parameters
    ----------
    node
        What it decides for itself, and its children.
    above
        The configuration of the federation above.
    config
        Its own, with its run folder.
    spans
        Its own rounds for each order.
    unseen
        Whether nothing names its members above.
    """

    def __init__(
        self, node: TreeNode, above: RunConfig, config: RunConfig, spans: Spans, *, unseen: bool
    ) -> None:
        self._node = node
        self._above = above
        self._config = config
        self._spans = spans
        self._unseen = unseen
        self._run_dir = Path(str(config.run_dir))

    def reply(
        self,
        order: TrainOrder,
        contract: Contract,
        span: Span,
        after: Checkpoint,
        received: Tensors,
        *,
        lost: bool,
        begin: float,
    ) -> tuple[Any, TrainReport]:
        """Return the state groups of a reply, encoded as they travel, and the report.

        Parameters
        ----------
        order, contract
            What was asked for, and what may leave.
        span
            The own rounds of it.
        after
            What they have ended with.
        received
            Parameters that came with the order.
        lost
            Whether what the order goes on from was lost.
        begin
            When work on it began, by `time.perf_counter`.
        """
        groups, let_out = self._released(_due(after, contract), received, order)
        shared = {name: t for name, t in groups[PARAMS].items() if name not in contract.own}
        trained = time.perf_counter()
        report = self._report(order, span, after, shared, received, lost, trained - begin)
        return self._encoded(groups, received, order), report.model_copy(update={"release": let_out})

    def _released(
        self, reply: StateGroups, received: Tensors, order: TrainOrder
    ) -> tuple[StateGroups, Release | None]:
        """Clip and noise what crosses the border, if the node says so; once for each order.

        Blocks of its members do not cross such a border: nothing bounds what they tell.
        """
        if self._node.privacy is None:
            return reply, None
        privacy = border_privacy(self._above, self._node)
        assert privacy.clip_norm is not None, "the configuration refuses it"
        if privacy.noise_multiplier > 0 and strategy_of(self._config).local.restricts_rows:
            raise PhotonError("privacy.noise_multiplier: no noise hides the vocabulary; see docs/worldlm.md")
        file = self._spans.release_file(order.round)
        if not file.exists():
            generator = None
            if privacy.seed is not None:
                generator = torch.Generator().manual_seed(
                    random.Random(f"{privacy.seed}/{order.round}/{order.silo}").getrandbits(63)
                )
            released, _ = release(received, reply["params"], privacy, generator)
            save_groups(file, {"params": released})
        counted = Release(
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            releases=self._spans.orders,
        )
        return {"params": load_groups(file).get("params", {})}, counted

    def _report(
        self,
        order: TrainOrder,
        span: Span,
        after: Checkpoint,
        shared: Tensors,
        received: Tensors,
        lost: bool,
        seconds: float,
    ) -> TrainReport:
        rounds, clients = self._told(span)
        tokens = sum(client.tokens for client in clients)
        squares = (
            float(torch.linalg.vector_norm(tensor - received[name])) ** 2 for name, tensor in shared.items()
        )
        training = max(1e-6, sum(event.seconds["training"] for event in rounds))
        return TrainReport(
            round=order.round,
            silo=order.silo,
            steps=sum(
                max(client.steps for client in clients if client.round == event.round) for event in rounds
            ),
            tokens=tokens,
            position=span.ends,
            loss=sum(client.loss * client.tokens for client in clients) / tokens,
            loss_last=sum(client.loss_last * client.tokens for client in clients) / tokens,
            learning_rate=clients[-1].learning_rate,
            gradient_norm=sum(client.gradient_norm for client in clients) / len(clients),
            update_norm=math.sqrt(sum(squares)),
            seconds={
                "load": max(0.0, seconds - training),
                "training": training,
                "save": 0.0,
                "total": max(1e-6, seconds),
            },
            state_lost=lost,
            leaves=len({client.silo for client in clients}) if self._unseen else len(self._node.silos()),
            residuals=[] if self._node.privacy else self._tags(after),
            vocabulary=after.state.vocabulary,
        )

    def _told(self, span: Span) -> tuple[list[RoundFinished], list[ClientFinished]]:
        """Return what the own rounds and the members in them have told."""
        history = current_history(read_events(self._run_dir / "events.jsonl"))
        rounds = [
            event
            for event in history
            if isinstance(event, RoundFinished) and span.begins < event.round <= span.ends
        ]
        clients = [
            event
            for event in history
            if isinstance(event, ClientFinished) and span.begins < event.round <= span.ends
        ]
        return rounds, clients

    def _tags(self, after: Checkpoint) -> list[ResidualTag]:
        """Return what the residuals are; members that are not seen above stay unnamed."""
        if not self._unseen:
            return after.state.residuals
        return [tag.model_copy(update={"origin": "member"}) for tag in after.state.residuals]

    def _encoded(self, groups: StateGroups, received: Tensors, order: TrainOrder) -> Any:
        """Encode a reply as it travels, and keep what the codecs have left over."""
        last = self._memory_file(order.last_round)
        memory = load_groups(last) if order.last_round and last.exists() else {}
        seed = f"{self._above.seed}/{order.round}/{order.silo}"
        packed, memory = encode_reply(groups, received, self._above.link, memory, seed=seed)
        if memory:
            save_groups(self._memory_file(order.round), memory)
        return packed

    def _memory_file(self, server_round: int) -> Path:
        return self._run_dir / f"link-{server_round:06d}.safetensors"


def _due(after: Checkpoint, contract: Contract) -> StateGroups:
    """Return what the contract asks for: parameters, and key blocks for other federations."""
    params = after.load_params()
    due = contract.leaving[PARAMS].shapes
    groups: StateGroups = {PARAMS: {name: tensor for name, tensor in params.items() if name in due}}
    kept = after.load_kept()
    return groups | {group: kept[group] for group in sorted(set(kept) & set(contract.optional))}
